"""Methods of other packages: distributions made here, with nothing but a module and entry points."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import moetailor
from moetailor.errors import MoetailorWarning
from moetailor.methods.plugins import load_plugins
from moetailor.methods.registry import METHODS
from moetailor_cli.completion import complete_method

Install = Callable[..., None]
CODE = """
from dataclasses import dataclass

from moetailor.answers import Drop
from moetailor.methods.method import Method
from moetailor.planning.layer_plan import keep_only


@dataclass(frozen=True, kw_only=True)
class Tiny(Method):
    '''Keep the first experts.'''

    name = "tiny_first"
    needs = frozenset()

    def plan(self, layer, keep):
        return keep_only(layer.num_experts, range(keep), Drop())


class Undecided(Method):
    name = "undecided"


other = "no class"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that puts a distribution on the path."""
    before = dict(METHODS)

    def put(package: str, entries: dict[str, str], code: str = CODE) -> None:
        site = tmp_path / package
        about = site / f"{package}-1.0.dist-info"
        about.mkdir(parents=True)
        (site / f"{package}.py").write_text(code)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {package}:{value}" for name, value in entries.items()]
        (about / "entry_points.txt").write_text("\n".join(["[moetailor.methods]", *lines]) + "\n")
        monkeypatch.syspath_prepend(str(site))

    yield put
    METHODS.clear()
    METHODS.update(before)


def told() -> list[str]:
    """Load what is installed, and return what is said of it."""
    with pytest.warns(MoetailorWarning) as found:
        load_plugins()
    return [str(warning.message) for warning in found]


def test_a_method_of_another_package_is_one_of_ours(install: Install, run, calibration) -> None:
    install("tiny_package", {"tiny_first": "Tiny"})
    load_plugins()
    plan = moetailor.make_plan(calibration("olmoe"), "Tiny_First", moetailor.Budget.parse(keep=6))
    assert all(list(layer.pool) == list(range(6)) for layer in plan.layers.values())
    code, shown, _ = run("methods", "tiny_first")
    assert (code, "Keep the first experts." in shown) == (0, True)
    assert complete_method("tiny") == ["tiny_first"]


@pytest.mark.parametrize(
    ("entries", "code", "why"),
    [
        ({"tiny_first": "Tiny"}, "import no_such_module", "cannot be loaded (No module named 'no_such_module')"),
        ({"tiny_first": "Missing"}, CODE, "cannot be loaded ("),
        ({"tiny_first": "other"}, CODE, "is no method: broken:other is no class"),
        ({"undecided": "Undecided"}, CODE, "is no method: broken:Undecided lacks plan"),
        ({"tiny_last": "Tiny"}, CODE, "calls itself 'tiny_first'"),
        ({"reap": "Tiny"}, CODE, "has the name of one that is there already, of moetailor"),
        ({"tiny_first": "Tiny"}, "raise SystemError('very broken')", "cannot be loaded (SystemError: very broken)"),
    ],
)
def test_what_is_no_method_is_left_out_and_named(
    install: Install, entries: dict[str, str], code: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    install("broken", entries, code)
    before = dict(METHODS)
    (said,) = told()
    assert said.startswith(f"broken: its method {next(iter(entries))!r} {why}")
    assert before == METHODS


def test_of_two_packages_with_one_name_the_second_is_refused(install: Install) -> None:
    install("one_package", {"tiny_first": "Tiny"})
    install("two_package", {"tiny_first": "Tiny"})
    (said,) = told()
    assert said.startswith(
        "two_package: its method 'tiny_first' has the name of one that is there already, of one_pack"
    )


def test_the_command_line_goes_on_without_it(install: Install, tmp_path: Path) -> None:
    install("broken", {"tiny_first": "Tiny"}, "import no_such_module")
    code = "import sys; sys.argv = ['moetailor', 'methods', 'reap']\nfrom moetailor_cli.app import main; main()"
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True)
    assert ran.returncode == 0
    assert "note: broken: its method 'tiny_first' cannot be loaded" in ran.stderr
