"""SIGKILL at random moments of every verb that writes: the same command again ends as if nobody had stopped it.

Each run is a child of this process, which has loaded everything: no kill is lost on imports. Half of the kills come at
a random time of the run, the other half in front of a random step of it, a call that changes the disk. What a kill
leaves must not pass for finished: a result is absent, the earlier one, or whole. Then the same command is given again,
and every file in the place of the results, hidden ones too, must have the bytes that it has after an undisturbed run.

Times differ from run to run: logs and report.html are not compared, JSON without the entries of `TIMES`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import torch
import transformers.trainer  # noqa: F401

import moetailor.report  # noqa: F401
from measure import REFERENCE, ROOT
from moetailor_cli import app

sys.path.append(str(ROOT / "tests"))
from support.kills import count_steps, die_at

# Keys whose values are times, or follow from them, and what is noted once a run is whole: a kill may come before that.
TIMES = {
    "seconds",
    "calibrate_seconds",
    "tokens_per_second",
    "speed",
    "prefill",
    "decode",
    "prefill_low",
    "decode_low",
    "settings",
}
UNREAD = ("log.jsonl", "report.html")
# Whole at every moment, and with more in it later.
GROWING = (".search.json", "calibration.json", "run.json")
TEXT = ("--data", "{model}/calibration.jsonl", "--sequences", "4", "--length", "64", "--batch-size", "2")
HELD_OUT = "{model}/heldout.jsonl"
PLAN = ("plan", "{made}/calib", "--method", "mone", "--remove", "25%", "-o")
COMPARE = ("compare", "{model}", *TEXT, "--held-out", HELD_OUT, "--held-out-sequences", "2", "--methods", "mone,reap")
# What later verbs start from, in {made}.
MADE = (
    ("calibrate", "{model}", "-o", "{made}/calib", *TEXT),
    (*PLAN, "{made}/plan.json"),
    ("compress", "{model}", "-o", "{made}/small", *TEXT, "--method", "mone", "--remove", "50%"),
    (*COMPARE, "--remove", "25%", "-o", "{made}/compared"),
)


@dataclass(frozen=True)
class Verb:
    """A command that writes into {run}.

    Attributes:
        name: of the command.
        words: the command.
        given: what lies in {run} before, by name: a folder or file of {made}.
        again: the second run may be refused with this where the first had finished.
    """

    name: str
    words: tuple[str, ...]
    given: tuple[tuple[str, str], ...] = ()
    again: str = ""


APPLY = ("apply", "{model}", "{made}/plan.json", "-o", "{run}/out", "--calibration", "{made}/calib")
TRAIN = "--loss both --train router,standins --steps 6 --save-every 2 --length 64 --batch-size 2".split()
SEARCH = "--method reap --remove 25% --population 4 --generations 3 --survivors 2 --samples 1".split()
EXISTS = "exists; choose another folder or pass --overwrite"
FIT = ("--memory", "11MB", "--engine", "vllm", "--context", "128", "--choice", "2")
VERBS = (
    Verb("calibrate", ("calibrate", "{model}", "-o", "{run}/calib", *TEXT, "--sensitivity", "--residual")),
    Verb("calibrate --stream", ("calibrate", "{model}", "-o", "{run}/calib", *TEXT, "--sensitivity", "--stream")),
    Verb("plan", (*PLAN, "{run}/plan.json")),
    Verb("plan again", (*PLAN, "{run}/plan.json", "-p", "score=exact"), (("plan.json", "plan.json"),)),
    Verb("apply", APPLY, again=EXISTS),
    Verb("apply --propagate", (*APPLY, "--propagate", "compressed"), again=EXISTS),
    Verb("apply --overwrite", (*APPLY, "--overwrite"), (("small", "out"),)),
    Verb("compress", ("compress", "{model}", "-o", "{run}/out", *TEXT, "-m", "reap", "--remove", "25%"), again=EXISTS),
    Verb(
        "recover",
        ("recover", "{made}/small", "--teacher", "{model}", *TEXT[:2], *TRAIN, "-o", "{run}/out"),
        again=EXISTS,
    ),
    Verb(
        "evaluate",
        ("evaluate", "{made}/small", "--against", "{model}", "--data", HELD_OUT, *TEXT[2:], "--json", "{run}/s.json"),
    ),
    Verb("compare", (*COMPARE, "--remove", "25%,50%", "-o", "{run}/compared")),
    Verb("compare --stream", (*COMPARE, "--remove", "25%,50%", "--stream", "-o", "{run}/compared")),
    Verb("allocate", ("allocate", "{made}/calib", *SEARCH, "-o", "{run}/alloc.json")),
    Verb("fit", ("fit", "{model}", *FIT, *TEXT[:2], "--held-out", HELD_OUT, "-o", "{run}/out")),
    Verb("report", ("report", "{run}/compared"), (("compared", "compared"),)),
)


@dataclass(frozen=True)
class Ended:
    """What became of a run: exit code (negative for a signal), seconds, steps, and what it said."""

    code: int
    seconds: float
    steps: int
    said: str


@dataclass(frozen=True)
class Bench:
    """Where runs happen.

    Attributes:
        model: the original.
        work: folder for everything.
    """

    model: Path
    work: Path

    def words(self, words: tuple[str, ...]) -> list[str]:
        """Return a command with its places."""
        places = {"model": self.model, "made": self.work / "made", "run": self.work / "run"}
        return [word.format(**places) for word in words]

    def make(self) -> None:
        """Make what the verbs start from."""
        (self.work / "made").mkdir(parents=True)
        (self.work / "tmp").mkdir()
        for words in MADE:
            ended = self.run(words)
            if ended.code:
                raise SystemExit(f"{' '.join(self.words(words))}: {ended.said}")

    def begin(self, verb: Verb) -> None:
        """Lay out what lies in the place of the results before a command."""
        shutil.rmtree(self.work / "run", ignore_errors=True)
        (self.work / "run").mkdir()
        for name, place in verb.given:
            given = self.work / "made" / name
            copy: Callable = shutil.copytree if given.is_dir() else shutil.copy
            copy(given, self.work / "run" / place)

    def run(self, words: tuple[str, ...], *, at: float = 0.0, step: int = 0) -> Ended:
        """Run a command in a child, to its end, or until it is killed some seconds or steps after its begin."""
        began, log, steps = time.perf_counter(), self.work / "said", self.work / "steps"
        child = os.fork()
        if child == 0:
            code = 70
            try:
                # torch makes the pool of a child anew at its first use, which must not be by two threads at once.
                torch.set_num_threads(1)
                _silence(log)
                tempfile.tempdir = str(self.work / "tmp")
                die_at(step) if step else count_steps(steps)
                code = _main(["moetailor", *self.words(words)])
            finally:
                os._exit(code)
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if at and time.perf_counter() - began > at:
                os.kill(child, signal.SIGKILL)
                at = 0.0
            time.sleep(0.001)
        _, status = os.waitpid(child, 0)
        counted = int(steps.read_text() or 0) if steps.exists() else 0
        said = " ".join(log.read_text(errors="replace").split())
        return Ended(os.waitstatus_to_exitcode(status), time.perf_counter() - began, counted, said)

    def found(self) -> dict[str, str]:
        """Return what stands for each file in the place of the results: a hash of what does not depend on times."""
        folder = self.work / "run"
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
        return {name: _hash(path) for name, path in files.items()}


def torture(bench: Bench, verb: Verb, kills: int, seed: int) -> list[str]:
    """Run a verb undisturbed, then kill it again and again; print a line for each, return what went wrong."""
    bench.begin(verb)
    before = bench.found()
    whole = bench.run(verb.words)
    expected, draw, wrong = bench.found(), random.Random(f"{verb.name} {seed}"), []
    if whole.code:
        return [f"{verb.name}: {whole.said}"]
    print(f"{verb.name:18} undisturbed: {whole.seconds:.1f} s, {whole.steps} steps, {len(expected)} files", flush=True)
    for number in range(kills):
        by_step = number % 2 == 1
        moment = {"step": draw.randint(1, whole.steps)} if by_step else {"at": draw.random() * whole.seconds}
        bench.begin(verb)
        killed = bench.run(verb.words, **moment)
        faults = [] if killed.code == -signal.SIGKILL or killed.code == 0 else [f"ended with {killed.said}"]
        faults += _half_written(bench.found(), before, expected)
        again = bench.run(verb.words)
        if again.code and not (verb.again and verb.again in again.said):
            faults.append(f"the second run ended with {again.code}: {again.said[-300:]}")
        faults += _differences(bench.found(), expected)
        faults += [f"left in the temporary folder: {path.name}" for path in (bench.work / "tmp").iterdir()]
        when = f"step {moment['step']}" if by_step else f"{moment['at']:.2f} s"
        done = "killed" if killed.code else "ended before"
        print(f"{verb.name:18} {done} at {when}: {'; '.join(faults) or 'the same'}", flush=True)
        wrong += [f"{verb.name}, seed {seed}, {when}: {fault}" for fault in faults]
    return wrong


def _half_written(found: dict[str, str], before: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Name results that a kill left neither absent, nor as they were, nor whole."""
    faults = []
    for name, content in found.items():
        whole = (before.get(name), expected.get(name, content))
        if content not in whole and not name.endswith(GROWING):
            faults.append(f"half of {name}")
    for out in {name.split("/")[0] for name in expected} & {"out"}:
        here = {name: content for name, content in found.items() if name.split("/")[0] == out}
        if here and here not in ({n: c for n, c in of.items() if n.split("/")[0] == out} for of in (before, expected)):
            faults.append(f"a part of {out}")
    return faults


