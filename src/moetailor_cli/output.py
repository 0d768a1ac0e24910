"""What a person sees: tables and messages. Messages go to stderr, results to stdout."""

from __future__ import annotations

import os
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from moetailor_cli import log
from moetailor_cli.console import PlainConsole

if TYPE_CHECKING:
    from moetailor import Calibration, Plan, RecoveryResult, Scores
    from moetailor.estimates.estimate import Estimate
    from moetailor.summary import Summary

# When the process began, nearly: for how long it took, and by the clock of files.
BEGAN, SINCE = time.perf_counter(), time.time()

_out = PlainConsole()
_err = PlainConsole(stderr=True)
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Leave messages, notes and progress out from now on, or print them again."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Say whether messages are left out."""
    return _quiet


def speaks() -> bool:
    """Say whether this process speaks: the first of those that the environment tells of."""
    return os.environ.get("WORLD_SIZE") in (None, "", "1") or os.environ.get("RANK") in (None, "", "0")


def messages() -> PlainConsole:
    """Return the console of messages."""
    return _err


def say(text: str, *, copied: bool = False) -> None:
    """Print one message, in a terminal in lines that end between words.

    Args:
        text: the message.
        copied: whether it holds a command to be copied, which stays one line.
    """
    _told(Text(text), copied=copied)


def result(line: Text | str) -> None:
    """Print one line of a result, as long as it is."""
    _out.print(line, soft_wrap=True)


def width() -> int:
    """Return how many characters a line of a result has room for."""
    return _out.width


def text(words: str, style: str = "") -> None:
    """Print a text in lines that fit."""
    for line in textwrap.wrap(words, max(width(), 20), break_on_hyphens=False):
        result(Text(line, style))


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: labels in the first column, in lines that end between their pieces, numbers in the others."""
    _, *wide = (2 + max(map(len, column)) for column in zip(names, *rows, strict=True))
    room = width() - sum(wide)
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(names):
        shown.add_column(name, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for label, *numbers in rows:
        shown.add_row(_in_lines(label, room), *numbers)
    _out.print(shown)


def _in_lines(label: str, room: int) -> str:
    """Return a label in as many lines as it needs, those behind the first indented."""
    from moetailor.words import pieces

    lines = [""]
    for piece in pieces(label):
        if lines[-1].strip() and len(lines[-1] + piece) > room:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)


def complain(text: str) -> None:
    """Print why something was refused."""
    _told(Text.assemble(("error: ", "bold red"), text), always=True)


def warn(text: str) -> None:
    """Print what the user should know though it went on."""
    _told(Text.assemble(("note: ", "yellow"), text))


def _told(text: Text, *, copied: bool = False, always: bool = False) -> None:
    """Print a message at once: bars that are on show take the place of what has no end of line yet."""
    log.note(text.plain)
    if always or not _quiet:
        _err.print(text, soft_wrap=copied or not _err.is_terminal)


def count(number: float) -> str:
    """Return a number of parameters as people say it."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:.0f}"


def summary(found: Summary) -> None:
    """Print what a checkpoint is."""
    from moetailor.words import nbytes

    _out.print(found.source, style="bold", end="", soft_wrap=True)
    _out.print(f"  {found.model_type}, {found.decoder_layers} decoder layers")
    names = ("MoE layers", "slots", "experts", "stand-ins", "rank", "top-k", "an expert", "all experts")
    rows = [
        [
            group.layers,
            str(group.slots),
            str(group.experts),
            str(group.stand_ins or "-"),
            _span(group.ranks) if group.ranks else "-",
            str(found.top_k) if group.runs == found.top_k else f"{found.top_k}, {group.runs} run",
            nbytes(group.expert_bytes),
            nbytes(group.expert_bytes * group.experts * group.size),
        ]
        for group in found.groups()
    ]
    table(names, rows)
    share = found.routed_parameters / found.parameters
    _out.print(
        f"parameters: {count(found.parameters)}, of which routed {count(found.routed_parameters)} ({share:.0%}), "
        f"shared experts {count(found.shared_parameters)}; active for a token {count(found.active_parameters)}, "
        "2 FLOPs each"
    )
    _out.print(f"on disk: {nbytes(found.nbytes)}" + ("" if found.lies == "plain" else f"; experts are {found.lies}"))


def calibration(made: Calibration) -> None:
    """Print what was measured of a text that was read, and what a reader should know of it."""
    text, options = made.fingerprint["text"], made.fingerprint["options"]
    wanted = options["sequences"] * options["length"]
    say(f"{made.folder}: {text['counted']:,} tokens through {len(made.layers)} MoE layers")
    if text["tokens"] < wanted:
        warn(f"the text ended after {text['tokens']:,} of {wanted:,} tokens; plans rest on fewer tokens than asked for")
    for stack in made.model.stacks[:1]:
        sampled = min(made.fingerprint["sample"]["tokens"], text["counted"])
        each = sampled * made.model.top_k / (stack.num_experts * made.model.width)
        if each < 1:
            warn(
                f"{sampled:,} sampled tokens are {each:.2g} for each of an expert's {made.model.width:,} dimensions; "
                "below 1 what is fitted to them is coarse: keep more, with --sample-size and perhaps more text"
            )
    unreached = {layer: int((made.sums(layer).count == 0).sum()) for layer in made.layers}
    unreached = {layer: number for layer, number in unreached.items() if number}
    if unreached:
        where = ", ".join(f"layer {layer}: {number}" for layer, number in list(unreached.items())[:8])
        warn(
            f"{sum(unreached.values())} experts were reached by no token ({where}); more or broader text would "
            "tell what they do"
        )


