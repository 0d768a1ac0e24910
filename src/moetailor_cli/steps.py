"""What comes next: for each verb one line that names what it made and the command that goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

Given = Mapping[str, Any]

# Their dry run prints what would run: it is asked for to be copied.
COMMANDS = ("serve", "lm_eval")
AGAIN = "next: the same command without --dry-run"


def following(verb: str, given: Given) -> str | None:
    """Return the line; None where a verb has nothing to go on from.

    Args:
        verb: the verb, which ended well.
        given: its arguments and options by name.
    """
    if given.get("json") is True or given.get("ranking"):
        return None  # for a program
    if given.get("dry_run") and verb not in COMMANDS:
        return AGAIN if given.get("json") else f"nothing was made; {AGAIN}"
    return STEPS[verb](given)


def _word(given: object) -> str:
    return quote(str(given))


def _inspect(given: Given) -> str:
    return f"next: moetailor fit {_word(given['model'])} --memory 24GB"


def _calibrate(given: Given) -> str:
    out = _word(given["out"])
    compared = f"moetailor compare {_word(given['model'])} --calibration {out} -o comparison --held-out heldout.jsonl"
    return (
        f"the calibration is in {given['out']}; next: moetailor plan {out} -o plan.json --method mone --remove 25%, or "
        f"{compared}"
    )


def _methods(given: Given) -> str:
    name = given["name"] or "METHOD"
    return f"next: moetailor plan calib -o plan.json --method {name} --remove 25%"


def _plan(given: Given) -> str:
    model, calibration = given["model"] or _source(given["out"]), _word(given["calibration"])
    apply = f"moetailor apply {_word(model)} {_word(given['out'])} -o OUT --calibration {calibration}"
    return f"the plan is in {given['out']}; next: {apply}"


def _allocate(given: Given) -> str:
    budget = next(f"--{name} {given[name]}" for name in ("remove", "keep", "size", "memory") if given[name] is not None)
    words = f"-o plan.json --method {given['method']} {budget} --allocation {_word(given['out'])}"
    return f"the counts are in {given['out']}; next: moetailor plan {_word(given['calibration'])} {words}"


def _show(given: Given) -> str:
    return f"next: moetailor apply {_word(_source(given['plan']))} {_word(given['plan'])} -o OUT --calibration calib"


def _apply(given: Given) -> str:
    out = _word(given["out"])
    judge = f"moetailor evaluate {out} --against {_word(given['model'])} --data heldout.jsonl"
    return f"the result is in {given['out']}; next: {judge}, or moetailor serve {out}"


def _evaluate(given: Given) -> str:
    what = "KL, in nats a token, is how far its predictions are from the original's: 0 where they are the same"
    return f"{what}; next: moetailor serve {_word(given['compressed'])}"


def _compare(given: Given) -> str | None:
    """Return how to make the row to take: the smallest that hardly loses, else the one that loses least."""
    from moetailor.comparison.frontier import ENOUGH, kl_of
    from moetailor.comparison.stored import read_results

    results = read_results(given["out"] / "results.json")
    front = [results["cells"][number] for number in results["front"]]
    if not front:
        return None
    row = next((cell for cell in front if kl_of(cell) < ENOUGH), front[-1])
    folder = given["calibration"] or given["out"] / "calibration"
    words = ["moetailor plan", _word(folder), "-o plan.json", *_asked(row)]
    return f"the comparison is in {given['out']}; next, for {row['name']}: {' '.join(words)}"


def _asked(row: Mapping[str, Any]) -> list[str]:
    """Return the flags with which `plan` makes a row."""
    from dataclasses import fields

    from moetailor.methods import find_method

    defaults = {field.name: field.default for field in fields(find_method(row["method"]))}
    words = [f"--method {row['method']}"]
    words += [f"-p {_word(f'{name}={value}')}" for name, value in row["parameters"].items() if defaults[name] != value]
    if row["removes"]:
        kind, amount, *_ = row["budget"].split()
        words.append(f"--{kind} {amount}")
    return words + ([f"--bits {row['bits']}"] if row["bits"] else [])


def _report(given: Given) -> str:
    return f"next: open {given['folder'] / 'report.html'} in a browser"


def _recover(given: Given) -> str:
    out, original = _word(given["out"]), _word(given["teacher"] or "MODEL")
    return f"the result is in {given['out']}; next: moetailor evaluate {out} --against {original} --data heldout.jsonl"


def _source(plan: Path) -> str:
    from moetailor import Plan

    return Plan.load(plan).model.source or "MODEL"


STEPS: dict[str, Callable[[Given], str | None]] = {
    # Made, it says how the engine is started.
    "fit": lambda given: "nothing was made; next: the same command with -o OUT",
    "inspect": _inspect,
    "calibrate": _calibrate,
    "methods": _methods,
    "plan": _plan,
    "allocate": _allocate,
    "show": _show,
    "diff": _show,
    "apply": _apply,
    "compress": _apply,
    "evaluate": _evaluate,
    "compare": _compare,
    "report": _report,
    "recover": _recover,
    # It serves until it is stopped, and says where before it begins.
    "serve": lambda given: None,
    # It becomes the harness.
    "lm_eval": lambda given: None,
}
