"""Calibration: sums and samples that merge, runs that resume to the same bytes, tokens that do not count."""

import dataclasses
import errno
import hashlib
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moetailor
from moetailor import ranks
from moetailor.calibration.collector import Collector
from moetailor.calibration.statistics import Sample, Sums, _splitmix64, sample_keys
from moetailor.calibration.stopped import Stopped
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.layout import Stack
from moetailor.checkpoint.lock import growing
from support.families import tiny_model
from support.kills import in_child, killed
from support.plans import FACTS
from support.tiny import token_batches

Get = Callable[[str], Path]
GetCalibration = Callable[[str], moetailor.Calibration]


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "log.jsonl"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_sums_close(one: Sums, other: Sums) -> None:
    for field in dataclasses.fields(Sums):
        torch.testing.assert_close(getattr(one, field.name), getattr(other, field.name), rtol=1e-4, atol=1e-5)


def test_two_texts_add_up_to_both(checkpoint: Get, tmp_path: Path) -> None:
    batches = token_batches(3)
    options = moetailor.SampleOptions(tokens=20)
    whole = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "whole", text=batches, sample=options)
    first = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "first", text=batches[:1], sample=options)
    second = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "second", text=batches[1:], sample=options)
    for layer in whole.layers:
        assert_sums_close(first.sums(layer) + second.sums(layer), whole.sums(layer))
        merged = first.sample(layer).merged(second.sample(layer), 20)
        assert torch.equal(merged.key, whole.sample(layer).key)
        assert torch.equal(merged.index, whole.sample(layer).index)
        torch.testing.assert_close(merged.hidden, whole.sample(layer).hidden, rtol=1e-5, atol=1e-6)


def test_the_sample_is_the_smallest_keys(calibration: GetCalibration, checkpoint: Get, tmp_path: Path) -> None:
    batches = token_batches()
    small = moetailor.calibrate(
        checkpoint("olmoe"), tmp_path / "small", text=batches, sample=moetailor.SampleOptions(tokens=7)
    )
    every = torch.cat([sample_keys(batch.document, batch.position, 0).flatten() for batch in batches])
    assert torch.equal(small.sample(0).key, every.sort().values[:7])
    whole = calibration("olmoe").sample(0)
    assert torch.equal(whole.hidden[:7], small.sample(0).hidden)


def test_keys_depend_on_document_position_and_seed_and_spread_evenly() -> None:
    document, position = torch.arange(100)[:, None].expand(100, 100), torch.arange(100).expand(100, 100)
    keys = sample_keys(document, position, 0).flatten()
    assert len(keys.unique()) == 10_000
    assert not torch.equal(keys, sample_keys(document, position, 1).flatten())
    assert abs(float((keys < 0).float().mean()) - 0.5) < 0.02
    # splitmix64 of state 0 is the published first output
    assert int(_splitmix64(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_padding_never_counts(checkpoint: Get, tmp_path: Path) -> None:
    ids = token_batches(1)[0].input_ids[:1]
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=torch.long)], 1)
    plain = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "plain", text=[moetailor.Batch.of(ids)])
    masked = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "masked", text=[moetailor.Batch.of(padded, mask)])
    for layer in plain.layers:
        assert_sums_close(plain.sums(layer), masked.sums(layer))
        assert len(masked.sample(layer).key) == 12


def test_masked_tokens_do_not_count(checkpoint: Get, tmp_path: Path) -> None:
    (batch,) = token_batches(1)
    counted = torch.ones_like(batch.counted)
    counted[:, 0] = False
    part = dataclasses.replace(batch, counted=counted)
    calibration = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "part", text=[part])
    assert float(calibration.sums(0).tokens) == 22
    assert float(calibration.sums(0).count.sum()) == 44
    assert len(calibration.sample(0).key) == 22


