"""What a student is trained towards: the words of the text, the teacher's predictions, the teacher's layers.

Every part is a sum over the tokens that count. Divided by their number over all processes and accumulated batches it
gives the same gradient however the blocks are dealt out. Shapes: B sequences, L tokens, T tokens that count, V
vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from moetailor.errors import MoetailorError
from moetailor.recovery.examples import IGNORED

Loss = Literal["task", "kd", "both"]
PARTS: dict[str, tuple[str, ...]] = {"task": ("task",), "kd": ("kd",), "both": ("task", "kd")}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: a sum of parts, each a mean over the tokens that count.

    Attributes:
        loss: ``task`` (cross entropy of the next word), ``kd`` (temperature^2 KL(teacher || student)) or ``both``.
        temperature: softens both distributions of ``kd``.
        layer_weight: c of c * mean over decoder layers of |h - h_teacher|^2 / |h_teacher|^2.
    """

    loss: Loss = "kd"
    temperature: float = 1.0
    layer_weight: float = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """Factors of the parts."""
        return dict.fromkeys(PARTS[self.loss], 1.0) | ({"layer": self.layer_weight} if self.layer_weight else {})

    @property
    def needs_teacher(self) -> bool:
        """Whether a part compares with a teacher."""
        return set(self.weights) != {"task"}


class Student(nn.Module):
    """A model with its loss, as transformers' Trainer takes it.

    Args:
        model: the model to be trained. What trains of it is float32; where the rest is not, it runs under autocast.
        objective: what is minimised.
        teacher: the model to compare with. It is no submodule: it is neither saved, moved, wrapped nor trained.
    """

    # Trainer then gives forward the number of tokens that count over all processes and accumulated batches.
    accepts_loss_kwargs = True
    # Trainer looks for it when it resumes.
    _keys_to_ignore_on_save = None
    teacher: Any

    def __init__(self, model: Any, objective: Objective, teacher: Any = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.__dict__["teacher"] = None if teacher is None else teacher.eval().requires_grad_(False)
        # What accelerate shards one by one: the decoder layers.
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return {"loss": the objective}.

        Args:
            input_ids: token ids, [B, L].
            labels: the words to predict, `IGNORED` where none counts, [B, L].
            num_items_in_batch: tokens to divide by; those of this batch when None.
        """
        weights = self.objective.weights
        sums = self.sums(input_ids, labels, weights)
        count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": torch.stack([weights[name] * part for name, part in sums.items()]).sum() / count}

    def sums(self, input_ids: torch.Tensor, labels: torch.Tensor, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the sum of some parts (``task``, ``kd``, ``layer``) over the tokens that count."""
        counted, layers, found = labels[:, 1:] != IGNORED, "layer" in names, {}
        dtype = self.model.get_input_embeddings().weight.dtype
        with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
            out = self.model(input_ids=input_ids, use_cache=False, output_hidden_states=layers)
        logits_TV = out.logits[:, :-1][counted].float()
        if "task" in names:
            found["task"] = F.cross_entropy(logits_TV, labels[:, 1:][counted], reduction="sum")
        if "kd" not in names and not layers:
            return found
        with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
            target = self.teacher(input_ids=input_ids, use_cache=False, output_hidden_states=layers)
        if "kd" in names:
            found["kd"] = divergence(target.logits[:, :-1][counted].float(), logits_TV, self.objective.temperature)
        if layers:
            found["layer"] = layer_distance(target.hidden_states, out.hidden_states, counted)
        return found

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return what trains, and nothing else: Trainer's checkpoints stay as small as that."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in super().state_dict(*args, **kwargs).items() if name in trainable}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; what does not train stays."""
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def divergence(teacher_TV: torch.Tensor, student_TV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return temperature^2 KL(teacher || student) of two sets of logits, summed over tokens."""
    # T^2 sum_v p (log p - log q), p and q at temperature T
    logp_TV, logq_TV = (torch.log_softmax(logits / temperature, -1) for logits in (teacher_TV, student_TV))
    return temperature**2 * F.kl_div(logq_TV, logp_TV, reduction="sum", log_target=True)


def layer_distance(
    teacher: Sequence[torch.Tensor] | None, student: Sequence[torch.Tensor] | None, counted: torch.Tensor
) -> torch.Tensor:
    """Return the mean over decoder layers of |h - h_teacher|^2 / |h_teacher|^2, summed over tokens.

    Args:
        teacher: its hidden states, the embeddings first, each [B, L, D].
        student: the same of the student.
        counted: the positions whose next token counts, bool [B, L - 1].

    Raises:
        MoetailorError: the family does not give the outputs of its layers.
    """
    if not teacher or not student or len(teacher) != len(student):
        raise MoetailorError("the models do not give the outputs of their layers; leave --layer-weight out")
    total = torch.zeros((), device=counted.device)
    for goal, given in zip(teacher[1:], student[1:], strict=True):
        goal_TD, given_TD = goal[:, :-1][counted].float(), given[:, :-1][counted].float()
        total = total + ((given_TD - goal_TD).square().sum(-1) / goal_TD.square().sum(-1)).sum()
    return total / (len(teacher) - 1)
