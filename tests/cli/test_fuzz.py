"""Bad input, some of it at every change: no traceback, no hang, no memory, nothing touched (`fuzzing.py`).

`benchmarks/fuzz.py` does the same by the tens of thousands.
"""

from pathlib import Path
from random import Random

import pytest
from fuzzing import TARGETS, Fuzzer, Target, write_home
from spoiling import BOMB, DEEP

from cli_runner import snapshot
from compress.cli.console import LONGEST, MOST_PROBLEMS, told
from compress.errors import UsageError
from compress.models.untrusted import DEEPEST, parse_json, parse_yaml, typed_path

EXAMPLES = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = Path(tmp_path_factory.mktemp("fuzz")) / "home"
    home.mkdir()
    write_home(home)
    return home


@pytest.fixture(scope="module")
def fuzzer(home) -> Fuzzer:
    return Fuzzer(home, seconds=60)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_no_input_is_a_traceback(target, fuzzer):
    from hypothesis import HealthCheck, given, settings  # which takes a second that each process would pay
    from hypothesis import strategies as st

    fuzzer.warm_up(target)

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(choose=st.randoms(use_true_random=False))
    def never_a_fault(choose):
        verdict = fuzzer.spoil_and_judge(target, choose)
        assert verdict.fault is None, (target.name, verdict)

    never_a_fault()


def doing(what) -> Target:
    return Target("spy", "text.txt", lambda data, choose: b"spoiled", what)


def run_away(_home, _choose):
    while True:
        pass


def open_a_pickle(home, _choose):
    import pickle

    pickle.loads(pickle.dumps(Path("x")))  # noqa: S301 (the audit is what is tested)


def grow(_home, _choose):
    [bytes([1]) * 2**20 for _ in range(400)]


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        (lambda home, _choose: 1 / 0, "traceback: ZeroDivisionError: division by zero"),
        (run_away, "hang: "),
        (grow, "memory: "),
        (lambda home, _choose: (home / "prose.txt").write_text("x"), "touched ['prose.txt']"),
        (lambda home, _choose: (home.parent / "beside").write_text("x"), "did "),
        (open_a_pickle, 'did ["pickle.find_class'),
    ],
)
def test_the_harness_finds(what, fault, fuzzer, home):
    before = snapshot(home)
    found = Fuzzer(home, seconds=0.3) if fault == "hang: " else fuzzer
    verdict = found.judge(doing(what), b"spoiled", Random(0))
    (home / "prose.txt").write_bytes(before["prose.txt"] or b"")
    assert verdict.fault.startswith(fault)
    assert snapshot(home) == before


def test_what_cannot_be_used_is_one_kind_of_error():
    for text in ("", "{", "[" * 10**5, "9" * 5000, '"\\ud800"', '{"a": "\\udc00x"}', "\ufeff{}"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
    assert parse_yaml("[" * DEEPEST + "]" * DEEPEST)[0]
    with pytest.raises(ValueError, match=f"nested more than {DEEPEST} levels"):
        parse_yaml("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))
    for text in ("[" * DEEP, "- " * DEEP, "!!python/object:os.system x", "a: *b", "!!bool 3"):
        with pytest.raises(ValueError, match=r"."):
            parse_yaml(text)


def test_references_without_end_are_not_followed(fuzzer):
    recipe = next(target for target in TARGETS if target.name == "recipe")
    for seed in range(3):
        verdict = fuzzer.judge(recipe, BOMB.encode(), Random(seed))
        assert verdict.code == 2
        assert "some of them by reference" in verdict.said


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-that-name/x"])
def test_what_no_path_can_be(name):
    with pytest.raises(UsageError, match="cannot be used as a path"):
        typed_path(name)


def test_a_message_is_some_lines_that_can_be_printed():
    error = UsageError("\n".join(["red \x1b[31m, \u202e, \ud800, é", "x" * 5000, *["more"] * 100]))
    lines = told(error)
    assert lines[0] == "red \ufffd[31m, \ufffd, \ufffd, é"
    assert lines[1] == "x" * LONGEST + "..."
    assert len(lines) == MOST_PROBLEMS + 1
    assert lines[-1] == f"And {102 - MOST_PROBLEMS} more."
