"""Programs that models write: how they come about, that they are judged rightly and held to limits, and pass@k."""

import gzip
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import GenerationConfig

from compress.datasets.texts import load_problems
from compress.errors import Unavailable, UsageError
from compress.evaluation import _programs, generation
from compress.evaluation._programs import PASSED, run_programs
from compress.evaluation.generation import (
    STOPS,
    Sampling,
    StopInCompletion,
    check_can_run,
    completions,
    cut_at_stop,
    pass_at_k,
    program_of,
)
from documents import PROBLEM, write_problems
from tiny import tiny_model, tiny_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
on_posix = pytest.mark.skipif(os.name != "posix", reason="limits are those of Unix")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch) -> Iterator[None]:
    """No file and no process."""
    scratch = tmp_path / "programs"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert list(scratch.iterdir()) == []
    assert [each for each in psutil.Process().children(recursive=True) if _programs.__file__ in each.cmdline()] == []


PATIENT = 100  # seconds: what ends by itself is not to be cut short by a busy machine


def outcome(program: str, seconds: int = PATIENT) -> str:
    (found,) = run_programs([program], seconds=seconds)
    return found


@on_posix
def test_a_program_whose_last_line_runs_passes():
    programs = [
        "",
        "def f(x):\n    return x + 1\nassert f(1) == 2",
        "import math, re, typing, collections, itertools, hashlib, heapq",
        "import sys; sys.stderr.write('x' * 10**6)",
        "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.chmod('a/b', 0)",
        "import atexit, os\natexit.register(os._exit, 3)",
    ]
    assert run_programs(programs, seconds=PATIENT) == [PASSED] * len(programs)


FAILURES = {
    "assert 1 == 2, 'not so'": "AssertionError: not so",
    "def f(:": "SyntaxError: invalid syntax (program.py, line 1)",
    "raise ValueError('a' * 10**6)": "ValueError: " + "a" * 188,
    "def f(): return f()\nf()": "RecursionError: maximum recursion depth exceeded",
    "class E(Exception):\n  def __str__(self): raise E\nraise E": "ended before its last line",
    # What ends early has not passed, whatever it says.
    "import sys\nsys.exit(0)": "SystemExit: 0",
    "import os\nos._exit(0)": "ended before its last line",
    "print('passed')\nimport os\nos._exit(0)": "ended before its last line",
    "import os\nos.execv('/bin/true', ['true'])": "ended before its last line",
    "import atexit, os\natexit.register(os._exit, 0)\nassert False": "AssertionError",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)": "killed by signal 11",
    "import os\nos.closerange(0, 300)": "ended before its last line",
}


@on_posix
def test_a_program_that_fails_says_why():
    assert dict(zip(FAILURES, run_programs(list(FAILURES), seconds=PATIENT), strict=True)) == FAILURES


@on_posix
def test_an_endless_program_is_ended(monkeypatch):
    monkeypatch.setattr(_programs, "STARTUP_SECONDS", 2)
    deaf = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(600)"
    programs = ["while True: pass", "import time\ntime.sleep(600)", deaf]
    assert run_programs(programs, seconds=1) == ["took more than 1 seconds"] * 3


@on_posix
def test_the_limits():
    assert outcome("x = bytearray(2**31)") == "MemoryError"
    assert outcome("open('large', 'wb').write(bytes(2**26))") == "OSError: [Errno 27] File too large"
    assert (
        outcome(
            "import resource\nmost = {'NPROC': 0, 'CORE': 0, 'CPU': 101, 'AS': 2**30, 'FSIZE': 2**24}\n"
            "for name, number in most.items():\n"
            "    assert resource.getrlimit(getattr(resource, 'RLIMIT_' + name)) == (number, number), name"
        )
        == PASSED
    )


@on_posix
def test_what_a_program_starts_ends_with_it(tmp_path, monkeypatch):
    """Also where the number of processes has no limit."""
    monkeypatch.setattr(_programs, "STARTUP_SECONDS", 1)
    note = tmp_path / "pid"
    program = (
        f"import os, time\nif os.fork() == 0:\n  open({str(note)!r}, 'w').write(str(os.getpid()))\n  time.sleep(60)\n"
        "time.sleep(60)"
    )
    assert outcome(program, seconds=2) != PASSED
    assert not note.exists() or has_ended(int(note.read_text() or 0))


