"""`moetailor show` and `moetailor diff`, on plans whose every slot is known."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moetailor
from moetailor.answers import (
    Auxiliary,
    Drop,
    Fitted,
    Keep,
    Linear,
    Merged,
)
from moetailor.planning.layer_plan import LayerPlan
from moetailor_cli import output
from moetailor_cli.app import main
from support.plans import CONSTANT, DROP, FACTS, KEEP, MIXED, layer, plan

Show = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Show:
    """Return a function that saves plans, runs a verb on them and gives the lines it prints."""

    def call(
        verb: str, *plans: moetailor.Plan, width: int = 80, options: tuple[str, ...] = (), code: int = 0
    ) -> list[str]:
        files = [tmp_path / name for name in ("a.json", "b.json")[: len(plans)]]
        for file, given in zip(files, plans, strict=True):
            given.save(file)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(output._out, "_width", width)
        monkeypatch.setattr(sys, "argv", ["moetailor", verb, *[file.name for file in files], *options])
        ended = 0
        try:
            main()
        except SystemExit as stop:
            ended = int(stop.code or 0)
        shown = capsys.readouterr()
        assert ended == code, shown.err
        return (shown.out if code == 0 else shown.err).splitlines()

    return call


def test_every_kind_of_answer_is_shown(run: Show) -> None:
    after = f"{MIXED.nbytes / 1000:.2f} kB ({MIXED.nbytes / FACTS.nbytes:.1%}, moetailor)"
    assert run("show", MIXED) == [
        "a.json",
        f"         mixed, remove 25%: 100.00 kB becomes {after}",
        "         rank=8",
        # 8 + 8 + 6 and the whole layer's 12
        "# kept 34   . dropped 2   c constant 1   l linear map 3   b low rank over a base 3   m merged 2   "
        "> another expert 2   < another layer's expert 1",
        "layer, experts that stay, slots:",
        "   0   8 cll#l### ####",
        "         linear of rank 4: 1; linear of rank 8: 2 4",
        "   1   9 mm#..### ####",
        "         merged into 1: 0-1; dropped, merged into 1: 3",
        "   2   7 >><#bbb# ####",
        "         expert 3: 0; expert 3 x 0.5: 1; expert 3 of layer 3: 2; rank 16 over",
        "         base 4: 4-6",
        "whole    layers 3",
    ]


def test_experts_in_few_bits_are_shown_by_their_bits(run: Show) -> None:
    four, mixed = moetailor.Width(bits=4), moetailor.Width(bits=2, down=4)
    lines = run("show", plan("auto", layer(CONSTANT, widths={1: four, 2: mixed, 11: mixed})))
    # 8 of the layer, and 36 of those that stay whole
    assert lines[3] == "# kept 44   4 kept in 4 bits 1   2 kept in 2 bits 2   c constant 1"
    assert lines[5:7] == ["   0  11 c42##### ###2", "         kept in 4 bits: 1; kept in 2/4 bits: 2 11"]


def test_fitted_experts_are_shown_apart_from_merged_ones(run: Show) -> None:
    refit = plan("refit", layer(Fitted(), DROP, Fitted(), Merged(3), Drop(3)))
    lines = run("show", refit)
    assert "f kept, weights fitted 2" in lines[3]
    assert "m merged 1" in lines[3]
    assert lines[5:7] == ["   0  10 f.fm.### ####", "         merged into 3: 3; dropped, merged into 3: 4"]
    assert "kept -> kept, weights fitted: 0 2" in " ".join(run("diff", plan("mone", layer(KEEP, DROP)), refit))


def test_scores_are_listed_from_the_highest(run: Show) -> None:
    lines = run("show", MIXED, options=("--scores",))
    at = lines.index("         linear of rank 4: 1; linear of rank 8: 2 4")
    assert lines[at + 1 : at + 3] == [
        "         11# 11, 10# 10, 9# 9, 8# 8, 7# 7, 6# 6, 5# 5, 4l 4, 3# 3, 2l 2, 1l 1,",
        "         0c 0",
    ]
    assert lines.count("         the method gave no scores") == 2


@pytest.mark.parametrize("width", [20, 40, 80, 160])
def test_lines_fit_the_terminal(run: Show, width: int) -> None:
    wide = plan("wide", layer(DROP, DROP))
    wide = dataclasses.replace(
        wide,
        model=dataclasses.replace(
            FACTS, nbytes=10**6, stacks=tuple(dataclasses.replace(stack, num_experts=128) for stack in FACTS.stacks)
        ),
        layers={"model.layers.0": LayerPlan(slots=(DROP, DROP, *(Keep() for n in range(2, 128))))},
    )
    lines = run("show", wide, width=width)
    grid = lines[lines.index("layer, experts that stay, slots:") + 1 : -1]
    assert max(map(len, grid)) <= max(width, 29)
    assert "".join(grid).replace(" ", "") == "0126" + ".." + "#" * 126
    blocks = -(-16 // max(1, (width - 9 + 1) // 9))
    assert len(grid) == blocks


def test_a_difference_names_the_slots_and_what_they_were(run: Show) -> None:
    one = plan("mone", layer(CONSTANT, CONSTANT, CONSTANT), layer(KEEP, CONSTANT))
    other = plan("linear", layer(CONSTANT, Linear(8), KEEP, CONSTANT), layer(KEEP, CONSTANT))
    other = dataclasses.replace(other, parameters={"rank": 8, "ranks": "given"})
    lines = run("diff", one, other)
    assert lines[0] == "a.json"
    assert lines[1].startswith("         mone, remove 25%: 100.00 kB becomes ")
    assert lines[3] == "b.json"
    assert lines[5:] == [
        "         rank=8, ranks=given",
        "",
        "   0     9 of 12 alike; constant -> linear of rank 8: 1; constant -> kept: 2;",
        "         kept -> constant: 3",
        "alike    layers 1, 2, 3",
        "45 of 48 slots have the same answer in both (93.8%)",
    ]


def test_a_plan_is_like_itself_and_every_field_of_an_answer_counts(run: Show) -> None:
    assert run("diff", MIXED, MIXED)[-2:] == [
        "alike    layers 0, 1, 2, 3",
        "48 of 48 slots have the same answer in both (100.0%)",
    ]
    one, other = plan("linear", layer(Linear(4))), plan("linear", layer(Linear(4, shared=True)))
    said = "   0     11 of 12 alike; linear of rank 4 -> linear of rank 4, input shared: 0"
    assert run("diff", one, other)[-3] == said
    split = plan("compressed_experts", layer(CONSTANT, *(Auxiliary(1, constants=True),) * 11))
    assert run("diff", plan("mone", layer(CONSTANT)), split)[-4:-2] == [
        "   0     1 of 12 alike; kept -> auxiliary unless among 1 main, vectors=expert,",
        "         constants=True: 1-11",
    ]


def test_layers_that_the_model_does_not_run_have_a_name_of_their_own(run: Show) -> None:
    stacks = (*FACTS.stacks, dataclasses.replace(FACTS.stacks[0], prefix="model.layers.4", index=None, shape=None))
    facts = dataclasses.replace(FACTS, stacks=stacks)
    dropped = dict.fromkeys([stack.prefix for stack in stacks], layer(DROP))
    lines = run("show", dataclasses.replace(MIXED, model=facts, layers=dropped))
    assert lines[-1] == "mtp4  11 .####### ####"
    assert ", native)" in lines[1]


def test_other_models_and_broken_plans_are_refused(run: Show) -> None:
    wide = dataclasses.replace(MIXED, model=dataclasses.replace(FACTS, width=11))
    said = "error: a.json and b.json are for different models: their width is not the same"
    assert run("diff", MIXED, wide, code=1) == [said]
    short = dataclasses.replace(MIXED, layers={"model.layers.0": LayerPlan(slots=(KEEP, DROP))})
    assert run("show", short, code=1) == ["error: model.layers.0: the plan has 2 slots, the layer 12"]


def test_neither_weights_nor_calibration_are_needed(run: Show, tmp_path: Path) -> None:
    # the source of the model is a name that nothing here could resolve, and the folder holds plans only
    run("show", MIXED)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text())["model"]["source"] == "a/model"


def test_a_ranking_is_a_line_a_layer_the_first_to_go_first(run: Show) -> None:
    """Slot 1 is protected: it stays, whatever its score."""
    scores = [0.3, 0.1, 0.2, *(0.4 + slot for slot in range(9))]
    lines = run("show", plan("by_hand", layer(DROP, KEEP, DROP, scores=scores)), options=("--ranking",))
    order = [2, 0, 1, *range(3, 12)]
    assert [json.loads(line) for line in lines] == [
        {"layer": 0, "experts": order, "scores": [scores[slot] for slot in order], "stay": 10}
    ]


def test_a_plan_without_scores_has_no_ranking(run: Show) -> None:
    told = " ".join(run("show", MIXED, options=("--ranking",), code=1))
    assert "mixed gave no scores" in told
