"""Tiny checkpoints in which some experts are redundant on purpose.

The first number of the hidden state is made large and the same for every token, and all else that passes a norm is
scaled up to where it was: so every expert and every router has an input that is constant. It is the bias of families
that have none: with it an expert can give a constant, or a linear map of its input, and a router can shun an expert.
The other experts do not see it.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

import moetailor
from moetailor.checkpoint.anatomy import MoELayer, discover, tensors_of
from moetailor.checkpoint.experts import Experts
from support.families import tiny_model

PLANTED: dict[str, dict[str, int]] = {
    "olmoe": {"num_experts": 12},
    "qwen3_moe": {},
    "gpt_oss": {"num_local_experts": 12},
    "deepseek_v3": {},
}
"""Families to plant in, with the changes that make room: 12 experts each."""

LARGE, SMALL = 1000.0, 0.2
# Many more words than an expert has neurons: what it gives for few inputs, a map of low rank gives too.
WORDS = 1024
_NORM = re.compile(r"(input_layernorm|post_attention_layernorm|model\.norm)\.weight$")


@dataclass(frozen=True)
class Planted:
    """What the experts of every MoE layer are, by number; those not named are random and like no other.

    Attributes:
        original: a random expert of which there are copies.
        duplicate: the same again.
        permuted: the same with its neurons in another order.
        scaled: the same with its output times `factor`.
        constant: gives the same vector for every token.
        linear: gives a linear map of its input of rank `rank`.
        dead: is never chosen.
        factor: see `scaled`.
        rank: see `linear`.
    """

    original: int = 1
    duplicate: int = 3
    permuted: int = 8
    scaled: int = 6
    constant: int = 4
    linear: int = 9
    dead: int = 10
    factor: float = 0.5
    rank: int = 4

    @property
    def redundant(self) -> set[int]:
        """The experts that can go without loss."""
        return {self.duplicate, self.permuted, self.scaled, self.constant, self.linear, self.dead}


@torch.no_grad()
def planted_model(name: str, seed: int = 0, what: Planted = Planted()) -> PreTrainedModel:
    """Return a family's tiny model with redundant experts in every MoE layer.

    Args:
        name: A key of `PLANTED`.
        seed: Two calls with one seed give the same bits.
        what: which expert becomes what.
    """
    model = tiny_model(name, seed, vocab_size=WORDS, **PLANTED[name])
    # A state that is hardly changed by what is added to it: its scale and its first number are the same in every layer.
    width = model.config.hidden_size
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == width:
            module.weight *= SMALL
        if isinstance(module, nn.Linear) and module.in_features == width:
            module.weight[:, 0] = 0
    embeddings = model.get_input_embeddings().weight
    embeddings *= 5
    embeddings[:, 0] = LARGE
    for parameter_name, parameter in model.named_parameters():
        if _NORM.search(parameter_name):
            parameter[1:] *= LARGE / width**0.5
    for layer in discover(model.config, model).layers.values():
        _plant(Experts(model.get_submodule(layer.experts)), what)
        _shun(model, layer, what.dead)
    return model


def planted_batches(tokens: int = 2304, length: int = 48, seed: int = 1) -> list[moetailor.Batch]:
    """Return text that takes each expert to some hundred tokens.

    Args:
        tokens: how many.
        length: tokens of a sequence.
        seed: another one gives another text.
    """
    generator = torch.Generator().manual_seed(seed)
    return [moetailor.Batch.of(torch.randint(3, WORDS, (tokens // length, length), generator=generator))]


def _plant(experts: Experts, what: Planted) -> None:
    stacks = {name: stack.clone() for name, stack in experts.matrices().items()}
    for part in ("gate", "up"):
        stacks[part][:, :, 0] = 0
    stacks["gate"] *= 3  # far from linear
    stacks["down"] *= SMALL
    inner = stacks["down"].shape[2]
    order = torch.arange(inner).roll(5)
    for copy, neurons in ((what.duplicate, slice(None)), (what.permuted, order), (what.scaled, slice(None))):
        for name, stack in stacks.items():
            one = stack[what.original]
            stack[copy] = one[:, neurons] if name == "down" else one if name == "down_bias" else one[neurons]
    for name in ("down", "down_bias"):
        if name in stacks:
            stacks[name][what.scaled] *= what.factor
    # A gate that sees only what is constant is constant; so is the expert when its other half is, too.
    for expert, parts in ((what.constant, ("gate", "up")), (what.linear, ("gate",))):
        for part in parts:
            stacks[part][expert] = 0
            stacks[part][expert, :, 0] = 0.3
    stacks["down"][what.linear, :, what.rank :] = 0
    for parameter, values in experts.packed(stacks).items():
        getattr(experts.module, parameter).copy_(values)


def _shun(model: nn.Module, layer: MoELayer, expert: int) -> None:
    """Let the router see the constant input for one expert only, and shun it."""
    tensors = tensors_of(model)
    for name, axis in layer.slot_rows.items():
        weight = tensors[f"{layer.block}.{name}"]
        assert axis == 0, name
        if weight.dim() == 2:
            weight[:, 0] = 0
            weight[expert] = 0
            weight[expert, 0] = -100
