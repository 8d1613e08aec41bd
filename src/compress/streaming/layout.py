"""The form in which finished branches are written."""

from dataclasses import dataclass

from compress.models.branch import Branch
from compress.models.expert_names import file_name
from compress.models.written import WrittenForm

ADAPTER_PREFIX = "base_model.model."  # what PEFT calls the model that an adapter is for
LORA = (".lora_A", ".lora_B")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Branches as they come out of the walk, which is the form of the dense model and of our own architecture.

    model_type: of the stock model that is written, whose files have other names for experts' linears; "" for ours.
    ties_head: whether the head stays the embeddings' table.
    """

    model_type: str = ""
    ties_head: bool = False

    def directions(self, width: int) -> int:
        """How many directions of the stream a hidden size of `width` has room for."""
        return width

    def form(self, branch: Branch, name: str) -> WrittenForm:
        """What a reader or writer is brought into when its branch settles."""
        return WrittenForm()

    def settle(self, branch: Branch) -> None:
        """Bring a branch that nothing is done to any more into the written form, in place."""

    def file_name(self, name: str) -> str:
        """What the checkpoint's files call the tensor that has this name in the model it describes."""
        return file_name(name, self.model_type) if self.model_type else name

    def in_adapter(self, name: str) -> str | None:
        """The name in the adapter beside the checkpoint; None for what is in the checkpoint itself."""
        return f"{ADAPTER_PREFIX}{name}.weight" if name.endswith(LORA) else None
