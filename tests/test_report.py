"""The page of a comparison, from results made by hand: what it says, that it stands alone, and what is missing."""

import copy
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moetailor.comparison.stored import read_results
from moetailor.errors import MoetailorError
from moetailor.report import write_report
from moetailor.report.colors import PLAIN, looks
from moetailor.report.drawing import Label, canvas, place
from moetailor.report.maps import by_use
from moetailor.report.words import commands, digits, nbytes, reasons, verdict
from moetailor_cli.app import main

VOID = {"meta", "link", "br", "img", "wbr"}


def cell(method: str, asked: str, kl: float, size: int, **fields: object) -> dict:
    """A cell whose every number follows from its KL."""
    fidelity = {
        "tokens": 1000,
        "original": {"perplexity": 20.0, "perplexity_interval": [19.0, 21.0]},
        "compressed": {"perplexity": 20.0 * (1 + kl), "perplexity_interval": [19.0, 23.0]},
        "kl": {"mean": kl, "low": kl * 0.9, "high": kl * 1.1},
        "top1_agreement": {"mean": 1 - kl, "low": 0.5, "high": 1.0},
    }
    return {
        "name": method,
        "method": method,
        "parameters": {},
        "bits": None,
        "removes": True,
        "budget": f"remove {asked}",
        "error": None,
        "nbytes": size,
        "seconds": {"plan": 1.0, "apply": 2.0, "evaluate": 3.0},
        "native": method == "reap",
        "fidelity": {"": fidelity, "wiki": fidelity, "code": fidelity},
        "speed": {
            "prefill": 5000.0 + size / 1e5,
            "decode": 200.0,
            "prefill_low": 4000.0 + size / 1e5,
            "decode_low": 150.0,
        },
        "resident": 2 * size,
        "expected_kl": kl * 1.5,
        "layers": {
            "1": {"expected": kl, "measured": kl * 2, "slots": "#c.>"},
            "2": {"expected": 0.0, "measured": kl, "slots": "####"},
        },
    } | fields


FAILED = cell("naee", "25%", 1, 1, error="needs <script>alert(1)</script> & more") | dict.fromkeys(
    ("nbytes", "seconds", "native", "fidelity", "speed", "resident", "expected_kl", "layers")
)
SHARES = {"": [0.1, 0.4, 0.3, 0.2], "wiki": [0.0, 0.5, 0.3, 0.2], "code": [0.2, 0.3, 0.3, 0.2]}
RESULTS = {
    "format": "moetailor-comparison",
    "version": 3,
    "model": {
        "source": "a/<b>model",
        "model_type": "olmoe",
        "nbytes": 100_000_000,
        "top_k": 2,
        "layers": {"1": 4, "2": 4},
    },
    "about": {
        "moetailor": "1.2.3",
        "torch": "2.0",
        "transformers": "5.0",
        "threads": 1,
        "device": "cpu",
        "seconds": {"calibrate": 10.0, "reference": 5.0},
    },
    "calibration": {"data": ["a.jsonl"], "tokens": 4096, "folder": "calib"},
    "heldout": {"data": ["b.jsonl"], "tokens": 1000, "domains": {"wiki": 600, "code": 400}},
    "original": {
        "perplexity": {"": 20.0, "wiki": 20.0},
        "prefill": 4321.0,
        "decode": 180.0,
        "prefill_low": 3210.0,
        "decode_low": 170.0,
        "resident": 200_000_000,
    },
    "usage": {"1": SHARES, "2": SHARES},
    "sensitivities": {"1": 0.5, "2": 0.25},
    "cells": [
        cell("auto", "25%", 0.0125, 80_000_000),
        cell("mone", "25%", 0.031, 79_000_000),
        cell("reap", "25%", 0.062, 78_000_000),
        cell("random", "25%", 0.25, 77_000_000),
        FAILED,
        cell("mone", "50%", 0.13, 60_000_000),
        cell("auto", "50%", 0.14, 61_000_000),
    ],
    "groups": {"25% removed": [0, 1, 2, 3, 4], "50% removed": [5, 6]},
    "front": [5, 3, 2, 1, 0],
    "recommendation": None,
    "spearman": {"": 0.97, "25% removed": 1.0, "50% removed": 0.5},
}


