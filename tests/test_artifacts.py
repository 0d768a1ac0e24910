"""Our own artifacts, damaged or of another run: refused with the file and what to do, and following that works."""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import moetailor
from moetailor.calibration.folder import layer_file
from moetailor.checkpoint.tensors import digest, read_tensors
from moetailor.comparison.stored import read_results
from moetailor.errors import CalibrationError, MoetailorError
from moetailor.evaluation.search import SearchFile
from support.tiny import token_batches
from support.training import blocks

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]
KEEP = moetailor.Budget.parse(keep=5)
AGAIN = "delete it and run the same calibrate command again: it measures what is missing"
ANEW = "delete the folder and calibrate again"


@pytest.fixture
def copied(calibration: GetCalibration, tmp_path: Path) -> moetailor.Calibration:
    """A calibration of olmoe that may be damaged."""
    return moetailor.Calibration.open(shutil.copytree(calibration("olmoe").folder, tmp_path / "calibration"))


def edit(file: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Write a safetensors file again with one tensor changed, or lost."""
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), file)


def spoiled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


CHANGES = {
    "NaN": spoiled(math.nan),
    "Inf": spoiled(math.inf),
    "another number": spoiled(0.125),
    "lost": lambda tensor: None,
    "another shape": lambda tensor: tensor.reshape(1, -1),
    "another dtype": lambda tensor: tensor.half(),
}


# Calibrations


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["sum.gated_norm", "sum.output", "sample.hidden", "sample.logits"])
def test_a_number_that_was_not_measured_is_refused(change: str, name: str, copied: moetailor.Calibration) -> None:
    file = layer_file(copied.folder, 1)
    edit(file, name, CHANGES[change])
    damaged, sound = (copied.sums, copied.sample) if name.startswith("sum") else (copied.sample, copied.sums)
    with pytest.raises(CalibrationError) as refused:
        damaged(1)
    assert str(refused.value) == (
        f"{file}: holds other values than were written, it is damaged or of another run; {AGAIN}"
    )
    sound(1)  # each part stands for itself
    damaged(0)


@pytest.mark.parametrize("name", ["layer-0000.safetensors", "layer-0001.safetensors", "text.safetensors"])
def test_the_cure_gives_the_same_plan(name: str, copied: moetailor.Calibration, checkpoint: Get) -> None:
    before = moetailor.make_plan(copied, "lightmoe", KEEP, parameters={"rank": 1, "bases": 1})
    file = copied.folder / name
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(CalibrationError, match=f"{name}: holds other values"):
        copied.batches() if name.startswith("text") else copied.sample(int(name[6:10])) and copied.sums(int(name[6:10]))
    file.unlink()
    with pytest.raises(CalibrationError, match=f"{name}: missing; {AGAIN}"):
        copied.batches() if name.startswith("text") else copied.sums(int(name[6:10]))
    again = moetailor.calibrate(checkpoint("olmoe"), copied.folder, text=token_batches(), residual=True)
    assert file.read_bytes() == sound
    assert moetailor.make_plan(again, "lightmoe", KEEP, parameters={"rank": 1, "bases": 1}) == before


def test_a_layer_of_another_run_is_refused(copied: moetailor.Calibration) -> None:
    shutil.copy(layer_file(copied.folder, 0), layer_file(copied.folder, 1))
    for read in (copied.sums, copied.sample):
        with pytest.raises(CalibrationError, match="holds other values than were written"):
            read(1)
        read(0)


def test_what_is_no_file_is_not_waited_for(copied: moetailor.Calibration) -> None:
    for name, read in (("layer-0000.safetensors", lambda: copied.sums(0)), ("text.safetensors", copied.batches)):
        (copied.folder / name).unlink()
        os.mkfifo(copied.folder / name)
        with pytest.raises(CalibrationError, match=f"{name}: no ordinary file; delete it"):
            read()


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """Return where the plain values of a JSON tree lie."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return [at] if inner is None else [place for key, one in inner for place in places(one, (*at, key))]


def test_every_value_of_the_manifest_is_guarded(copied: moetailor.Calibration) -> None:
    """Whichever is changed, to a value of its type or of none: refused, with what to do."""
    file = copied.folder / "calibration.json"
    sound = json.loads(file.read_text())
    assert len(places(sound)) > 50
    for at in places(sound):
        old: Any = sound
        for step in at:
            old = old[step]
        for value in (old + 1 if isinstance(old, int) else "x", None, [], 10**9, math.nan):
            if value == old:
                continue
            file.write_text(json.dumps(_with(sound, at, value)))
            with pytest.raises(CalibrationError) as refused:
                moetailor.Calibration.open(copied.folder)
            assert str(refused.value).startswith(f"{file}: ")
            assert str(refused.value).endswith(f"; {ANEW}")


def _with(content: dict, at: tuple, value: Any) -> dict:
    changed = copy.deepcopy(content)
    parent: Any = changed
    for step in at[:-1]:
        parent = parent[step]
    parent[at[-1]] = value
    return changed


def test_sensitivities_are_guarded(copied: moetailor.Calibration, checkpoint: Get) -> None:
    file, before = copied.folder / "sensitivity.json", copied.sensitivities()
    content = json.loads(file.read_text())
    for at in places(content):
        for value in (0.5, math.nan, "x", None):
            file.write_text(json.dumps(_with(content, at, value)))
            with pytest.raises(CalibrationError, match=r"sensitivity\.json: .*; delete it and run the same"):
                copied.sensitivities()
    file.unlink()
    assert copied.sensitivities() is None
    again = moetailor.calibrate(
        checkpoint("olmoe"), copied.folder, text=token_batches(), residual=True, sensitivity=True
    )
    assert again.sensitivities() == before
    # What a kill left between the file and its hash counts for nothing.
    assert moetailor.Calibration(**vars(again) | {"hashes": {}}).sensitivities() is None


def test_a_stopped_run_goes_on_behind_what_it_knows(copied: moetailor.Calibration, checkpoint: Get) -> None:
    (copied.folder / "calibration.json").unlink()
    (copied.folder / "sensitivity.json").unlink()
    file = layer_file(copied.folder, 0)
    sound = file.read_bytes()
    edit(file, "sample.gate", spoiled(math.nan))

    def again() -> moetailor.Calibration:
        return moetailor.calibrate(checkpoint("olmoe"), copied.folder, text=token_batches(), residual=True)

    with pytest.raises(CalibrationError, match=f"layer-0000.safetensors: holds other values .*; {AGAIN}"):
        again()
    file.unlink()
    again()
    assert file.read_bytes() == sound
    # A layer that was written when its hash was not yet noted is measured again.
    (copied.folder / "calibration.json").unlink()
    notes = json.loads((copied.folder / "run.json").read_text())
    notes["hashes"] = {name: known for name, known in notes["hashes"].items() if "0000" not in name}
    (copied.folder / "run.json").write_text(json.dumps(notes))
    edit(file, "sample.gate", spoiled(math.nan))
    again()
    assert file.read_bytes() == sound
    (copied.folder / "calibration.json").unlink()
    for broken in ("{", "[]", "{}", '{"fingerprint": 3, "hashes": {}}'):
        (copied.folder / "run.json").write_text(broken)
        with pytest.raises(CalibrationError, match=rf"run\.json: .*; {ANEW}"):
            again()


def test_a_hash_is_of_names_dtypes_shapes_and_values(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    given = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.view(2, 3)},
        {"a": tensor.view(3, 2)},
        {"a": tensor.view(torch.int32)},
        {"a": tensor.flip(0)},
        {"a": tensor, "b": tensor[:0]},
        {},
    ]
    assert len({digest(tensors) for tensors in given}) == len(given)
    assert digest({"b": tensor, "a": tensor}) == digest({"a": tensor.clone(), "b": tensor.clone()})
    assert digest({"a": torch.arange(12.0)[::2]}) == digest({"a": torch.arange(12.0)[::2].contiguous()})
    for number, tensors in enumerate(given):
        save_file({f"p.{name}": part.contiguous() for name, part in tensors.items()}, tmp_path / "x")
        read = read_tensors(tmp_path / "x", "p.", known=digest(given[number]), error=CalibrationError, cure="")
        assert digest(read) == digest(tensors)


