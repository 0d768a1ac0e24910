"""Layers of a few random experts, with samples of random tokens."""

from contextlib import nullcontext

import torch

from moetailor.calibration.statistics import Sample
from moetailor.checkpoint.anatomy import discover
from moetailor.checkpoint.experts import Experts
from moetailor.planning.view import LayerView
from support.families import tiny_model
from support.hand import TinyExperts, layer_of, sums_of

WIDTH, INNER = 6, 5


def random_experts(count: int, seed: int = 0) -> TinyExperts:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, INNER, WIDTH), (count, INNER, WIDTH), (count, WIDTH, INNER)]
    return TinyExperts(*(torch.randn(shape, generator=generator) for shape in shapes))


def with_copy(module: TinyExperts, of: int = 0, order: list[int] | None = None) -> TinyExperts:
    """Append a copy of an expert, its neurons perhaps in another order."""
    order = list(range(INNER)) if order is None else order
    gate, up = module.gate_up_proj.detach().chunk(2, 1)
    down = module.down_proj.detach()
    return TinyExperts(
        torch.cat([gate, gate[of : of + 1, order]]),
        torch.cat([up, up[of : of + 1, order]]),
        torch.cat([down, down[of : of + 1, :, order]]),
    )


def layer_with(module: TinyExperts, counts: list[int], tokens: int = 60, **fields: object) -> LayerView:
    """Return a layer whose experts were used so often, with a sample routed to all of them in turn."""
    pairs = [(expert, 1.0, [1.0] + [0.0] * (WIDTH - 1)) for expert, count in enumerate(counts) for _ in range(count)]
    generator = torch.Generator().manual_seed(1)
    sample = Sample(
        key=torch.arange(tokens),
        hidden=torch.randn(tokens, WIDTH, generator=generator),
        index=(torch.arange(tokens)[:, None] % len(counts)).int(),
        gate=torch.rand(tokens, 1, generator=generator),
        logits=torch.randn(tokens, len(counts), generator=generator),
    )
    return layer_of(sums_of(pairs, len(counts), tokens), sample=sample, module=module, **fields)


def routed_layer(module: TinyExperts, tokens: int, seed: int, top_k: int = 2) -> LayerView:
    """Return a layer with a sample of tokens that each chose two experts at random."""
    count = len(module.down_proj)
    layer = layer_with(module, [count - expert for expert in range(count)])
    generator = torch.Generator().manual_seed(seed)
    sample = Sample(
        key=torch.arange(tokens),
        hidden=torch.randn(tokens, WIDTH, generator=generator),
        index=torch.rand(tokens, count, generator=generator).topk(top_k, 1).indices.int(),
        gate=torch.rand(tokens, top_k, generator=generator),
        logits=torch.randn(tokens, count, generator=generator),
    )
    layer.read_sample = lambda: sample
    return layer


def layer_with_biases() -> tuple[LayerView, torch.nn.Module]:
    """Return a layer of a family with biases, clamped activations and interleaved projections, and its experts."""
    model = tiny_model("gpt_oss")
    layer = next(iter(discover(model.config, model).layers.values()))
    module = model.get_submodule(layer.experts)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(parameter.dim()))
    view = routed_layer(random_experts(layer.num_experts), 400, 0)
    view.open_experts, view.shape = lambda: nullcontext(Experts(module)), layer.expert_shape
    view.read_sample().hidden = torch.randn(400, layer.width, generator=torch.Generator().manual_seed(0))
    return view, module


def layer_of_tokens(module: TinyExperts, tokens: int = 300, seed: int = 0) -> LayerView:
    """Return a routed layer whose sums are those of its sample."""
    layer = routed_layer(module, tokens, seed)
    sums, sample = layer.sums, layer.sample
    for name in ("count", "gate", "gate_sq", "gate_sq_output", "gate_sq_norm_sq"):
        getattr(sums, name).zero_()
    sums.tokens.fill_(tokens)
    for expert in range(layer.num_experts):
        token, gate = layer.routed(expert)
        y, g = layer.experts.outputs(expert, sample.hidden[token]).double(), gate.double()
        sums.count[expert] = len(token)
        sums.gate_sq[expert] = g.square().sum()
        sums.gate_sq_output[expert] = (g.square()[:, None] * y).sum(0)
        sums.gate_sq_norm_sq[expert] = (g.square() * y.square().sum(1)).sum()
    layer.expert_bytes = 4 * 3 * WIDTH * 50
    return layer