def has_ended(pid: int) -> bool:
    """Within 5 seconds: a kill takes a moment. A zombie has: a container without an init process leaves it one."""
    for _ in range(50):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


@on_posix
def test_a_program_sees_an_empty_folder_and_no_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert (
        outcome(
            "import os, sys\n"
            "assert os.listdir('.') == []\n"
            "assert os.path.basename(os.getcwd()).startswith('compress-program-')\n"
            "assert 'SECRET' not in os.environ and set(os.environ) <= {'LC_CTYPE'}, os.environ\n"
            "assert sys.stdin.read() == ''\n"
            "assert os.getsid(0) == os.getpid()\n"
            "assert '' not in sys.path and os.getcwd() not in sys.path"
        )
        == PASSED
    )


# The problems.


@pytest.mark.skipif(not (DATA / "humaneval").is_dir(), reason="the problems are not here")
@on_posix
def test_canonical_solutions_pass():
    problems = load_problems(DATA)
    assert len(problems) == 164
    problems = problems[::16]
    found = run_programs([program_of(problem, problem["canonical_solution"]) for problem in problems], seconds=PATIENT)
    assert [(p["task_id"], each) for p, each in zip(problems, found, strict=True) if each != PASSED] == []
    wrong = run_programs([program_of(problem, "    return 'wrong'\n") for problem in problems[:5]])
    assert PASSED not in wrong


def test_problems_from_files(tmp_path):
    line = json.dumps(PROBLEM).encode() + b"\n"
    write_problems(tmp_path, line * 3)
    assert load_problems(tmp_path) == [PROBLEM] * 3
    assert load_problems(tmp_path, limit=1) == [PROBLEM]
    write_problems(tmp_path, gzip.compress(line), "HumanEval.jsonl.gz")
    assert load_problems(tmp_path) == [PROBLEM]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", " has no problems"),
        (b"{", ", line 1 is not JSON: Expecting property name"),
        (b'{"prompt": "x"}', ", line 1 is no problem: it must have the texts task_id, prompt"),
        (b"\n" + json.dumps(PROBLEM | {"test": 1}).encode(), ", line 2 is no problem"),
        (b"\xff", " cannot be read: .*can't decode"),
        (b"[1]", ", line 1 is no problem"),
    ],
)
def test_damaged_problems_are_named(tmp_path, content, reason):
    write_problems(tmp_path, content)
    with pytest.raises(Unavailable, match=f"HumanEval.jsonl{reason}.* Replace the file"):
        load_problems(tmp_path)


def test_pass_at_k_is_the_share_of_choices_with_a_correct_one():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                picks = list(itertools.combinations(range(n), k))
                share = sum(min(pick) < c for pick in picks) / len(picks)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_what_is_made_of_the_outcomes():
    outcomes = ["passed", "x: 1", "x: 2", "passed", "passed", "passed", "y", "x: 1", "x: 1"]
    found = generation.judged(outcomes, Sampling(samples=3, temperature=0.5, ks=(1, 2)))
    first = [1 / 3, 1.0, 0.0]
    assert found.rates["pass@1"].value == pytest.approx(statistics.fmean(first))
    assert found.rates["pass@1"].standard_error == pytest.approx(statistics.stdev(first) / 3**0.5)
    assert found.rates["pass@2"].value == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert (found.problems, found.samples, found.passed) == (3, 3, 4)
    assert found.failures == {"x": 4, "y": 1}
    record = found.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert generation.judged(outcomes[:3], Sampling(samples=3)).rates["pass@1"].standard_error is None


@pytest.fixture(scope="module")
def writer():
    return tiny_model("llama", dtype=torch.float32, num_hidden_layers=1), tiny_tokenizer()


def written(writer: Any, prompts: list[str], batch_size: int, sampling: Sampling) -> list[str]:
    problems = [{"prompt": prompt} for prompt in prompts]
    model, tokenizer = writer
    return [text for _, text in completions(problems, model, tokenizer, sampling, batch_size)]