def plan(made: Plan, form: str = "auto") -> None:
    """Print what becomes of the slots, a line for each kind of layer; `form` is the format that was asked for."""
    from moetailor.answers import ANSWERS
    from moetailor.transform.formats import resolve_format
    from moetailor.words import nbytes

    kinds: dict[str, list[str]] = {}
    order = [kind.label for kind in ANSWERS.values()]
    for prefix, layer in made.layers.items():
        found = Counter(answer.label for answer in layer.answers)
        ranks = {answer.label: set() for answer in layer.answers}
        for answer in layer.answers:
            ranks[answer.label] |= {getattr(answer, "rank", 0)} - {0}
        told = ", ".join(
            f"{number} {label}" + (f" of rank {_span(sorted(ranks[label]))}" if ranks[label] else "")
            for label, number in sorted(found.items(), key=lambda item: order.index(item[0]))
            if label != "kept"
        )
        kinds.setdefault(f"{len(layer.pool)} of {len(layer.slots)} experts stay, {told}", []).append(prefix)
    say(
        f"{made.method}, {made.budget}: {nbytes(made.model.nbytes)} becomes {nbytes(made.nbytes)} "
        f"({resolve_format(made, form).name} format)"
    )
    if made.expected is not None:
        say(f"  expected KL: {made.expected:.2g} nats a token")
    for kind, prefixes in kinds.items():
        where = prefixes[0] if len(prefixes) == 1 else f"{len(prefixes)} layers, {prefixes[0]} .. {prefixes[-1]}"
        say(f"  {where}: {kind}")


def scores(measured: Scores) -> None:
    """Print the comparison of a compressed model with its original."""
    from moetailor.words import nbytes

    names = ("text", "tokens", "perplexity", "compressed", "KL, nats", "95% interval", "same top-1")
    rows = [
        [
            name,
            f"{part.tokens:,}",
            f"{part.original_perplexity.mean:.2f}",
            f"{part.compressed_perplexity.mean:.2f}",
            f"{part.kl.mean:.4f}",
            f"{part.kl.low:.4f} to {part.kl.high:.4f}",
            f"{part.top1_agreement.mean:.1%}",
        ]
        for name, part in {"all": measured.overall, **measured.domains}.items()
    ]
    table(names, rows)
    sizes = []
    for name, pair in {"bytes on disk": measured.nbytes, "bytes in memory": measured.resident}.items():
        if pair is not None:
            sizes.append([name, nbytes(pair[0]), nbytes(pair[1]), f"{pair[1] / pair[0]:.3f}"])
    if measured.speed is not None:
        first, second = measured.speed
        for name in ("prefill", "decode"):
            pair = [(getattr(each, f"{name}_low"), getattr(each, name)) for each in (first, second)]
            said = [f"{low:,.0f} to {high:,.0f}" for low, high in pair]
            sizes.append([f"{name}, tokens/s", *said, f"{pair[1][1] / pair[0][1]:.2f}"])
    for task, metrics in measured.tasks.items():
        for metric, (before, after) in metrics.items():
            if metric != "n" and not metric.endswith("_stderr"):
                ratio = f"{after / before:.3f}" if before else "-"
                sizes.append([f"{task}, {metric}", f"{before:.3f}", f"{after:.3f}", ratio])
    _out.print()
    table(("", "original", "compressed", "ratio"), sizes)


def expected(compressed: str, measured: Scores) -> None:
    """Print what the plan of a result expected, if it did, beside what was measured."""
    from moetailor.planning.plan import Plan
    from moetailor.transform.disk import PLAN_FILE

    if (file := Path(compressed) / PLAN_FILE).is_file() and (cost := Plan.load(file).expected) is not None:
        say(f"KL: {cost:.2g} nats a token expected, {measured.overall.kl.mean:.2g} measured")


def recovery(done: RecoveryResult) -> None:
    """Print what training did to the losses."""
    rows = [["trained", f"{done.losses[0]:.4f}", f"{done.losses[-1]:.4f}"]]
    rows += [[f"held out, {name}", f"{before:.4f}", f"{done.after[name]:.4f}"] for name, before in done.before.items()]
    table(("loss", "before", "after"), rows)
    say(f"{done.out}: {done.steps:,} steps, {done.tokens:,} tokens, {done.seconds:,.0f} seconds")


def estimate(found: Estimate) -> None:
    """Print what a verb will take."""
    for line in found.lines():
        say(line)


def took(*places: Path) -> dict[str, int | float]:
    """Print what the verb took, and return it.

    Args:
        places: files and folders that it may have written to.
    """
    from moetailor.checkpoint.rates import peak_nbytes
    from moetailor.words import nbytes

    seconds, (memory, device) = time.perf_counter() - BEGAN, peak_nbytes()
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    found = [file.stat() for file in files if file.is_file()]
    written = sum(told.st_size for told in found if told.st_mtime >= SINCE - 1)
    on_device = f", {nbytes(device)} on the GPU" if device else ""
    amount = f"{nbytes(written)} written, " if places else ""
    say(f"took {seconds:,.1f} s, {amount}{nbytes(memory)} of memory at most{on_device}")
    return {"seconds": round(seconds, 3), "memory": memory, "device_memory": device, "written": written}


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}-{numbers[-1]}"
