"""Tiny quantized checkpoints of every layout, each beside its twin: a plain one of the numbers that it stands for.

Codes, scales and numbers are made here by plain arithmetic over the bits, with nothing of what is tested.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moetailor.checkpoint.quiet import quiet_transformers
from support.families import tiny_model

WEIGHT = re.compile(r"layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123])\.weight$")
Parts = dict[str, torch.Tensor]
# What a matrix is stored as, and the numbers that this stands for.
Quantize = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout.

    Attributes:
        family: whose tiny model lies so.
        entry: the quantization_config.
        quantize: what a matrix becomes, by what stands in place of ``weight`` (of the whole name where experts are
            fused).
        changes: to the family's config.
        label: as moetailor calls it.
    """

    family: str
    entry: dict[str, Any]
    quantize: Quantize
    label: str
    changes: dict[str, Any] = field(default_factory=dict)


def write_source(layout: Layout, folder: Path) -> tuple[Path, Path]:
    """Write a tiny checkpoint in a layout, and its twin; return both folders."""
    with quiet_transformers():
        tiny_model(layout.family, **layout.changes).save_pretrained(folder / "twin")
    return quantize_twin(layout, folder)


def quantize_twin(layout: Layout, folder: Path) -> tuple[Path, Path]:
    """Put a checkpoint in a layout beside one that is there already, which becomes its twin."""
    config = json.loads((folder / "twin/config.json").read_text()) | {"dtype": "bfloat16"}
    stored, numbers = {}, {}
    for name, tensor in load_file(folder / "twin/model.safetensors").items():
        fused = tensor.ndim == 3 and layout.family == "gpt_oss"
        if fused or (WEIGHT.search(name) and layout.family != "gpt_oss"):
            parts, numbers[name] = layout.quantize(tensor)
            stored |= {
                (name if fused else name.removesuffix("weight")) + part: tensor for part, tensor in parts.items()
            }
        else:
            stored[name] = numbers[name] = tensor if name.endswith("correction_bias") else tensor.to(torch.bfloat16)
    (folder / "source").mkdir()
    for place, tensors, entry in ((folder / "source", stored, layout.entry), (folder / "twin", numbers, None)):
        made = config | ({"quantization_config": entry} if entry else {})
        (place / "config.json").write_text(json.dumps(made))
        save_file({name: t.contiguous() for name, t in tensors.items()}, place / "model.safetensors", {"format": "pt"})
    return folder / "source", folder / "twin"


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack rows of unsigned integers into 32-bit words, the first in the lowest bits, also across words."""
    rows = []
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        parts = [number >> 32 * word & 0xFFFFFFFF for word in range(count)]
        rows.append([part - 2**32 if part >= 2**31 else part for part in parts])
    return torch.tensor(rows, dtype=torch.int32)


def integers(weight: torch.Tensor, bits: int, group: int, dtype: torch.dtype, symmetric: bool, order: torch.Tensor):
    """Return unsigned codes [O, I], zero points and scales [O, G], and the numbers.

    Args:
        weight: [O, I].
        bits: of a code.
        group: inputs of a group.
        dtype: of the scales.
        symmetric: whether zero points are in the middle.
        order: the group of each input.
    """
    outputs, groups, most = len(weight), -(-weight.shape[1] // group), 2**bits - 1
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    zeros, scales = torch.zeros(outputs, groups, dtype=torch.int64), torch.zeros(outputs, groups, dtype=dtype)
    numbers = torch.zeros(weight.shape, dtype=dtype)
    for g in range(groups):
        mine = weight[:, order == g]
        low, high = mine.amin(1).clamp_max(0), mine.amax(1).clamp_min(0)
        if symmetric:
            low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
        scales[:, g] = ((high - low) / most).clamp_min(1e-4).to(dtype)
        step = scales[:, g].float()
        zeros[:, g] = 2 ** (bits - 1) if symmetric else (-low / step).round().clamp(0, most).long()
        zero = zeros[:, g].float()
        q = (mine / step[:, None] + zero[:, None]).round().clamp(0, most)
        codes[:, order == g] = q.long()
        numbers[:, order == g] = ((q - zero[:, None]) * step[:, None]).to(dtype)
    return codes, zeros, scales, numbers


def in_order(inputs: int, group: int) -> torch.Tensor:
    return torch.arange(inputs) // group


def packs(bits: int, group: int, symmetric: bool, shuffled: bool = False) -> Quantize:
    """compressed-tensors' pack-quantized; `group` 0 for one of all inputs."""

    def quantize(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        inputs = weight.shape[1]
        order = in_order(inputs, group or inputs)
        if shuffled:
            order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        codes, zeros, scales, numbers = integers(weight, bits, group or inputs, torch.bfloat16, symmetric, order)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        parts |= {} if symmetric else {"weight_zero_point": words(zeros.T, bits).T}
        return parts | ({"weight_g_idx": order.int()} if shuffled else {}), numbers

    return quantize


def gptq(bits: int, group: int, less: int, shuffled: bool = False) -> Quantize:
    """GPTQ: codes along the inputs, zero points along the outputs, stored with `less` taken off."""

    def quantize(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        inputs = weight.shape[1]
        order = in_order(inputs, group)
        if shuffled:
            order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        codes, zeros, scales, _ = integers(weight, bits, group, torch.float16, False, order)
        zeros = zeros.clamp_min(less)
        numbers = ((codes.float() - zeros[:, order].float()) * scales[:, order].float()).half()
        stored = {
            "qweight": words(codes, bits).T,
            "qzeros": words(zeros.T - less, bits),
            "scales": scales.T,
            "g_idx": order.int(),
        }
        return stored, numbers

    return quantize


def awq(group: int) -> Quantize:
    """AWQ: codes and zero points along the outputs; of eight in a word, the first four lie in the even places."""

    def mixed(rows: torch.Tensor) -> torch.Tensor:
        return words(torch.stack([rows[:, start + n] for start in range(0, rows.shape[1], 8) for n in PLACES], 1), 4)

    def quantize(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        order = in_order(weight.shape[1], group)
        codes, zeros, scales, numbers = integers(weight, 4, group, torch.float16, False, order)
        return {"qweight": mixed(codes.T), "qzeros": mixed(zeros.T), "scales": scales.T}, numbers

    return quantize


# What lies in each place of a word: outputs 0, 2, 4, 6, 1, 3, 5, 7.
PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def fp8(block: tuple[int, int], scale_name: str, dtype: torch.dtype, axes: int = 2) -> Quantize:
    """FP8 with a scale for each block; 0 for all of an axis."""

    def quantize(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        high, wide = block[0] or len(weight), block[1] or weight.shape[1]
        grid = -(-len(weight) // high), -(-weight.shape[1] // wide)
        codes, scales = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), torch.zeros(grid, dtype=dtype)
        numbers = torch.zeros(weight.shape, dtype=torch.bfloat16)
        for i in range(grid[0]):
            for j in range(grid[1]):
                place = slice(i * high, i * high + high), slice(j * wide, j * wide + wide)
                scales[i, j] = weight[place].abs().max() / 448
                codes[place] = (weight[place] / scales[i, j].float()).to(torch.float8_e4m3fn)
                numbers[place] = (codes[place].float() * scales[i, j].float()).to(torch.bfloat16)
        return {"weight": codes, scale_name: scales.reshape(grid[:axes])}, numbers

    return quantize


def halves(codes: torch.Tensor) -> torch.Tensor:
    """Pack rows of 4-bit codes two in a byte, the first in the lower half."""
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def e2m1(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of the nearest 4-bit floats, and these."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = (at[..., None] - table).abs().argmin(-1)
    return codes, table[codes]


def mxfp4(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """gpt-oss: [E, I, O] lies as [E, O, I / 32, 16]."""
    lying = weight.transpose(1, 2).unflatten(2, (-1, 32))
    power = (lying.abs().amax(-1) / 6).log2().ceil()
    codes, values = e2m1(lying / power.exp2()[..., None])
    numbers = (values * power.exp2()[..., None]).flatten(2).transpose(1, 2).to(torch.bfloat16)
    return {"_blocks": halves(codes), "_scales": (power + 127).to(torch.uint8)}, numbers


def nvfp4(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Groups of 16 inputs with scales in FP8, divided by one of the matrix."""
    parted = weight.unflatten(1, (-1, 16))
    whole = (448 * 6 / weight.abs().max()).reshape(1)
    scale = (parted.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    step = (scale.float() / whole)[..., None]
    codes, values = e2m1(parted / step.clamp_min(1e-9))
    numbers = (values * step).flatten(1).to(torch.bfloat16)
    return {"weight_packed": halves(codes.flatten(1)), "weight_scale": scale, "weight_global_scale": whole}, numbers


def compressed(form: str, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """Return a quantization_config of compressed-tensors."""
    described = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8} | weights
    group = {"targets": ["Linear"], "weights": described, "input_activations": activations, "format": form}
    status = {"quantization_status": "compressed", "ignore": ["lm_head", "re:.*mlp.gate$"]}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}} | status


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": False}
FP8_ACTIVATIONS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
BY_ROW = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}

LAYOUTS = {
    "fp8-blocks": Layout(
        family="deepseek_v3",
        entry={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]},
        quantize=fp8((8, 8), "weight_scale_inv", torch.float32),
        label="FP8 in blocks of 8 x 8",
    ),
    "fp8-blocks-qwen3": Layout(
        family="qwen3_moe",
        entry={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]},
        quantize=fp8((8, 8), "weight_scale_inv", torch.bfloat16),
        label="FP8 in blocks of 8 x 8",
    ),
    "fp8-rows": Layout(
        family="qwen3_moe",
        entry=compressed("float-quantized", FP8_ACTIVATIONS, **BY_ROW),
        quantize=fp8((1, 0), "weight_scale", torch.bfloat16),
        label="FP8 by row",
    ),
    "mxfp4": Layout(
        family="gpt_oss",
        entry={
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        },
        quantize=mxfp4,
        label="MXFP4",
        changes={"intermediate_size": 32},
    ),
    "w4a16": Layout(
        family="mixtral",
        entry=compressed("pack-quantized"),
        quantize=packs(4, 8, True),
        label="int4, groups of 8",
    ),
    "w4a16-zeros": Layout(
        family="qwen3_moe",
        entry=compressed("pack-quantized", symmetric=False),
        quantize=packs(4, 8, False),
        label="int4, groups of 8",
    ),
    "w8a16": Layout(
        family="deepseek_v3",
        entry=compressed("pack-quantized", num_bits=8, strategy="channel", group_size=None),
        quantize=packs(8, 0, True),
        label="int8, by row",
    ),
    "w3a16-order": Layout(
        family="mixtral",
        entry=compressed("pack-quantized", num_bits=3, actorder="group", symmetric=False),
        quantize=packs(3, 8, False, shuffled=True),
        label="int3, groups of 8",
    ),
    "nvfp4": Layout(
        family="olmoe",
        entry=compressed("nvfp4-pack-quantized", **NVFP4),
        quantize=nvfp4,
        label="NVFP4",
    ),
    "gptq": Layout(
        family="qwen3_moe",
        entry=GPTQ,
        quantize=gptq(4, 8, 1),
        label="GPTQ int4, groups of 8",
    ),
    "gptq-v2-order": Layout(
        family="mixtral",
        entry=GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True},
        quantize=gptq(4, 8, 0, shuffled=True),
        label="GPTQ int4, groups of 8",
    ),
    "awq": Layout(
        family="deepseek_v3",
        entry={"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True},
        quantize=awq(8),
        label="AWQ int4, groups of 8",
    ),
}