def test_greedy_completions_do_not_depend_on_the_batch(writer):
    prompts = ["def f(x):\n", "a", "some longer text here"]
    sampling = Sampling(max_new_tokens=12)
    alone = written(writer, prompts, 1, sampling)
    assert written(writer, prompts, 3, sampling) == alone
    model, tokenizer = writer
    ids = torch.tensor([tokenizer.encode(prompts[2])])
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(ids[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert alone[2] == cut_at_stop(text[len(prompts[2]) :])


def test_samples_are_seeded_and_the_generator_is_left_alone(writer):
    sampling = Sampling(samples=3, temperature=1.0, seed=1, max_new_tokens=8)
    before = torch.random.get_rng_state()
    first = written(writer, ["x", "y"], 4, sampling)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(first) == 6
    assert len(set(first)) > 2
    assert written(writer, ["x", "y"], 4, sampling) == first
    other = Sampling(samples=3, temperature=1.0, seed=2, max_new_tokens=8)
    assert written(writer, ["x", "y"], 4, other) != first


def test_a_completion_ends_with_the_context(writer):
    (text,) = written(writer, ["x" * 60], 1, Sampling())
    assert len(text.encode(errors="surrogateescape")) <= 3 * 4
    with pytest.raises(UsageError, match="a problem has 64 tokens, which is all that the model can read"):
        written(writer, ["x" * 64], 1, Sampling())


@pytest.mark.parametrize("stop", STOPS)
def test_a_row_is_done_at_a_stop_and_cut_before_it(stop):
    """In the completion: the line end before it is not taken for the first character of a stop."""
    tokenizer = tiny_tokenizer()
    prompt = "def f():\n"
    texts = ("yyyyyyyyyyyyy", stop, f"y{stop}", stop[1:], f"{stop} ")
    rows = [tokenizer.encode((prompt + text).ljust(len(prompt) + 8)[: len(prompt) + len(text)]) for text in texts]
    done = [bool(StopInCompletion(tokenizer, len(tokenizer.encode(prompt)))(torch.tensor([row]), None)) for row in rows]
    assert done == [False, True, True, False, False]
    assert cut_at_stop(f"    return x\n{stop} more\nprint(1)") == cut_at_stop("    return x\n") == "    return x\n"


def test_the_space_before_a_completion_is_kept():
    """Of a tokenizer that puts spaces before words and takes the first away in decoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = {"<unk>": 0, "▁": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([1, 1, 3]) == " b"
    assert generation.continued(tokenizer, tokenizer.encode("a"), [1, 1, 3]) == "  b"


@on_posix
def test_a_model_that_writes_the_answer(monkeypatch):
    """From the prompt to pass@k."""
    texts = iter(["    return x\n", "    return 4\n", "    return x\n", "    retrun x\n"])
    monkeypatch.setattr(generation, "complete", lambda prompts, *_: [next(texts) for _ in prompts])
    told: list[tuple[str, int]] = []
    model: Any = tiny_model("llama", num_hidden_layers=1)
    found = generation.measure(
        [PROBLEM, PROBLEM],
        model,
        tiny_tokenizer(),
        Sampling(samples=2, temperature=0.8, ks=(1, 2)),
        batch_size=3,
        on_progress=lambda what, count: told.append((what, count)),
    )
    assert [rate.value for rate in found.rates.values()] == [0.5, 1.0]
    assert found.failures == {"AssertionError": 1, "SyntaxError": 1}
    assert told == [("writing", 1)] * 4 + [("running", 1)] * 4


def test_a_system_on_which_nothing_runs(monkeypatch):
    check_can_run()
    monkeypatch.setattr(generation, "run_programs", lambda _programs: ["killed by signal 9"])
    with pytest.raises(UsageError, match=r"^--humaneval cannot run programs on this system: an empty one killed by"):
        check_can_run()
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(UsageError, match=r"an empty one cannot be limited\. Use Linux or macOS"):
        check_can_run()


def test_a_models_own_defaults_of_generation_do_not_count(writer):
    _, tokenizer = writer
    model = tiny_model("llama", num_hidden_layers=1)
    model.generation_config = GenerationConfig(eos_token_id=[1, 7], temperature=3.0, do_sample=True, top_k=5)
    greedy = generation.generation_config(model, tokenizer, Sampling(), 9, 2)
    assert (greedy.do_sample, greedy.max_new_tokens, greedy.eos_token_id) == (False, 9, [1, 7])
    drawn = generation.generation_config(model, tokenizer, Sampling(temperature=0.5), 9, 2)
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.top_k) == (True, 0.5, 0.95, 0)
