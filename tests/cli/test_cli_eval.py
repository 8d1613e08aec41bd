"""`compress eval` beyond one perplexity: divergence, tasks, programs, comparisons, and every kind of checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_runner import flat, invoke, snapshot, succeeds, untouched
from compress.checkpoints.gguf import write_gguf
from compress.checkpoints.quality import QUALITY, read_quality
from compress.cli.eval import usual_text
from compress.evaluation.tasks import task_index
from compress.models.hub import find_model
from compress.numerics.sparsity import Pattern
from documents import PROBLEM, TASKS, write_problems, write_task
from gguf_folders import write_folder
from stored import storage_of, write_compact, write_packed
from tiny import tiny_tokenizer, write_model, write_text

# lm-eval and what it imports warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
ADAPTED = storage_of("packed", 4, group=8, rank=4)
SMALL = storage_of("compact", 4, group=8, pattern=Pattern(2, 4), rank=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model of every kind, a text, tasks and problems."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "dense", "llama", dtype=torch.float32)
    write_text(home / "text.txt", lines=60)
    for name, documents in TASKS.items():
        write_task(home / "data", name, documents)
    write_problems(home / "data", json.dumps(PROBLEM).encode() + b"\n")
    write_packed(home / "packed", ADAPTED)
    write_compact(home / "compact", SMALL)
    for stored in ("packed", "compact"):
        tiny_tokenizer().save_pretrained(home / stored)
        (home / stored / "compress.json").write_text("{}")
    write_folder(home / "plain")
    write_gguf(home / "plain", home / "plain.gguf")
    compressed(home, "sliced", "slice", "--method", "slicegpt", "--ratio", 0.25)
    compressed(home, "thin", "lord", "--rank-frac", 0.5)
    return home


def compressed(home: Path, name: str, command: str, *words: object) -> None:
    """By this program, in one process; that the output reloads is the business of other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.pipeline.verify", lambda *_arguments, **_options: 0.0)
        text = ["--calib", home / "text.txt", "--samples", 4, "--seq-len", 32, "--device", "cpu"]
        succeeds(command, "--model", home / "dense", *words, *text, "--out", home / name)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPRESS_DATA_DIR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # All of lm-eval's tasks take long to read.
    monkeypatch.setattr("compress.evaluation.tasks.task_index", lambda folder: task_index(folder or "piqa"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(home: Path, *more: object) -> list[object]:
    return ["--ppl", home / "text.txt", "--seq-len", 32, "--limit", 2, *more]


def refused(code: int, *words: object) -> list[str]:
    ran = invoke("eval", *words)
    assert ran.code == code, ran.err
    assert ran.out == ""
    return ran.faults


def test_nothing_asked(home, place):
    assert usual_text([find_model("demo"), find_model(str(home / "dense"))]) == "stdlib"
    (fault,) = refused(2, "--model", home / "dense")
    for option in ("--ppl wikitext2", "--kl", "--tasks piqa", "--humaneval"):
        assert option in fault
    assert "--tasks names no task" in refused(2, "--model", home / "dense", "--tasks", ",")[0]


def test_all_measures_at_once(home, place):
    words = ["--kl", home / "dense", "--tasks", "piqa, boolq,piqa", "--data-dir", home / "data"]
    ran = succeeds("eval", "--model", home / "sliced", *texts(home), *words, "--json")
    assert list(ran.json) == ["model", "parameters", "dtype", "perplexity", "divergence", "tasks"]
    (divergence,) = ran.json["divergence"]
    assert divergence["dense"] == "dense"
    assert divergence["kl"] > 0
    assert divergence["dataset"] == ran.json["perplexity"][0]["dataset"]
    scores = ran.json["tasks"]["scores"]
    assert [(each["task"], each["documents"], each["source"]) for each in scores] == [
        ("piqa", 2, "files"),
        ("boolq", 2, "files"),
    ]
    accuracies = [each["metrics"]["acc"]["value"] for each in scores]
    assert ran.json["tasks"]["average"]["acc"] == sum(accuracies) / 2
    assert list(dict.fromkeys(phase for phase, _ in ran.progress)) == [
        *("preparing", "loading dense", "running dense", "loading sliced", "measuring sliced")
    ]
    done, total = ran.progress[-1][1].partition(", took ")[0].split("/")
    assert done == total
    table = flat(succeeds("eval", "--model", home / "sliced", *texts(home), *words).out)
    for shown in ("divergence from dense", f"{divergence['kl']:.4g}", "average of the tasks, acc_norm"):
        assert shown in table
    assert "boolq, acc" in table
    assert "2 documents from files" in table


def test_all_faults_of_the_tasks_and_options_at_once(home, place):
    words = ["--tasks", "piqqa,boolq,arc_challenge", "--ppl", "wikitex2", "--data-dir", home / "data"]
    faults = refused(2, "--model", home / "dense", *words, "--humaneval", "--k", "2", "--dtype", "int3")
    expected = ("--allow-code-execution", "--k takes numbers", "'int3'", "'piqqa'. Did you mean 'piqa'?")
    for word in (*expected, "lm-eval cannot ask arc_challenge:", "'wikitex2'. Did you mean 'wikitext2'?"):
        assert len([fault for fault in faults if word in fault]) == 1, word
    assert len(faults) == 6


def test_other_tokens_do_not_compare(home, place, tmp_path):
    """Another vocabulary, and another tokenizer."""
    write_model(tmp_path / "large", "llama", dtype=torch.float32, vocab_size=300)
    (fault,) = refused(2, "--model", home / "dense", "--kl", "large", *texts(home))
    assert "large and dense have vocabularies of 300 and 259" in fault
    shutil.copytree(home / "dense", tmp_path / "beginning")
    settings = json.loads((tmp_path / "beginning" / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (tmp_path / "beginning" / "tokenizer.json").write_text(json.dumps(settings))
    (fault,) = refused(2, "--model", home / "dense", "--kl", "beginning", *texts(home))
    assert "beginning and dense have other tokens for the same text" in fault


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--allow-code-execution", "--ppl", "stdlib"], "are of --humaneval"),
        (["--humaneval", "--allow-code-execution", "--k", "1,x"], "--k takes numbers from 1 to"),
        (
            ["--humaneval", "--allow-code-execution", "--samples-per-problem", "2", "--temperature", "0"],
            "the same program every time",
        ),
        (["more", "--ppl", "stdlib"], "'more' is no option"),
        (["--save", "--model", "demo", "--ppl", "stdlib"], "demo is none of yours"),
    ],
)
def test_wrong_words(place, home, words, message):
    model = [] if "--model" in words or "--compare" in words else ["--model", home / "dense"]
    (fault,) = refused(2, *model, *words, "--data-dir", home / "data")
    assert message in fault


def test_nothing_is_run_without_leave(home, place, monkeypatch):
    monkeypatch.setattr("compress.evaluation._programs.run_program", lambda *_: pytest.fail("a program was run"))
    monkeypatch.setattr("compress.models.stored_loading.open_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (fault,) = refused(2, "--humaneval", "--model", home / "dense", "--data-dir", home / "data")
    assert fault.startswith("--humaneval runs programs that a model wrote, on this machine")
    assert "say --allow-code-execution" in fault


def test_programs_of_a_model(home, place, monkeypatch):
    """The tiny model writes nonsense, of too few tokens: what matters is that it is run and judged."""
    words = ["--humaneval", "--allow-code-execution", "--samples-per-problem", 2, "--k", "1,2"]
    ran = succeeds("eval", "--model", home / "dense", *words, "--data-dir", home / "data", "--json")
    found = ran.json["humaneval"]
    assert found["rates"] == {f"pass@{k}": {"value": 0.0, "standard_error": None} for k in (1, 2)}
    assert (found["problems"], found["samples"], found["temperature"], found["passed"]) == (1, 2, 0.8, 0)
    assert sum(found["failures"].values()) == 2
    monkeypatch.setattr("compress.evaluation.generation.run_programs", lambda programs, **_: ["passed"] * len(programs))
    table = flat(succeeds("eval", "--model", home / "dense", *words[:2], "--data-dir", home / "data").out)
    assert "HumanEval, pass@1" in table
    assert "1, 1 problems, 1 of 1 programs passed, greedy" in table


KINDS = ("dense", "sliced", "thin", "packed", "compact", "plain.gguf")


def test_a_comparison_of_every_kind_of_checkpoint(home, place):
    words = texts(home, "--kl", home / "dense", "--tasks", "piqa", "--data-dir", home / "data")
    found = succeeds("eval", "--compare", *(home / kind for kind in KINDS), *words, "--json").json
    assert [each["model"] for each in found["models"]] == [kind.removesuffix(".gguf") for kind in KINDS]
    assert found["notes"] == []
    for kind, each in zip(KINDS, found["models"], strict=True):
        folder = home / kind
        files = [*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")] or [folder]
        assert each["bytes"] == sum(file.stat().st_size for file in files) > 0
        assert each["parameters"] > 0
        assert 1 < each["perplexity"][0]["ppl"] < 1e4
        assert each["divergence"][0]["kl"] >= -1e-9
        assert len(each["tasks"]["scores"]) == 1
    own = found["models"][0]["divergence"][0]
    assert own["kl"] == pytest.approx(0, abs=1e-9)
    assert own["agreement"] == 1
    alone = succeeds("eval", "--model", home / "sliced", *words, "--json").json
    measured = {key: value for key, value in found["models"][1].items() if key != "bytes"}
    assert without_seconds(measured) == without_seconds(alone)
    table = flat(succeeds("eval", "--compare", home / "dense", "--compare", home / "sliced", *texts(home)).out)
    for shown in ("model", "bytes", "ppl", "sliced"):
        assert shown in table


def without_seconds(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_seconds(value) for key, value in found.items() if key != "seconds"}
    return [without_seconds(each) for each in found] if isinstance(found, list) else found


def test_all_models_are_looked_at_first(home, place, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.evaluation.evaluate.measure", lambda *_: pytest.fail("a model was measured"))
    shutil.copytree(home / "dense", tmp_path / "torn", ignore=shutil.ignore_patterns("tokenizer*"))
    faults = refused(1, "--compare", home / "dense", "torn", "--ppl", home / "text.txt")
    assert "torn has no tokenizer" in faults[0]
    assert "no model folder './nowhere'" in refused(2, "--compare", "./nowhere", home / "dense", *texts(home))[0]


def test_one_model_is_in_memory_at_a_time(home, place, monkeypatch):
    import weakref

    from compress.models import stored_loading

    alive: list[Any] = []
    opened = stored_loading.open_model

    def open_alone(*arguments: Any, **options: Any) -> Any:
        assert [each for each in alive if each() is not None] == []
        model = opened(*arguments, **options)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(stored_loading, "open_model", open_alone)
    words = texts(home, "--kl", home / "dense")
    succeeds("eval", "--compare", home / "dense", home / "sliced", *words)
    assert len(alive) == 3


def test_the_result_is_kept_if_asked(home, place, tmp_path):
    shutil.copytree(home / "sliced", tmp_path / "mine")
    before = snapshot(tmp_path / "mine")
    words = ["--model", "mine", *texts(home)]
    shown = succeeds("eval", *words, "--save", "--json").json
    saved = json.loads((tmp_path / "mine" / QUALITY).read_text())
    assert saved["perplexity"] == shown["perplexity"]
    assert list(saved) == ["perplexity", "settings"]
    settings = saved["settings"]["perplexity"]
    assert settings["versions"]["torch"] == torch.__version__
    assert (settings["limit"], settings["dtype"], settings["device"]) == (2, "float32", "cpu")
    tasks = ["--tasks", "piqa", "--data-dir", home / "data", "--save"]
    succeeds("eval", "--model", "mine", *tasks)
    both = json.loads((tmp_path / "mine" / QUALITY).read_text())
    assert list(both) == ["perplexity", "settings", "tasks"]
    measures = read_quality(tmp_path / "mine")
    assert measures is not None
    assert measures.measures[0].value == shown["perplexity"][0]["ppl"]
    assert both["perplexity"] == saved["perplexity"]
    assert both["settings"]["tasks"]["limit"] is None
    shutil.copytree(home / "dense", tmp_path / "other")
    compared = ["--compare", "mine", "other", *texts(home)[:-1], 1, "--save"]
    succeeds("eval", *compared)
    for name in ("mine", "other"):
        assert json.loads((tmp_path / name / QUALITY).read_text())["perplexity"][0]["windows"] == 1
    after = snapshot(tmp_path / "mine")
    assert {name: content for name, content in after.items() if name != QUALITY} == before
    (tmp_path / "mine" / QUALITY).write_text("[]")
    with untouched(tmp_path / "mine"):
        (fault,) = refused(1, *words, "--save")
    assert "quality.json is damaged" in fault


def test_a_gguf_file_is_its_folder(home, place):
    models = [home / "plain", home / "plain.gguf"]
    both = succeeds("eval", "--compare", *models, *texts(home), "--json").json["models"]
    assert both[1]["perplexity"][0]["ppl"] == pytest.approx(both[0]["perplexity"][0]["ppl"], rel=1e-5)
    assert both[1]["parameters"] == both[0]["parameters"]
    assert "plain is none of yours" in refused(2, "--model", home / "plain.gguf", *texts(home), "--save")[0]


def test_a_comparison_of_what_does_not_compare(home, place, tmp_path):
    write_model(tmp_path / "short", "llama", dtype=torch.float32, max_position_embeddings=16)
    words = ["--ppl", home / "text.txt", "--limit", 2]
    (note,) = succeeds("eval", "--compare", home / "dense", "short", *words, "--json").json["notes"]
    assert note == "Of other windows than dense's, so not to be compared with it: perplexity of short."
