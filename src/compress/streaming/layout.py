"""The form in which finished branches are written: our own architecture's, or a stock one's."""

from typing import Protocol, runtime_checkable

from compress.models.branch import Branch
from compress.models.written import WrittenForm


@runtime_checkable
class Layout(Protocol):
    @property
    def ties_head(self) -> bool:
        """Whether the head stays the embeddings' table."""

    def directions(self, width: int) -> int:
        """How many directions of the stream a hidden size of `width` has room for."""

    def form(self, branch: Branch, name: str) -> WrittenForm:
        """What a reader or writer is brought into when its branch settles."""

    def settle(self, branch: Branch) -> None:
        """Bring a branch that nothing is done to any more into the written form, in place."""

    def written(self, name: str) -> str:
        """The name in the checkpoint of what has this name in the walk."""

    def file_name(self, name: str) -> str:
        """What the checkpoint's files call the tensor that has this name in the model it describes."""

    def in_adapter(self, name: str) -> str | None:
        """The name in the adapter beside the checkpoint; None for what is in the checkpoint itself."""
