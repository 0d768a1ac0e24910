"""Models on the hub: a look at one downloads headers, not weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moetailor.summary import summarise
from support import hub
from support.reference import REFERENCE

MOETAILOR = [sys.executable, "-c", "from moetailor_cli.app import main; main()"]


def inspect(served: hub.Hub, home: Path, *more: str) -> subprocess.CompletedProcess:
    command = [*MOETAILOR, "inspect", hub.NAME, "--json", *more]
    environment = os.environ | served.environment(home)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_look_downloads_headers_and_says_the_same(tmp_path: Path) -> None:
    """18 MB of weights, of which the first hundred thousand bytes are asked for."""
    with hub.serving(REFERENCE) as served:
        ran = inspect(served, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads(json.dumps(summarise(REFERENCE).to_json())) | {"source": hub.NAME}
    assert 0 < served.given["model.safetensors"] <= 100_001
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_what_is_refused_is_refused_by_its_config(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 0}))
    with hub.serving(folder) as served:
        ran = inspect(served, tmp_path / "home")
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert not any(name.endswith(".safetensors") for name in served.given)


@pytest.mark.parametrize("damage", ["no safetensors", "garbage", "gone"])
def test_what_is_no_header_is_said(damage: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "garbage":
        weights.write_bytes(b"nothing of the kind, but long enough for a length")
    else:
        weights.unlink()
    if damage == "no safetensors":
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with hub.serving(folder) as served:
        ran = inspect(served, tmp_path / "home")
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    told = {"garbage": "the header of model.safetensors cannot be had from the hub"}
    assert f"error: {hub.NAME}" in ran.stderr
    assert told.get(damage, "has no safetensors weights") in ran.stderr


def test_without_a_network_it_says_what_needs_it(tmp_path: Path) -> None:
    ran = inspect(hub.Hub("http://127.0.0.1:9"), tmp_path)
    assert ran.returncode == 1
    assert f"{hub.NAME}: neither a folder nor a model that the hub would give" in ran.stderr


def test_what_was_downloaded_is_not_asked_for_again(tmp_path: Path) -> None:
    with hub.serving(REFERENCE) as served:
        script = f"from moetailor.checkpoint.files import open_checkpoint; open_checkpoint({hub.NAME!r})"
        environment = os.environ | served.environment(tmp_path)
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
        before = dict(served.given)
        ran = inspect(served, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert before["model.safetensors"] == served.given["model.safetensors"] == 18585624
