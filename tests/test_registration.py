"""transformers knows our architecture after `import compress`, whatever was imported before or after it, and how."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

# What a program may do first. Each ends in one that has imported compress and looks into transformers' registries.
ORDERS = {
    "a model class, then compress": "from transformers import LlamaForCausalLM, PreTrainedModel; import compress",
    "compress, then generation": "import compress; from transformers import GenerationMixin",
    "compress, then the configs": "import compress; from transformers import AutoConfig",
    "the modeling file first": "import compress.models.modeling_sliced",
}
# Nothing of ours is imported here: that alone would register it.
LOOK = """
import json, sys
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
config = CONFIG_MAPPING["compress_sliced"]
model = MODEL_FOR_CAUSAL_LM_MAPPING[config]
print(json.dumps([f"{found.__module__}.{found.__name__}" for found in (config, model, model.config_class)]))
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def outcomes():
    """Each order in an interpreter of its own, side by side."""
    with ThreadPoolExecutor(max_workers=len(ORDERS)) as pool:
        return dict(zip(ORDERS, pool.map(lambda order: python(order + LOOK), ORDERS.values()), strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_both_registries_know_the_architecture(order, outcomes):
    done = outcomes[order]
    assert done.returncode == 0, done.stderr
    config = "compress.models.configuration_sliced.SlicedConfig"
    assert json.loads(done.stdout) == [config, "compress.models.modeling_sliced.SlicedForCausalLM", config]


def test_importing_the_package_imports_neither_torch_nor_transformers():
    done = python("import json, sys, compress; print(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "compress" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "accelerate", "pydantic", "numpy", "typer", "rich"}


def test_the_version_is_at_hand():
    import compress
    from compress.version import __version__

    assert compress.__version__ == __version__
