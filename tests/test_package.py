"""What is shipped: archives built as a release would, one of them installed beside the libraries that are here."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import moetailor
from moetailor_cli.app import VERBS
from support.source import ROOT

Run = Callable[..., str]
PIP = [sys.executable, "-m", "pip", "--quiet"]
OFFLINE = ["--no-index", "--no-deps"]


def shell(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command that does not see the checkout, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a wheel and an sdist."""
    out = tmp_path_factory.mktemp("built")
    shell(sys.executable, "-m", "hatchling", "build", "-d", out)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def content(wheel: Path) -> set[str]:
    """Return the files of a wheel, without its notes about itself."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_a_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    files = [file for file in (ROOT / "src").rglob("*") if file.is_file() and file.parent.name != "__pycache__"]
    assert content(wheel) == {file.relative_to(ROOT / "src").as_posix() for file in files}
    assert {"moetailor/py.typed", "moetailor_cli/py.typed"} <= content(wheel)


def test_the_sdist_gives_the_same_wheel(built: Path, wheel: Path, tmp_path: Path) -> None:
    shell(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", tmp_path, next(built.glob("*.tar.gz")))
    again = next(tmp_path.glob("*.whl"))
    assert again.name == wheel.name
    assert content(again) == content(wheel)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the commands of an environment that has the wheel, and the libraries of this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    commands = home / "bin"
    shell(*PIP, "--python", commands / "python", "install", *OFFLINE, wheel)
    site = Path(shell(commands / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A folder that a .pth file names is searched for modules; a checkout that is installed there stays out of sight.
    (site / "libraries.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    return commands


def test_an_installed_wheel_is_imported(installed: Path, tmp_path: Path) -> None:
    tell = "import moetailor; print(moetailor.__file__); print(*sorted(moetailor.METHODS))"
    place, methods = shell(installed / "python", "-c", tell, cwd=tmp_path).splitlines()
    assert Path(place).is_relative_to(installed.parent)
    assert methods.split() == sorted(moetailor.METHODS)


def test_its_command_runs(installed: Path, tmp_path: Path) -> None:
    command = installed / "moetailor"
    assert shell(command, "--version", cwd=tmp_path) == f"moetailor {moetailor.__version__}\n"
    told = shell(command, "--help", cwd=tmp_path)
    assert all(verb.__name__.replace("_", "-") in told for verb in VERBS)


def test_one_version_is_told_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == moetailor.__version__
    assert f"## {moetailor.__version__}" in (ROOT / "CHANGELOG.md").read_text()
