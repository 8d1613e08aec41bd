"""What readers of GGUF make of a file. llama.cpp computes all that is in it; transformers leaves some of it out."""

from pathlib import Path

from compress.checkpoints.gguf.llama import Model


def reader_notes(folder: Path) -> list[str]:
    """What to know of the readers of a folder's GGUF file, a sentence each; nothing if all read it alike.

    folder: the finished checkpoint. Its biases are read: those that are all zero are not in the file.
    Raises as `write_gguf` does of the folder's model.
    """
    model = Model(folder)
    notes = [
        f"transformers' reader of GGUF leaves out the {left_out}; llama.cpp reads {pronoun}."
        for left_out, pronoun in dropped_by_transformers(model).items()
    ]
    if has_wide_query_biases(model):
        notes.append(
            "llama.cpp from before April 2026 does not load the file, because its query biases have another width than "
            "the model."
        )
    return notes


def dropped_by_transformers(model: Model) -> dict[str, str]:
    """By what it is called, its pronoun."""
    dropped = {"biases": "them"} if model.biased else {}
    if model.rope["rope_type"] != "default":
        dropped[f"rotary scaling {model.rope['rope_type']!r}"] = "it"
    return dropped


def has_wide_query_biases(model: Model) -> bool:
    """llama.cpp took the hidden size for their width until its pull request 21245 (create_tensor_qkv)."""
    queries = (entry for entry in model.entries if entry.name.endswith(".attn_q.bias"))
    return any(entry.shape[0] != model.config.hidden_size for entry in queries)
