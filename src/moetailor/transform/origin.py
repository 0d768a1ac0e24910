"""What a result was made from, by its provenance, and whether another checkpoint is that."""

from __future__ import annotations

import warnings
from typing import Any, TypedDict

from moetailor.checkpoint import family
from moetailor.checkpoint.files import Checkpoint
from moetailor.errors import MoetailorError, MoetailorWarning
from moetailor.schema import load_json, read
from moetailor.transform.disk import PROVENANCE_FILE

# What a model and its original have in common, by its spelling in their configs.
COMMON = {
    "model_type": "model type",
    "vocab_size": "words",
    "hidden_size": "width",
    "num_hidden_layers": "decoder layers",
}


class Fingerprint(TypedDict):
    """What `Checkpoint.fingerprint` gives."""

    config: str
    shards: dict[str, dict[str, Any]]


class Origin(TypedDict):
    """The original of a result: what it was called, and what it was."""

    source: str
    fingerprint: Fingerprint


def unlike(config: Any, other: Any) -> str | None:
    """Say why a model cannot be the original of another one; None where it may be.

    Args:
        config: transformers config of the model.
        other: that of the one that may be its original.
    """
    for name, what in COMMON.items():
        mine, theirs = getattr(config, name, None), getattr(other, name, None)
        if mine != theirs:
            return f"{what}: {theirs}, the model's: {mine}"
    count = family.expert_count_spellings(config)
    # Slot maps may give a result of moetailor's own form any number of experts.
    entry = getattr(config, "quantization_config", None)
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    if method != family.QUANT_METHOD and count and getattr(config, count[0]) > getattr(other, count[0], 0):
        return f"experts: {getattr(other, count[0], 0)}, the model's: {getattr(config, count[0])}"
    return None


def check_origin(model: Checkpoint, original: Checkpoint) -> None:
    """Warn when a result was made from another checkpoint than the one that it is held against.

    Args:
        model: the result; one without provenance is not looked at.
        original: what shall be its original.

    Raises:
        MoetailorError: it is the other way round, or a provenance cannot be read.
    """
    swapped, made = _origin_of(original), _origin_of(model)
    if swapped is not None and not _differences(swapped["fingerprint"], model.fingerprint()):
        raise MoetailorError(f"{original.source}: was made from {model.source}; name them the other way round")
    if made is not None and (differs := _differences(made["fingerprint"], original.fingerprint())):
        warnings.warn(
            f"{model.source}: was made from {made['source']}; {original.source} is not that checkpoint ({differs}), it "
            "is used all the same",
            MoetailorWarning,
            stacklevel=3,
        )


def _origin_of(checkpoint: Checkpoint) -> Origin | None:
    file = checkpoint.folder / PROVENANCE_FILE
    if not file.exists():
        return None
    cure = "delete it, and what the result was made from is not checked"
    told = load_json(file, error=MoetailorError, cure=cure).get("original")
    return None if told is None else read(Origin, told, f"{file}, original", error=MoetailorError, cure=cure)


def _differences(made: Fingerprint, now: dict) -> str:
    """Say what of a checkpoint is not what it was, by the names of its files; nothing where all is."""
    before, after = made["shards"], now["shards"]
    other = [name for name in before if name in after and before[name] != after[name]]
    missing = sorted(before.keys() ^ after.keys())
    found = ["config.json"] * (made["config"] != now["config"]) + other + missing
    if not found:
        return ""
    few = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    if missing:
        return f"other files: {few}"
    alike = all(before[name].get("header") == after[name].get("header") for name in other)
    return f"other {'weights of the same shapes' if other and alike else 'contents'}: {few}"