def bits(number: int, kl: float, size: int) -> dict:
    """A row of bits alone."""
    slots = {layer: {"expected": kl, "measured": kl, "slots": str(number) * 4} for layer in "12"}
    return cell("quantize", "0%", kl, size, name=f"{number} bits", removes=False, layers=slots)


SIZED = RESULTS | {
    "cells": [
        cell("auto", "", 0.0001, 50_000_000, budget="size 50%"),
        bits(4, 0.002, 44_000_000),
        cell("reap", "", 0.3, 49_000_000, budget="size 50%"),
        cell("auto", "", 0.0009, 40_000_000, budget="size 40%"),
        cell("reap", "", 0.08, 39_000_000, budget="size 40%", name="reap + 4 bits", bits="4"),
        *(FAILED | {"name": name, "error": "takes at least 45 bytes"} for name in ("reap", "ean")),
        FAILED | {"name": "reap", "error": "takes at least 45 bytes"},
    ],
    "groups": {
        "at most 50% of the bytes": [0, 1, 2],
        "at most 40% of the bytes": [3, 4, 5, 6],
        "at most 30% of the bytes": [7],
    },
    "front": [4, 3, 0],
    "recommendation": "Would <4> bits do?",
    "spearman": {"": 0.9},
}


class Page(HTMLParser):
    """Reads a page: its words outside pictures, the words in pictures, its elements; refuses what does not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.drawn: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            (self.drawn if "svg" in self.open else self.words).append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(tmp_path: Path, **changes: object) -> Page:
    write_report(copy.deepcopy(RESULTS) | changes, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text())


def test_the_page_holds_every_number(tmp_path: Path) -> None:
    found = page(tmp_path)
    for row in RESULTS["cells"]:
        if row["error"] is None:
            kl = row["fidelity"][""]["kl"]
            said = [digits(kl["mean"]), f"{digits(kl['low'])} to {digits(kl['high'])}", nbytes(row["nbytes"])]
            said += [f"{20 * (1 + kl['mean']):.2f}", f"{100 * (1 - kl['mean']):.1f}%", digits(row["expected_kl"])]
            said += [nbytes(row["resident"]), digits(row["speed"]["prefill"]), "6.00"]
            said += [f"≥ {digits(row['speed']['prefill_low'])}", "3,210 to 4,321", "170 to 180"]
            for number in said:
                assert number in found.text, (row["method"], number)
    for fact in (
        "100.00 MB",
        "4,096 tokens of a.jsonl",
        "wiki 600, code 400",
        "moetailor 1.2.3",
        "0.97 over all",
        "0.50 (50% removed)",
        "4,321",
    ):
        assert fact in found.text
    assert (
        found.tags.count("svg") == 1 + 1 + 3 + 2 + 2
    )  # quality, usage, slots and those of the fourth, errors, domains
    assert {"auto", "mone", "reap", "random", "all text", "wiki"} <= set(found.drawn)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    found = page(tmp_path)
    text = re.sub(r"base64,[^\"]*", "", (tmp_path / "report.html").read_text())
    assert "http" not in re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    assert "script" not in found.tags
    for name, value in found.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value is not None
            assert value.startswith(("#", "data:"))


def test_what_is_not_ours_is_escaped(tmp_path: Path) -> None:
    found = page(tmp_path)
    assert "needs <script>alert(1)</script> & more" in found.text
    assert "a/<b>model" in found.text
    assert "script" not in found.tags
    name = "<i>$x_1$"
    fidelity = RESULTS["cells"][0]["fidelity"] | {name: RESULTS["cells"][0]["fidelity"][""]}
    cells = [RESULTS["cells"][0] | {"fidelity": fidelity}]
    alone = {"cells": cells, "groups": {"25% removed": [0]}, "front": [0]}
    found = page(tmp_path, **alone, heldout=RESULTS["heldout"] | {"domains": {name: 10}})
    assert name in found.drawn
    assert (
        found.tags.count("i") == 4 + 3
    )  # the keys of four kinds of slots; of one method a key and two places; no more


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    page(tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    page(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_missing_parts_are_said(tmp_path: Path) -> None:
    def without(**fields: object) -> list[dict]:
        return [row | fields if row["error"] is None else row for row in RESULTS["cells"]]

    found = page(tmp_path, sensitivities=None, spearman=None, cells=without(expected_kl=None))
    assert "how sensitive the predictions are to errors of each layer was not measured" in found.text
    overall = [row | ({"fidelity": {"": row["fidelity"][""]}} if row["fidelity"] else {}) for row in RESULTS["cells"]]
    found = page(
        tmp_path,
        cells=overall,
        usage={layer: {"": shares[""]} for layer, shares in RESULTS["usage"].items()},
        heldout={"data": ["b.jsonl"], "tokens": 1000, "domains": {}},
    )
    assert "names no domains" in found.text
    found = page(tmp_path, cells=[FAILED], groups={"25% removed": [0]}, front=[])
    assert "All 1 cells failed" in found.text
    assert found.tags.count("svg") == 1
    alone = {"cells": [cell("auto", "25%", 0.0, 80_000_000)], "groups": {"25% removed": [0]}, "front": [0]}
    found = page(tmp_path, **alone, spearman=None)
    assert "auto stays closest to the original: KL 0.00" in found.text
    assert "What failed" not in found.text


def test_verdict_in_words() -> None:
    auto, mone, reap = (
        cell(name, "25%", kl, size) for name, kl, size in (("auto", 0.01, 80), ("mone", 0.012, 80), ("reap", 0.02, 75))
    )
    said = verdict([auto, mone, reap], 100)
    assert "KL 0.0100 nats a token (95% interval 0.00900 to 0.0110), perplexity 20.20 against 20.00 (+1.0%)" in said
    assert "80% of the original. Next is mone with KL 0.0120, 1.2 times as much; their intervals overlap." in said
    assert said.endswith("Best of those that load in stock engines is reap, KL 0.0200.")
    assert verdict([auto, reap], 100).count("overlap") == 0
    assert verdict([reap], 100).endswith("75% of the original. It loads in stock engines.")


def test_a_comparison_at_equal_bytes(tmp_path: Path) -> None:
    found = page(tmp_path, **SIZED)
    for said in (
        "Would <4> bits do?",
        "At most 50% of the bytes",
        "At most 40% of the bytes auto stays closest to the original: KL 9.00e-4",
        "Orange is bits alone",
        "0.90 over all",
        "kept in 4 bits",
        # Reasons that are alike stand in one row.
        "ean, reap 40% takes at least 45 bytes reap 30% takes at least 45 bytes",
    ):
        assert said in found.text, said
    assert found.text.count("on the front") == 3
    assert "At most 30% of the bytes" not in found.text
    assert {"auto", "4 bits", "reap + 4 bits", "size, % of the original's 100.00 MB"} <= set(found.drawn)
    # A name is written once in the picture, whatever its sizes.
    quality = (tmp_path / "report.html").read_text().partition("<svg")[2].partition("</svg>")[0]
    assert quality.count(">auto<") == 1


def test_the_answer_comes_first_then_the_front_then_what_to_take(tmp_path: Path) -> None:
    told = "Would 4 bits do? They lose 0.002. Bits alone stay under 0.001. Least is lost by auto."
    found = page(tmp_path, **(SIZED | {"recommendation": told}))
    text = (tmp_path / "report.html").read_text()
    assert '<p class="first">Would 4 bits do? They lose 0.002.</p>' in text
    order = [
        "Would 4 bits do?",
        "Bits alone stay under",
        "Quality against bytes",
        "What to take",
        "Ranking",
        "Expected and",
    ]
    assert sorted(order, key=found.text.index) == order
    assert page(tmp_path).text.startswith(
        "a/<b>model: a comparison by moetailor a/<b>model Would 4 bits do? That was not"
    )


def test_damage_has_a_grade_by_its_limits(tmp_path: Path) -> None:
    costs = {0.00099: "hardly noticed", 0.001: "small", 0.049: "noticed", 0.05: "large", 0.2: "severe"}
    for level, (kl, words) in enumerate(costs.items()):
        alone = {"cells": [cell("auto", "25%", kl, 80_000_000)], "groups": {"25% removed": [0]}, "front": [0]}
        text = page(tmp_path, **alone, spearman=None).text
        assert f"{'■' * (level + 1)}{'□' * (4 - level)} {words} 25% removed auto stays closest" in text


def test_each_size_has_the_plan_that_makes_its_winner_and_all_have_one_apply(tmp_path: Path) -> None:
    found = page(tmp_path, **SIZED)
    plans = [
        f"# at most {size} of the bytes: auto moetailor plan calib -o plan.json --method auto --size {size}"
        for size in ("50%", "40%")
    ]
    apply = "# then moetailor apply 'a/<b>model' plan.json -o OUT --calibration calib"
    assert " ".join([*plans, apply]) in found.text
    assert found.tags.count("pre") == found.text.count("moetailor apply") == 1


def test_commands_name_what_is_not_usual() -> None:
    usual = {"score": "fusion", "frequency": "unconditional", "novice": "mean", "shrinkage": 0.0}
    mone = cell("mone", "25%", 0.1, 1, parameters=usual | {"novice": "optimal"}, bits="4/6")
    (plan, apply) = commands(mone, "a model", "c")
    assert plan == "moetailor plan c -o plan.json --method mone -p novice=optimal --bits 4/6 --remove 25%"
    assert apply == "moetailor apply 'a model' plan.json -o OUT --calibration c"
    four = bits(4, 0.1, 1) | {"parameters": {"rounding": "gptq", "bits": 4, "down": 0, "group": 128, "codes": "int"}}
    assert commands(four, "m", "c")[0] == "moetailor plan c -o plan.json --method quantize -p codes=int"
    uniform = cell("auto", "25%", 0.1, 1, parameters={"uniform_layers": True})
    assert "-p uniform_layers=true --remove" in commands(uniform, "m", "c")[0]
    unknown = cell("theirs", "25%", 0.1, 1, parameters={"x": 1})
    assert "--method theirs -p x=1 --remove" in commands(unknown, "m", "c")[0]


def test_a_method_has_one_color_throughout(tmp_path: Path) -> None:
    found = looks(SIZED["cells"])
    assert {color for name, (color, _) in found.items() if name.endswith("bits") and "+" not in name} == {PLAIN}
    others = [look for name, look in found.items() if look[0] != PLAIN]
    assert len(set(others)) == len(others) == 4  # auto, reap, reap + 4 bits, ean
    page(tmp_path, **SIZED)
    text = (tmp_path / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    quality, errors, *by_domain = [pictures[n] for n in (0, -3, -2, -1)]
    for picture in (quality, errors, *by_domain):
        assert found["auto"][0] in picture
    assert f'<i style="background: {found["auto"][0]}"></i>auto' in text
    many = looks([cell(f"m{n}", "25%", 0.1, 1) for n in range(30)])
    assert len(set(many.values())) == 30


def test_columns_say_their_units(tmp_path: Path) -> None:
    text = page(tmp_path).text
    head = "method KL, nats a token size, share loads in perplexity same top word, % KL expected, nats in memory"
    assert f"{head} prefill, tokens/s decode, tokens/s made in, s" in text


def test_why_rows_were_not_measured() -> None:
    said = [("a", "40%", "x"), ("b", "40%", "x"), ("b", "30%", "x"), ("a", "30%", "x"), ("a", "30%", "y")]
    cells = [{"name": name, "group": group, "error": reason} for name, group, reason in said]
    assert reasons(cells) == [("a, b", "40%; 30%", "x"), ("a", "30%", "y")]


def test_experts_stand_in_the_order_of_their_use() -> None:
    assert by_use(RESULTS["usage"]) == {"1": [1, 2, 3, 0], "2": [1, 2, 3, 0]}


def test_labels_cover_nothing() -> None:
    figure, axes = canvas(3.0)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    labels = [Label(0.5, 0.5 + 0.01 * n, f"method_{n}") for n in range(40)]
    place(axes, labels)
    figure.draw_without_rendering()
    boxes = [note.get_window_extent() for note in axes.texts]
    points = axes.transData.transform([(label.x, label.y) for label in labels])
    assert 4 < len(boxes) < 40
    assert axes.texts[0].get_text() == "method_0"
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.contains(*point) for point in points)
        assert axes.get_window_extent().containsx(box.x0)
        assert axes.get_window_extent().containsx(box.x1)


def in_a_browser(report: Path, width: int, told: str) -> subprocess.CompletedProcess[str]:
    """Show a report in a frame, whose width is that of a screen to the page's own rules; so high that it has no bar to
    scroll. Its title becomes what an expression over its document `d` says.
    """
    shown = html.escape(report.read_text())
    frame = f'<iframe style="width: {width}px; height: 20000px; border: 0" srcdoc="{shown}"></iframe>'
    script = f"<script>onload = () => {{ d = frames[0].document; document.title = {told} }}</script>"
    (probe := report.parent / "probe.html").write_text(frame + script)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    command = ["chromium", *options, f"--user-data-dir={report.parent / 'profile'}", probe.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


NEEDS_CHROMIUM = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")


@pytest.mark.slow
@NEEDS_CHROMIUM
@pytest.mark.parametrize("results", [RESULTS, SIZED], ids=["ratios", "sizes"])
def test_a_browser_shows_it_on_a_phone(results: dict, tmp_path: Path) -> None:
    """Nothing but the tables' own boxes scrolls sideways, size and engines are in sight, and there is no complaint."""
    write_report(results, tmp_path / "report.html")
    edge = "Math.max(...[...d.querySelectorAll('td:nth-child(4)')].map((td) => td.getBoundingClientRect().right))"
    ran = in_a_browser(tmp_path / "report.html", 360, f"`${{d.body.scrollWidth}} ${{{edge} < 360}}`")
    assert "<title>360 true</title>" in ran.stdout
    assert "CONSOLE" not in ran.stderr


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_long_names_leave_all_columns_in_sight(tmp_path: Path) -> None:
    named = [each | {"name": f"{each['name']}:refit=True:multiple=1"} for each in SIZED["cells"]]
    write_report(SIZED | {"cells": named}, tmp_path / "report.html")
    wide = "[...d.querySelectorAll('.scroll')].filter((box) => box.scrollWidth > box.clientWidth).length"
    ran = in_a_browser(tmp_path / "report.html", 1280, f"`${{{wide}}} tables scroll`")
    assert "<title>0 tables scroll</title>" in ran.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file or directory\); make it with `moetailor compare`"),
        ("{", "not JSON"),
        ("[]", "not a JSON object; make it with `moetailor compare`"),
        ("{}", "not a moetailor comparison; make it with `moetailor compare`"),
        (json.dumps(RESULTS | {"version": 1}), "a comparison of version 1, this moetailor reads 3; make it with"),
    ],
)
def test_other_files_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(MoetailorError, match=message):
        read_results(tmp_path / "results.json")


def test_moetailor_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    monkeypatch.setattr(sys, "argv", ["moetailor", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert "report.html" in capsys.readouterr().err
    write_report(RESULTS, tmp_path / "direct.html")
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "direct.html").read_bytes()
