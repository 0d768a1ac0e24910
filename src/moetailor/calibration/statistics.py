"""What is measured of one MoE layer: sums in float64 that add, and a sample of tokens that merges as exactly.

Shapes: T tokens, K experts of a token, E experts, R = T x K routed pairs, D model width, N sampled tokens.
Symbols: g is the gate of a routed pair as the model used it, y the raw output of its expert, |.| the Euclidean norm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from moetailor.calibration.batch import AGAIN
from moetailor.checkpoint.artifact import write_tensors
from moetailor.checkpoint.tensors import digest, read_tensors
from moetailor.errors import CalibrationError

SUMS, SAMPLE = "sum.", "sample."


@dataclass(kw_only=True)
class Sums:
    """Sums over the counted tokens of one layer, float64; ``a + b`` is the sums of both texts.

    Attributes:
        tokens: T, [].
        count: routed pairs of each expert, [E].
        gate: sum of g, [E].
        gate_sq: sum of g^2, [E].
        output: sum of y, [E, D].
        gated_output: sum of g y, [E, D].
        gate_sq_output: sum of g^2 y, [E, D].
        norm: sum of |y|, [E].
        gated_norm: sum of g |y|, [E].
        gate_sq_norm: sum of g^2 |y|, [E].
        norm_sq: sum of |y|^2, [E].
        gate_sq_norm_sq: sum of g^2 |y|^2, [E].
        norm_max: the largest |y|, [E]; merged by maximum.
        probability: sum over all tokens of the router's probability of each expert, [E].
        together: tokens that chose both of two experts, [E, E].
        gated_norm_shift: sum of g |y| max(0, 1 - cos(h, h~)), [E], with h the residual stream that leaves the decoder
            layer when its routed experts give nothing, and h~ the one that does; None when it was not recorded.
    """

    tokens: torch.Tensor
    count: torch.Tensor
    gate: torch.Tensor
    gate_sq: torch.Tensor
    output: torch.Tensor
    gated_output: torch.Tensor
    gate_sq_output: torch.Tensor
    norm: torch.Tensor
    gated_norm: torch.Tensor
    gate_sq_norm: torch.Tensor
    norm_sq: torch.Tensor
    gate_sq_norm_sq: torch.Tensor
    norm_max: torch.Tensor
    probability: torch.Tensor
    together: torch.Tensor
    gated_norm_shift: torch.Tensor | None = None

    @classmethod
    def shapes(cls, experts: int, width: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each sum."""
        square, wide = (experts, experts), (experts, width)
        others = {"tokens": (), "together": square, "output": wide, "gated_output": wide, "gate_sq_output": wide}
        return {f.name: others.get(f.name, (experts,)) for f in fields(cls)}

    @classmethod
    def zeros(cls, experts: int, width: int, *, residual: bool = False) -> Sums:
        """Return the sums over no tokens; with `residual`, `gated_norm_shift` too."""
        shapes = {name: s for name, s in cls.shapes(experts, width).items() if residual or name not in ON_REQUEST}
        return cls(**{name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})

    def __add__(self, other: Sums) -> Sums:
        """Return the sums over both texts; a sum that one of them did not record is left out."""
        mine, theirs = self.recorded, other.recorded
        merged = {name: mine[name] + theirs[name] for name in mine.keys() & theirs.keys()}
        merged["norm_max"] = torch.maximum(self.norm_max, other.norm_max)
        return Sums(**merged)

    @property
    def recorded(self) -> dict[str, torch.Tensor]:
        """The sums that were recorded, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: total for name, total in found.items() if total is not None}


# What costs more than one run, and the option of `calibrate` that records it. Sensitivities are no sums and have a file
# of their own, see `sensitivity.py`.
ON_REQUEST = {"gated_norm_shift": "residual", "sensitivity": "sensitivity"}
STATISTICS = frozenset({"sensitivity", *(field.name for field in fields(Sums))})


@dataclass(kw_only=True)
class Sample:
    """A sample of a layer's tokens: those with the smallest keys, so the sample of two texts is that of their union.

    Attributes:
        key: hash of (seed, document, position), uint64 kept as int64 of the same order, ascending, [N].
        hidden: input of the experts, [N, D].
        index: experts of each token, [N, K].
        gate: their gates, float32, [N, K].
        logits: router logits, float32, [N, E].
    """

    key: torch.Tensor
    hidden: torch.Tensor
    index: torch.Tensor
    gate: torch.Tensor
    logits: torch.Tensor

    def merged(self, other: Sample, size: int) -> Sample:
        """Return the `size` tokens with the smallest keys of both; equal keys keep this sample's first."""
        parts = {f.name: torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)}
        order = torch.argsort(parts["key"], stable=True)[:size]
        return Sample(**{name: part[order] for name, part in parts.items()})

    @classmethod
    def concatenated(cls, parts: Sequence[Sample]) -> Sample:
        """Return the parts of one run as one sample, by key."""
        joined = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)}
        order = torch.argsort(joined["key"], stable=True)
        return cls(**{name: part[order] for name, part in joined.items()})


