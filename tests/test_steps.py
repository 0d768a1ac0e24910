"""What comes after a verb, and how much is said: --quiet, --verbose."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from moetailor_cli import app
from moetailor_cli.steps import STEPS, following
from support.plans import MIXED
from support.reference import REFERENCE, TEXT

HELD_OUT = ["--data", REFERENCE / "heldout.jsonl", "--sequences", "2", "--length", "64"]


def commands(told: str) -> list[list[str]]:
    """Return the commands that the last line names."""
    line = told.rstrip().splitlines()[-1]
    parts = line.partition("next")[2].partition(": ")[2].split(", or ")
    return [shlex.split(part)[1:] for part in parts if part.startswith("moetailor ")]


def test_every_verb_has_a_step() -> None:
    assert set(STEPS) == {verb.__name__ for verb in app.VERBS}


def test_one_stage_leads_to_the_next(run, tmp_path: Path) -> None:
    """The commands are given as they are told, with the names that stand for what the user chooses filled in."""
    calib, compared, heldout = tmp_path / "a calib", tmp_path / "compared", REFERENCE / "heldout.jsonl"
    filled = {"plan.json": tmp_path / "plan.json", "OUT": tmp_path / "out", "heldout.jsonl": heldout}
    filled |= {"comparison": compared}
    code, _, err = run("calibrate", REFERENCE, "-o", calib, *TEXT)
    assert code == 0
    plan, compare = ([filled.get(word, word) for word in words] for words in commands(err))
    code, _, err = run(*plan)
    assert code == 0, err
    assert f"the plan is in {filled['plan.json']}; next: " in err
    (words,) = commands(err)
    apply = [filled.get(word, word) for word in words]
    code, _, err = run(*apply)
    assert code == 0, err
    evaluate, serve = ([filled.get(word, word) for word in words] for words in commands(err))
    assert serve == ["serve", str(filled["OUT"])]
    code, _, err = run(*evaluate, "--sequences", "2", "--length", "64")
    assert code == 0, err
    assert commands(err) == [["serve", str(filled["OUT"])]]
    assert "KL, in nats a token, is how far" in err.splitlines()[-1]
    more = ["--methods", "mone,quantize@4,reap@4", "--sizes", "60%", "--held-out-sequences", "2", "--length", "64"]
    code, _, err = run(*compare, *more)
    assert code == 0, err
    (words,) = commands(err)
    filled["plan.json"] = tmp_path / "winner.json"
    code, _, err = run(*[filled.get(word, word) for word in words])
    assert code == 0, err
    results = json.loads((compared / "results.json").read_text())
    made = json.loads(filled["plan.json"].read_text())
    row = next(cell for cell in results["cells"] if cell["nbytes"] == made["bytes"]["planned"])
    assert results["cells"].index(row) in results["front"]


def test_what_is_for_programs_or_was_not_done_says_so() -> None:
    assert following("inspect", {"json": True}) is None
    assert following("compress", {"dry_run": True}) == "nothing was made; next: the same command without --dry-run"


def test_shown_plans_say_whose_they_are(run, tmp_path: Path) -> None:
    MIXED.save(tmp_path / "plan.json")
    code, shown, err = run("show", tmp_path / "plan.json")
    assert code == 0
    assert commands(err)[0][:3] == ["apply", MIXED.model.source, str(tmp_path / "plan.json")]
    assert run("show", tmp_path / "plan.json", "--quiet") == (0, shown, "")


def test_quiet_leaves_results_and_errors(run, tmp_path: Path) -> None:
    code, shown, err = run("calibrate", REFERENCE, "-o", tmp_path / "calib", *TEXT, "--quiet")
    assert (code, shown, err) == (0, "", "")
    plan = ["plan", tmp_path / "calib", "-o", tmp_path / "plan.json", "--method", "random", "--remove", "25%"]
    assert run(*plan, "-q") == (0, "", "")
    code, shown, err = run("inspect", tmp_path, "--quiet")
    assert (code, shown) == (1, "")
    assert "no config.json" in err
    assert run(*plan)[2]  # the next one is not quiet
    code, _, err = run("inspect", REFERENCE, "--quiet", "--verbose")
    assert (code, "give one of them" in err) == (2, True)


def test_every_verb_may_be_quiet_or_verbose() -> None:
    for verb in get_command(app.app).commands.values():
        assert {"-q", "-v"} <= {name for part in verb.params for name in part.opts}


@pytest.mark.parametrize("verbose", [True, False])
def test_verbose_lets_libraries_speak(verbose: bool, tmp_path: Path) -> None:
    """In a process of its own, whose loggers nobody needs afterwards."""
    code = f"import sys; sys.argv = ['moetailor', *{['inspect', str(REFERENCE), *(['-v'] * verbose)]}]\n"
    code += "import logging\nfrom moetailor_cli.app import main\n"
    code += "import moetailor.summary as s; found = s.summarise\n"
    code += "def told(*a, **o):\n    logging.getLogger('transformers.x').info('told so'); return found(*a, **o)\n"
    code += "s.summarise = told\nmain()\n"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("told so" in ran.stderr) == verbose