# Comparisons


def cell(**changes: Any) -> dict:
    interval = {"mean": 0.1, "low": 0.05, "high": 0.2}
    perplexity = {"perplexity": 20.0, "perplexity_interval": [19.0, 21.0]}
    measured = {"tokens": 10, "original": perplexity, "compressed": perplexity, "kl": interval}
    return {
        "name": "reap",
        "method": "reap",
        "parameters": {},
        "bits": None,
        "removes": True,
        "budget": "remove 25%",
        "error": None,
        "nbytes": 70,
        "seconds": {"plan": 1.0},
        "native": True,
        "fidelity": {"": measured | {"top1_agreement": interval}},
        "speed": {"prefill": 10.0, "decode": 1.0, "prefill_low": 9.0, "decode_low": 0.5},
        "resident": 70,
        "expected_kl": None,
        "layers": {"0": {"expected": 0.1, "measured": 0.2, "slots": "##.>"}},
    } | changes


RESULTS = {
    "format": "moetailor-comparison",
    "version": 3,
    "model": {"source": "m", "model_type": "olmoe", "nbytes": 100, "top_k": 2, "layers": {"0": 4}},
    "about": {
        "moetailor": "0", "torch": "2", "transformers": "5", "threads": 1, "device": "cpu",
        "seconds": {"reference": 1.0},
    },
    "calibration": {"data": ["a"], "tokens": 10, "folder": "c"},
    "heldout": {"data": ["b"], "tokens": 10, "domains": {}},
    "original": {
        "perplexity": {"": 20.0}, "resident": 100,
        "prefill": 10.0, "decode": 1.0, "prefill_low": 9.0, "decode_low": 0.5,
    },
    "usage": {"0": {"": [0.25, 0.25, 0.25, 0.25]}},
    "sensitivities": None,
    "cells": [cell(), cell(error="no") | dict.fromkeys(
        ("nbytes", "seconds", "native", "fidelity", "speed", "resident", "expected_kl", "layers"))],
    "groups": {"25% removed": [0, 1]},
    "front": [0],
    "recommendation": None,
    "spearman": None,
}  # fmt: skip
WRONG = [
    (("model", "nbytes"), 0, "model.nbytes is 0, it must be 1 or more"),
    (("model", "layers"), {}, "model.layers is no map of layers to their numbers of experts"),
    (("model", "layers"), {"x": 4}, "model.layers is no map of layers to their numbers of experts"),
    (("model", "layers"), {"0": 10**9}, "model.layers['0'] is 1000000000, it must be 0 to 65536"),
    (("usage", "0"), {}, "usage['0'] is not of a share for each expert of that layer"),
    (("usage", "0", ""), [0.5, 0.5], "usage['0'] is not of a share for each expert of that layer"),
    (("usage", "0", "", 0), 1.5, "usage['0'][''][0] is 1.5, it must be 0 to 1"),
    (("usage", "7"), {"": []}, "usage['7'] is not of a share for each expert of that layer"),
    (("cells", 0), 3, "cells[0] is 3, not an object"),
    (("cells", 0, "nbytes"), "x", "cells[0]: nbytes is 'x', not a whole number"),
    (("cells", 0, "error"), 3, "cells[0]: error is 3, not a text"),
    (("cells", 0, "fidelity"), {}, "cells[0].fidelity lacks all text, ''"),
    (("cells", 0, "fidelity", "", "kl", "mean"), 1e300, "fidelity[''].kl.mean is 1e+300, it must be -1000000.0 to"),
    (("cells", 0, "layers"), {}, "cells[0].layers does not have a letter for each slot of the model"),
    (("cells", 0, "layers", "0", "slots"), "##", "cells[0].layers does not have a letter for each slot"),
    (("cells", 0, "layers", "0", "slots"), "##.?", "cells[0].layers has slots ['?'], which no version knows"),
    (("cells", 0, "bits"), 4, "cells[0]: bits is 4, not a text"),
    (("groups", "25% removed"), [0], "groups do not name each of 2 cells once"),
    (("groups", "x"), [1], "groups do not name each of 2 cells once"),
    (("groups", "25% removed", 1), 2, "groups do not name each of 2 cells once"),
    (("front",), [0, 1, 7], "front has cells [1, 7], which were not measured"),
    (("cells", 1, "nbytes"), 3, "cells[1]: nbytes is 3, not null"),
    (("original", "decode"), 0, "original.decode is 0, it must be 1e-300 to 1e+300"),
    (("spearman",), {"": math.nan}, "spearman[''] is nan, not a finite number"),
]  # fmt: skip