@dataclass(kw_only=True)
class LayerStatistics:
    """All that calibration knows of one MoE layer."""

    sums: Sums
    sample: Sample

    def save(self, file: Path) -> dict[str, str]:
        """Write the statistics as one safetensors file, which is whole or absent.

        Returns:
            The hash of the sums and of the sample, by prefix.
        """
        sample = {f.name: getattr(self.sample, f.name).contiguous() for f in fields(Sample)}
        parts = {SUMS: self.sums.recorded, SAMPLE: sample}
        write_tensors(file, {prefix + name: t for prefix, part in parts.items() for name, t in part.items()})
        return {prefix: digest(part) for prefix, part in parts.items()}


def load_sums(file: Path, experts: int, width: int, *, known: str | None = None) -> Sums:
    """Read the sums of one layer.

    Args:
        file: its file.
        experts: experts of the layer.
        width: D.
        known: hash of the sums when they were written.

    Raises:
        CalibrationError: the file is missing, damaged or of another layer.
    """
    found = read_tensors(file, SUMS, known=known, error=CalibrationError, cure=AGAIN)
    shapes = Sums.shapes(experts, width)
    _check_kinds(file, found, {name: (torch.float64, *shape) for name, shape in shapes.items()}, ON_REQUEST)
    return Sums(**found)


def load_sample(file: Path, experts: int, width: int, top_k: int, *, known: str | None = None) -> Sample:
    """Read the sample of one layer; see `load_sums`, and `top_k`, K."""
    found = read_tensors(file, SAMPLE, known=known, error=CalibrationError, cure=AGAIN)
    tokens = found["key"].numel() if "key" in found else 0
    kinds = {
        "key": (torch.int64, tokens),
        "hidden": (None, tokens, width),  # in the dtype of the run
        "index": (torch.int32, tokens, top_k),
        "gate": (torch.float32, tokens, top_k),
        "logits": (torch.float32, tokens, experts),
    }
    _check_kinds(file, found, kinds)
    return Sample(**found)


def load_counts(file: Path, experts: int) -> torch.Tensor:
    """Read how many sampled tokens of one layer each expert has, [E], and nothing else; see `load_sums`."""
    name = f"{SAMPLE}index"
    index = read_tensors(file, name, names=[""], error=CalibrationError, cure=AGAIN)[""]
    # What else was written there is not read, and so not known by its hash.
    return index.flatten().long().clamp(0, experts - 1).bincount(minlength=experts)


def _check_kinds(
    file: Path, found: Mapping[str, torch.Tensor], kinds: Mapping[str, tuple], optional: Collection[str] = ()
) -> None:
    """Refuse tensors that are not all there, or of another dtype or shape than such a layer has."""
    if odd := (kinds.keys() - found.keys() - set(optional)) | (found.keys() - kinds.keys()):
        raise CalibrationError(f"{file}: lacks or does not know {', '.join(sorted(odd))}; {AGAIN}")
    for name, tensor in found.items():
        dtype, *shape = kinds[name]
        if list(tensor.shape) != shape or tensor.dtype != (dtype or tensor.dtype):
            what = f"{tensor.dtype} of shape {list(tensor.shape)}, this layer has {dtype or 'numbers'} of {shape}"
            raise CalibrationError(f"{file}: {name} is {what}; {AGAIN}")


