"""How far compressed MoE layers are from the original's: each alone, and all of them in the running model.

On a little text the original shows what each MoE block got and what its routed experts gave. A compressed block that
gets the same inputs shows its own error, free of what the layers before it did; that is what a plan can expect. The
compressed model as a whole, on held-out text, shows what is measured. Shapes: T tokens, D width of the experts' output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moetailor.calibration.batch import Batch, evenly_spaced_sequences
from moetailor.checkpoint.anatomy import MoELayer

# Tokens of either text: in the order of what a quick look at each cell costs, not of a whole pass.
TOKENS = 2048


@dataclass(frozen=True)
class LayerError:
    """Squared error of a layer's routed output, summed over its width, a token: mean over the tokens that count.

    Attributes:
        expected: of the layer alone, on calibration text.
        measured: in the running model, on held-out text.
        energy: the original output's square, on the two texts.
    """

    expected: float
    measured: float
    energy: tuple[float, float]


@dataclass
class Seen:
    """What one MoE layer was called with and gave, call by call.

    Attributes:
        arguments: arguments of the block.
        outputs: outputs of its experts module, [T, D].
    """

    arguments: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)


class Probe:
    """The original's MoE layers on a little text, to hold compressed ones against.

    Args:
        model: the original.
        layers: its MoE layers.
        calibrated: calibration text.
        held_out: held-out text.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[int, MoELayer],
        calibrated: Sequence[Batch],
        held_out: Sequence[Batch],
    ) -> None:
        self.layers, self.text = layers, evenly_spaced_sequences(held_out, TOKENS)
        calibrated = evenly_spaced_sequences(calibrated, TOKENS)
        self.alone = self._run(model, calibrated)
        self.running = {index: seen.outputs for index, seen in self._run(model, self.text).items()}
        # Of the two texts, sequence by sequence.
        self.counted = [[batch.counted[0, _real(batch)] for batch in text] for text in (calibrated, self.text)]

    def errors(self, model: nn.Module) -> dict[int, LayerError]:
        """Return the errors of a compressed copy of the model by decoder layer."""
        running, (calibrated, held_out) = self._run(model, self.text), self.counted
        with torch.no_grad(), _watched(model, self.layers) as alone:
            for index, layer in self.layers.items():
                block = model.get_submodule(layer.block)
                for args, kwargs in self.alone[index].arguments:
                    block(*args, **kwargs)
        return {
            index: LayerError(
                expected=_square(calibrated, self.alone[index].outputs, alone[index].outputs),
                measured=_square(held_out, self.running[index], running[index].outputs),
                energy=(_square(calibrated, self.alone[index].outputs), _square(held_out, self.running[index])),
            )
            for index in self.layers
        }

    def _run(self, model: Any, text: Sequence[Batch]) -> dict[int, Seen]:
        device = model.get_input_embeddings().weight.device
        with torch.no_grad(), _watched(model, self.layers) as seen:
            for batch in text:
                model(input_ids=batch.input_ids[:, _real(batch)].to(device), use_cache=False)
        return seen


@contextmanager
def _watched(model: nn.Module, layers: Mapping[int, MoELayer]) -> Iterator[dict[int, Seen]]:
    """Keep what MoE layers get and give while the context lasts."""
    seen, inside = {index: Seen() for index in layers}, -1

    def watch(index: int, layer: MoELayer) -> Iterator[Any]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal inside
            inside = index
            seen[index].arguments.append((args, kwargs))

        def leave(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            # Experts that are guests elsewhere are also called from other layers.
            if inside == index:
                seen[index].outputs.append(output)

        yield model.get_submodule(layer.block).register_forward_pre_hook(enter, with_kwargs=True)
        yield model.get_submodule(layer.experts).register_forward_hook(leave)

    with ExitStack() as hooks:
        for index, layer in layers.items():
            for hook in watch(index, layer):
                hooks.callback(hook.remove)
        yield seen


def _real(batch: Batch) -> torch.Tensor:
    """Return which tokens of a single sequence are no padding, bool [L]."""
    return torch.ones_like(batch.counted[0]) if batch.attention_mask is None else batch.attention_mask[0].bool()


def _square(
    counted: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], others: Sequence[torch.Tensor] | None = None
) -> float:
    """Return the mean square, summed over the width, of outputs or of their difference to others.

    Args:
        counted: which tokens enter the mean, bool [T] for each sequence.
        outputs: outputs of each sequence, [T, D].
        others: what to compare them with, as `outputs`.
    """
    total, tokens = 0.0, 0
    for number, (counted_T, output_TD) in enumerate(zip(counted, outputs, strict=True)):
        difference_TD = output_TD.float() if others is None else output_TD.float() - others[number].float()
        total += float(difference_TD[counted_T.to(output_TD.device)].square().sum(dtype=torch.float64))
        tokens += int(counted_T.sum())
    return total / max(tokens, 1)
