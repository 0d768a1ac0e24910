"""Models on the hub: a look at one downloads headers, not weights."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import moetailor
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.hub import headers_only, upload
from moetailor.summary import summarise
from support import hub
from support.families import tiny_model
from support.quantized import LAYOUTS, write_source
from support.reference import REFERENCE

MOETAILOR = [sys.executable, "-c", "from moetailor_cli.app import main; main()"]


Ran = tuple[int, str, str]
Ask = Callable[..., Ran]


@pytest.fixture
def ask(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Return a function that runs a verb with another hub: the hub's library reads the environment anew."""

    def call(served: hub.Hub, home: Path, *words: object, **settings: str) -> Ran:
        for name, value in (served.environment(home) | settings).items():
            monkeypatch.setenv(name, value)
        importlib.reload(constants)
        return run(*words)

    yield call
    monkeypatch.undo()
    importlib.reload(constants)


def test_a_look_downloads_headers_and_says_the_same(tmp_path: Path) -> None:
    """18 MB of weights, of which the first hundred thousand bytes are asked for; in a process of its own."""
    with hub.serving(REFERENCE) as served:
        command = [*MOETAILOR, "inspect", hub.NAME, "--json"]
        environment = os.environ | served.environment(tmp_path)
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads(json.dumps(summarise(REFERENCE).to_json())) | {"source": hub.NAME}
    assert 0 < served.given["model.safetensors"] <= 100_001
    assert list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("name", ["fp8-blocks", "mxfp4", "w4a16", "shards"])
def test_inspect_and_fit_download_config_and_headers_alone(name: str, run, ask: Ask, tmp_path: Path) -> None:
    """Some 13 MB of weights, most of it the embedding and the head, of which each file's beginning is asked for."""
    if name == "shards":
        folder = tmp_path / "source"
        tiny_model("qwen3_moe", vocab_size=100_000).save_pretrained(folder, max_shard_size="4MB")
        assert len(list(folder.glob("*.safetensors"))) == 3
    else:
        layout = LAYOUTS[name]
        folder, _ = write_source(replace(layout, changes=layout.changes | {"vocab_size": 200_000}), tmp_path)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    size = ("--memory", "6MB", "--context", "24", "--json")
    looked, fitted = run("inspect", folder, "--json"), run("fit", folder, *size)
    with hub.serving(folder) as served:  # as if each were the first to ask for the model
        code, shown, err = ask(served, tmp_path / "one", "inspect", hub.NAME, "--json")
        assert (code, json.loads(shown)) == (0, json.loads(looked[1]) | {"source": hub.NAME}), err
        code, shown, err = ask(served, tmp_path / "two", "fit", hub.NAME, *size)
        assert (code, shown) == fitted[:2], err
    weights = {file for file in sizes if file.endswith(".safetensors")}
    # Each verb asks once for the first hundred thousand bytes of each file; what else it gets is config and index.
    asked = {file: 2 * min(100_001, sizes[file]) for file in weights}
    assert {file: served.given[file] for file in weights} == asked
    assert served.given.keys() - weights <= {"config.json", "model.safetensors.index.json", "generation_config.json"}
    total = sum(sizes.values())
    assert sum(served.given.values()) / 2 <= 100_001 * len(weights) + 20_000 < 0.05 * total


def test_what_is_refused_is_refused_by_its_config(ask: Ask, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 0}))
    with hub.serving(folder) as served:
        code, _, err = ask(served, tmp_path / "home", "inspect", hub.NAME)
    assert (code, "error: model type 'olmoe' has no MoE layers" in err) == (1, True), err
    assert not any(name.endswith(".safetensors") for name in served.given)


