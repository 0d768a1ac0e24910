"""Checkpoints of compressed-tensors: which forms the groups of their quantization_config name."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from moetailor.checkpoint.storage.fp4 import Fp4
from moetailor.checkpoint.storage.fp8 import ScaledFp8
from moetailor.checkpoint.storage.packs import Packs
from moetailor.checkpoint.storage.quantized import Quantized, register_reader
from moetailor.errors import CheckpointError, reason_of

METHOD, PACKED, FLOATS = "compressed-tensors", "pack-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FORMATS = (PACKED, FLOATS, NVFP4, MXFP4)
CURE = "give the bf16 or fp32 original"


@register_reader(METHOD)
def read_compressed(entry: Mapping[str, Any]) -> list[Quantized]:
    """Read the groups; those that name modules come before those that name all linear ones."""
    from compressed_tensors.quantization import QuantizationConfig

    if entry.get("sparsity_config"):
        raise CheckpointError(f"sparse weights are not handled; {CURE}")
    known = {name: copy.deepcopy(value) for name, value in entry.items() if name in QuantizationConfig.model_fields}
    try:
        for group in known.get("config_groups", {}).values():
            # The order of inputs lies with the weights, and the library no longer knows all its names.
            (group.get("weights") or {}).pop("actorder", None)
        config = QuantizationConfig.model_validate(known)
        groups: list[Any] = list(config.config_groups.values())
        for target in (target for group in groups for target in group.targets):
            re.compile(target.removeprefix("re:"))
    except Exception as error:  # whatever the library raises over what somebody wrote there
        raise CheckpointError(f"compressed-tensors cannot read its groups: {reason_of(error)}") from None
    found = []
    for scheme in groups:
        if scheme.weights is None:
            raise CheckpointError(f"a group without a description of weights is not handled; {CURE}")
        found.append(_way(scheme, scheme.format or config.format))
    return sorted(found, key=lambda way: not any(target.startswith("re:") for target in way.targets))


def _way(scheme: Any, form: str) -> Quantized:
    weights, inputs = scheme.weights, scheme.input_activations
    if inputs is not None and inputs.type == "int":
        raise CheckpointError(f"activations in {inputs.num_bits}-bit integers are not run here; {CURE}")
    if form not in FORMATS:
        raise CheckpointError(f"format {form!r} is not handled, {', '.join(FORMATS)} are; {CURE}")
    given: dict[str, Any] = {"targets": tuple(scheme.targets)}
    strategy, group = str(getattr(weights.strategy, "value", weights.strategy)), weights.group_size or -1
    if form == PACKED and strategy in ("group", "channel") and 1 <= weights.num_bits <= 8:
        return Packs(bits=weights.num_bits, group=group, symmetric=weights.symmetric, **given)
    if form == FLOATS and strategy in ("tensor", "channel", "block") and weights.num_bits == 8:
        outputs, inputs = weights.block_structure or (1, 1)
        blocks = {"tensor": (0, 0), "channel": (1, 0), "block": (max(outputs, 1), max(inputs, 1))}
        return ScaledFp8(block=blocks[strategy], **given)
    if form in (NVFP4, MXFP4):
        return Fp4(group=group, format=form, scheme=scheme, whole=form == NVFP4, **given)
    raise CheckpointError(f"format {form!r} with scales by {strategy} is not handled; {CURE}")
