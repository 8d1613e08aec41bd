"""`compress auto --target-latency`: the largest file that decodes fast enough, in llama.cpp."""

import json
from typing import ClassVar

import pytest
import torch

import tiny
from cli_runner import invoke, succeeds
from compress.errors import UsageError
from compress.pipeline import latency
from searches import auto

pytest.importorskip("gguf")


class Engine:
    """A token takes a second a byte, and one for each loaded file."""

    loaded: ClassVar[list[int]] = []

    def __init__(self, file, **_options):
        self.size = file.stat().st_size
        self.loaded.append(self.size)

    def speed(self, _prompt, _new):
        return 0.0, 1 / self.size


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.write_model(folder / "llama", "llama", dtype=torch.float32, num_hidden_layers=3, **tiny.IN_BLOCKS)
    tiny.write_text(folder / "text.txt")
    return folder


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(latency, "LlamaCpp", Engine)
    monkeypatch.setattr(Engine, "loaded", found := [])
    return found


@pytest.mark.parametrize("fixed", [0, 300])  # what a token takes besides
def test_the_largest_size_is_found_that_is_fast_enough(fixed):
    def share(size):
        return (size + fixed) / (1000 + fixed)

    size, found = latency.largest_fast(200, 1000, 0.6, share)
    assert found == share(size)
    assert 0.6 - latency.NEAR <= found <= 0.6


def test_the_least_size_is_tried_before_a_time_is_refused():
    seen = []

    def share(size):
        seen.append(size)
        return 0.5 + size / 2000

    with pytest.raises(
        UsageError, match=r"in 0\.1 of the dense model's time .* of 200 bytes, takes 0\.60\. Allow more"
    ):
        latency.largest_fast(200, 1000, 0.1, share)
    assert seen[-1] == 200


@pytest.mark.parametrize("target", [0.45, 0.1])  # by types alone, and with blocks left out
def test_a_file_is_written_that_decodes_in_the_time(home, loaded, tmp_path, target):
    out = tmp_path / "out"
    succeeds(*auto(home, "--target-latency", target, "--out", out))
    (file,) = out.glob("*.gguf")
    dense, *tried = loaded
    name_differs = 100
    assert file.stat().st_size <= target * dense + name_differs
    assert min(abs(file.stat().st_size - size) for size in tried) < 0.05 * dense
    facts = json.loads((out / "compress.json").read_text())
    assert bool(facts["dropped"]) == (target == 0.1)
    assert facts["recipe"]["budget"] is None


def test_what_cannot_be_is_refused_and_leaves_nothing(home, loaded, tmp_path):
    ran = invoke(*auto(home, "--target-latency", 0.001, "--out", tmp_path / "out"))
    assert ran.code == 2
    assert "decodes in 0.001 of the dense model's time" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-latency", 0.5, "--for", "vllm"], "target_latency is measured in llama.cpp"),
        (["--target-latency", 0.5, "--target-size", "1MB"], "one of the three"),
        (["--target-latency", 1.5], "less than 1"),
    ],
)
def test_wrong_words_are_refused(home, options, message):
    ran = invoke(*auto(home, *options, "--dry-run"))
    assert ran.code == 2
    assert message in ran.err


def test_the_plan_says_the_time(home):
    assert "0.5 of the dense model's" in succeeds(*auto(home, "--target-latency", 0.5, "--dry-run")).out


def test_random_weights_run_in_llama_cpp(home, tmp_path):
    pytest.importorskip("xllamacpp")
    succeeds(*auto(home, "--target-latency", 0.97, "--out", tmp_path / "out"))
    assert [*(tmp_path / "out").glob("*.gguf")]
