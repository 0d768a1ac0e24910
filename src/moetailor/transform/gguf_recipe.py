"""What llama.cpp's quantizer needs of a plan: an importance matrix of the experts, and a type for each projection.

llama.cpp quantizes by itself, in formats of its own. Given native experts as they lie, it wants to know how large the
inputs of each matrix are, by expert (what llama-imatrix measures), and which type each tensor shall have.
Shapes: n experts that stay, T tokens of one, D model width, F expert width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from moetailor.calibration.folder import Calibration
from moetailor.checkpoint.artifact import write_by, write_text
from moetailor.checkpoint.layout import Stack
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.weights import ExpertWeights
from moetailor.errors import MoetailorError, MoetailorWarning
from moetailor.methods.run import view_of
from moetailor.planning.layer_plan import LayerPlan, untouched
from moetailor.planning.plan import Plan
from moetailor.planning.view import LayerView
from moetailor.transform.build import built_matrices

MATRIX_FILE, TYPES_FILE = "imatrix.gguf", "tensor-types.txt"
GGUF_HINT = "writing an importance matrix needs the gguf library: pip install 'moetailor[gguf]'"
# Types by bits, for rows of whole superblocks of 256 numbers; for rows of whole blocks of 32; and for all others.
SUPERBLOCK, BLOCK = 256, 32
TYPES = {8: "q8_0", 7: "q8_0", 6: "q6_k", 5: "q5_k", 4: "q4_k", 3: "q3_k", 2: "iq2_xs", 1: "iq1_s"}
BLOCK_TYPES = {8: "q8_0", 7: "q8_0", 6: "q5_1", 5: "q5_0", 4: "iq4_nl", 3: "iq4_nl", 2: "iq4_nl", 1: "iq4_nl"}
OTHER = "f16"
AS_THEY_LIE = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


def write_gguf_recipe(plan: Plan, original: Original, folder: Path, calibration: Calibration | None) -> None:
    """Write tensor types and, where there is a calibration, the importance matrix.

    Args:
        plan: what becomes of the slots, and in how many bits what stays shall lie.
        original: the original.
        folder: where to write.
        calibration: the plan's calibration, whose sample is what is measured.
    """
    lines = [f"{name}={kind}\n" for name, kind in tensor_types(plan).items()]
    write_text(folder / TYPES_FILE, "".join(lines))
    if calibration is not None:
        library, sums = find_library(), importance(plan, ExpertWeights(original), calibration)
        text = calibration.fingerprint["text"]
        write_by(folder / MATRIX_FILE, lambda file: _write(library, file, sums, text))


def tensor_types(plan: Plan) -> dict[str, str]:
    """Return the type of each projection of each MoE layer, by the pattern of its name; see `several_widths`."""
    found, other = {}, {}
    for stack, layer in _layers(plan):
        assert stack.shape is not None
        for part, (_, inputs) in stack.shape.matrices.items():
            kind = AS_THEY_LIE.get(stack.dtype, OTHER)
            if layer.widths:
                width = next(iter(layer.widths.values()))
                bits = width.down or width.bits if part == "down" else width.bits
                kind = _type(bits, inputs)
                if kind != TYPES[bits]:
                    other[TYPES[bits], inputs] = kind
            found[rf"blk\.{stack.index}\.ffn_{part}_exps\.weight"] = kind
    for (wanted, inputs), kind in other.items():
        _warn(f"rows of {inputs} numbers are no whole blocks of {wanted}; {kind} stands in its place")
    return found


def several_widths(plan: Plan) -> str | None:
    """Say which layer has experts in several widths, which one tensor cannot have; None where no layer has."""
    for stack, layer in _layers(plan):
        lying = {str(width) for width in layer.widths.values()} | ({"as in the original"} if layer.plain else set())
        if len(lying) > 1:
            return f"{stack.prefix} has them in {', '.join(sorted(lying))}"
    return None


def importance(
    plan: Plan, weights: ExpertWeights, calibration: Calibration
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the sums of squared inputs of each projection, and over how many tokens, by its name in GGUF.

    Each is float64 [n, inputs] and [n], over the sampled tokens that chose the expert, in the order of the experts that
    stay.

    Args:
        plan: what becomes of the slots.
        weights: those of the original.
        calibration: the plan's.
    """
    found, unseen = {}, 0
    for stack, layer in _layers(plan):
        assert stack.index is not None
        view = view_of(calibration, stack.index, weights)
        sums, counts = _layer_sums(plan, view, layer)
        found |= {f"blk.{stack.index}.ffn_{part}_exps.weight": (total, counts) for part, total in sums.items()}
        unseen += int((counts == 0).sum())
        view.close()
    if unseen:
        _warn(
            f"{unseen} experts have no sampled token, so all their inputs weigh alike; "
            "take more text with `moetailor calibrate --sequences`"
        )
    return found


def _layer_sums(plan: Plan, view: LayerView, layer: LayerPlan) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    experts, shape = view.experts, view.shape
    anew = built_matrices(plan, view) if layer.rebuilt else {}
    sums = {
        part: torch.zeros(len(layer.pool), inputs, dtype=torch.float64) for part, (_, inputs) in shape.matrices.items()
    }
    counts = torch.zeros(len(layer.pool), dtype=torch.float64)
    for row, expert in enumerate(layer.pool):
        token, _ = view.routed(expert)
        x_TD = view.sample.hidden[token].float()
        matrices = experts.expert(expert)
        if expert in layer.rebuilt:
            matrices = {name: stack[layer.rebuilt.index(expert)] for name, stack in anew.items()}
        h_TF = experts.hidden({name: matrix.float() for name, matrix in matrices.items()}, x_TD.to(experts.device))
        for part in experts.inputs:
            sums[part][row] = x_TD.double().square().sum(0)
        sums["down"][row], counts[row] = h_TF.double().square().sum(0).cpu(), len(token)
    return sums, counts


def _layers(plan: Plan) -> list[tuple[Stack, LayerPlan]]:
    """Return the MoE layers that the model runs, those that do not change too."""
    run = [stack for stack in plan.model.stacks if stack.index is not None]
    return [(stack, plan.layers.get(stack.prefix) or untouched(stack.num_experts)) for stack in run]


def _type(bits: int, inputs: int) -> str:
    if inputs % SUPERBLOCK == 0:
        return TYPES[bits]
    return BLOCK_TYPES[bits] if inputs % BLOCK == 0 else OTHER


def find_library() -> Any:
    """Return the gguf library.

    Raises:
        MoetailorError: it is missing.
    """
    try:
        return import_module("gguf")
    except ImportError as error:
        raise MoetailorError(f"format gguf: {GGUF_HINT}") from error


def _write(
    library: Any, file: Path, sums: Mapping[str, tuple[torch.Tensor, torch.Tensor]], text: Mapping[str, Any]
) -> None:
    """Write the sums as llama-imatrix does: ``.in_sum2`` and ``.counts`` of each tensor, with a row for each expert."""
    writer = library.GGUFWriter(file, arch="imatrix")
    writer.kv_data[0].pop("general.architecture")  # which only models have
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["moetailor calibration"])
    shapes = text["shapes"]
    writer.add_uint32("imatrix.chunk_count", sum(count for count, _ in shapes))
    writer.add_uint32("imatrix.chunk_size", max(length for _, length in shapes))
    for name, (total, counts) in sorted(sums.items()):
        writer.add_tensor(f"{name}.in_sum2", total.float().numpy())
        writer.add_tensor(f"{name}.counts", counts[:, None].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _warn(text: str) -> None:
    warnings.warn(f"format gguf: {text}", MoetailorWarning, stacklevel=4)
