"""`stdlib`: the source text of the running Python's own standard library, read from disk.

It needs no network, so every command runs on a fresh machine. One row is one file. A file belongs to a split for
good, by the hash of its path: 1/16 of the files are `test`, 1/16 `validation`, the rest `train`. Tests and generated
tables are left out (some distributions do not install them, and a model learns nothing from a code page).

The text follows the Python version: perplexities on it compare only within one version.
"""

import hashlib
import sysconfig
from pathlib import Path

from compress.errors import Unavailable

SPLITS = ("train", "validation", "test")
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"})


def load(split: str, data_dir: Path | None = None) -> list[str]:
    """The files of one split, in the order of their paths."""
    rows, root = [], library_root()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.isdisjoint(relative.parts) and split_of(relative.as_posix()) == split:
            rows.append(path.read_text(encoding="utf-8", errors="replace"))
    if not rows:
        raise Unavailable(f"The standard library has no source files under {root}. Name a text file instead.")
    return rows


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(relative_path: str) -> str:
    sixteenth = hashlib.sha256(relative_path.encode()).digest()[0] % 16
    return {0: "test", 1: "validation"}.get(sixteenth, "train")