def _differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Name the files that are not as after an undisturbed run."""
    faults = [f"{name} is left" for name in found.keys() - expected.keys()]
    faults += [f"{name} is missing" for name in expected.keys() - found.keys()]
    return faults + [f"{name} differs" for name in found.keys() & expected.keys() if found[name] != expected[name]]


def _hash(file: Path) -> str:
    """Return a hash of a file, of what in it is no time."""
    content = file.read_bytes()
    if file.name in UNREAD or file.suffix == ".log":
        return "not compared"
    if file.suffix == ".json":
        try:
            content = json.dumps(_timeless(json.loads(content))).encode()
        except ValueError:
            pass
    return hashlib.sha256(content).hexdigest()


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _timeless(value) for name, value in content.items() if name not in TIMES}
    return [_timeless(value) for value in content] if isinstance(content, list) else content


def _silence(log: Path) -> None:
    handle = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    # A test has put others in their places.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def _main(words: list[str]) -> int:
    sys.argv = words
    try:
        app.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> int:
    """Parse the arguments and kill every verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REFERENCE, help="an original with its texts (default: reference)")
    parser.add_argument("--workdir", type=Path, help="a folder for results (default: a temporary one)")
    parser.add_argument("--kills", type=int, default=8, help="kills of each verb (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default %(default)s)")
    parser.add_argument("--verbs", help="some of them, with commas (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = options.verbs.split(",") if options.verbs else [verb.name for verb in VERBS]
    with tempfile.TemporaryDirectory(dir=options.workdir) as work:
        bench = Bench(options.model.resolve(), Path(work))
        bench.make()
        wrong = [
            fault
            for verb in VERBS
            if verb.name in chosen
            for fault in torture(bench, verb, options.kills, options.seed)
        ]
    print("\n".join(wrong) or f"{options.kills * len(chosen)} kills, all well")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
