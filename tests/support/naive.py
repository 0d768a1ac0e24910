"""Slow, obvious references: one token and one expert at a time, and routers with experts masked out."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moetailor.checkpoint.anatomy import MoELayer, discover, tensors_of
from moetailor.checkpoint.stored_experts import StoredExperts
from moetailor.checkpoint.weights import ExpertWeights
from support.tiny import token_batches

NEVER = -1e4  # exp and sigmoid of it are exactly 0 in float32


def run_recorded(model: nn.Module, layer: MoELayer, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a model and return what one layer's experts and router saw: hidden, index, gate, logits."""
    seen: dict[str, torch.Tensor] = {}

    def experts_called(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.update(zip(("hidden", "index", "gate"), args, strict=True))

    def router_called(module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        logits = next(p for p in parts if p.is_floating_point() and p.shape[-1] == layer.num_experts)
        seen["logits"] = logits.reshape(-1, layer.num_experts)

    hooks = [
        model.get_submodule(layer.experts).register_forward_pre_hook(experts_called),
        model.get_submodule(layer.router).register_forward_hook(router_called),
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def expert_output(model: nn.Module, layer: MoELayer, expert: int, x_D: torch.Tensor) -> torch.Tensor:
    """Return one expert's raw output for one token, by the family's own eager code."""
    experts = model.get_submodule(layer.experts)
    with torch.no_grad():
        return experts(x_D[None], torch.tensor([[expert]]), torch.ones(1, 1))[0]


def sums(model: nn.Module, layer: MoELayer, batches: Iterable[Any], probabilities: str) -> dict[str, torch.Tensor]:
    """Return every sum of `moetailor.calibration.statistics.Sums`, added up token by token in float64."""
    experts, width = layer.num_experts, layer.width
    total = {name: torch.zeros(experts, dtype=torch.float64) for name in SCALARS}
    total |= {
        name: torch.zeros(experts, width, dtype=torch.float64) for name in ("output", "gated_output", "gate_sq_output")
    }
    total |= {"together": torch.zeros(experts, experts, dtype=torch.float64), "tokens": torch.zeros(())}
    for batch in batches:
        seen = run_recorded(model, layer, batch.input_ids)
        counted = batch.counted.flatten()
        for token in counted.nonzero().flatten().tolist():
            total["tokens"] += 1
            logits = seen["logits"][token].double()
            total["probability"] += logits.sigmoid() if probabilities == "sigmoid" else logits.softmax(-1)
            chosen = seen["index"][token].tolist()
            for expert, gate in zip(chosen, seen["gate"][token].double().tolist(), strict=True):
                y = expert_output(model, layer, expert, seen["hidden"][token]).double()
                norm = float(y.square().sum().sqrt())
                for name, value in zip(
                    SCALARS,
                    (1, gate, gate**2, norm, gate * norm, gate**2 * norm, norm**2, (gate * norm) ** 2),
                    strict=False,
                ):
                    total[name][expert] += value
                total["norm_max"][expert] = max(total["norm_max"][expert], norm)
                total["output"][expert] += y
                total["gated_output"][expert] += gate * y
                total["gate_sq_output"][expert] += gate**2 * y
                for other in chosen:
                    total["together"][expert, other] += 1
    return total


def shifted(model: nn.Module, layer: MoELayer, batches: Iterable[Any]) -> torch.Tensor:
    """Return sum g |y| max(0, 1 - cos(h, h~)) of each expert, from two runs of the whole model for each batch."""
    decoder_layer = model.get_submodule(re.match(r".*\blayers\.\d+", layer.experts)[0])  # type: ignore[index]
    experts = model.get_submodule(layer.experts)
    left: list[torch.Tensor] = []
    total = torch.zeros(layer.num_experts, dtype=torch.float64)

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    for batch in batches:
        left.clear()
        watch = decoder_layer.register_forward_hook(leaves)
        seen = run_recorded(model, layer, batch.input_ids)
        silence = experts.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        run_recorded(model, layer, batch.input_ids)
        silence.remove()
        watch.remove()
        counted = batch.counted.flatten()
        after, before = (hidden.double().reshape(len(counted), -1) for hidden in left)
        for token in counted.nonzero().flatten().tolist():
            h, moved = before[token], after[token]
            shift = max(0.0, 1 - float(h @ moved) / (float(h.norm()) * float(moved.norm())))
            for expert, gate in zip(seen["index"][token].tolist(), seen["gate"][token].tolist(), strict=True):
                norm = float(expert_output(model, layer, expert, seen["hidden"][token]).double().norm())
                total[expert] += gate * norm * shift
    return total


SCALARS = (
    *("count", "gate", "gate_sq", "norm", "gated_norm", "gate_sq_norm", "norm_sq", "gate_sq_norm_sq"),
    *("norm_max", "probability"),
)


def set_slot_vectors(model: nn.Module, layer: MoELayer, dropped: list[int], value: float) -> None:
    """Set the entries of some slots in the vectors of a router's block (correction biases), not in its matrix."""
    tensors = tensors_of(model)
    for name, axis in layer.slot_rows.items():
        tensor = tensors[f"{layer.block}.{name}"]
        if tensor.numel() == layer.num_experts:
            tensor.data.index_fill_(axis, torch.tensor(dropped), value)


@contextmanager
def masked(model: nn.Module, layers: Iterable[MoELayer], dropped: dict[int, list[int]]) -> Iterator[None]:
    """Keep some experts from ever being chosen: their logits and correction biases are far below all others."""
    original = nn.functional.linear
    hooks = []
    for layer in layers:
        lost = dropped.get(layer.index, [])
        set_slot_vectors(model, layer, lost, NEVER)

        def mask(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, *, lost: list[int] = lost) -> torch.Tensor:
            return original(x, weight, bias).index_fill(-1, torch.tensor(lost, dtype=torch.long), NEVER)

        def enter(module: nn.Module, args: Any, mask: Any = mask) -> None:
            nn.functional.linear = mask

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            nn.functional.linear = original

        router = model.get_submodule(layer.router)
        hooks += [router.register_forward_pre_hook(enter), router.register_forward_hook(leave)]
    try:
        yield
    finally:
        nn.functional.linear = original
        for hook in hooks:
            hook.remove()


def masked_outputs(checkpoint: Path, dropped: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the experts of layer 1 give for every token with some of them masked in the router, and the gates."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    layer = discover(model.config, model).layers[1]
    outputs: list[torch.Tensor] = []
    gates: list[torch.Tensor] = []
    watch = model.get_submodule(layer.experts).register_forward_hook(lambda m, args, out: outputs.append(out))
    with masked(model, [layer], {1: dropped}) if dropped else nullcontext():
        for batch in token_batches():
            seen = run_recorded(model, layer, batch.input_ids)
            dense = torch.zeros(len(seen["index"]), layer.num_experts)
            gates.append(dense.scatter_(1, seen["index"].long(), seen["gate"].float()))
    watch.remove()
    return torch.cat(outputs), torch.cat(gates)


def assert_read_alike(source: Path) -> None:
    """Check that experts which stay on disk, and are read when asked for, are those of the layer that was loaded."""
    whole, apart = ExpertWeights(source), ExpertWeights(source, batch_memory=1)
    for index, layer in apart.anatomy.layers.items():
        with whole.open(index) as loaded, apart.open(index) as stored:
            assert isinstance(stored, StoredExperts)
            assert not isinstance(loaded, StoredExperts)
            assert (stored.shape, stored.dtype, stored.device) == (loaded.shape, loaded.dtype, loaded.device)
            last = layer.num_experts - 1
            for some in ([last, 0, last], [1], slice(0, 2), slice(None)):
                for name, wanted in loaded.matrices(some).items():
                    assert torch.equal(stored.matrices(some)[name], wanted), (index, name, some)
            x = torch.randn(3, layer.width, generator=torch.Generator().manual_seed(0))
            assert torch.equal(stored.outputs(last, x), loaded.outputs(last, x))
            assert all(parameter.is_meta for parameter in stored.module.parameters())