def sample_keys(document: torch.Tensor, position: torch.Tensor, seed: int) -> torch.Tensor:
    """Return one well-mixed 64-bit key for each token, as int64 (splitmix64 of document, position and seed).

    Args:
        document: document hashes, int64, any shape.
        position: places in the documents, int64, same shape.
        seed: another seed gives another sample.
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix64(document.numpy().astype(np.uint64) ^ _splitmix64(np.array(seed % 2**64, np.uint64)))
        mixed = _splitmix64(mixed + position.numpy().astype(np.uint64))
    return torch.from_numpy(mixed.view(np.int64).copy())


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def add_tokens(sums: Sums, index_TK: torch.Tensor, probability_TE: torch.Tensor) -> None:
    """Add how one batch of counted tokens was routed, in place.

    Args:
        sums: the sums so far.
        index_TK: experts of each token.
        probability_TE: the router's probabilities of all experts.
    """
    chosen = torch.zeros(len(index_TK), len(sums.count), dtype=torch.float32, device=index_TK.device)
    chosen.scatter_(1, index_TK, 1.0)
    # counts of a batch stay below 2^24, so float32 products are exact
    sums.together.add_((chosen.T @ chosen).double().cpu())
    sums.probability.add_(probability_TE.sum(0, dtype=torch.float64).cpu())
    sums.tokens.add_(len(index_TK))


def add_pairs(sums: Sums, output_RD: torch.Tensor, expert_R: torch.Tensor, gate_R: torch.Tensor) -> None:
    """Add what some routed pairs of counted tokens gave, in place.

    Args:
        sums: the sums so far.
        output_RD: raw expert outputs, sorted by expert.
        expert_R: expert of each routed pair, ascending.
        gate_R: gate of each routed pair.
    """
    # Only the experts from the first to the last one here are touched.
    first, experts = int(expert_R[0]), int(expert_R[-1]) - int(expert_R[0]) + 1
    here, expert_R = slice(first, first + experts), expert_R - first
    gate = gate_R.double()
    norm = torch.linalg.vector_norm(
        output_RD, dim=1, dtype=torch.float64 if output_RD.device.type == "cpu" else torch.float32
    )
    norm = norm.double()
    gated = gate * norm
    scalars = torch.stack([torch.ones_like(gate), gate, gate**2, norm, gated, gate * gated, norm**2, gated**2])
    per_expert = torch.zeros(len(scalars), experts, dtype=torch.float64, device=gate.device)
    per_expert.index_add_(1, expert_R, scalars)
    names = ("count", "gate", "gate_sq", "norm", "gated_norm", "gate_sq_norm", "norm_sq", "gate_sq_norm_sq")
    for name, values in zip(names, per_expert.cpu(), strict=True):
        getattr(sums, name)[here].add_(values)
    largest = torch.zeros(experts, dtype=torch.float64, device=gate.device)
    largest.scatter_reduce_(0, expert_R, norm, reduce="amax")
    sums.norm_max[here] = torch.maximum(sums.norm_max[here], largest.cpu())
    # sum [1, g, g^2] y over the tokens of each expert: thin products in float64
    products = torch.zeros(3, experts, output_RD.shape[1], dtype=torch.float64, device=gate.device)
    start = 0
    for expert, length in enumerate(per_expert[0].long().tolist()):
        part = slice(start, start + length)
        if length:
            products[:, expert] = scalars[:3, part] @ output_RD[part].double()
        start += length
    for name, values in zip(("output", "gated_output", "gate_sq_output"), products.cpu(), strict=True):
        getattr(sums, name)[here].add_(values)
