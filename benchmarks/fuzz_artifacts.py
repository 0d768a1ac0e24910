"""Damaged artifacts of our own through the verbs that read them: each is refused with one message, or does no harm.

A small world is made once: a checkpoint, its calibration, one that was stopped, plans, a result, a comparison, an
allocation with its search, a stopped training. A case damages one file of a copy of it (a value changed, a key lost, a
byte turned, the file cut off, replaced by a folder, a pipe or a file of its kind) and runs a verb that reads it, in a
process forked from one that has loaded everything. It must end with 0, or with 1 and a message behind `error: `, in
time, without a traceback, without a change to what it reads, with nothing half-written. Where it ends with 0 though a
calibration was damaged, the plan must be that of the sound one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 (here, so that no case loads it)
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

import moetailor
from measure import REFERENCE
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor_cli import app

TEXT = ("--sequences", 2, "--length", 24, "--batch-size", 1)
SECONDS, MEMORY = 60, 4 * 2**30
CALIBRATED = {"vocab_size": 4096, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_experts": 8}
TOP_K, HEADS = 2, 2


def planning(method: str, out: str = "new.json") -> tuple:
    """Return the command that plans with a method."""
    return ("plan", "calibration", "-o", out, "--method", method, "--remove", "25%")


PLAN = planning("reap")
COMPARE = (
    "compare", "model", "-o", "comparison", "--calibration", "sound", "--held-out", "text.jsonl", "--methods",
    "reap,mone", "--remove", "25%", "--held-out-sequences", 1, "--length", 16, "--device", "cpu",
)  # fmt: skip
SEARCH = ("allocate", "calibration", "-o", "search.json", "--method", "reap", "--remove", "25%", "--population", 2)
SEARCH += ("--survivors", 1, "--generations", 1, "--samples", 1)
RECOVER = ("recover", "out", "-o", "trained", "--data", "text.jsonl", "--loss", "task", "--length", 16, "--steps", 3)
RECOVER += ("--save-every", 1, "--batch-size", 1, "--device", "cpu")
FIT = ("apply", "model", "mixed.json", "-o", "new", "--calibration", "calibration")
EVALUATE = ("evaluate", "out", "--against", "model", "--data", "text.jsonl", "--sequences", 1, "--length", 16)
# Which verbs read the files that a pattern names.
VERBS: dict[str, list[tuple]] = {
    "calibration/calibration.json": [
        PLAN,
        FIT,
        ("calibrate", "model", "-o", "calibration", "--data", "text.jsonl", *TEXT),
    ],
    "calibration/layer-*": [
        PLAN,
        planning("lightmoe"),
        ("inspect", "model", "--calibration", "calibration"),
    ],
    "calibration/text.safetensors": [
        planning("auto"),
        SEARCH,
        (*FIT, "--propagate", "compressed"),
    ],
    "calibration/sensitivity.json": [(*PLAN, "--allocation", "error")],
    "stopped/*": [("calibrate", "model", "-o", "stopped", "--data", "text.jsonl", *TEXT)],
    "mixed.json": [("show", "mixed.json", "--scores"), ("diff", "mixed.json", "other.json"), FIT],
    "other.json": [("show", "other.json"), ("diff", "mixed.json", "other.json"), (*FIT[:2], "other.json", *FIT[3:])],
    "out/config.json": [("inspect", "out"), EVALUATE, RECOVER],
    "out/moetailor_plan.json": [EVALUATE],
    "out/moetailor_provenance.json": [RECOVER],
    "comparison/results.json": [("report", "comparison")],
    "comparison/comparison.json": [COMPARE],
    "comparison/original.json": [COMPARE],
    "comparison/cells/*": [COMPARE],
    "allocation.json": [(*PLAN, "--allocation", "allocation.json")],
    "search.search.json": [SEARCH],
    "trained.training/settings.json": [RECOVER],
    "trained.training/checkpoint-*/*": [RECOVER],
}
# What a verb may write; all else must stay as it is.
WRITES = {
    "calibrate": "stopped calibration",
    "compare": "comparison",
    "report": "comparison",
    "allocate": "search.json search.search.json",
}
WRITES |= {"recover": "trained trained.training", "plan": "new.json", "apply": "new"}
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 1.5, -0.5, float("nan"), float("inf"), 1e308, 10**9, 2**63, 10**400, "", "x",
    "0", "\x1b[31m", "\ud800", "a\nb", "../../x", "\0", "9" * 5000, [], {}, [[]], [0, 1], {"0": 1}, {"x": {}}, "[red]",
    "é" * 9000,
]  # fmt: skip


def call(arguments: tuple) -> int:
    """Run a verb in this process and return its exit status."""
    before, sys.argv = sys.argv, ["moetailor", *map(str, arguments)]
    try:
        app.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0


class Stop(TrainerCallback):
    """Stops a training before its last step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def make_world(folder: Path) -> None:
    """Write a sound artifact of each kind."""
    config = AutoConfig.for_model(
        "olmoe", **CALIBRATED, num_experts_per_tok=TOP_K, num_attention_heads=HEADS, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
        for tensor in model.parameters():
            tensor.data.mul_(8)  # else its experts give next to nothing
        model.save_pretrained(folder / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / file, folder / "model")
    lines = (REFERENCE / "calibration.jsonl").read_text().splitlines()[:4]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    os.chdir(folder)
    calibrate = ("calibrate", "model", "-o", "calibration", "--data", "text.jsonl", *TEXT, "--sensitivity")
    (folder / "allocation.json").write_text('{"0": 5, "1": "87%"}\n')
    mixed, other = planning("auto", "mixed.json"), planning("mone", "other.json")
    for arguments in (calibrate, mixed, other, SEARCH):
        assert call(arguments) == 0, arguments
    shutil.copytree("calibration", "sound")
    assert call((*FIT[:4], "out", *FIT[5:])) == 0
    assert call(COMPARE) == 0
    shutil.copytree(
        "calibration", "stopped", ignore=shutil.ignore_patterns("calibration.json", "sensitivity.json", "layer-0001*")
    )
    with contextlib.suppress(KeyboardInterrupt):
        examples = moetailor.ExampleOptions(data="text.jsonl", length=16)
        steps = moetailor.RecoveryOptions(steps=3, save_every=1, batch_size=1)
        given: dict[str, Any] = {"examples": examples, "options": steps, "loss": "task", "device": "cpu"}
        moetailor.recover("out", "trained", callbacks=[Stop()], **given)


# Damage


def turn_a_byte(file: Path, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at = draw.randrange(min(len(content), draw.choice([16, 400, 10**9])))
    content[at] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"byte {at} turned"


def cut_off(file: Path, draw: random.Random) -> str:
    size = file.stat().st_size
    os.truncate(file, at := draw.choice([0, 1, 7, 8, size // 2, size - 1, draw.randrange(size)]))
    return f"cut off after {at} of {size}"


def replace(file: Path, draw: random.Random) -> str:
    """Put something else in the place of a file."""
    other = draw.choice(
        ["nothing", "a folder", "a pipe", "a loop", "[]", "null", "{}", "deep", "digits", "UTF-16", "zeros", "sparse"]
    )
    file.unlink()
    if other == "a folder":
        file.mkdir()
    elif other == "a pipe":
        os.mkfifo(file)
    elif other == "a loop":
        file.symlink_to(file)
    elif other == "sparse":
        file.touch()
        os.truncate(file, 2**40)
    elif other != "nothing":
        texts = {"deep": "[" * 10**5, "digits": '{"a": ' + "9" * 10**5 + "}", "UTF-16": '{"a": 1}', "zeros": "\0" * 999}
        file.write_bytes(texts.get(other, other).encode("utf-16" if other == "UTF-16" else "utf-8"))
    return f"{other} in its place"


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Yield where the values of a JSON tree lie."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(one, (*at, key))


def change_json(file: Path, draw: random.Random) -> str:
    """Change, lose, double, rename or move a value."""
    content = json.loads(file.read_text())
    found = list(places(content))
    if not found:
        return turn_a_byte(file, draw)
    # As many high up in the tree as deep in it.
    deep = draw.choice(sorted({len(at) for at in found}))
    *above, key = draw.choice([at for at in found if len(at) == deep])
    parent = content
    for step in above:
        parent = parent[step]
    what = draw.choice(["change", "change", "change", "lose", "double", "rename", "add", "swap"])
    if what == "change":
        parent[key] = draw.choice(
            [*VALUES, lambda old: old * 2, lambda old: [old], lambda old: {"a": old}, lambda old: str(old)]
        )
        what += f" to {str(parent[key])[:20]!r}"
    elif what == "lose":
        del parent[key]
    elif what == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif isinstance(parent, dict):
        other = draw.choice(["", "x", "0", "-1", "99999999999", "experts", "\ud800"])
        parent[other] = copy.deepcopy(parent[key])
        if what == "rename" and other != key:
            del parent[key]
    elif what == "swap":
        other = draw.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    file.write_text(json.dumps(content, default=lambda made: made(1)))
    return f"{what} at {[*above, key]}"


def change_tensors(file: Path, draw: random.Random) -> str:
    """Change the values, dtype, shape or name of a tensor, and write a sound file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    what = draw.choice(["nan", "inf", "one", "lost", "renamed", "flat", "half", "empty", "int", "another"])
    tensor = tensors.pop(name).clone()
    if what in ("nan", "inf", "one"):
        tensor.view(-1)[:1] = 1 if not tensor.is_floating_point() else float(what.replace("one", "1"))
        tensors[name] = tensor
    elif what == "another":
        tensors[name] = tensors[draw.choice(sorted(tensors))].clone() if tensors else tensor
    elif what != "lost":
        made = {"flat": tensor.reshape(-1), "half": tensor.half(), "empty": tensor.reshape(-1)[:0], "int": tensor.int()}
        tensors[name + "x" * (what == "renamed")] = made.get(what, tensor)
    save_file(tensors, file)
    return f"{name} {what}"


def from_elsewhere(file: Path, draw: random.Random) -> str:
    """Put another file of the world with the same ending in its place."""
    world = Path.cwd()
    others = [other for other in sorted(world.rglob("*" + file.suffix)) if other.is_file()]
    content = (other := draw.choice(others)).read_bytes()
    file.write_bytes(content)
    return f"{other.relative_to(world)} in its place"


def damage(file: Path, draw: random.Random) -> str:
    """Damage a file in one of the ways that its kind knows."""
    ways: list[Callable[[Path, random.Random], str]] = [turn_a_byte, cut_off, replace, from_elsewhere]
    more = {".json": change_json, ".safetensors": change_tensors}.get(file.suffix)
    return draw.choice(ways + [more] * (12 if more is change_json else 4) if more else ways)(file, draw)


# A case


@dataclass(frozen=True)
class Ended:
    """How a case ended.

    Attributes:
        case: what was damaged, how, and what read it.
        verdict: ``refused`` and ``harmless`` are good.
        said: the last lines that were printed.
    """

    case: str
    verdict: str
    said: str

    @property
    def good(self) -> bool:
        return self.verdict in ("refused", "harmless")


def run_case(world: Path, seed: int, scratch: Path) -> Ended:
    """Damage a copy of the world, run a verb on it, and judge."""
    draw = random.Random(seed)
    pattern = draw.choice(list(VERBS))
    place = scratch / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place)
    with contextlib.chdir(place):
        file = draw.choice(sorted(place.glob(pattern)))
        how, arguments = damage(file, draw), draw.choice(VERBS[pattern])
        before = state(place)
        code = run_forked(arguments, scratch / "log", SECONDS)
    said = (scratch / "log").read_text(errors="replace")
    verdict = judge(code, said, arguments, before, place)
    if verdict == "harmless" and pattern.startswith(("calibration/", "stopped/")):
        verdict = compared(arguments, world, place, scratch)
    case = f"{file.relative_to(place)}: {how}; {' '.join(map(str, arguments[:8]))}"
    return Ended(f"seed {seed}, {case}", verdict, "\n".join(said.strip().splitlines()[-3:])[-600:])


def run_forked(arguments: tuple, log: Path, seconds: float) -> int | None:
    """Run a verb in a forked child; return its exit status, negative for a signal, None when it had to be killed."""
    child = os.fork()
    if not child:
        code = 99
        try:
            os.setsid()
            with open(log, "wb") as out, open(os.devnull) as nothing:
                for number, stream in enumerate((nothing, out, out)):
                    os.dup2(stream.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
            size = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            code = call(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def state(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes; pipes and what is too large to read by their kind alone."""
    found = {}
    for file in folder.rglob("*"):
        plain = file.is_file() and not file.is_symlink() and file.stat().st_size < 2**30
        if plain or not file.is_dir():
            found[str(file.relative_to(folder))] = file.read_bytes() if plain else b""
    return found


def judge(code: int | None, said: str, arguments: tuple, before: dict[str, bytes], place: Path) -> str:
    """Say how a verb ended by what it printed and what it left."""
    if code is None or code < 0:
        return "hang" if code is None else f"crash by signal {-code}"
    if code == 99 or "Traceback (most recent call last)" in said:
        return "traceback"
    if code not in (0, 1):
        return f"exit status {code}"
    if code == 1 and "error: " not in said:
        return "silent"
    writes = WRITES.get(arguments[0], "").split()
    after = state(place)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if other := [name for name in changed if name.split("/")[0].removesuffix(".log") not in writes]:
        return f"changed {other[0]}"
    if code == 1 and (left := [name for name in changed if name.startswith("new") or ".partial" in name]):
        return f"left {left[0]}"
    return "refused" if code else "harmless"


def compared(arguments: tuple, world: Path, place: Path, scratch: Path) -> str:
    """Say whether a damaged calibration gave what the sound one gives."""
    if arguments[0] == "calibrate":
        out = arguments[3]
        files = [file.name for file in (world / "sound").iterdir() if file.name.startswith(("layer", "text"))]
        same = all((place / out / name).read_bytes() == (world / "sound" / name).read_bytes() for name in files)
    elif arguments[0] == "plan":
        sound = scratch / f"sound-{hash(arguments)}.json"
        if not sound.exists():
            with contextlib.chdir(world):
                run_forked(tuple(sound if word == "new.json" else word for word in arguments), scratch / "log", SECONDS)
        same = layers_of(place / "new.json") == layers_of(sound)
    else:
        same = True
    return "harmless" if same else "other numbers"


def layers_of(plan: Path) -> dict:
    return json.loads(plan.read_text())["layers"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others count up")
    parser.add_argument("--world", type=Path, help="folder to keep the world in, for more runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="moetailor-fuzz-") as made:
        scratch = Path(made)
        world = (options.world or scratch / "world").resolve()
        if not world.exists():
            world.mkdir(parents=True)
            with contextlib.chdir(world):
                make_world(world)
        verdicts = Counter()
        for seed in range(options.seed, options.seed + options.count):
            ended = run_case(world, seed, scratch)
            verdicts[ended.verdict.split(" ")[0]] += 1
            if not ended.good:
                print(f"{ended.verdict}: {ended.case}\n  {ended.said}".replace("\n", "\n  "), flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    sys.exit(any(verdict not in ("refused", "harmless") for verdict in verdicts))


if __name__ == "__main__":
    main()
