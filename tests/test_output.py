"""What a terminal is sent: words from files neither steer it nor are taken for markup, and help is shown as written."""

import dataclasses
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from typer.main import get_command

from moetailor.checkpoint.files import SINGLE
from moetailor.errors import MoetailorWarning
from moetailor_cli import app, output, waiting
from moetailor_cli.console import PlainConsole
from moetailor_cli.options import PANELS
from support.plans import MIXED

Get = Callable[[str], Path]
# Red, a bell, the title of the window, a C1 code, an order turned round, half a character, and rich's own markup.
HOSTILE = "a\x1b[31mb\x07\x1b]0;owned\x07c\x9b2Jd\u202ee\u2066f\u200fg\ud800h\x7f\ri[red]j[/]k[/red]:smile:[@l]"
SHOWN = "a[31mb]0;ownedc2Jdefg\ufffdhi[red]j[/]k[/red]:smile:[@l]"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize(
    "show",
    [
        output.say,
        output.complain,
        output.warn,
        output.result,
        output.text,
        lambda text: output.result(Text(text, "dim")),
        lambda text: output.table([text, text], [[text, text]]),
        lambda text: output._out.print(f"{text} in a line"),
    ],
)
def test_what_steers_a_terminal_is_left_out(
    show: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output._out, "_width", 400)
    show(HOSTILE)
    shown = "".join(capsys.readouterr())
    assert STEERS.search(shown) is None
    assert SHOWN in "".join(shown.split())


def test_colours_and_bars_still_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = PlainConsole(force_terminal=True, width=200, color_system="standard")
    with console.capture() as taken:
        console.print(Text(HOSTILE, "red"))
        table = Table(HOSTILE)
        table.add_row(HOSTILE)
        console.print(table)
    sent = taken.get()
    assert "\x1b[31ma" in sent
    assert STEERS.search(re.sub(r"\x1b\[[0-9;]*m", "", sent)) is None
    monkeypatch.setattr(output, "_err", console)
    with console.capture() as taken, waiting.stages() as stage:
        stage(HOSTILE, 1, 2)
    sent = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", taken.get())
    assert "50%" in sent
    assert STEERS.search(sent) is None


def test_a_label_that_is_too_long_ends_between_its_pieces(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output._out, "_width", 32)
    output.table(["method", "KL, nats"], [["*camera:refit=True:multiple=16", "0.0138"], [" reap", "0.1"]])
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert shown[1:] == ["*camera:refit=True:    0.0138", "  multiple=16", f" reap{0.1:>24}"]


