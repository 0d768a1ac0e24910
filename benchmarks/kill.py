"""SIGKILL at random moments: a rerun ends with the same bytes, and nothing half-written passes for finished.

Each of `moetailor calibrate --stream` and `moetailor apply` is killed ten times, seven times between the end of its
first and of its last layer or shard and three times anywhere in its run, and then run to its end. After each kill a
calibration folder must be refused by `Calibration.open` and the folder of `apply` must not exist; after each rerun
every file except log.jsonl must have the SHA-256 it has after a run that nobody stopped.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import moetailor
from measure import apply_command, calibrate_command, hashes, plan_command, run_process
from moetailor.checkpoint.files import open_checkpoint

UNHASHED = ("log.jsonl",)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command that can be killed.

    Attributes:
        name: of the stage.
        command: what to run.
        out: its result.
        progress: returns how far it has come, in layers or bytes.
        first: progress when the first layer or shard is complete.
        last: progress when all of them are.
        unit: what progress counts.
        finished: whether the result takes itself for complete.
    """

    name: str
    command: list[str]
    out: Path
    progress: Callable[[], int]
    first: int
    last: int
    unit: str
    finished: Callable[[], bool]

    def clean(self) -> None:
        """Delete the result and what a kill left of it."""
        for folder in (self.out, partial(self.out)):
            shutil.rmtree(folder, ignore_errors=True)


def partial(out: Path) -> Path:
    """Return where `apply` writes before it renames."""
    return out.with_name(out.name + ".partial")


def calibration_stage(checkpoint: Path, out: Path, tokens: int) -> Stage:
    """Return `calibrate --stream` over a few short sequences."""

    def finished() -> bool:
        try:
            moetailor.Calibration.open(out)
        except moetailor.CalibrationError:
            return False
        return True

    layers = open_checkpoint(checkpoint).config["num_hidden_layers"]
    return Stage(
        name="calibrate",
        command=calibrate_command(checkpoint, out, tokens=tokens, batch_tokens=tokens // 2, length=256),
        out=out,
        progress=lambda: len(list(out.glob("layer-*.safetensors"))),
        first=1,
        last=layers,
        unit="layers",
        finished=finished,
    )


def apply_stage(checkpoint: Path, calibration: Path, work: Path, method: str, remove: str) -> Stage:
    """Return `apply` of a plan that is made here."""
    plan, out = work / "plan.json", work / "compressed"
    run_process(plan_command(calibration, plan, method, remove))
    made = moetailor.Plan.load(plan)
    # Shards keep their order, so all but the first of them are what is left of the result after the first one.
    first_shard = open_checkpoint(checkpoint).shards[0].stat().st_size

    def progress() -> int:
        return sum(file.stat().st_size for file in partial(out).glob("*.safetensors"))

    return Stage(
        name="apply",
        command=apply_command(checkpoint, plan, out, calibration),
        out=out,
        progress=progress,
        first=min(first_shard, made.nbytes // 2),
        last=made.nbytes,
        unit="bytes",
        finished=out.exists,
    )


def kill_and_rerun(stage: Stage, moment: Callable[[float], bool], expected: dict[str, str]) -> tuple[bool, bool, str]:
    """Kill a run and rerun it; return whether the kill fell inside, whether all went well, and a line that says it."""
    stage.clean()
    killed = run_process(stage.command, stop=moment, poll=0.005)
    reached = stage.progress()
    was_killed, finished = killed.status == -signal.SIGKILL, stage.finished()
    inside = was_killed and stage.first <= reached < stage.last
    again = None if finished else run_process(stage.command)
    same = hashes(stage.out, without=UNHASHED) == expected and not partial(stage.out).exists()
    line = (
        f"{stage.name:9} {'killed' if was_killed else 'ended'} after {killed.seconds:6.1f} s, "
        f"{reached:,} of {stage.last:,} {stage.unit}{' (inside)' if inside else ''}; "
        + ("taken for finished" if again is None else f"not taken for finished, rerun took {again.seconds:.1f} s")
        + f"; {'same bytes' if same else 'OTHER BYTES'}"
    )
    return inside, same and not (inside and finished), line


def moments(stage: Stage, seconds: float, kills: int, draw: random.Random) -> list[Callable[[float], bool]]:
    """Return when to kill: seven times in ten once a random progress is reached, else at a random time."""
    return [
        at_progress(stage, draw.randrange(stage.first, stage.last), draw.random() * seconds / 30)
        if number % 10 < 7
        else at_time(draw.random() * seconds)
        for number in range(kills)
    ]


def at_progress(stage: Stage, target: int, delay: float) -> Callable[[float], bool]:
    """Kill `delay` seconds after the progress was reached."""
    reached: list[float] = []

    def stop(seconds: float) -> bool:
        if not reached and stage.progress() >= target:
            reached.append(seconds)
        return bool(reached) and seconds >= reached[0] + delay

    return stop


def at_time(target: float) -> Callable[[float], bool]:
    """Kill some seconds after the start."""
    return lambda seconds: seconds >= target


def torture(stage: Stage, kills: int, seed: int) -> bool:
    """Run a stage once undisturbed, then kill it again and again; print a line for each kill."""
    stage.clean()
    whole = run_process(stage.command)
    expected = hashes(stage.out, without=UNHASHED)
    print(f"{stage.name:9} undisturbed: {whole.seconds:.1f} s, {len(expected)} files", flush=True)
    inside, well = 0, True
    for moment in moments(stage, whole.seconds, kills, random.Random(f"{stage.name} {seed}")):
        fell_inside, went_well, line = kill_and_rerun(stage, moment, expected)
        inside, well = inside + fell_inside, well and went_well
        print(line, flush=True)
    print(f"{stage.name:9} {kills} kills, {inside} inside, {'all well' if well else 'FAILED'}", flush=True)
    return well and inside >= kills * 6 // 10


def main() -> int:
    """Parse the arguments and kill both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="from make_checkpoint.py, several shards")
    parser.add_argument("workdir", type=Path, metavar="WORKDIR", help="for results; needs the checkpoint's size free")
    parser.add_argument("--kills", type=int, default=10, help="kills of each stage (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of calibration (default %(default)s)")
    parser.add_argument("--method", default="mone", help="method of the plan that is applied (default %(default)s)")
    parser.add_argument("--remove", default="25%", help="share of experts it removes (default 25%%)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default %(default)s)")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    calibration = options.workdir / "calibration"
    well = torture(calibration_stage(options.checkpoint, calibration, options.tokens), options.kills, options.seed)
    applied = apply_stage(options.checkpoint, calibration, options.workdir, options.method, options.remove)
    well = torture(applied, options.kills, options.seed) and well
    applied.clean()
    shutil.rmtree(calibration)
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
