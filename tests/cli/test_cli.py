"""The command line: what it accepts, writes and prints when all is well. Bad input is in test_bad_input.py.

Most commands run in this process, with the reloading of the written checkpoint taken for granted; that it does reload
is seen through the installed command.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from cli_runner import environment, finish, flat, invoke, snapshot, start_installed, succeeds
from compress.cli.options import newest_output
from tiny import write_model, write_text

COMMANDS = ("slice", "lord", "slim", "quantize", "eval", "bench")
ROOT = Path(__file__).parents[2]
LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float16",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a text, and configs without weights."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "tiny", "opt")
    write_text(home / "text.txt", lines=60)
    (home / "llama-2-7b-config").mkdir()
    (home / "llama-2-7b-config" / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return home


@pytest.fixture
def place(home, unproved, tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def words(home):
    """`slice` with everything but how much."""
    text = ["--calib", home / "text.txt", "--samples", 4, "--seq-len", 32]
    return ["slice", "--model", home / "tiny", "--method", "slicegpt", *text]


# The installed command runs in a process of its own, while the other tests of this file do; its test comes last.


@pytest.fixture(scope="module", autouse=True)
def started(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    slicing = ["--model", home / "tiny", "--method", "slicegpt", "--ratio", 0.25, "--calib", home / "text.txt"]
    slicing += ["--samples", 4, "--seq-len", 32]
    process = start_installed("slice", *slicing, "--device", "cpu", "--json", cwd=folder)
    yield folder, process
    if process.poll() is None:
        process.kill()
        finish(process)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_the_help_is_accepted(command, place, monkeypatch):
    """Its words are options that there are: offline, it gets as far as the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    example = flat(invoke(command, "--help").out).partition("Example: compress ")[2].split(" ╭")[0]
    ran = invoke(*example.split())
    assert ran.code == 4
    assert "is not on this machine" in ran.faults[0]


def test_the_reference_of_the_options_is_what_they_are():
    """docs/cli.md is written by scripts/cli_reference.py: run it again where an option has changed."""
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "scripts" / "cli_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == module.reference()


PROBE = """
import sys
from compress.cli import main
for words in {words}:
    sys.argv = ["compress", *words]
    try:
        main()
    except SystemExit:
        pass
    heavy = [name for name in ("torch", "transformers", "datasets", "accelerate") if name in sys.modules]
    sys.stderr.write("IMPORTED " + repr((words, heavy)) + "\\n")
"""


