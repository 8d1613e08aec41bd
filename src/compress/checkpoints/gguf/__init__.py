"""A finished checkpoint of a llama-shaped model as one GGUF file, which llama.cpp and the programs built on it load.

GGUF's architecture `llama` covers Llama, and Mistral without a sliding window, sliced or not: widths, head size and
head counts are stated one by one. What the file could not say is refused before anything is written, or before the
model is compressed (`check_exportable`). The weights pass through memory one tensor at a time.

The package `gguf` (the extra of that name) knows the format, the names of tensors and the special tokens; the rest
follows the specification of GGUF (ggml, docs/gguf.md) and llama.cpp's own converter.

    llama.py       the tensors
    tokenizer.py   the tokenizer
    container.py   the file, by gguf's writer
    writing.py     from a folder to a file, and what its readers leave out

That the file reads back as its folder is proved by checkpoints/verify.py.
"""

from compress.checkpoints.gguf.writing import check_exportable, reader_notes, write_gguf
from compress.checkpoints.verify import verify_gguf

__all__ = ["check_exportable", "reader_notes", "verify_gguf", "write_gguf"]