@pytest.mark.parametrize(("at", "value", "said"), WRONG, ids=[said for *_, said in WRONG])
def test_results_that_do_not_add_up_are_refused(at: tuple, value: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(RESULTS))
    assert read_results(file) == RESULTS
    file.write_text(json.dumps(_with(RESULTS, at, value)))
    with pytest.raises(MoetailorError) as refused:
        read_results(file)
    assert f"{file}: " in str(refused.value)
    assert said in str(refused.value)
    assert str(refused.value).endswith("; make it with `moetailor compare`")


def test_a_search_goes_on_from_numbers_only(tmp_path: Path) -> None:
    file = tmp_path / "a.search.json"
    begin = '{"format": "moetailor-search", "version": 1, "about": {"method": "reap"}'
    SearchFile(file, {"method": "reap"}).get((1, 2), lambda counts: 0.5)
    assert SearchFile(file, {"method": "reap"}).get((1, 2), pytest.fail) == 0.5
    for content, said in (
        ("{", "not JSON that can be read"),
        ('{"about": {"method": "reap"}}', "not a moetailor search"),
        (begin + "}", "it lacks overlap"),
        (begin + ', "overlap": {"1,2": "x"}}', "overlap['1,2'] is 'x', not a finite number"),
        (begin + ', "overlap": {"1,2": NaN}}', "overlap['1,2'] is nan, not a finite number"),
        (begin + ', "overlap": {"1,2": 7}}', "overlap['1,2'] is 7, it must be 0 to 1.001"),
    ):
        file.write_text(content)
        with pytest.raises(MoetailorError) as refused:
            SearchFile(file, {"method": "reap"})
        assert said in str(refused.value)
        assert str(refused.value).endswith("; delete it, or name another --out")


