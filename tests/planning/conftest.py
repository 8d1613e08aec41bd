from pathlib import Path

import pytest
import torch

import tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write_model(folder / "llama", "llama", dtype=torch.float32, **tiny.IN_BLOCKS)
    tiny.write_text(folder / "text.txt")
    return folder