@pytest.mark.parametrize("damage", ["no safetensors", "garbage", "gone"])
def test_what_is_no_header_is_said(damage: str, ask: Ask, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    weights = folder / "model.safetensors"
    if damage == "garbage":
        weights.write_bytes(b"nothing of the kind, but long enough for a length")
    else:
        weights.unlink()
    if damage == "no safetensors":
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with hub.serving(folder) as served:
        code, _, err = ask(served, tmp_path / "home", "inspect", hub.NAME)
    assert code == 1
    told = {"garbage": "the header of model.safetensors cannot be had from the hub"}
    assert f"error: {hub.NAME}" in err
    assert told.get(damage, "has no safetensors weights") in err


def test_without_a_network_it_says_what_needs_it(ask: Ask, tmp_path: Path) -> None:
    nowhere = hub.Hub("http://127.0.0.1:9")
    for more, name in (((), hub.NAME), (("--revision", "v2"), f"{hub.NAME}@v2")):
        code, _, err = ask(nowhere, tmp_path, "inspect", hub.NAME, *more)
        assert code == 1
        assert f"{name}: neither a folder nor a model that the hub would give" in err


def test_a_connection_that_breaks_is_no_traceback(ask: Ask, tmp_path: Path) -> None:
    """Whatever the HTTP library raises: here the other side hangs up, and what it says is no HTTP."""
    for said in (b"", b"no HTTP\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=hang_up, args=(server, said), daemon=True).start()
            broken = hub.Hub(f"http://127.0.0.1:{server.getsockname()[1]}")
            code, _, err = ask(broken, tmp_path, "inspect", hub.NAME)
        assert code == 1
        assert f"{hub.NAME}: neither a folder nor a model that the hub would give" in err


def hang_up(server: socket.socket, said: bytes) -> None:
    with suppress(OSError):
        while True:
            other, _ = server.accept()
            with other:
                other.recv(4096)
                other.sendall(said)


def test_what_was_downloaded_is_not_asked_for_again(ask: Ask, tmp_path: Path) -> None:
    with hub.serving(REFERENCE) as served:
        assert ask(served, tmp_path, "inspect", hub.NAME)[0] == 0
        open_checkpoint(hub.NAME)
        before = dict(served.given)
        code, _, err = ask(served, tmp_path, "inspect", hub.NAME)
    assert code == 0, err
    # The look's beginning of the file, then all of it, and nothing more.
    assert before["model.safetensors"] == served.given["model.safetensors"] == 100_001 + 18_585_624


def test_weights_of_a_stopped_download_are_not_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there, out = tmp_path / "commit", tmp_path / "out"
    there.mkdir()
    out.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (there / name).write_bytes(b"1234")
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    monkeypatch.setattr("moetailor.checkpoint.hub._tensors", lambda name, shard, commit: header)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    headers_only(hub.NAME, there, shards, out)
    assert {file.name for file in out.iterdir()} == {"config.json", *shards}
    assert all((out / shard).read_bytes()[8:].startswith(b"{") for shard in shards)


def test_a_revision_is_asked_for_and_stays_with_the_name(ask: Ask, tmp_path: Path) -> None:
    with hub.serving(REFERENCE) as served:
        code, shown, err = ask(served, tmp_path, "inspect", hub.NAME, "--json", "--revision", "v2")
        asked = [path for path in served.asked if "/revision/" in path]
    assert code == 0, err
    assert json.loads(shown)["source"] == f"{hub.NAME}@v2"
    assert asked
    assert set(asked) == {f"/api/models/{hub.NAME}/revision/v2"}


def test_lm_eval_gets_the_name_of_a_model_on_the_hub(ask: Ask, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with hub.serving(REFERENCE) as served:
        code, shown, err = ask(served, tmp_path, "lm-eval", f"{hub.NAME}@v2", "--dry-run")
    assert code == 0, err
    assert f"""--model_args '{json.dumps({"pretrained": hub.NAME, "revision": "v2"})}'""" in shown


def test_a_revision_is_one_of_a_model_on_the_hub(run) -> None:
    for model, told in ((str(REFERENCE), "names no model on the hub"), ("a/b@c", "names its revision already")):
        code, _, err = run("inspect", model, "--revision", "v2")
        assert code == 2
        assert told in " ".join(err.replace("│", " ").split())


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("planned")
    text = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=2, length=32)
    calibration = moetailor.calibrate(REFERENCE, folder / "calib", text=text)
    moetailor.make_plan(calibration, "frequency", moetailor.Budget.parse(keep=4)).save(folder / "plan.json")
    return folder / "plan.json", folder / "calib"


def pushed(home: Path, planned: tuple[Path, Path], name: str) -> list[str]:
    plan, calibration = map(str, planned)
    words = ["apply", str(REFERENCE), plan, "--calibration", calibration, "-o", str(home / "out")]
    return [*words, "--push-to-hub", name]


def test_a_finished_result_is_uploaded_with_its_card(ask: Ask, tmp_path: Path, planned: tuple[Path, Path]) -> None:
    with hub.serving(REFERENCE) as served:
        words = pushed(tmp_path, planned, "some/small")
        code, _, err = ask(served, tmp_path, *words, HF_TOKEN="hf_known")
        assert code == 0, err
        assert f"uploaded to {served.address}/some/small" in err
    written = {
        str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()
    }
    assert {"README.md", "model.safetensors", "moetailor_plan.json"} <= written.keys()
    assert served.taken == written
    assert "/api/repos/create" in served.asked


@pytest.mark.parametrize(("name", "told"), [("some/small", "does not know who you are"), ("a b", "--push-to-hub a b:")])
def test_what_could_not_be_uploaded_is_refused_before_the_work(
    ask: Ask, tmp_path: Path, planned: tuple[Path, Path], name: str, told: str
) -> None:
    with hub.serving(REFERENCE) as served:
        code, _, err = ask(served, tmp_path, *pushed(tmp_path, planned, name), HF_TOKEN="hf_unknown")
    assert code == 1
    assert told in err
    assert not (tmp_path / "out").exists()
    assert served.taken == {}


def test_where_nothing_is_made_nothing_is_uploaded_and_that_is_said(ask: Ask, tmp_path: Path) -> None:
    words = ["fit", REFERENCE, "--memory", "1GB", "-o", tmp_path / "out", "--push-to-hub", "some/small"]
    with hub.serving(REFERENCE) as served:
        code, _, err = ask(served, tmp_path, *words, HF_TOKEN="hf_known")
    assert (code, served.taken) == (0, {})
    assert "nothing was made, and nothing uploaded" in " ".join(err.split())
    assert "hf upload" not in err  # of a folder that is not there


def test_what_the_hub_does_not_take_stays_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise ValueError("no more room")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(
        moetailor.MoetailorError, match=r"is whole, and the hub does not take it as a/b \(no more room\)"
    ):
        upload(tmp_path, "a/b")
