"""Commands that are killed, run out of disk, lose their inputs or meet another run: what is left, and how it goes on.

    python benchmarks/faults.py --kills 200 --others 200 --seed 1 --processes 2 --write docs/reliability.md

Every command runs in a fork of a process that has torch imported, on models of a few thousand weights. A kill (SIGKILL,
SIGTERM or SIGINT) comes at a change of a file, at any moment, in the midst of a file, or while a clean process reloads
what was written; a third of the runs are killed again while they go on. `--write` replaces the text between the marks.
Exits with 1 if anything was lost, half written or left elsewhere, or if a run could not be gone on with.
"""

import argparse
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import marked

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fault_kinds
from faulting import COMMANDS, Place, Trial, Undisturbed, as_lines, try_all, try_pairs, write_inputs

AT_ONCE = 40  # trials: their folders lie on the disk together
COLUMNS = ["", "struck", "output absent", "old", "new", "half", "lost", "left elsewhere", "processes left"]
COLUMNS += ["then identical", "after a refusal", "wrong"]


def row(label: str, trials: Sequence[Trial]) -> list[str]:
    """Numbers of trials, but for those of states, which are of kills and faults."""
    states, endings = Counter(state for trial in trials for state in trial.states), Counter(t.ending for t in trials)
    found = [trial.found for trial in trials if trial.found is not None]
    numbers = [
        sum(trial.struck for trial in trials),
        *(states[state] for state in ("absent", "old", "new", "half")),
        sum(each.lost for each in found),
        sum(bool(each.litter) for each in found),
        sum(trial.left for trial in trials),
        endings["identical"] + endings["was whole"],
        endings["refused, then identical"],
        sum(bool(trial.faults) for trial in trials),
    ]
    return [label, *map(str, numbers)]


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *(f"| {' | '.join(each)} |" for each in rows)]
    return "\n".join(lines) + "\n"


class Bench:
    def __init__(self, place: Place, rng: random.Random) -> None:
        self.place = place
        self.rng = rng
        self.wholes = place.undisturbed(COMMANDS)
        (self.own,) = place.undisturbed([fault_kinds.OWN])
        self.notes: list[str] = []
        self.trials: list[Trial] = []

    def tried(self, trials: list[Trial]) -> list[Trial]:
        self.trials += trials
        for line in as_lines(trials):
            print(f"WRONG {line}", flush=True)
        print(f"{sum(each.struck for each in self.trials)} struck in {len(self.trials)} runs", flush=True)
        return trials

    def kills(self, count: int) -> list[Trial]:
        """Until so many have struck: a run may end before its kill."""
        done: list[Trial] = []
        while (missing := count - sum(trial.struck for trial in done)) > 0:
            turn = len(done) % len(self.wholes)
            wholes = [*self.wholes[turn:], *self.wholes[:turn]]
            trials = fault_kinds.killed(self.place, wholes, min(missing, AT_ONCE), self.rng)
            try_all(self.place, trials)
            done += self.tried(trials)
        return done

    def others(self, count: int) -> list[Trial]:
        """A quarter each of disks that fail, inputs that change, damaged runs, and all else."""
        share, rng, place = max(1, count // 8), self.rng, self.place
        builders = [whole for whole in self.wholes if whole.command.builds]
        slices, on_disk = self.of("slice"), self.of("slice, activations on disk")
        kinds: list[Callable[[], list[Trial]]] = [
            lambda: fault_kinds.small_disks(place, slices, share),
            lambda: fault_kinds.small_disks(place, on_disk, share),
            lambda: fault_kinds.failing_disks(place, self.wholes, 2 * share, rng),
            lambda: fault_kinds.changed_inputs(place, self.own, share, rng),
            lambda: fault_kinds.damaged(place, slices, share, rng),
            lambda: fault_kinds.damaged(place, self.of("slim, packed with an adapter"), share, rng),
        ]
        done: list[Trial] = []
        for draw in kinds:
            trials = draw()
            try_all(place, trials)
            done += self.tried(trials)
        return done + self.pairs(builders, share) + self.full_disks([slices, on_disk])

    def pairs(self, wholes: Sequence[Undisturbed], count: int) -> list[Trial]:
        trials, options = fault_kinds.pairs(self.place, wholes, count, self.rng)
        try_pairs(self.place, trials, options)
        return self.tried(trials)

    def full_disks(self, wholes: Sequence[Undisturbed]) -> list[Trial]:
        try:
            trials = [trial for whole in wholes for trial in fault_kinds.full_disks(self.place, whole)]
        except OSError as error:
            self.notes.append(f"Disks that somebody else fills were left out: {error.strerror}.")
            return []
        try:
            try_all(self.place, trials)
        finally:
            self.place.unmount()
        return self.tried(trials)

    def of(self, name: str) -> Undisturbed:
        return next(whole for whole in self.wholes if whole.command.name == name)


def report(bench: Bench, killed: Sequence[Trial], others: Sequence[Trial], command: str) -> str:
    names = [whole.command.name for whole in bench.wholes]
    by_command = [row(name, [trial for trial in killed if trial.whole.command.name == name]) for name in names]
    kinds = list(dict.fromkeys(trial.fault.kind for trial in others))
    by_kind = [row(kind, [trial for trial in others if trial.fault.kind == kind]) for kind in kinds]
    signals = Counter(signal.Signals(t.fault.number).name for t in killed if t.fault.number is not None)
    sent = ", ".join(f"{count} {name}" for name, count in signals.most_common())
    versions = f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    notes = "".join(f"\n{note}\n" for note in bench.notes)
    return (
        f"Date: {date.today().isoformat()}. {versions}, {os.cpu_count()} cores.\n\n    {command}\n\n"
        f"Kills, by command (first signals: {sent}):\n\n{table([*by_command, row('all', killed)])}\n"
        f"Other faults:\n\n{table([*by_kind, row('all', others)])}{notes}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many have to strike")
    parser.add_argument("--others", type=int, default=200, help="about how many other faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--write", type=Path, help="the file with the marks")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        write_inputs(Path(root))
        bench = Bench(Place(Path(root), options.processes), random.Random(options.seed))
        killed = bench.kills(options.kills) if options.kills else []
        others = bench.others(options.others) if options.others else []
    text = report(bench, killed, others, f"python benchmarks/faults.py {' '.join(sys.argv[1:])}")
    print(text)
    print(f"{time.monotonic() - start:.0f} seconds")
    if options.write is not None:
        marked.write(text, options.write, "kills and faults")
    wrong = as_lines(bench.trials)
    print("\n".join(wrong))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
