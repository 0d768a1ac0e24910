"""transform/origin.py: results held against what they were made from, a sibling of it, and something else."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import moetailor
from moetailor.checkpoint.files import open_checkpoint
from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.planning.budget import Budget
from moetailor.recovery.examples import Blocks
from moetailor.recovery.recover import check_teacher
from moetailor.transform.origin import check_origin, unlike
from support.families import tiny_model
from support.tiny import token_batches

ROOT = Path(__file__).parent.parent / "examples" / "reference-moe"


def saved(folder: Path, name: str = "olmoe", seed: int = 0, **how: object) -> Path:
    with quiet_transformers():
        tiny_model(name, seed).save_pretrained(folder, **how)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An original, and what reap (native) and mone (moetailor) make of it."""
    folder = tmp_path_factory.mktemp("made")
    original = saved(folder / "original")
    calibration = moetailor.calibrate(original, folder / "calibration", text=token_batches())
    results = []
    for method in ("reap", "mone"):
        plan = moetailor.make_plan(calibration, method, Budget.parse(keep=6))
        results.append(moetailor.apply(plan, original, folder / method, calibration=calibration))
    return original, *results


def told(result: Path, other: Path) -> list[str]:
    """Return what is said when a result is held against another checkpoint."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_origin(open_checkpoint(result), open_checkpoint(other))
    return [str(warning.message) for warning in said]


def warning(result: Path, original: Path, other: Path, differs: str) -> list[str]:
    return [f"{result}: was made from {original}; {other} is not that checkpoint ({differs}), it is used all the same"]


def test_the_original_is_known_wherever_it_lies(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, *results = made
    copied = Path(shutil.copytree(original, tmp_path / "copied"))
    (copied / "README.md").write_text("a card does not make it another one")
    for result in results:
        assert told(result, original) == told(result, copied) == []


def test_another_checkpoint_is_named_with_what_differs(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, *results = made
    sibling = saved(tmp_path / "sibling", seed=7)
    shards = saved(tmp_path / "shards", max_shard_size="40KB")
    edited = Path(shutil.copytree(original, tmp_path / "edited"))
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    half = tmp_path / "half"
    with quiet_transformers():
        AutoModelForCausalLM.from_pretrained(original, dtype="bfloat16").save_pretrained(half)
    for result in results:
        same = "other weights of the same shapes: model.safetensors"
        assert told(result, sibling) == warning(result, original, sibling, same)
        assert told(result, edited) == warning(result, original, edited, "other contents: config.json")
        assert told(result, half) == warning(result, original, half, "other contents: config.json, model.safetensors")
        (said,) = told(result, shards)
        assert "is not that checkpoint (other files: model-00001-of-" in said
        assert " more), it is used all the same" in said


def test_what_says_nothing_is_not_judged(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, native, _ = made
    copied = Path(shutil.copytree(native, tmp_path / "copied"))
    file = copied / "moetailor_provenance.json"
    file.write_text(json.dumps({"moetailor": "0.1", "recovery": {}}))
    assert told(copied, saved(tmp_path / "sibling", seed=7)) == []
    file.unlink()
    assert told(copied, original) == []
    for content in ("{nope", "[]", '{"original": 5}', '{"original": {"source": "x", "fingerprint": {"config": 1}}}'):
        file.write_text(content)
        with pytest.raises(moetailor.MoetailorError, match=r"moetailor_provenance\.json.*; delete it, and what"):
            check_origin(open_checkpoint(copied), open_checkpoint(original))


def test_names_the_wrong_way_round_are_refused(made: tuple[Path, Path, Path]) -> None:
    original, native, _ = made
    with pytest.raises(moetailor.MoetailorError, match=f"^{native}: was made from {original}; name them the other way"):
        check_origin(open_checkpoint(original), open_checkpoint(native))
    # A result against itself says nothing, but does no harm.
    assert len(told(native, native)) == 1


DIFFERENT = [
    ({"vocab_size": 256}, "words: 256, the model's: 128"),
    ({"hidden_size": 64}, "width: 64, the model's: 32"),
    ({"num_hidden_layers": 3}, "decoder layers: 3, the model's: 2"),
    ({"num_experts": 4}, "experts: 4, the model's: 8"),
    ({"num_experts": 16}, None),
    ({"rope_theta": 5.0}, None),
]


@pytest.mark.parametrize(("change", "why"), DIFFERENT)
def test_what_cannot_be_the_original_is_refused(change: dict, why: str | None) -> None:
    config = tiny_model("olmoe").config
    other = type(config)(**{**config.to_dict(), **change})
    assert unlike(config, other) == why
    if why is not None:
        with pytest.raises(moetailor.MoetailorError, match=f"the teacher's {why}; give the original of the model"):
            check_teacher(config, other)


def test_evaluate_refuses_another_kind_and_names_a_sibling(tmp_path: Path) -> None:
    text = moetailor.TextOptions(data=(str(ROOT / "heldout.jsonl"),), sequences=2, length=16, batch_size=1)
    with pytest.raises(moetailor.MoetailorError) as refused:
        moetailor.evaluate(saved(tmp_path / "other", "qwen2_moe"), ROOT, text=text)
    assert str(refused.value) == (
        f"{ROOT} cannot be the original of {tmp_path / 'other'}: its model type: olmoe, the model's: qwen2_moe"
    )
    calibration = moetailor.calibrate(ROOT, tmp_path / "calibration", text=text)
    plan = moetailor.make_plan(calibration, "frequency", Budget.parse(keep=24))
    result = moetailor.apply(plan, ROOT, tmp_path / "out")
    sibling = Path(shutil.copytree(ROOT, tmp_path / "sibling"))
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(ROOT, dtype="bfloat16")
        model.lm_head.weight.data[:, :8] += 0.5
        model.save_pretrained(sibling)
    with pytest.warns(moetailor.MoetailorWarning, match="is not that checkpoint") as said:
        scores = moetailor.evaluate(result, sibling, text=text)
    assert str(sibling) in str(said[0].message)
    assert scores.overall.kl.mean > 0


def test_recover_names_a_teacher_that_is_a_sibling(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, native, _ = made
    ids = token_batches()[0].input_ids
    blocks = Blocks(ids, ids)
    teacher = saved(tmp_path / "sibling", seed=7)
    options = moetailor.RecoveryOptions(steps=1, batch_size=1)
    with pytest.warns(moetailor.MoetailorWarning, match=f"{teacher} is not that checkpoint"):
        moetailor.recover(native, tmp_path / "out", examples=blocks, teacher=teacher, options=options)