@pytest.mark.parametrize(("stream", "failing"), [(False, n) for n in range(1, 7)] + [(True, n) for n in range(1, 10)])
def test_a_stopped_run_resumes_to_the_same_bytes(
    stream: bool, failing: int, checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at the n-th step that finishes something (a layer's file, a set of hidden states, the manifest)."""
    source, batches = checkpoint("deepseek_v3"), token_batches()
    moetailor.calibrate(source, tmp_path / "whole", text=batches, stream=stream)
    real, calls = Path.rename, 0

    def stopping(self: Path, target: Path) -> Path:
        nonlocal calls
        if str(tmp_path / "stopped") in str(self):
            calls += 1
            if calls == failing + 1:  # the first is the run's own fingerprint
                raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", stopping)
    with pytest.raises(KeyboardInterrupt):
        moetailor.calibrate(source, tmp_path / "stopped", text=batches, stream=stream)
    monkeypatch.setattr(Path, "rename", real)
    with pytest.raises(moetailor.CalibrationError, match=r"not finished|no calibration folder"):
        moetailor.Calibration.open(tmp_path / "stopped")
    moetailor.calibrate(source, tmp_path / "stopped", text=batches, stream=stream)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("lost", [{1}, {2}, {1, 2}])
def test_layers_whose_files_are_lost_are_measured_again(
    lost: set[int], stream: bool, checkpoint: Get, tmp_path: Path
) -> None:
    """Also beside what was left when sensitivities, which walk over other batches, were stopped."""
    source, batches = checkpoint("deepseek_v3"), token_batches()
    # In half precision the way of a layer's sums shows in their bits.
    how: dict[str, Any] = {"stream": stream, "dtype": "bfloat16"}
    made = moetailor.calibrate(source, tmp_path / "c", text=batches, **how)
    before = digests(made.folder)
    with pytest.raises(KeyboardInterrupt):
        # Three sequences, each a batch: the first one is through the third layer.
        moetailor.calibrate(
            source,
            made.folder,
            text=batches,
            **how,
            sensitivity=True,
            progress=lambda _, done, every: _interrupt() if done == 7 else None,
        )
    assert (made.folder / ".moetailor" / "states-sensitivity" / "0" / "original" / "layer-0002").exists() == stream
    for layer in lost:
        (made.folder / f"layer-{layer:04d}.safetensors").unlink()
    calls: list[tuple[int, int]] = []
    moetailor.calibrate(source, made.folder, text=batches, **how, progress=lambda _, *at: calls.append(at))
    # No layer behind the last lost one runs.
    assert calls == [(done, 2 * (max(lost) + 1)) for done in range(1, 2 * (max(lost) + 1) + 1)]
    left = digests(made.folder)
    assert {name: digest for name, digest in left.items() if "sensitivity" not in name} == before
    again = moetailor.calibrate(source, made.folder, text=batches, **how, sensitivity=True)
    whole = moetailor.calibrate(source, tmp_path / "whole", text=batches, **how, sensitivity=True)
    assert digests(again.folder) == digests(whole.folder)


@pytest.mark.parametrize("done", range(1, 10))
def test_stopped_sensitivities_go_on_after_the_last_finished_layer(
    done: int, checkpoint: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stop after each batch of three, in each of three layers: what was done is not done again, and gives the bytes of
    a run that nobody stopped.
    """
    caplog.set_level("INFO", "moetailor")
    source, how = checkpoint("deepseek_v3"), {"text": token_batches(), "stream": True, "sensitivity": True}
    whole = moetailor.calibrate(source, tmp_path / "whole", **how)
    moetailor.calibrate(source, tmp_path / "c", text=token_batches(), stream=True)
    with pytest.raises(KeyboardInterrupt):
        moetailor.calibrate(
            source, tmp_path / "c", **how, progress=lambda _, *at: _interrupt() if at == (done, 12) else None
        )
    calls: list[tuple[int, int]] = []
    caplog.clear()
    made = moetailor.calibrate(source, tmp_path / "c", **how, progress=lambda _, *at: calls.append(at))
    finished = (done - 1) // 3  # the last batch of a layer is told of before the layer is noted
    told = [f"resumes: {finished} of 3 layers of the sensitivities are there"] if finished else []
    assert [line for line in caplog.messages if "resumes" in line] == told
    # Behind three layers of three batches come their predictions.
    assert calls == [(now, 12) for now in range(3 * finished + 1, 13)]
    assert digests(made.folder) == digests(whole.folder)
    assert not (made.folder / ".moetailor").exists()


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_states_that_cannot_be_read_are_named(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, batches, folder = checkpoint("olmoe"), token_batches(), tmp_path / "c"
    finish = Collector.finish
    monkeypatch.setattr(Collector, "finish", lambda self: finish(self) if self.layer.index == 0 else _interrupt())
    with pytest.raises(KeyboardInterrupt):
        moetailor.calibrate(source, folder, text=batches, stream=True)
    monkeypatch.undo()
    file = folder / ".moetailor" / "states" / "original" / "layer-0001" / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        moetailor.CalibrationError,
        match=rf"{file}: cannot be read .*; delete {folder / '.moetailor' / 'states'} and run",
    ):
        moetailor.calibrate(source, folder, text=batches, stream=True)
    shutil.rmtree(folder / ".moetailor" / "states")
    moetailor.calibrate(source, folder, text=batches, stream=True)
    whole = moetailor.calibrate(source, tmp_path / "whole", text=batches, stream=True)
    assert digests(folder) == digests(whole.folder)


def test_a_run_killed_before_it_measured_anything_begins_again(checkpoint: Get, tmp_path: Path) -> None:
    source, out = checkpoint("olmoe"), tmp_path / "out"
    moetailor.calibrate(source, tmp_path / "whole", text=token_batches())
    step = 1
    while not (out / "text.safetensors").exists():
        shutil.rmtree(out, ignore_errors=True)
        assert killed(lambda: moetailor.calibrate(source, out, text=token_batches()), step)
        left = shutil.copytree(out, tmp_path / "left") if out.exists() else tmp_path / "left"
        moetailor.calibrate(source, left, text=token_batches())
        assert digests(left) == digests(tmp_path / "whole"), step
        shutil.rmtree(left)
        step += 1


def test_a_second_run_into_one_folder_is_refused(checkpoint: Get, tmp_path: Path) -> None:
    def second(what: str, done: int, total: int) -> None:
        if done == 2:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    def run() -> None:
        try:
            moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches())
        except moetailor.MoetailorError as error:
            told.append(str(error))

    told: list[str] = []
    moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches(), progress=second)
    assert len(told) == 1
    assert re.match(rf"{tmp_path / 'c'}: `.*` \(process {os.getpid()} on .*\) is writing there; wait for it", told[0])


def test_a_finished_calibration_is_taken_from_a_disk_that_cannot_be_written(
    checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches())

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", fail)
    assert moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches()) == made
    with pytest.raises(moetailor.MoetailorError, match=r"other: cannot be written \(Read-only file system\)"):
        moetailor.calibrate(checkpoint("olmoe"), tmp_path / "other", text=token_batches())


def test_what_a_kill_left_in_a_finished_folder_goes(checkpoint: Get, tmp_path: Path) -> None:
    """It may be as large as all hidden states."""

    def die() -> None:
        with growing(made.folder) as work:
            (work / "states").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)

    made = moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches())
    os.waitpid(in_child(die), 0)
    assert (made.folder / ".moetailor" / "states").is_dir()
    assert moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", text=token_batches()) == made
    assert not (made.folder / ".moetailor").exists()


def test_a_finished_run_is_not_run_again(checkpoint: Get, calibration: GetCalibration) -> None:
    done = calibration("olmoe")
    calls: list[tuple[int, int]] = []
    again = moetailor.calibrate(
        checkpoint("olmoe"), done.folder, text=token_batches(), residual=True, progress=lambda _, *at: calls.append(at)
    )
    assert again == done
    assert calls == []


def test_another_run_in_the_same_folder_is_refused(checkpoint: Get, calibration: GetCalibration) -> None:
    folder = calibration("olmoe").folder
    with pytest.raises(moetailor.CalibrationError, match=r"another calibration \(text differ"):
        moetailor.calibrate(checkpoint("olmoe"), folder, text=token_batches(3))


def test_progress_counts_to_the_end(checkpoint: Get, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    moetailor.calibrate(
        checkpoint("olmoe"), tmp_path / "c", text=token_batches(), progress=lambda _, *at: calls.append(at)
    )
    assert calls == [(done, 4) for done in range(1, 5)]


def test_sensitivities_are_a_stage_that_ends_with_its_predictions(checkpoint: Get, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    given = {"text": token_batches(), "sensitivity": True, "progress": lambda *at: calls.append(at)}
    moetailor.calibrate(checkpoint("olmoe"), tmp_path / "c", **given)
    # Two layers and the head, over four blocks of a sequence each.
    blocks = sum(len(batch.input_ids) for batch in token_batches())
    assert [call for call in calls if call[0] == "sensitivity"] == [
        ("sensitivity", done, 3 * blocks) for done in range(1, 3 * blocks + 1)
    ]
    assert [call[0] for call in calls] == ["calibrate"] * 4 + ["sensitivity"] * 3 * blocks


def test_a_model_in_memory_gives_the_numbers_of_its_checkpoint(
    checkpoint: Get, calibration: GetCalibration, tmp_path: Path
) -> None:
    model = tiny_model("olmoe")
    mine = moetailor.calibrate(model, tmp_path / "mine", text=token_batches(), residual=True)
    for layer in mine.layers:
        assert_sums_close(mine.sums(layer), calibration("olmoe").sums(layer))
    assert [dataclasses.asdict(s) for s in mine.model.stacks] == [
        dataclasses.asdict(s) for s in calibration("olmoe").model.stacks
    ]
    with pytest.raises(moetailor.PlanError, match="calibrated in memory; pass weights="):
        moetailor.make_plan(mine, "conmoe", moetailor.Budget.parse(keep=6))
    # The hooks are gone: the model runs as before.
    assert all("forward" not in vars(module) for module in model.modules())
    plan = moetailor.make_plan(mine, "mone", moetailor.Budget.parse(keep=6), weights=moetailor.ExpertWeights(model))
    assert moetailor.apply(plan, model, calibration=mine) is model


def test_merging_keeps_the_first_of_equal_keys() -> None:
    def sample(values: list[int], mark: float) -> Sample:
        n = len(values)
        return Sample(
            key=torch.tensor(values),
            hidden=torch.full((n, 1), mark),
            index=torch.zeros(n, 1, dtype=torch.int32),
            gate=torch.zeros(n, 1),
            logits=torch.zeros(n, 1),
        )

    merged = sample([1, 5], 1.0).merged(sample([1, 2], 2.0), 3)
    assert merged.key.tolist() == [1, 1, 2]
    assert merged.hidden.flatten().tolist() == [1, 2, 2]


def facts_of(experts: int, width: int, top_k: int, layers: int) -> ModelFacts:
    shape = ExpertShape(width=width, intermediate=8)
    stacks = [
        Stack(prefix=f"model.layers.{index}", index=index, num_experts=experts, shape=shape, dtype="BF16")
        for index in range(layers)
    ]
    return dataclasses.replace(FACTS, width=width, top_k=top_k, stacks=tuple(stacks))


def test_the_sample_grows_with_the_model() -> None:
    """Two tokens for each expert and dimension of the widest layer, no fewer than usual, as far as there is room."""
    facts = facts_of(experts=64, width=2048, top_k=8, layers=16)
    token = 16 * (8 + 2048 * 2 + 8 * 8 + 64 * 4)

    def of(**given: int) -> int:
        return moetailor.SampleOptions(**given).of_model(facts, itemsize=2)

    assert of() == 2 * 2048 * 64 // 8
    assert of(nbytes=100 * token + 5) == 100
    assert of(tokens=7, nbytes=1) == 7
    narrow = facts_of(experts=8, width=32, top_k=2, layers=3)
    assert moetailor.SampleOptions().of_model(narrow, itemsize=4) == 16384
    with pytest.raises(moetailor.CalibrationError, match=f"--sample-size 1,000: one token .* {token:,}"):
        of(nbytes=1000)


def test_another_runs_streams_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stopped(tmp_path, {"layer": "a"}).note(2)
    assert Stopped(tmp_path, {"layer": "a"}).layer == 2
    assert Stopped(tmp_path, {"layer": "b"}).layer == 0
    monkeypatch.setattr(ranks, "_count", 2)
    assert Stopped(tmp_path, {"layer": "a"}).layer == 0
