"""Programs of strangers: that they are judged rightly, do no harm and leave nothing; and what is made of a model's."""

import gzip
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import GenerationConfig

from compress.datasets.humaneval import load_problems
from compress.errors import CompressError, Unavailable, UsageError
from compress.evaluation import _programs, _sandbox, humaneval
from compress.evaluation._programs import Limits, Outcome, run_programs
from compress.evaluation.humaneval import STOPS, AtStop, Sampling, completions, cut_at_stop, pass_at_k, program_of
from tiny import tiny_model, tiny_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
on_posix = pytest.mark.skipif(os.name != "posix", reason="limits are those of Unix")
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what it allows")
QUICK = Limits(seconds=1.0)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """Where the programs' folders are, so that what is left of them is seen."""
    folder = tmp_path_factory.mktemp("programs")
    folder.chmod(0o755)
    for above in folder.parents:
        if above.owner() == folder.owner() and above != Path(tempfile.gettempdir()):
            above.chmod(above.stat().st_mode | 0o111)
    return folder


@pytest.fixture(autouse=True)
def nothing_left(scratch, monkeypatch) -> Iterator[None]:
    """No file and no process."""
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert list(scratch.iterdir()) == []
    assert running() == []


def running() -> list[psutil.Process]:
    """This process's supervisors, and programs that have outlived theirs."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if _sandbox.__file__ in (process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    # Other tests may run at the same time, in other processes.
    own = set(psutil.Process().children(recursive=True))
    return [process for process in found if process in own or process.ppid() in (0, 1)]


def outcome(program: str, limits: Limits = QUICK) -> Outcome:
    (found,) = run_programs([program], limits)
    return found


@pytest.fixture(scope="module")
def held(scratch) -> dict[str, str]:
    """What the system allows to hold programs in."""
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        return outcome("").held
    finally:
        tempfile.tempdir = before


# Who passes.


@on_posix
@pytest.mark.parametrize(
    "program",
    [
        "",
        "def f(x):\n    return x + 1\nassert f(1) == 2",
        "import math, re, typing, collections, itertools, hashlib, heapq",
        "print('x' * 10**6)",
        "import sys; sys.stderr.write('x' * 10**6)",
        "open('mine', 'w').write('x')",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.chmod('a/b', 0)",
    ],
)
def test_a_program_whose_last_line_runs_passes(program):
    found = outcome(program)
    assert (found.passed, found.detail) == (True, "passed")


EARLY = {
    "exit": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "os._exit": ("import os\nos._exit(0)", "ended before its last line"),
    "says it passed": ("print('passed')\nimport os\nos._exit(0)", "ended before its last line"),
    "quit": ("quit()", "SystemExit: None"),
    "raises": ("raise SystemExit", "SystemExit"),
    "at exit": ("import atexit, os\natexit.register(os._exit, 0)\nassert False", "AssertionError"),
    "kills itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\nassert False", None),
    "answers": (
        "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'passed')\n  except OSError: pass\nos._exit(0)",
        None,
    ),
    "execs": ("import os\nos.execv('/bin/true', ['true'])", "ended before its last line"),
}


@on_posix
@pytest.mark.parametrize(("program", "detail"), EARLY.values(), ids=EARLY)
def test_a_program_that_ends_early_does_not_pass(program, detail):
    found = outcome(program + "\nassert False, 'the tests'")
    assert not found.passed
    assert detail is None or found.detail == detail


@on_posix
@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2, 'not so'", "AssertionError: not so"),
        ("def f(:", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("x", "NameError: name 'x' is not defined"),
        ("raise ValueError('a' * 10**6)", "ValueError: " + "a" * 188),
        ("raise ValueError('a\\nb')", "ValueError: a b"),
        ("def f(): return f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class E(Exception):\n  def __str__(self): raise E\nraise E", "ended before its last line"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_a_wrong_program_says_why(program, detail):
    found = outcome(program)
    assert (found.passed, found.detail) == (False, detail)


@on_posix
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal, time\nfor n in (1, 2, 3, 15, 24): signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)",
        "import os, time\nos.closerange(0, 300)\ntime.sleep(60)",
    ],
    ids=["endless", "asleep", "deaf", "silent"],
)
def test_an_endless_program_is_ended(program):
    start = time.monotonic()
    found = outcome(program)
    assert not found.passed
    assert QUICK.seconds <= time.monotonic() - start < QUICK.seconds + 5
    assert "1 seconds" in found.detail or "killed" in found.detail


# What may be taken.


@on_posix
def test_memory_is_bounded():
    assert outcome("x = bytearray(2**31)").detail == "MemoryError"
    assert not outcome("x = []\nwhile True: x.append(bytearray(10**7))", Limits(seconds=5.0, memory_bytes=2**28)).passed


@on_posix
def test_a_fork_bomb_is_bounded(held):
    bomb = "import os, time\nwhile True:\n  try: os.fork()\n  except OSError: time.sleep(0.01)"
    most = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most.append(len(psutil.Process().children(recursive=True)))
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    found = outcome(bomb)
    stop.set()
    thread.join()
    assert not found.passed
    assert 2 < max(most) <= 2 * QUICK.processes


@on_posix
def test_what_a_program_starts_ends_with_it():
    """Also what has left its session and its parent."""
    outlives = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n  os._exit(0)"
    start = time.monotonic()
    assert outcome(outlives).passed
    assert time.monotonic() - start < 5
    assert [p for p in psutil.process_iter() if p.cmdline()[-1:] == [_sandbox.__file__] and p.ppid() == 1] == []


@on_posix
def test_files_are_bounded():
    assert outcome("open('large', 'wb').write(bytes(2**26))").detail == "OSError: [Errno 27] File too large"
    many = "kept = [open(f'{i}', 'w') for i in range(100)]"
    assert outcome(many).detail.startswith("OSError: [Errno 24] Too many open files")


# What may be touched.


@on_posix
def test_a_program_sees_an_empty_folder_and_no_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert outcome(
        "import os, sys\n"
        "assert os.listdir('.') == []\n"
        "assert os.path.basename(os.getcwd()).startswith('compress-program-')\n"
        "assert 'SECRET' not in os.environ and set(os.environ) <= {'LC_CTYPE'}, os.environ\n"
        "assert sys.stdin.read() == ''\n"
        "assert '' not in sys.path and os.getcwd() not in sys.path\n"
        "assert not [fd for fd in os.listdir('/dev/fd') if int(fd) > 5]"
    ).passed


@on_linux
@pytest.mark.parametrize(
    "act",
    [
        "open({path!r} + '/new', 'w')",
        "open({path!r} + '/there', 'a')",
        "__import__('os').remove({path!r} + '/there')",
        "__import__('os').mkdir({path!r} + '/folder')",
        "__import__('os').rename({path!r} + '/there', 'mine')",
        "__import__('os').link({path!r} + '/there', 'mine')",
        "__import__('os').truncate({path!r} + '/there', 0)",
        "__import__('os').symlink('x', {path!r} + '/link')",
        "__import__('shutil').rmtree({path!r})",
    ],
)
def test_nothing_is_written_outside_of_its_folder(tmp_path, held, act):
    if held["writes"] != "its own folder":
        pytest.skip("the system has no Landlock")
    tmp_path.chmod(0o777)
    (tmp_path / "there").write_text("x")
    (tmp_path / "there").chmod(0o666)
    found = outcome(act.format(path=str(tmp_path)))
    assert not found.passed
    assert "Error" in found.detail
    assert [file.name for file in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "x"


@on_linux
def test_there_is_no_network(held):
    """Not even to this machine itself."""
    if held["network"] == "on":
        pytest.skip("the system takes no network away")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = outcome(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
        assert not found.passed
        assert "Error" in found.detail
        if held["network"] == "off":
            packet = (
                "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'x', ('192.0.2.1', 9))"
            )
            assert not outcome(packet).passed


@on_linux
def test_other_processes_are_out_of_reach(held):
    if held["processes"] == "one session":
        pytest.skip("the system allows no namespaces")
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        assert not outcome(f"import os\nos.kill({bystander.pid}, 9)").passed
        outcome("import os\nos.kill(-1, 9)")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@on_linux
@pytest.mark.skipif(os.geteuid() != 0, reason="is not root")
def test_root_is_not_the_user(held):
    assert held["user"] == "nobody"
    assert outcome("import os\nassert os.getuid() == os.geteuid() == 65534 and os.getgroups() == []").passed
    assert not outcome("import os\nos.setuid(0)").passed


LESS = {"own_namespaces": "without TCP", "keep_writes_in": "off"}


@on_linux
@pytest.mark.parametrize(("function", "network"), LESS.items(), ids=LESS)
def test_a_system_that_allows_less_is_said_to(tmp_path, monkeypatch, held, function, network):
    """With less to hold them in, programs are judged and ended as before, and the answer says what there was."""
    if held["network"] != "off" or held["writes"] != "its own folder":
        pytest.skip("the system allows less anyway")
    script = tmp_path / "sandbox.py"
    source = Path(_sandbox.__file__).read_text(encoding="utf-8")
    lesser = f"\n{function} = lambda *_: {{}}\n\nif __name__"
    script.write_text(source.replace("\nif __name__", lesser), encoding="utf-8")
    monkeypatch.setattr(_sandbox, "__file__", str(script))
    found = outcome("pass")
    assert found.passed
    assert found.held["network"] == network
    assert (found.held["writes"] == "its own folder") == (function != "keep_writes_in")
    assert (found.held["processes"] == "one session") == (function == "own_namespaces")
    start = time.monotonic()
    assert not outcome("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass").passed
    assert outcome("import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)").passed
    assert time.monotonic() - start < 10
    assert [p for p in psutil.process_iter() if str(script) in p.cmdline()] == []


def test_a_program_that_cannot_be_closed_in_is_not_run(monkeypatch):
    monkeypatch.setattr(_programs, "supervised", lambda _job, _seconds: {"refused": "because"})
    with pytest.raises(UsageError, match=r"^--humaneval: because\.$"):
        outcome("pass")
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(UsageError, match="only run on Linux and macOS"):
        run_programs(["pass"])


@on_posix
def test_a_supervisor_that_does_not_answer(tmp_path, monkeypatch):
    script = tmp_path / "broken.py"
    script.write_text("raise OSError('no')")
    monkeypatch.setattr(_sandbox, "__file__", str(script))
    with pytest.raises(CompressError, match="could not be run: OSError: no"):
        outcome("pass")
    script.write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(_programs, "GRACE_SECONDS", 0.1)
    assert not outcome("pass", Limits(seconds=0.5)).passed


# Many.


@on_posix
def test_answers_come_in_order_and_are_counted():
    programs = [f"assert {number} % 3" for number in range(12)]
    done: list[int] = []
    found = run_programs(programs, QUICK, workers=3, on_done=done.append)
    assert [each.passed for each in found] == [bool(number % 3) for number in range(12)]
    assert sum(done) == 12


@on_posix
def test_an_interrupt_runs_no_more_programs():
    def interrupt(_count: int) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_programs(["", *["import time; time.sleep(1)"] * 50], QUICK, workers=2, on_done=interrupt)
    assert time.monotonic() - start < 6


def test_the_token_is_another_every_time(monkeypatch):
    tokens = []

    def note(job: dict[str, Any], _seconds: float) -> dict[str, Any]:
        tokens.append(job["token"])
        return {"said": tokens[0], "in_time": True, "ended": 0, "held": {}}

    monkeypatch.setattr(_programs, "supervised", note)
    assert [each.passed for each in run_programs(["", ""], QUICK, workers=1)] == [True, False]
    assert len(set(tokens)) == 2
    assert all(len(token) == 32 for token in tokens)


# The problems.


@pytest.mark.skipif(not (DATA / "humaneval").is_dir(), reason="the problems are not here")
@on_posix
def test_the_canonical_solutions_of_all_problems_pass():
    problems = load_problems(DATA)
    assert len(problems) == 164
    found = run_programs([program_of(problem, problem["canonical_solution"]) for problem in problems])
    assert [(p["task_id"], each.detail) for p, each in zip(problems, found, strict=True) if not each.passed] == []
    wrong = run_programs([program_of(problem, "    return 'wrong'\n") for problem in problems[:10]])
    assert not any(each.passed for each in wrong)


PROBLEM = {
    "task_id": "Test/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 3\n",
}


def write_problems(folder: Path, content: bytes, name: str = "HumanEval.jsonl") -> None:
    (folder / "humaneval").mkdir(exist_ok=True)
    (folder / "humaneval" / name).write_bytes(content)


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
        (b"", "it has no problems"),
        (b"{", "Expecting property name"),
        (b'{"prompt": "x"}', "a problem lacks 'task_id'"),
        (json.dumps(PROBLEM | {"test": 1}).encode(), "whose fields are not text"),
        (b"\xff", "can't decode"),
        (b"[1]", "list indices"),
    ],
)
def test_damaged_problems_are_named(tmp_path, content, reason):
    write_problems(tmp_path, content)
    with pytest.raises(Unavailable, match=f"HumanEval.jsonl cannot be read: .*{reason}.* Replace the file"):
        load_problems(tmp_path)


def test_problems_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(Unavailable, match=r"humaneval/HumanEval\.jsonl\.gz or .* under --data-dir"):
        load_problems(None)


# pass@k.


def test_pass_at_k_is_the_share_of_choices_with_a_correct_one():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                picks = list(itertools.combinations(range(n), k))
                share = sum(min(pick) < c for pick in picks) / len(picks)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_what_is_made_of_the_outcomes():
    details = ["passed", "x: 1", "x: 2", "passed", "passed", "passed", "y", "x: 1", "x: 1"]
    outcomes = [Outcome(detail == "passed", detail, {"network": "off"}) for detail in details]
    found = humaneval.judged(outcomes, Sampling(samples=3, temperature=0.5, ks=(1, 2)))
    first = [1 / 3, 1.0, 0.0]
    assert found.rates[0].value == pytest.approx(statistics.fmean(first))
    assert found.rates[0].error == pytest.approx(statistics.stdev(first) / 3**0.5)
    assert found.rates[1].value == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert (found.problems, found.samples, found.passed) == (3, 3, 4)
    assert found.failures == {"x": 4, "y": 1}
    record = found.to_dict()
    assert record["rates"]["pass@2"]["value"] == found.rates[1].value
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert humaneval.judged(outcomes[:3], Sampling(samples=3)).rates[0].error is None


# Writing.


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
def test_a_completion_is_cut_before_a_stop(stop):
    assert cut_at_stop(f"    return x\n{stop} more\nprint(1)") == "    return x\n"
    assert cut_at_stop("    return x\n") == "    return x\n"


@pytest.mark.parametrize("stop", STOPS)
def test_a_row_is_done_at_a_stop(stop):
    tokenizer = tiny_tokenizer()
    rows = [
        tokenizer.encode(f"prompt\ndef xxxxxxxx{text}"[-30:].rjust(30)) for text in ("yyyyyyyyyyyyy", stop, stop + " ")
    ]
    ids = torch.tensor(rows)
    assert AtStop(tokenizer, 10)(ids, None).tolist() == [False, True, True]
    assert AtStop(tokenizer, 30)(ids, None).tolist() == [False, False, False]


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
    assert humaneval.continued(tokenizer, tokenizer.encode("a"), [1, 1, 3]) == "  b"


@on_posix
def test_a_model_that_writes_the_answer(monkeypatch):
    """From the prompt to pass@k."""
    texts = iter(["    return x\n", "    return 4\n", "    return x\n", "    retrun x\n"])
    monkeypatch.setattr(humaneval, "complete", lambda prompts, *_: [next(texts) for _ in prompts])
    told: list[tuple[str, int]] = []
    model: Any = tiny_model("llama", num_hidden_layers=1)
    found = humaneval.measure(
        [PROBLEM, PROBLEM],
        model,
        tiny_tokenizer(),
        Sampling(samples=2, temperature=0.8, ks=(1, 2)),
        batch_size=3,
        on_progress=lambda what, count: told.append((what, count)),
    )
    assert [rate.value for rate in found.rates] == [0.5, 1.0]
    assert found.failures == {"AssertionError": 1, "SyntaxError": 1}
    assert told == [("writing", 1)] * 4 + [("running", 1)] * 4


def test_a_models_own_defaults_of_generation_do_not_count(writer):
    _, tokenizer = writer
    model = tiny_model("llama", num_hidden_layers=1)
    model.generation_config = GenerationConfig(eos_token_id=[1, 7], temperature=3.0, do_sample=True, top_k=5)
    greedy = humaneval.generation(model, tokenizer, Sampling(), 9, 2)
    assert (greedy.do_sample, greedy.max_new_tokens, greedy.eos_token_id) == (False, 9, [1, 7])
    drawn = humaneval.generation(model, tokenizer, Sampling(temperature=0.5), 9, 2)
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.top_k) == (True, 0.5, 0.95, 0)
