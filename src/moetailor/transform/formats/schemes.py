"""What compressed-tensors calls a scheme: how the experts of a layer lie, by our kinds of codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moetailor.answers import Kind, Width
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.layout import Stack
from moetailor.checkpoint.storage.compressed import FLOATS, MXFP4, NVFP4, PACKED
from moetailor.planning.plan import Plan

# Bits for which engines have kernels, and inputs of a group for which vLLM's Marlin has them.
BITS, GROUPS = (4, 8), (128, 64, 32)
# What our storages store, by compressed-tensors' names.
STORED = {"_packed": "weight_packed", "_scale": "weight_scale"}


@dataclass(frozen=True, kw_only=True)
class Form:
    """How codes of a kind lie there.

    Attributes:
        name: as compressed-tensors calls it.
        stored: names of what our storages store.
        dtypes: of these, where ours are bytes that mean something.
        shapes: whether the shape of each matrix lies with it.
        weights: what a scheme says of weights beside bits and type.
        inputs: what it says of activations, which engines round to floats of 8 bits.
        whole: outputs and inputs of which there must be a multiple.
        unread: why transformers does not load it, if it does not.
        guarded: whether it would do so and make other numbers of the codes.
        bf16: whether it makes bfloat16 of the codes whatever it is asked for.
    """

    name: str
    stored: Mapping[str, str] = field(default_factory=lambda: STORED)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    shapes: bool = False
    weights: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    whole: tuple[int, int] = (1, 1)
    unread: str = ""
    guarded: bool = False
    bf16: bool = False


INTEGERS = Form(name=PACKED, stored=STORED | {"_zero_point": "weight_zero_point"}, shapes=True)
FLOAT8 = Form(
    name=FLOATS,
    stored=STORED | {"_packed": "weight"},
    dtypes={"_packed": "F8_E4M3"},
    weights={"strategy": "channel"},
    inputs={"strategy": "token"},
)
FORMS: dict[Kind, Form] = {
    "int": INTEGERS,
    "uint": INTEGERS,
    "fp8": FLOAT8,
    "fp8b128": replace(
        FLOAT8,
        weights={"strategy": "block", "block_structure": [128, 128]},
        inputs={"strategy": "group", "group_size": 128},
        whole=(128, 128),
        unread="it has a scale for each row, and knows no blocks; it loads --bits fp8",
    ),
    "mxfp4": Form(
        name=MXFP4,
        weights={"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        whole=(1, 32),
        bf16=True,
    ),
    "nvfp4": Form(
        name=NVFP4,
        stored=STORED | {"_global_scale": "weight_global_scale"},
        dtypes={"_scale": "F8_E4M3", "_global_scale": "F32"},
        weights={"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
        whole=(1, 16),
        unread="it leaves out the scale of each matrix; it loads --bits mxfp4 and int4g32",
        guarded=True,
    ),
}


@dataclass(frozen=True)
class Scheme:
    """How the experts of a layer lie: bits of a weight, inputs that share a scale (-1 for a row), what codes are."""

    bits: int
    group: int
    codes: Kind

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self.codes != "uint"

    @property
    def form(self) -> Form:
        """How its codes lie."""
        return FORMS[self.codes]

    def to_json(self) -> dict[str, Any]:
        """Return it as compressed-tensors says it: weights, and for floats of 8 bits activations."""
        group = {"strategy": "channel"} if self.group < 0 else {"strategy": "group", "group_size": self.group}
        kind = "float" if self.form.weights else "int"
        about = {"num_bits": self.bits, "symmetric": self.symmetric, "type": kind}
        inputs = {"input_activations": about | {"dynamic": True, **self.form.inputs}} if self.form.inputs else {}
        weights = about | {"dynamic": False, **(self.form.weights or group)}
        return {"weights": weights, **inputs, "format": self.form.name}


def unfit(plan: Plan, stack: Stack) -> str | None:
    """Say why the experts of a layer cannot be written; None where they can."""
    layer = plan.layers.get(stack.prefix)
    if layer is None or layer.plain:
        count = stack.num_experts if layer is None else len(layer.plain)
        return f"needs all experts in 4 or 8 bits, such as with --bits int4g32 or fp8; {count} lie as in the original"
    if len(layer.packed) > 1:
        return f"holds one width in each layer; this one has {', '.join(sorted(map(str, layer.packed)))}"
    (width,), shape = layer.packed, stack.shape
    assert shape is not None
    if width.codes not in FORMS:
        return f"holds integers and floats, no codebooks; the plan has {width}: take another of its codes"
    if width.down not in (0, width.bits):
        return f"holds one width for all matrices of an expert; the plan has {width}"
    if width.bits not in BITS:
        return f"holds 4 and 8 bits, for which engines have kernels (W4A16, W8A16); the plan has {width}"
    if shape.biased:
        return "holds experts without biases"
    high, wide = FORMS[width.codes].whole
    if odd := [size for size in shape.matrices.values() if size[0] % high or size[1] % wide]:
        told = f"holds {width.codes} of matrices whose outputs and inputs are multiples of {high} and {wide}"
        cure = "fp8" if width.bits == 8 else f"int4g{math.gcd(*(inputs for _, inputs in shape.matrices.values()))}"
        return f"{told}; here there are {odd[0][0]} x {odd[0][1]}: use {cure}"
    if _group(width, shape) is None:
        inputs = sorted({inputs for _, inputs in shape.matrices.values()}, reverse=True)
        fitting = [group for group in GROUPS if not any(size % group for size in inputs)] or [math.gcd(*inputs)]
        real = " and ".join(f"{'+'.join(map(str, _sizes(width, size)))} of {size} inputs" for size in inputs)
        return f"holds groups of one size; in groups of at most {width.group} there are {real}: use {fitting[0]}"
    return None


def _sizes(width: Width, inputs: int) -> list[int]:
    """Return the inputs of each group of a row."""
    size = width.storages(ExpertShape(width=inputs, intermediate=inputs))["down"].size(inputs)
    return [min(size, inputs - start) for start in range(0, inputs, size)]


def _group(width: Width, shape: ExpertShape) -> int | None:
    """Return the inputs of a group of all matrices, -1 where each row is one or where codes have groups of their own;
    None where they are not all alike.
    """
    if FORMS[width.codes].weights:
        return -1
    sizes = [_sizes(width, inputs) for _, inputs in shape.matrices.values()]
    if all(len(row) == 1 for row in sizes):
        return -1
    alike = {size for row in sizes for size in row}
    return alike.pop() if len(alike) == 1 else None


def schemes_of(plan: Plan) -> dict[Scheme, list[str]]:
    """Return the prefixes of the layers of each scheme, in the order of the layers."""
    found: dict[Scheme, list[str]] = {}
    for stack in plan.model.stacks:
        if stack.index is not None and stack.shape is not None:
            (width,) = plan.layers[stack.prefix].packed
            group = _group(width, stack.shape)
            assert group is not None
            scheme = Scheme(bits=width.bits, group=group, codes=width.codes)
            found.setdefault(scheme, []).append(stack.prefix)
    return found
