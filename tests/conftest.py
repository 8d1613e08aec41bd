import os
import re
from typing import Any

import jaxtyping
import pytest

# Tests are many small computations; a pool of threads only makes them wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# The first parameters that each test is run with.
FIRST = pytest.StashKey[dict[Any, str]]()
# Folders and files whose tests run whole commands or the whole pipeline; the others are the units.
FOLDERS = {"architectures", "cli", "inspection", "pipeline"}
FILES = re.compile(
    "test_(adding_a_family|allocation|auto|auto_depth|auto_packed|budget|checkpoint_files|drop_blocks|every_family|"
    "family_table|float8_blocks|gguf|gguf_input|gguf_quantized|half_precision|humaneval|llamacpp|max_memory|processes|"
    "quantized_tables|ranks|registration|security|sliced_model|slim|slim_world|soundness)"
)


def is_whole_run(item: pytest.Item) -> bool:
    return item.path.parent.name in FOLDERS or FILES.fullmatch(item.path.stem) is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come first: a file that takes long is not to be the last one, with nothing beside it."""
    for item in filter(is_whole_run, items):
        item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not is_whole_run(item))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes and dtypes at every call in the units alone, and for a test's first parameters alone.

    Whole runs call the same functions by the thousand, and other parameters the same functions again.
    """
    unchecked = is_whole_run(item) or item.get_closest_marker("unchecked") is not None
    first = item.session.config.stash.setdefault(FIRST, {}).setdefault((item.path, item.originalname), item.nodeid)
    jaxtyping.config.update("jaxtyping_disable", unchecked or first != item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the processes of a run keep what each would otherwise make again."""
    base = tmp_path_factory.getbasetemp()
    os.environ["COMPRESS_TESTS_STORE"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store")


@pytest.fixture(scope="session", autouse=True)
def _unflushed() -> Any:
    """Files wait for no disk: no test takes the power away. In which order they would, test_io.py has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="module")
def exact_norms() -> Any:
    import oracles

    with oracles.exact_norms():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model of two blocks in memory, its experts one by one, and its folder; each made once."""
    import tiny
    from compress.own_model.modeling_compress import unfuse_experts

    made: dict[str, Any] = {}

    def make(model_type: str, **changes: Any) -> Any:
        key = f"{model_type} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            model = tiny.tiny_model(model_type, **{"num_hidden_layers": 2} | changes)
            model.save_pretrained(folder)
            made[key] = unfuse_experts(model), folder
        return made[key]

    return make


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a checkpoint of each kind that the test file has in WRITTEN, and the models they are of."""
    from outputs import write_outputs

    folder = tmp_path_factory.mktemp("outputs")
    write_outputs(folder, *request.module.WRITTEN)
    return folder


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is seen and no data folder is set, and what is written is not reloaded in a process of its own."""
    monkeypatch.delenv("COMPRESS_DATA_DIR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
    monkeypatch.setattr("compress.checkpoints.gguf.verify_gguf", lambda *_arguments, **_options: 0.0)
