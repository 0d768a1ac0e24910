"""What is measured of one MoE layer, gathered run by run from what the hook shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moetailor.calibration.batch import Batch
from moetailor.calibration.capture import Pairs, Routed
from moetailor.calibration.sampling import Sampled
from moetailor.calibration.statistics import LayerStatistics, Sample, Sums, add_pairs, add_tokens
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.errors import CalibrationError


class Collector:
    """Gathers the statistics of one layer: of one batch after the other, and of all that were added.

    Sums of a batch are added to the others' as a whole, so that they are the same to the bit wherever a batch ran.

    Args:
        anatomy: the MoE layers.
        index: which decoder layer.
        batches: the text.
        sampled: which tokens to keep whole.
        residual: gather `Sums.gated_norm_shift` too, from `residual`.
    """

    def __init__(
        self, anatomy: Anatomy, index: int, batches: Sequence[Batch], sampled: Sampled, residual: bool = False
    ) -> None:
        self.layer, self.probabilities = anatomy.layers[index], anatomy.probabilities
        self.batches, self.sampled = batches, sampled
        self.residuals = residual
        self.sums = self.own = self._zeros()
        self.weighted: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.parts: list[Sample] = []
        self.sampled_own: Sample | None = None
        self.number = 0
        self.counted: torch.Tensor | None = None

    def begin(self, number: int) -> None:
        """Say that batch `number` runs next."""
        self.number, self.own = number, self._zeros()
        counted = self.batches[number].counted.reshape(-1)
        self.counted = None if bool(counted.all()) else counted

    def tokens(self, run: Routed) -> None:
        """Add how the tokens of a run were routed, and keep the sampled ones."""
        self._sample(run)
        logits, index = run.logits.float(), run.index
        if self.counted is not None:
            counted = self.counted.to(index.device)
            logits, index = logits[counted], index[counted]
        probability = logits.sigmoid() if self.probabilities == "sigmoid" else logits.softmax(-1)
        add_tokens(self.own, index, probability)

    def pairs(self, run: Pairs) -> None:
        """Add a portion of the run's routed pairs."""
        token, output, expert, gate = run.token, run.output, run.expert, run.gate
        if self.counted is not None:
            counted = self.counted.to(expert.device)[token]
            token, output, expert, gate = token[counted], output[counted], expert[counted], gate[counted]
        if len(expert):
            add_pairs(self.own, output, expert, gate)
            if self.residuals:
                norm = torch.linalg.vector_norm(output, dim=1, dtype=torch.float32)
                self.weighted.append((token, expert.cpu(), gate.double() * norm))

    def residual(self, without: torch.Tensor, whole: torch.Tensor) -> None:
        """Add how far the routed experts turned the residual stream of a run, after its pairs.

        Args:
            without: what leaves the decoder layer when the routed experts give nothing, [B, L, ...].
            whole: what leaves it when they do, same shape.
        """
        assert self.own.gated_norm_shift is not None
        tokens = self.batches[self.number].counted.numel()
        before, after = (hidden.reshape(tokens, -1).double() for hidden in (without, whole))
        # max(0, 1 - cos(h, h~)) of each token
        shift_T = (1 - torch.cosine_similarity(before, after)).clamp_min(0)
        for token, expert, weight in self.weighted:
            self.own.gated_norm_shift.index_add_(0, expert, (weight * shift_T[token]).cpu())
        self.weighted.clear()

    def taken(self) -> tuple[Sums, Sample]:
        """Return what was gathered of the batch that ran last."""
        assert self.sampled_own is not None
        return self.own, self.sampled_own

    def add(self, part: tuple[Sums, Sample]) -> None:
        """Add what was gathered of the next batch of the text."""
        self.sums = self.sums + part[0]
        self.parts.append(part[1])

    def _zeros(self) -> Sums:
        return Sums.zeros(self.layer.num_experts, self.layer.width, residual=self.residuals)

    def _sample(self, run: Routed) -> None:
        key, position = self.sampled[self.number]
        position = position.to(run.hidden.device)
        self.sampled_own = Sample(
            key=key,
            hidden=run.hidden[position].cpu(),
            index=run.index[position].int().cpu(),
            gate=run.gate[position].float().cpu(),
            logits=run.logits[position].float().cpu(),
        )

    def finish(self) -> LayerStatistics:
        """Return the statistics of all that was added.

        Raises:
            CalibrationError: outputs of an expert or of the router, or sums of them, are not finite.
        """
        bad = (~torch.isfinite(self.sums.norm_sq)).nonzero().flatten().tolist()
        if bad:
            raise CalibrationError(
                f"layer {self.layer.index}, expert {bad[0]}: outputs are not finite ({len(bad)} experts in this layer) "
                "though its weights are: the activations overflowed, then calibrate in a wider --dtype; "
                "or a weight before the experts is damaged, then download the checkpoint again"
            )
        # Experts may be sound behind a router that is not.
        if not bool(torch.isfinite(self.sums.gate + self.sums.probability).all()):
            raise CalibrationError(
                f"layer {self.layer.index}: the router gives values that are not finite though its weights are: "
                "the activations overflowed, then calibrate in a wider --dtype; "
                "or a weight before the router is damaged, then download the checkpoint again"
            )
        for name, total in self.sums.recorded.items():
            if not bool(torch.isfinite(total).all()):
                raise CalibrationError(f"layer {self.layer.index}: {name} is not finite; calibrate in a wider --dtype")
        return LayerStatistics(sums=self.sums, sample=Sample.concatenated(self.parts))
