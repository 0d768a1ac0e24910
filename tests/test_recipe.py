"""Recipes: settings as a file, and artifacts that keep theirs."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import moetailor
from moetailor.checkpoint.artifact import add_settings, write_json
from moetailor_cli import output
from moetailor_cli import recipe as recipe_module
from support.reference import REFERENCE, TEXT

SETTINGS = f"""
model: {REFERENCE}
data: [{TEXT[1]}]
sequences: 4
length: 64
method: mone
param: {{score: exact}}
remove: 25%
seed: null
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(SETTINGS)
    return tmp_path / "run.yaml"


def test_a_recipe_says_what_the_command_line_does_not(run, tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "out"
    code, _, err = run("compress", "--recipe", recipe, "-o", out, "--remove", "50%", "--length", "32")
    assert code == 0, err
    plan = moetailor.Plan.load(out / "moetailor_plan.json")
    assert (plan.method, plan.budget, plan.parameters["score"]) == ("mone", "remove 50%", "exact")
    made = moetailor.Calibration.open(tmp_path / "out.calibration")
    assert made.fingerprint["text"]["shapes"] == [[4, 32]]
    settings = json.loads((out / "moetailor_provenance.json").read_text())["settings"]
    assert settings["model"] == str(REFERENCE)
    assert {name: settings[name] for name in ("remove", "length", "sequences", "param", "sample-size")} == {
        "remove": "50%",
        "length": 32,
        "sequences": 4,
        "param": ["score=exact"],
        "sample-size": "8GB",
    }
    assert not {"out", "recipe", "quiet", "dtype"} & settings.keys()
    # What an artifact keeps is a recipe.
    (tmp_path / "again.yaml").write_text(json.dumps(settings))
    code, _, err = run("compress", "--recipe", tmp_path / "again.yaml", "-o", tmp_path / "again")
    assert code == 0, err
    assert moetailor.Plan.load(tmp_path / "again" / "moetailor_plan.json") == plan


@pytest.mark.parametrize("written", ["3:17", "[0:5, 3:17]", "'3:17'"])
def test_what_looks_like_a_number_is_taken_as_it_is_written(written: str, tmp_path: Path) -> None:
    """YAML reads 3:17 as minutes and seconds, and 0123 as octal."""
    rest = "revision: 0123\nlength: 64\nseed: null\n<<: {stream: true}\n"
    (tmp_path / "run.yaml").write_text(f"protect: {written}\n{rest}")
    known = {name: SimpleNamespace(name=name) for name in ("revision", "length", "seed")}
    known |= {
        "protect": SimpleNamespace(name="protect", multiple=True),
        "stream": SimpleNamespace(name="stream", is_flag=True),
    }
    found = recipe_module._defaults(tmp_path / "run.yaml", known)
    wanted = {"protect": ["0:5", "3:17"] if "[" in written else ["3:17"], "revision": "0123", "length": "64"}
    assert found == wanted | {"stream": True}


def test_plans_and_calibrations_keep_their_settings(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calib, file = tmp_path / "calib", tmp_path / "plan.json"
    assert run("calibrate", REFERENCE, "-o", calib, *TEXT)[0] == 0
    assert run("plan", calib, "-o", file, "-m", "random", "--remove", "25%", "--layers", "0-1")[0] == 0
    kept = json.loads((calib / "calibration.json").read_text())["settings"]
    assert kept["data"] == [str(TEXT[1])]
    assert json.loads(file.read_text())["settings"]["layers"] == "0-1"
    (plan := moetailor.Plan.load(file)).save(tmp_path / "bare.json")
    bare = (tmp_path / "bare.json").read_text()
    assert file.read_text().startswith(bare.rstrip("\n}"))
    assert plan.method == "random"
    before = (calib / "calibration.json").read_bytes()
    monkeypatch.setattr(output, "SINCE", time.time() + 10)  # as if the calibration were an earlier process'
    assert run("calibrate", REFERENCE, "-o", calib, *TEXT, "--states", "disk")[0] == 0
    assert (calib / "calibration.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sequence: 4", "'sequence' is no setting; did you mean 'sequences'?"),
        ("12: 4", "'12' is no setting. Known: "),
        ("recipe: x", "'recipe' is no setting"),
        ("- a", "holds no settings"),
        ("a: [", "cannot be read"),
        ("sequences: 4\nlength: 16\nsequences: 8", "cannot be read ('sequences' is said twice)"),
        ('sequences: !!int "x"', "cannot be read (invalid literal"),
        ("sequences: !!float abc", "cannot be read (could not convert"),
        ("a: " + "[" * 2000, "cannot be read"),
        ("stream: some", "stream: 'some' is neither true nor false"),
        ("sequences: {a: 1}", "is not one value"),
        ("sequences: many", "'--sequences'"),
    ],
)
def test_what_is_no_recipe_is_refused(run, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    code, _, err = run("calibrate", REFERENCE, "-o", tmp_path / "c", *TEXT[:2], "--recipe", tmp_path / "run.yaml")
    assert code == 2
    assert told in " ".join(err.replace("│", " ").split())


def test_settings_are_added_once_and_nothing_else_changes(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"format": "x", "list": [1, 2]})
    before = file.read_text()
    add_settings(file, {"remove": "25%", "layers": [1]})
    assert file.read_text().startswith(before.rstrip("\n}"))
    assert json.loads(file.read_text()) == json.loads(before) | {"settings": {"remove": "25%", "layers": [1]}}
    add_settings(file, {})
    assert json.loads(file.read_text()) == json.loads(before) | {"settings": {}}