def test_help_and_usage_errors_import_nothing_heavy(place):
    """Torch takes seconds; who asks for help, or mistypes a word, must not wait for it."""
    commands = [
        *(["--help"], ["--version"], ["slice", "--help"], ["eval", "--help"], ["slcie"], ["slice", "--ratoi", "1"]),
        *(["slim", "--help"], ["slice"], ["slice", "--ratio", "0.25", "--model", "opt-126m"], ["eval"]),
    ]
    ran = subprocess.run(
        [sys.executable, "-c", PROBE.format(words=commands)],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    lines = [line.removeprefix("IMPORTED ") for line in ran.stderr.splitlines() if line.startswith("IMPORTED ")]
    assert lines == [repr((words, [])) for words in commands]
    assert f"compress {compress.__version__}\n" in ran.stdout


def test_a_misspelt_command():
    ran = invoke("slcie", "--ratio", 0.25)
    assert ran.code == 2
    assert "No such command 'slcie'" in flat(ran.err)
    assert "Did you mean 'slice'" in flat(ran.err)


@pytest.mark.parametrize(("command", "typed", "meant"), [("slice", "--ratoi", "--ratio"), ("eval", "--pll", "--ppl")])
def test_a_misspelt_option(command, typed, meant):
    ran = invoke(command, typed, "x")
    assert ran.code == 2
    assert f"No such option: {typed}" in flat(ran.err)
    assert f" {meant}" in flat(ran.err).split(typed, 1)[1]


# Where to.


def test_the_default_output_of_many_ratios_is_a_name_that_a_file_can_have(home, place):
    """255 bytes are a name's limit, and .partial is added. Other ratios still have another name."""
    first, *rest = [f"0.25{number:04d}" for number in range(LLAMA_2_7B["num_hidden_layers"])]
    words = ["slice", "--model", home / "llama-2-7b-config", "--method", "slicegpt", "--dry-run", "--json"]
    both = (",".join([first, *rest]), ",".join([*rest, first]))
    outs = [Path(succeeds(*words, "--ratio", ratios).json["out"]) for ratios in both]
    assert outs[0] != outs[1]
    assert all(len(out.name) < 200 for out in outs)


def test_a_model_of_the_hub(home, place, words, monkeypatch):
    monkeypatch.setattr("compress.models.hub.fetch", lambda repository, patterns: home / "tiny")
    written = Path(succeeds(*words, "--model", "opt-125m", "--ratio", 0.25, "--json").json["out"])
    assert written == Path("compressed/opt-125m-slicegpt-0.25")
    facts = json.loads((written / "compress.json").read_text())
    assert facts["base_model"] == "facebook/opt-125m"
    assert "--model facebook/opt-125m " in facts["command"]
    plan = succeeds(*words, "--model", "someone/theirs", "--ratio", 0.25, "--dry-run", "--json").json
    assert plan["out"] == "compressed/someone--theirs-slicegpt-0.25"


def test_overwrite_replaces_the_whole_output(words, place):
    (place / "out").mkdir()
    for name in ("compress.json", "stale.txt"):
        (place / "out" / name).write_text("{}")
    old = snapshot(place)
    refused = invoke(*words, "--ratio", 0.25, "--out", "out")
    assert refused.code == 2
    assert snapshot(place) == old
    succeeds(*words, "--ratio", 0.25, "--out", "out", "--overwrite")
    assert [path.name for path in place.iterdir()] == ["out"]
    assert not (place / "out" / "stale.txt").exists()
    assert json.loads((place / "out" / "compress.json").read_text())["recipe"]["stages"][-1]["ratio"] == 0.25


def test_a_file_of_the_users_beside_the_output_stays(words, place):
    """Activations that memory does not hold go to a file beside the output, which must be nobody else's."""
    kept = {
        name: f"my {name}" for name in ("activations", "activations-stream", "activations-dense", "lock", "out.txt")
    }
    for name, content in kept.items():
        (place / name).write_text(content)
    succeeds(*words, "--ratio", 0.25, "--out", "out", "--cache-memory", "1", "--measure-error")
    assert {path.name for path in place.iterdir()} == {"out", *kept}
    assert {name: (place / name).read_text() for name in kept} == kept


def test_an_output_that_is_a_link_to_nowhere(words, place):
    """No folder can take its name. It would be found out at the very end."""
    (place / "link").symlink_to(place / "nowhere")
    ran = invoke(*words, "--ratio", 0.25, "--out", "link")
    assert ran.code == 2
    assert "link" in ran.faults[0]
    assert [path.name for path in place.iterdir()] == ["link"]


def test_json_is_all_that_stdout_has(words, place):
    ran = succeeds(*words, "--ratio", 0.25, "--json")
    result = ran.json
    assert set(result) == {
        *("out", "dense_parameters", "parameters", "removed", "dense_bytes", "bytes", "widths", "seconds"),
        *("reload_difference", "resumed_parts", "architecture", "loads_without_our_code", "units", "notes"),
        *("held_out_divergence", "ranks", "alternatives", "lost_energy", "mixture"),
    }
    assert result["resumed_parts"] == 0
    phases = [phase for phase, _ in ran.progress]
    assert phases == ["preparing", "compressing", "compressing", "verifying", "verifying"]
    assert ran.progress[1][1].startswith("0/5, embeddings, ")
    assert ran.progress[2][1].startswith("5/5, took ")


def test_the_profile_is_beside_the_result(words, place):
    ran = succeeds(*words, "--ratio", 0.25, "--json", "--profile")
    functions, _, kinds = ran.err.partition("ncalls")[2].partition("Seconds by kind of work")
    assert len(re.findall(r"^ *[\d/]+( +\d+\.\d{3}){4} \S", functions, re.MULTILINE)) == 10
    assert set(ran.json["seconds"]) <= set(kinds.split())


def test_eval_of_a_dense_model(home, place):
    """Against the loss taken by hand, window by window."""
    ran = succeeds(
        "eval", "--ppl", home / "text.txt", "--model", home / "tiny", "--seq-len", 32, "--limit", 3, "--json"
    )
    (entry,) = ran.json["perplexity"]
    model = AutoModelForCausalLM.from_pretrained(home / "tiny")
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(home / "tiny")((home / "text.txt").read_text(), return_tensors="pt").input_ids
    with torch.inference_mode():
        losses = [model(window[None], labels=window[None]).loss for window in ids[0][:96].split(32)]
    assert entry["ppl"] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-6)
    assert (entry["windows"], entry["tokens"], entry["seq_len"]) == (3, 3 * 31, 32)
    assert ran.json["parameters"] == model.num_parameters()
    assert [phase for phase, _ in ran.progress][-2:] == ["measuring tiny", "measuring tiny"]


def test_the_newest_output(place):
    for age, name in enumerate(["old", "newest", "older", "later.partial", "later.replaced"]):
        (place / "compressed" / name).mkdir(parents=True)
        file = place / "compressed" / name / "compress.json"
        file.write_text("{}")
        os.utime(file, (1e9 - age, 1e9 - age) if name.startswith("old") else (2e9 + age, 2e9 + age))
    (place / "compressed" / "empty").mkdir()
    assert newest_output() == Path("compressed/newest")


def test_local_data_sets(home, words, place, monkeypatch):
    """--data-dir and COMPRESS_DATA_DIR are one thing."""
    (place / "data" / "ptb").mkdir(parents=True)
    shutil.copy(home / "text.txt", place / "data" / "ptb" / "ptb.train.txt")
    command = [*words, "--calib", "ptb", "--ratio", 0.25, "--out", "out"]
    assert "--data-dir must be a folder" in invoke(*command, "--data-dir", "nowhere").faults[0]
    monkeypatch.setenv("COMPRESS_DATA_DIR", "data")
    succeeds(*command)
    assert json.loads((place / "out" / "compress.json").read_text())["recipe"]["calibration"]["source"] == "ptb"


def test_installed_slice_and_an_eval_of_the_newest_output(home, started, monkeypatch):
    folder, process = started
    ran = finish(process)
    assert ran.code == 0, ran.err
    assert ran.json["reload_difference"] < 1e-6
    assert (folder / ran.json["out"] / "model.safetensors.index.json").is_file()
    assert "verifying: 0/1, reloading, " in ran.err
    assert "Warning" not in ran.err
    monkeypatch.chdir(folder)
    evaluated = succeeds("eval", "--ppl", home / "text.txt", "--seq-len", 32, "--limit", 4, "--device", "cpu", "--json")
    assert evaluated.json["model"] == "tiny-slicegpt-0.25"
    assert evaluated.json["parameters"] == ran.json["parameters"]
    assert evaluated.progress[-1][1].startswith("4/4, took ")


def test_an_interruption_before_any_command_is_told_in_a_word(monkeypatch, capsys):
    from compress import cli

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(cli.signal, "signal", lambda *_arguments: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
