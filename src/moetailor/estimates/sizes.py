"""What a model computes for a token and takes in memory, read off its headers and its empty skeleton."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from moetailor.calibration.statistics import ON_REQUEST, Sums
from moetailor.checkpoint.anatomy import tensors_of
from moetailor.checkpoint.original import Original
from moetailor.planning.work import Work

_LAYER = re.compile(r"\blayers\.(\d+)\.")
# Operations of a decoder layer beside its experts, and of each expert; how often they go over hidden states.
LAYER_STEPS, EXPERT_STEPS, PASSES = 80, 15, 30


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One decoder layer.

    Attributes:
        dense: weights that every token meets.
        routed: weights that a token's experts have.
        numbers: all its numbers.
        experts: its routed experts, 0 where it has none.
        top_k: those of a token.
        routed_all: weights of all its experts.
        nbytes: its bytes on disk.
    """

    dense: int
    routed: int
    routed_all: int
    numbers: int
    experts: int
    top_k: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """A model.

    Attributes:
        layers: its decoder layers.
        width: of hidden states, D.
        attended: numbers of the keys of a token in one layer that a query is compared with, heads times their width.
        vocabulary: V.
        outside: numbers outside the layers.
        numbers: all numbers.
        stacked: the largest parameter that is put together of tensors that lie apart.
        nbytes: of the tensors on disk.
    """

    layers: tuple[LayerCost, ...]
    width: int
    attended: int
    vocabulary: int
    outside: int
    numbers: int
    stacked: int
    nbytes: int

    def layer(self, number: int, tokens: int, length: int) -> Work:
        """Return the work of a decoder layer on one batch.

        Args:
            number: which.
            tokens: of the batch.
            length: tokens of a sequence.
        """
        cost = self.layers[number]
        # 2 n for each weight; queries meet keys and values of half the sequence: 4 n (L / 2) heads d
        products = tokens * (2 * (cost.dense + cost.routed) + 2 * length * self.attended)
        run = min(cost.experts, tokens * cost.top_k)
        return Work(
            products=products,
            elements=PASSES * tokens * self.width + 6 * tokens * cost.top_k * self.width,
            steps=LAYER_STEPS + EXPERT_STEPS * run,
        )

    def forward(self, tokens: int, length: int) -> Work:
        """Return the work of all decoder layers on one batch."""
        return sum((self.layer(number, tokens, length) for number in range(len(self.layers))), Work())

    def head(self, tokens: int) -> Work:
        """Return the work of the head on some tokens."""
        return Work(products=2 * tokens * self.width * self.vocabulary, steps=20)

    @property
    def active(self) -> int:
        """Weights that one token meets, the head's included."""
        return sum(layer.dense + layer.routed for layer in self.layers) + self.width * self.vocabulary

    @property
    def largest(self) -> LayerCost:
        """The layer with the most numbers."""
        return max(self.layers, key=lambda layer: layer.numbers)


def cost_of(original: Original) -> ModelCost:
    """Return what a model costs; only headers are read.

    Args:
        original: the opened checkpoint of an original.
    """
    tensors, moe = tensors_of(original.skeleton.model), original.anatomy.layers
    config = original.plain_config.get_text_config()
    rows = {f"{layer.experts}.{name}": index for index, layer in moe.items() for name in layer.expert_rows}
    dense, routed, every, numbers, nbytes = ([0] * config.num_hidden_layers for _ in range(5))
    outside = 0
    for name, tensor in tensors.items():
        match = _LAYER.search(name)
        if match is None or int(match[1]) >= len(dense):
            outside += tensor.numel()
            continue
        at = int(match[1])
        numbers[at] += tensor.numel()
        if name in rows and tensor.dim() > 2:
            every[at] += tensor.numel()
            routed[at] += tensor.numel() * original.anatomy.top_k // moe[at].num_experts
        elif name not in rows and tensor.dim() > 1:
            dense[at] += tensor.numel()
    for key, name in original.skeleton.names.items():
        if (match := _LAYER.search(name)) is not None and int(match[1]) < len(nbytes):
            nbytes[int(match[1])] += original.checkpoint.numbers[key].nbytes
    keys = Counter(original.skeleton.names.values())
    heads = getattr(config, "num_attention_heads", 0)
    return ModelCost(
        layers=tuple(
            LayerCost(
                dense=dense[at],
                routed=routed[at],
                routed_all=every[at],
                numbers=numbers[at],
                experts=moe[at].num_experts if at in moe else 0,
                top_k=original.anatomy.top_k if at in moe else 0,
                nbytes=nbytes[at],
            )
            for at in range(len(dense))
        ),
        width=config.hidden_size,
        attended=heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)),
        vocabulary=config.vocab_size,
        outside=outside,
        numbers=outside + sum(numbers),
        stacked=max((tensors[name].numel() for name, count in keys.items() if count > 1), default=0),
        nbytes=original.checkpoint.nbytes,
    )


def files_of(original: Original) -> list[Path]:
    """Return the weight files that can be read here; none of a checkpoint of which only headers were asked for."""
    every = {part.file for info in original.checkpoint.numbers.values() for part in info.stored}
    return [] if original.headers_only else sorted(every)


def downloads_of(original: Original) -> int:
    """Return the bytes that the hub would have to give."""
    return original.checkpoint.nbytes if original.headers_only else 0


def statistics_nbytes(experts: int, width: int, top_k: int, sampled: int, itemsize: int) -> tuple[int, int]:
    """Return the bytes of what calibration keeps of a layer: sums, and sampled tokens.

    Args:
        experts: of the layer, E.
        width: of the model, D.
        top_k: experts of a token, K.
        sampled: tokens, N.
        itemsize: bytes of a number in the dtype of the run.
    """
    shapes = (shape for name, shape in Sums.shapes(experts, width).items() if name not in ON_REQUEST)
    return 8 * sum(map(math.prod, shapes)), sampled * (8 + width * itemsize + 8 * top_k + 4 * experts)
