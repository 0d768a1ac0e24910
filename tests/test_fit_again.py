"""What `fit` made before, as it knows it again: nothing else is shown in its place."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moetailor import MoetailorError, read_batches
from moetailor.calibration.batch import text_fingerprint
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.place import PLAN_FILE, PROVENANCE_FILE
from moetailor.fit import Job, look
from moetailor.methods.estimate import budget_words
from moetailor.serving import ENGINES
from support.reference import REFERENCE


@pytest.mark.parametrize(
    ("name", "memory"),
    [("fewer, in 4 bits", 9_000_000), ("4 bits for all", 11_000_000), ("bits and stand-ins", 9_000_000)],
)
def test_only_what_it_would_make_again_is_known(name: str, memory: int, tmp_path: Path) -> None:
    """Of a choice with a width for all that stays, too; by what lies beside a result of another run, it is another."""
    original = Original(REFERENCE)
    engine = ENGINES["transformers" if "stand-ins" in name else "vllm"]
    found = look(original, memory=memory, engine=engine, context=128)
    job = Job(choice=next(offer.choice for offer in found.offers if offer.choice.name == name), room=found.room)
    plan = job.choice.estimate(original.facts, job.room.planned)
    plan = replace(plan, budget=budget_words(job.budget, "uniform", job.choice.width))
    assert job.made(tmp_path, original) is None
    plan.save(tmp_path / PLAN_FILE)
    assert job.made(tmp_path, original) is None
    batches = read_batches(job.text, original.tokenizer(), max_length=512)
    text = text_fingerprint(batches) | {"shapes": []}
    run = {"options": asdict(job.text) | {"length": 512}, "dtype": "torch.float32", "text": text}
    written = json.dumps({"calibration": run})
    (tmp_path / PROVENANCE_FILE).write_text(written)
    assert job.made(tmp_path, original) == plan
    assert replace(job, dtype="bfloat16").made(tmp_path, original) is None
    assert replace(job, data=("other.jsonl",)).made(tmp_path, original) is None
    less = replace(job, room=replace(job.room, memory=memory - 100_000))
    assert less.made(tmp_path, original) == (None if job.choice.made_by.removes else plan)
    other = run | {"text": text | {"hash": "0" * 32}}
    for nothing in ({}, {"calibration": None}, {"calibration": {}}, {"calibration": "c"}, {"calibration": other}):
        (tmp_path / PROVENANCE_FILE).write_text(json.dumps(nothing))
        assert job.made(tmp_path, original) is None
    for damaged in ('{"calibration": {', "[]", written.replace('"length"', '"size"')):
        (tmp_path / PROVENANCE_FILE).write_text(damaged)
        with pytest.raises(MoetailorError, match="move the folder away, or name another one"):
            job.made(tmp_path, original)
    (tmp_path / PROVENANCE_FILE).write_text(written)
    replace(plan, model=replace(plan.model, fingerprint={"config": "another"})).save(tmp_path / PLAN_FILE)
    assert job.made(tmp_path, original) is None
