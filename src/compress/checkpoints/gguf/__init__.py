"""A finished checkpoint of a llama-shaped model as one GGUF file, and the proof that it reads back.

GGUF is what llama.cpp and the programs built on it load. Its architecture `llama` covers Llama, and Mistral without a
sliding window, sliced or not: widths, head size and head counts are stated one by one. What the file could not say is
refused before anything is written, or earlier, before the model is compressed (`check_exportable`). The weights pass
through memory one tensor at a time.

llama.cpp computes biases and scaled rotary embeddings of this architecture, so both are written; transformers' reader
drops them without a word. `reader_notes` is that word, and the proof hands transformers the folder's config.

The package `gguf` (the extra of that name) knows the format; what is in the file follows the specification of GGUF
(ggml, docs/gguf.md).

    llama.py          the model as entries of the file
    kinds.py          the tokenizers a file can say
    vocabulary.py     the tokenizer as lists of the file
    container.py      the file
    writing.py        a folder as a file
    readers.py        what readers make of it
    verification.py   the proof, with reload.py in a clean process
"""

from compress.checkpoints.gguf.readers import reader_notes
from compress.checkpoints.gguf.verification import verify_gguf
from compress.checkpoints.gguf.writing import check_exportable, write_gguf

__all__ = ["check_exportable", "reader_notes", "verify_gguf", "write_gguf"]
