"""Kills and other faults, in short; `benchmarks/faults.py` has them by the hundred, over all commands."""

import signal

import fault_kinds
import pytest
from faulting import COMMANDS, Fault, Place, Trial, Undisturbed, as_lines, try_all, write_inputs

from cli_runner import Disturbance

OVER = "slice, over another output"
NAMES = (OVER, "eval --save")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    write_inputs(root)
    return Place(root)


@pytest.fixture(scope="module")
def wholes(place):
    found = place.undisturbed([command for command in COMMANDS if command.name in NAMES])
    return {whole.command.name: whole for whole in found}


def struck(place: Place, trials: list[Trial]) -> list[Trial]:
    """After a look that nothing is wrong: those that did not end before it came."""
    try_all(place, trials)
    assert as_lines(trials) == []
    return [trial for trial in trials if trial.struck]


def at(place: Place, whole: Undisturbed, events: list[int], number: int = signal.SIGKILL) -> list[Trial]:
    return [Trial(whole, fault_kinds.at_change(event, number), place.folder(whole.before)) for event in events]


def test_killed_while_an_output_is_replaced(place, wholes):
    """At changes from the last part on: the name is the old output's, or the new one's, or waits for a resume."""
    whole = wholes[OVER]
    events = [whole.events - 30, whole.events - 6, whole.events]
    trials = struck(place, at(place, whole, events))
    assert len(trials) == len(events)
    assert {"old", "new"} <= {state for trial in trials for state in trial.states}


def test_killed_while_measures_are_saved(place, wholes):
    whole = wholes["eval --save"]
    trials = struck(place, at(place, whole, [1, whole.events // 2, whole.events]))
    assert len(trials) == 3


def test_the_process_that_reloads_ends_too(place, wholes):
    """Nothing is left of it, neither itself nor its files."""
    whole = wholes[OVER]
    hit = Disturbance(fault_kinds.STARTED, number=signal.SIGTERM, delay=0.5)
    fault = Fault("proof", "0.5 s into the proof", signal.SIGTERM, {"disturbance": hit, "verify": True})
    assert struck(place, [Trial(whole, fault, place.folder(whole.before))])


def test_a_shard_that_is_another_one_is_told(place):
    (whole,) = place.undisturbed([fault_kinds.OWN])
    shard = max(name for name in whole.before if name.endswith(".safetensors"))
    folder = place.folder(whole.before)
    hit = Disturbance(fault_kinds.RECORD, 1, "act", action=("change", shard))
    (ran,) = place.run([place.request(folder, whole.command.words, disturbance=hit)])
    assert ran.code == 1
    assert ran.faults == [f"{shard} has changed during the run. Start over with --overwrite."]
