"""Bring finished branches into the form in which they are written."""

from dataclasses import dataclass

from compress.models.branch import Branch
from compress.models.factors import WrittenForm
from compress.models.tensor_files import file_name

ADAPTER_PREFIX = "base_model.model."  # what PEFT calls the model that an adapter is for
LORA = (".lora_A", ".lora_B")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Write branches as the walk leaves them: the form of the dense model and of our own architecture.

    model_type: of the stock model that is written, whose files have other names for experts' linears; "" for ours.
    ties_head: whether the head stays the embeddings' table.
    """

    model_type: str = ""
    ties_head: bool = False

    def directions(self, width: int) -> int:
        """How many directions of the stream a hidden size of `width` has room for."""
        return width

    def form(self, branch: Branch, name: str) -> WrittenForm:
        """The form that a reader or writer gets when its branch is finished."""
        return WrittenForm()

    def settle(self, branch: Branch) -> None:
        """Bring a finished branch into the written form, in place."""

    def file_name(self, name: str) -> str:
        """The name in the checkpoint's files of a tensor of the model."""
        return file_name(name, self.model_type) if self.model_type else name

    def in_adapter(self, name: str) -> str | None:
        """The name in the checkpoint's LoRA adapter; None for a tensor of the checkpoint itself."""
        return f"{ADAPTER_PREFIX}{name}.weight" if name.endswith(LORA) else None
