"""What can befall a command: kills at any moment, disks that are full or fail, inputs and run folders that change.

Each function draws trials for `faulting.try_all`.
"""

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faulting import PARTIAL, SLICE, TEXT, Command, Fault, Place, Trial, Undisturbed

from cli_runner import Disturbance, act

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
LONGEST = 12.0  # seconds into a command: what comes later is the same again
TOLD = 1000  # bytes of messages
PROOF = 4.0  # seconds that a clean process is given before it is killed
STARTED = "subprocess:Popen.communicate"
SAVING = "compress.io:save_file"
RECORD = "compress.checkpoints.run_folder:RunFolder.record"

# A command whose inputs lie in its own folder, to be changed there.
OWN_INPUTS = ("llama", "text.txt")
OWN = Command(
    "slice, its inputs changed",
    [*SLICE, "--model", "llama", "--calib", "text.txt", *TEXT[2:], "--device", "cpu", "--out", "out", "--json"],
    inputs=OWN_INPUTS,
)


# Kills.


def killed(place: Place, wholes: Sequence[Undisturbed], count: int, rng: random.Random) -> list[Trial]:
    """As many for each command, within one; a third of them killed again, a tenth really reloaded in the end."""
    trials = []
    for number in range(count):
        whole = wholes[number % len(wholes)]
        again = [draw_again(whole, rng) for _ in range(rng.choice([0, 0, 0, 0, 1, 2]))]
        folder = place.folder(whole.before)
        trials.append(Trial(whole, draw_kill(whole, rng), folder, again, really_reloaded=rng.random() < 0.1))
    return trials


def draw_kill(whole: Undisturbed, rng: random.Random) -> Fault:
    """At a change of a file, at any time, in the midst of a file, or while a clean process reloads what was written."""
    number = int(rng.choice(SIGNALS))
    kind = rng.choices(["change", "time", "proof", "torn"], [40, 35, 15, 10])[0]
    if kind == "proof" and whole.command.builds:
        hit = Disturbance(STARTED, number=number, delay=rng.uniform(0.01, PROOF))
        return Fault(kind, f"{hit.delay:.2f} s into the proof", number, {"disturbance": hit, "verify": True})
    if kind == "torn" and whole.command.builds:
        hit = Disturbance(SAVING, rng.randint(1, 10), "tear")
        return Fault(kind, f"within file {hit.call}", signal.SIGKILL, {"disturbance": hit})
    if kind == "time":
        seconds = rng.uniform(0, min(whole.seconds, LONGEST))
        return Fault(kind, f"after {seconds:.2f} s", number, {"signal_after": seconds, "number": number})
    return at_change(rng.randint(1, whole.events), number)


def draw_again(whole: Undisturbed, rng: random.Random) -> Fault:
    """A resumed run is shorter, and its first changes are the ones that matter."""
    return at_change(min(rng.randint(1, whole.events), rng.randint(1, whole.events)), int(rng.choice(SIGNALS)))


def at_change(event: int, number: int = signal.SIGKILL) -> Fault:
    return Fault("change", f"at change {event}", int(number), {"write_event": event, "number": int(number)})


# Disks.