# Trainings


class Stop(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(checkpoint: Get, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was stopped behind its second checkpoint."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint("olmoe"), out, callbacks=[Stop()])
    return out.with_name("out.training")


def train(model: Path, out: Path, **given: Any) -> moetailor.RecoveryResult:
    options = moetailor.RecoveryOptions(steps=3, save_every=1, batch_size=2)
    return moetailor.recover(model, out, examples=blocks(), loss="task", options=options, **given)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_of_a_training_is_named(name: str, stopped: Path, checkpoint: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "out.training"))
    (last,) = folder.glob("checkpoint-*")
    os.truncate(last / name, 100)
    with pytest.raises(MoetailorError) as refused:
        train(checkpoint("olmoe"), tmp_path / "out")
    assert str(refused.value).startswith(f"{last}: cannot be gone on from (")
    assert str(refused.value).endswith(
        "delete it, and the same command goes on from the checkpoint before it, or trains anew"
    )
    assert not (tmp_path / "out").exists()
    shutil.rmtree(last)
    assert train(checkpoint("olmoe"), tmp_path / "out").steps == 3


def test_notes_of_a_training_that_cannot_be_read(stopped: Path, checkpoint: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "out.training"))
    (folder / "settings.json").write_text("")
    with pytest.raises(
        MoetailorError, match=rf"settings\.json: not JSON that can be read .*; delete {folder} to train"
    ):
        train(checkpoint("olmoe"), tmp_path / "out")


def test_a_provenance_that_cannot_be_read_is_refused_before_the_training(
    checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(checkpoint("olmoe"), tmp_path / "model"))
    (model / "moetailor_provenance.json").write_text("[")
    with monkeypatch.context() as patch:
        patch.setattr("moetailor.recovery.recover.train_student", lambda *a, **k: pytest.fail("trained"))
        with pytest.raises(MoetailorError, match=r"moetailor_provenance\.json: not JSON .*; delete it, and the result"):
            train(model, tmp_path / "out")
    (model / "moetailor_provenance.json").unlink()
    (model / "README.md").write_bytes(b"\xff\xfe no UTF-8")
    train(model, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes().startswith(b"\xff\xfe no UTF-8\nTrained further by moetailor")