@pytest.mark.parametrize("told", [output.warn, output.say, output.complain])
def test_messages_stand_whole_beside_bars_and_break_between_words(
    told: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = PlainConsole(force_terminal=True, width=40, color_system=None)
    monkeypatch.setattr(output, "_err", console)
    words = "layer 3: 3 of 23 experts were fitted on few tokens; keep more with --sample-tokens"
    with console.capture() as taken, waiting.stages() as stage:
        stage("calibrate", 1, 2)
        told(words)
    # Where a bar was wiped away, something new begins.
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", taken.get().replace("\x1b[2K", "\n")).splitlines()
    begin = next(number for number, line in enumerate(lines) if "layer 3: 3" in line)
    kind = "note: " if told is output.warn else "error: " if told is output.complain else ""
    shown = [line.rstrip() for line in lines[begin : begin + 3]]
    assert " ".join(shown) == kind + words
    assert all(len(line) <= 40 for line in shown)


def test_a_command_to_copy_stays_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    console = PlainConsole(force_terminal=True, width=40, color_system=None)
    monkeypatch.setattr(output, "_err", console)
    command = "next: moetailor evaluate OUT --against MODEL --data heldout.jsonl"
    with console.capture() as taken:
        output.say(command, copied=True)
    assert taken.get() == f"{command}\n"


def test_a_note_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(*given: object, **options: object) -> None:
        for number in (1, 2, 1):
            warnings.warn(f"layer {number}", MoetailorWarning, stacklevel=1)

    monkeypatch.setattr(app, "app", verb)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        app.main()
    assert capsys.readouterr().err.splitlines() == ["note: layer 1", "note: layer 2"]


def call(*arguments: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["moetailor", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    return int(stop.value.code or 0), "".join(capsys.readouterr())


def test_names_in_plans_and_checkpoints_are_harmless(
    tmp_path: Path, checkpoint: Get, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"monkeypatch": monkeypatch, "capsys": capsys}
    half = HOSTILE.replace("\ud800", "")
    dataclasses.replace(MIXED, method=half, budget=half, parameters={half: half}).save(tmp_path / "plan.json")
    code, shown = call("show", tmp_path / "plan.json", **given)
    assert (code, STEERS.search(shown)) == (0, None)
    folder = tmp_path / "m\x1b[31model"
    folder.mkdir()
    save_file({half: torch.zeros(1)}, folder / SINGLE)
    config = json.loads((checkpoint("olmoe") / "config.json").read_text())
    for content in (config, config | {"model_type": half}):
        (folder / "config.json").write_text(json.dumps(content))
        code, shown = call("inspect", folder, **given)
        assert (code, STEERS.search(shown)) == (1, None)
        assert "m[31model" in shown


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("verb", app.VERBS, ids=lambda verb: verb.__name__)
def test_help_is_shown_as_it_is_written(
    verb: Callable, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a narrow terminal, where a word that is too long would be cut."""
    monkeypatch.setenv("COLUMNS", str(columns))
    code, shown = call(verb.__name__.replace("_", "-"), "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert max(map(len, shown.splitlines())) <= columns
    letters = re.sub(r"[\s│…]", "", shown)
    hints = get_type_hints(verb, include_extras=True)
    written = [extra.help for hint in hints.values() for extra in getattr(hint, "__metadata__", ())]
    command = get_command(app.app).commands[verb.__name__.replace("_", "-")]
    names = [name for part in command.params if part.param_type_name == "option" for name in part.opts]
    for text in [*filter(None, written), *verb.__doc__.split("\n\n"), *names]:
        for word in re.sub(r"\[/?dim\]", "", text).split():
            assert word in letters, word


def test_options_lie_in_the_same_groups_on_all_verbs() -> None:
    groups: dict[str, set[str]] = {}
    for verb in get_command(app.app).commands.values():
        for part in verb.params:
            if part.param_type_name == "option":
                groups.setdefault(part.rich_help_panel, set()).add(part.opts[0])
    assert set(groups) <= set(PANELS)
    assert "--device" in groups["Where it runs"]
    assert {"--data", "--length"} <= groups["What it reads"]
    # The seed of a search or a training decides, that of text is about what is read.
    twice = {name for name in set().union(*groups.values()) if sum(name in found for found in groups.values()) > 1}
    assert twice <= {"--seed"}


def test_help_goes_from_what_is_read_to_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, shown = call("compress", "--help", monkeypatch=monkeypatch, capsys=capsys)
    found = re.findall(r"^╭─ (.*?) ─", shown, re.MULTILINE)
    assert found == ["Arguments", *(name for name in PANELS if name in found)]
    assert "NAME,CONFIG[@SPLIT]" in shown


def test_scores_name_all_that_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of domains whole, and every metric of a task but how sure it is and of how many documents."""
    one = SimpleNamespace(mean=0.5, low=0.4, high=0.6)
    names = ("original_perplexity", "compressed_perplexity", "kl", "top1_agreement")
    part = SimpleNamespace(tokens=123_456, **dict.fromkeys(names, one))
    long = [f"en-web-crawl-filtered-2024-part-{number}" for number in ("one", "two")]
    tasks = {"cot": {"exact_match,strict-match": (0.5, 0.4), "exact_match_stderr": (0.1, 0.1), "n": (9, 9)}}
    measured = SimpleNamespace(
        overall=part, domains=dict.fromkeys(long, part), nbytes=(4, 2), resident=None, speed=None, tasks=tasks
    )
    output.scores(measured)  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "".join(line[:7].strip() for line in shown.splitlines()[2:12]) == "".join(long)
    assert "cot, exact_match,strict-match" in shown
    assert "0.800" in shown
    assert "stderr" not in shown
