"""Models on the hub: a look at one downloads headers, not weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

import moetailor
from moetailor.checkpoint.hub import upload
from moetailor.summary import summarise
from support import hub
from support.families import tiny_model
from support.quantized import LAYOUTS, write_source
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


# Runs both verbs in one process, as if each were the first to ask for the model.
BOTH = """
import shutil, sys
from moetailor_cli.app import main
model, home = sys.argv[1:]
for words in (["inspect", model, "--json"], ["fit", model, "--memory", "6MB", "--context", "24", "--json"]):
    sys.argv = ["moetailor", *words]
    try: main()
    except SystemExit as stop: assert not stop.code, words
    print("====")
    shutil.rmtree(home)
"""


@pytest.mark.parametrize("name", ["fp8-blocks", "mxfp4", "shards"])
def test_inspect_and_fit_download_config_and_headers_alone(name: str, run, tmp_path: Path) -> None:
    """Some 13 MB of weights, most of it the embedding and the head, of which each file's beginning is asked for."""
    if name == "shards":
        folder = tmp_path / "source"
        tiny_model("qwen3_moe", vocab_size=100_000).save_pretrained(folder, max_shard_size="4MB")
        assert len(list(folder.glob("*.safetensors"))) == 3
    else:
        layout = LAYOUTS[name]
        folder, _ = write_source(replace(layout, changes=layout.changes | {"vocab_size": 200_000}), tmp_path)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    home = tmp_path / "home"
    with hub.serving(folder) as served:
        command = [sys.executable, "-c", BOTH, hub.NAME, str(home)]
        environment = os.environ | served.environment(home)
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    weights = {file for file in sizes if file.endswith(".safetensors")}
    # Each verb asks once for the first hundred thousand bytes of each file; what else it gets is config and index.
    asked = {file: 2 * min(100_001, sizes[file]) for file in weights}
    assert {file: served.given[file] for file in weights} == asked
    assert served.given.keys() - weights <= {"config.json", "model.safetensors.index.json", "generation_config.json"}
    total = sum(sizes.values())
    assert sum(served.given.values()) / 2 <= 100_001 * len(weights) + 20_000 < 0.05 * total
    looked, fitted, _ = ran.stdout.split("====\n")
    assert json.loads(looked) == json.loads(run("inspect", folder, "--json")[1]) | {"source": hub.NAME}
    assert fitted == run("fit", folder, "--memory", "6MB", "--context", "24", "--json")[1]


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


def test_a_revision_is_asked_for_and_stays_with_the_name(tmp_path: Path) -> None:
    with hub.serving(REFERENCE) as served:
        first = inspect(served, tmp_path, "--revision", "v2")
        asked = [path for path in served.asked if "/revision/" in path]
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["source"] == f"{hub.NAME}@v2"
    assert asked
    assert set(asked) == {f"/api/models/{hub.NAME}/revision/v2"}


def test_a_revision_is_one_of_a_model_on_the_hub(run) -> None:
    for model, told in ((str(REFERENCE), "names no model on the hub"), ("a/b@c", "names its revision already")):
        code, _, err = run("inspect", model, "--revision", "v2")
        assert code == 2
        assert told in " ".join(err.replace("│", " ").split())


def test_a_revision_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    ran = inspect(hub.Hub("http://127.0.0.1:9"), tmp_path, "--revision", "v2")
    assert ran.returncode == 1
    assert f"{hub.NAME}@v2: neither a folder nor a model" in ran.stderr


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("planned")
    text = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=2, length=32)
    calibration = moetailor.calibrate(REFERENCE, folder / "calib", text=text)
    moetailor.make_plan(calibration, "frequency", moetailor.Budget.parse(keep=4)).save(folder / "plan.json")
    return folder / "plan.json", folder / "calib"


def push(
    served: hub.Hub, home: Path, planned: tuple[Path, Path], *more: str, token: str
) -> subprocess.CompletedProcess:
    plan, calibration = map(str, planned)
    words = ["apply", str(REFERENCE), plan, "--calibration", calibration, "-o", str(home / "out")]
    environment = os.environ | served.environment(home) | {"HF_TOKEN": token}
    command = [*MOETAILOR, *words, "--push-to-hub", *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_finished_result_is_uploaded_with_its_card(tmp_path: Path, planned: tuple[Path, Path]) -> None:
    with hub.serving(REFERENCE) as served:
        ran = push(served, tmp_path, planned, "some/small", token="hf_known")
        assert ran.returncode == 0, ran.stderr
        assert f"uploaded to {served.address}/some/small" in ran.stderr
    written = {
        str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()
    }
    assert {"README.md", "model.safetensors", "moetailor_plan.json"} <= written.keys()
    assert served.taken == written
    assert "/api/repos/create" in served.asked


@pytest.mark.parametrize(("name", "told"), [("some/small", "does not know who you are"), ("a b", "--push-to-hub a b:")])
def test_what_could_not_be_uploaded_is_refused_before_the_work(
    tmp_path: Path, planned: tuple[Path, Path], name: str, told: str
) -> None:
    with hub.serving(REFERENCE) as served:
        ran = push(served, tmp_path, planned, name, token="hf_unknown")
    assert ran.returncode == 1
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "out").exists()
    assert served.taken == {}


def test_what_the_hub_does_not_take_stays_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise ValueError("no more room")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(
        moetailor.MoetailorError, match=r"is whole, and the hub does not take it as a/b \(no more room\)"
    ):
        upload(tmp_path, "a/b")