def small_disks(place: Place, whole: Undisturbed, count: int) -> list[Trial]:
    """No file may grow beyond a limit; the limits are spread evenly over the files' sizes."""
    largest = max(len(content) for content in whole.after.values() if content)
    # What is said of it must go into a file too.
    limits = [TOLD + (largest - TOLD) * number // count for number in range(count)]
    return [
        Trial(whole, Fault("disk full", f"beyond {limit} bytes", None, {"max_file_bytes": limit}), place.folder())
        for limit in limits
    ]


FAILING = {
    "disk full": ("full", ["os:fsync", "pathlib:Path.replace", SAVING, "shutil:copyfile", "pathlib:Path.write_text"]),
    "disk sealed": ("sealed", ["pathlib:Path.mkdir", "pathlib:Path.rename", "pathlib:Path.unlink", "os:open"]),
    "disk broken": (
        "broken",
        ["compress.models.tensor_files:safe_open", "pathlib:Path.read_bytes", "pathlib:Path.read_text", "os:fsync"],
    ),
}


def failing_disks(place: Place, wholes: Sequence[Undisturbed], count: int, rng: random.Random) -> list[Trial]:
    """The system refuses one call: of those that write, of those that change names, of those that read."""
    trials = []
    for _ in range(count):
        whole, kind = rng.choice(wholes), rng.choice(list(FAILING))
        how, targets = FAILING[kind]
        hit = Disturbance(rng.choice(targets), rng.randint(1, 12), how)
        fault = Fault(kind, f"at call {hit.call} of {hit.target}", None, {"disturbance": hit})
        trials.append(Trial(whole, fault, place.folder(whole.before)))
    return trials


def full_disks(place: Place, whole: Undisturbed) -> list[Trial]:
    """A small disk is filled by somebody else when a part is finished, and freed again. Raises OSError without root."""
    trials = []
    for part in range(1, 6):
        hit = Disturbance(RECORD, part, "act", action=("fill", "../filler"))
        fault = Fault("disk filled", f"with part {part}", None, {"disturbance": hit}, free_disk)
        trials.append(Trial(whole, fault, place.disk("32m")))
    return trials


def free_disk(folder: Path) -> None:
    (folder.parent / "filler").unlink()


# Several runs on one output.


def pairs(place: Place, wholes: Sequence[Undisturbed], count: int, rng: random.Random) -> tuple[list[Trial], list[Any]]:
    """Two runs that start at most a run's length apart, the second with any options; and these options."""
    trials, options = [], []
    for number in range(count):
        whole = wholes[number % len(wholes)]
        options.append(rng.choice([[], ["--overwrite"], ["--resume"], ["--resume", "--overwrite"]]))
        later = rng.choice([0.0, rng.uniform(0, whole.seconds), rng.uniform(0.8, 1.2) * whole.seconds])
        moment = f"{later:.2f} s apart, {' '.join(options[-1]) or 'no option'}"
        trials.append(
            Trial(whole, Fault("two runs", moment, None, {"starts_after": later}), place.folder(whole.before))
        )
    return trials, options


# Files that change under the run.


def changed_inputs(place: Place, whole: Undisturbed, count: int, rng: random.Random) -> list[Trial]:
    """A shard or the text is removed, cut or changed, or the unfinished run is removed, when a part is finished."""
    files = [name for name in whole.before if name == "text.txt" or name.endswith(".safetensors")]
    trials = []
    for _ in range(count):
        verb, name = rng.choice(["remove", "change", "remove", "change", "truncate"]), rng.choice(files)
        if rng.random() < 0.15:
            verb, name = "remove", PARTIAL
        hit = Disturbance(RECORD, rng.randint(1, 5), "act", action=(verb, name))
        kind = "unfinished run removed" if name == PARTIAL else "input changed"
        fault = Fault(kind, f"{verb} {name} with part {hit.call}", None, {"disturbance": hit})
        trials.append(Trial(whole, fault, place.folder(whole.before)))
    return trials


# What a killed run has left, damaged before the next.


def damaged(place: Place, whole: Undisturbed, count: int, rng: random.Random) -> list[Trial]:
    """Killed after a part; then its run.json, or another file of the unfinished run, is not what it was."""
    trials = []
    for number in range(count):
        part, seed = rng.randint(1, 5), rng.randrange(2**32)
        hurts_record = number % 2 == 0
        fault = Fault(
            "run.json damaged" if hurts_record else "unfinished run damaged",
            f"after part {part} (seed {seed})",
            int(signal.SIGKILL),
            {"disturbance": Disturbance(RECORD, part, after=True)},
            damaging(damage_record if hurts_record else damage_file, seed),
        )
        trials.append(Trial(whole, fault, place.folder(whole.before)))
    return trials


def damaging(damage: Callable[[Path, random.Random], None], seed: int) -> Callable[[Path], None]:
    return lambda folder: damage(folder / PARTIAL, random.Random(seed))


def damage_record(partial: Path, rng: random.Random) -> None:
    """run.json is cut, a bit of it flipped, or a stretch of it noise."""
    file = partial / "run.json"
    if not file.is_file():
        return
    content, place = file.read_bytes(), rng.randrange(file.stat().st_size)
    end = {"cut": b"", "flip": bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]}
    end["noise"] = rng.randbytes(9) + content[place + 9 :]
    file.write_bytes(content[:place] + end[rng.choice(list(end))])


def damage_file(partial: Path, rng: random.Random) -> None:
    """Any file is removed, cut or changed, or its time is of another century."""
    files = sorted(file for file in partial.rglob("*") if file.is_file() and file.stat().st_size > 2)
    file, verb = rng.choice(files), rng.choice(["remove", "truncate", "change", "clock"])
    if verb == "clock":
        for each in files:
            os.utime(each, times=(rng.choice([0, 4_000_000_000]),) * 2)
    else:
        act(verb, str(file))
