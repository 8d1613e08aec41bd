"""Whether a change of the code keeps every byte: tiny models of many families through many recipes, and their hashes.

    PYTHONPATH=tests python benchmarks/golden.py --write FILE.json   # before a change
    PYTHONPATH=tests python benchmarks/golden.py --check FILE.json   # after it, on the same machine

A hash is of one tensor file of one output, or of its config.json. The proof by reloading is left out: it is a process
each, and changes no file.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import tiny
from compress.checkpoints import verify
from compress.cli import app

FOLD = {"stage": "fold_norms"}
REFIT = {"stage": "refit"}
SHARED = [FOLD, {"stage": "rotate_shared"}]
UNITS = {"stage": "prune_units", "units": "neurons"}
BITS = {"stage": "slim", "quantize": {"num_bits": 4, "group_size": 8}}
RECIPES: dict[str, dict[str, Any]] = {
    "slicegpt": {"stages": [FOLD, {"stage": "measure_error"}, {"stage": "rotate"}, {"stage": "slice", "ratio": 0.25}]},
    "anchored": {
        "stages": [*SHARED, {"stage": "slice", "ratio": 0.25, "slice_head": True}, REFIT, UNITS | {"ratio": 0.25}]
    },
    "anchored in a budget": {
        "stages": [*SHARED, {"stage": "slice", "slice_head": True}, REFIT, UNITS],
        "budget": {"keep_params": 0.7},
    },
    "free neurons": {
        "stages": [*SHARED, {"stage": "slice", "slice_head": True}, REFIT, UNITS],
        "budget": {"keep_params": 0.7, "allocation": "free"},
    },
    "per layer": {
        "stages": [
            FOLD,
            {"stage": "rotate", "signal": "normed", "stream": "dense"},
            {"stage": "slice", "ratio": 0.25, "slice_head": True},
            REFIT,
        ]
    },
    "lord": {"stages": [{"stage": "factorize", "method": "lord", "rank_frac": 0.5, "multiple": 1}]},
    "low rank in a budget": {
        "stages": [REFIT, {"stage": "factorize", "allocation": "auto", "gradient_weight": 0.5, "multiple": 1}],
        "budget": {"keep_params": 0.7},
    },
    "low rank, multiplied out": {"stages": [REFIT, {"stage": "factorize", "rank_frac": 0.5, "form": "dense"}]},
    "bits": {"stages": [BITS]},
    "adapters": {
        "stages": [
            {**BITS, "prune": {"pattern": "2:4"}, "adapt": {"rank": 2, "rounds": 2}, "polish": 1, "form": "compact"}
        ]
    },
    "slim": {
        "stages": [
            {
                "stage": "slim",
                "prune": {"method": "wanda"},
                "quantize": {"method": "slim", "strategy": "tensor"},
                "adapt": {"method": "slim", "rank": 2},
                "form": "dense",
            }
        ]
    },
    "sliced, then bits": {
        "stages": [
            *SHARED,
            {"stage": "slice", "width": 24, "slice_head": True},
            REFIT,
            {**BITS, "form": "compact"},
        ]
    },
    "low rank, then bits": {
        "stages": [
            REFIT,
            {"stage": "factorize", "rank_frac": 0.5, "multiple": 8},
            {"stage": "slim", "quantize": {"num_bits": 4, "strategy": "channel"}, "form": "compact"},
        ]
    },
}
RUNS_A_FAMILY = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    options = parser.parse_args()
    verify.verify = lambda *_arguments, **_options: 0.0  # before the run imports it
    found = dict[str, Any]()
    with tempfile.TemporaryDirectory() as scratch:
        for number, model_type in enumerate(tiny.FAMILIES):
            names = list(RECIPES)
            for place in range(RUNS_A_FAMILY):
                name = names[(number * 3 + place * 5) % len(names)]
                found[f"{model_type}: {name}"] = hashes(Path(scratch), model_type, name)
                print(f"{model_type}: {name}", file=sys.stderr, flush=True)
    if options.write:
        options.write.write_text(json.dumps(found, indent=1))
    if options.check:
        golden = json.loads(options.check.read_text())
        changed = [name for name in {**golden, **found} if golden.get(name) != found.get(name)]
        print("\n".join(f"changed: {name}" for name in changed) or f"{len(found)} runs as before")
        sys.exit(bool(changed))


def hashes(scratch: Path, model_type: str, name: str) -> Any:
    """By file of the output; the error's first words where the recipe does not fit the family."""
    place = scratch / f"{model_type} {name}".replace(" ", "-").replace(",", "")
    tiny.write_model(place / "dense", model_type, dtype=torch.float32, num_hidden_layers=2)
    text = tiny.write_text(place / "text.txt", lines=120)
    calibration = {"source": str(text), "samples": 16, "seq_len": 16}
    (place / "recipe.yaml").write_text(json.dumps({"method": "test", **RECIPES[name], "calibration": calibration}))
    command = ["run", str(place / "recipe.yaml"), "--model", str(place / "dense"), "--out", str(place / "out")]
    done = CliRunner().invoke(app, command)
    if done.exit_code:
        return f"exit {done.exit_code}"
    files = [*(place / "out").rglob("*.safetensors"), place / "out" / "config.json"]
    return {str(file.relative_to(place / "out")): sha256(file) for file in sorted(files)}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
