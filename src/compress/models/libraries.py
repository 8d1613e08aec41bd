"""Turn the errors of libraries that read a user's files into ours.

transformers, tokenizers and gguf take a file's word for most of what it says: a value of another kind comes out of them
as any error at all, of tokenizers as a bare Exception. Where they are called, and nowhere else, all of that becomes one
sentence that names the file.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from compress.errors import CheckpointError, CompressError

LONGEST = 300  # characters of a library's message: some repeat the value that they do not like


@contextmanager
def reading(what: str, remedy: str = "", *, kind: type[CompressError] = CheckpointError) -> Iterator[None]:
    """
    what: the beginning of the sentence, such as "The tokenizer of FOLDER cannot be read".
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        raise kind(f"{what}: {one_line(error)}" + (f". {remedy}" if remedy else "")) from error


def one_line(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}..."
