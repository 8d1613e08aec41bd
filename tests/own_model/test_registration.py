"""transformers knows our architecture after `import compress`, whatever was imported before or after it, and how."""

import json
import subprocess
import sys
from typing import Any

import pytest

# What a program may do first. Each ends in one that has imported compress and looks into transformers' registries.
ORDERS = {
    "a model class, then compress": "from transformers import LlamaForCausalLM, PreTrainedModel; import compress",
    "compress, then the configs": "import compress; from transformers import AutoConfig",
}
# Nothing of ours is imported here: that alone would register it.
LOOK = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
config = CONFIG_MAPPING["compress"]
model = MODEL_FOR_CAUSAL_LM_MAPPING[config]
print(json.dumps([f"{found.__module__}.{found.__name__}" for found in (config, model, model.config_class)]))
"""
# torch is imported once; every order is a fork that has neither compress nor transformers yet.
FORKS = """
import json, os, sys, traceback
import torch
assert not {name.split(".")[0] for name in sys.modules} & {"compress", "transformers"}
for order in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            exec(order)
        except BaseException:
            print(json.dumps(traceback.format_exc()))
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
"""


def python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-I", "-c", code, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    lines = python(FORKS, json.dumps([order + LOOK for order in ORDERS.values()])).splitlines()
    return dict(zip(ORDERS, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_both_registries_know_the_architecture(order, outcomes):
    config = "compress.own_model.configuration_compress.CompressConfig"
    assert outcomes[order] == [config, "compress.own_model.modeling_compress.CompressForCausalLM", config]


def test_importing_the_package_imports_neither_torch_nor_transformers():
    modules = json.loads(python("import json, sys, compress; print(json.dumps(sorted(sys.modules)))"))
    loaded = {name.split(".")[0] for name in modules}
    assert "compress" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "accelerate", "pydantic", "numpy", "typer", "rich"}
