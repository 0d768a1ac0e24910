"""Training a student with transformers' Trainer: its schedule, its accumulation, its processes, its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from moetailor.checkpoint.quiet import quiet_transformers
from moetailor.errors import MoetailorError, out_of_memory, reason_of
from moetailor.progress import Progress, resumed
from moetailor.recovery.examples import Blocks
from moetailor.recovery.folder import check_parts, last_checkpoint
from moetailor.recovery.loss import Student


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """How a student is trained.

    Attributes:
        steps: optimizer steps; `epochs` decides when None.
        epochs: passes over the blocks.
        batch_size: blocks that a process runs at once.
        accumulate: batches of a step.
        lr: learning rate of AdamW, after `warmup` falling to 0 as a cosine; gradients are clipped to a norm of 1.
        warmup: share of the steps in which the learning rate rises from 0.
        weight_decay: weight decay of AdamW.
        seed: orders the blocks and starts the adapters.
        save_every: steps between checkpoints.
        temperature: softens the distributions that ``kd`` compares.
        layer_weight: weight of the distance between the outputs of the decoder layers, see `Objective`.
        anneal: share of the steps in which the originals of low-rank experts fade out, see `Annealing`; 0 for none.
        anneal_gamma: 0 fades linearly, more faster at first.
        lora_rank: rank of the adapters of experts and the rest.
        lora_alpha: their scale is lora_alpha / lora_rank.
        gradient_checkpointing: compute the layers again in the backward pass instead of keeping what they held.
        fsdp: the processes share one student and one teacher, each GPU holding a part of every layer.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 1e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0
    save_every: int = 100
    temperature: float = 1.0
    layer_weight: float = 0.0
    anneal: float = 0.0
    anneal_gamma: float = 0.0
    lora_rank: int = 8
    lora_alpha: int = 16
    gradient_checkpointing: bool = False
    fsdp: bool = False

    def check(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            MoetailorError: see the message.
        """
        steps = {} if self.steps is None else {"steps": self.steps}
        counts = {"batch_size": self.batch_size, "accumulate": self.accumulate, "save_every": self.save_every}
        positive = {"epochs": self.epochs, "lr": self.lr, "temperature": self.temperature}
        for name, value in (steps | counts | positive | {"lora_alpha": self.lora_alpha}).items():
            if not 0 < value < math.inf:
                raise MoetailorError(f"{_flag(name)} {value}: is not a positive number")
        for name in ("weight_decay", "layer_weight", "anneal_gamma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise MoetailorError(f"{_flag(name)} {value}: is not 0 or more")
        if not 0 <= self.anneal <= 1:
            raise MoetailorError(f"--anneal {self.anneal}: is not a share of the steps, above 0 and at most 1")
        if not 0 <= self.warmup < 1:
            raise MoetailorError(f"--warmup {self.warmup}: is not a share of the steps, 0 or more and less than 1")
        if self.fsdp and self.anneal:
            raise MoetailorError("--fsdp shares out the tensors that --anneal fades; leave one of them out")


def training_arguments(folder: Path, options: RecoveryOptions, device: str) -> TrainingArguments:
    """Return Trainer's arguments; from here on this process has its device and knows the others.

    Args:
        folder: where checkpoints go.
        options: how to train.
        device: ``cpu`` or ``cuda``.

    Raises:
        MoetailorError: another device, or nobody to share the model with.
    """
    if device not in ("cpu", "cuda"):
        raise MoetailorError(f"device {device!r}: training runs on cpu or cuda; choose GPUs with CUDA_VISIBLE_DEVICES")
    with _processes():
        arguments = TrainingArguments(
            output_dir=str(folder),
            use_cpu=device == "cpu",
            max_steps=options.steps or -1,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            # Below 1 it is a share; 0.03 of few steps still is one step.
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            seed=options.seed,
            save_steps=options.save_every,
            save_total_limit=1,
            # Each step: a loss that is not finite must stop the run before anything is saved after it.
            logging_steps=1,
            logging_nan_inf_filter=False,
            average_tokens_across_devices=True,
            include_num_input_tokens_seen="all",
            disable_tqdm=True,
            report_to="none",
            fsdp=True if options.fsdp else None,  # type: ignore[arg-type]
        )
    if options.fsdp and arguments.world_size == 1:
        raise MoetailorError(
            "--fsdp shares the model out to several processes, and this is the only one; start them with "
            "torchrun --nproc-per-node=GPUS --no-python moetailor recover ..."
        )
    # One process drives one GPU; more of them take torchrun or accelerate.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@contextmanager
def _processes() -> Iterator[None]:
    """Say what is wrong when the environment speaks of other processes and nobody started them.

    Raises:
        MoetailorError: see above.
    """
    try:
        yield
    except ValueError as error:
        if "MASTER_" not in str(error):
            raise
        raise MoetailorError(
            f"the environment speaks of several processes ({reason_of(error)}); start them with torchrun, or unset "
            "RANK and WORLD_SIZE"
        ) from None


def train(
    student: Student,
    blocks: Blocks,
    arguments: TrainingArguments,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> TrainerState:
    """Train a student in place, from the last whole checkpoint in the folder of `arguments` if there is one.

    Args:
        student: the model with its loss; what requires gradients trains.
        blocks: the examples.
        arguments: from `training_arguments`.
        callbacks: more of them, called with ``model=student``.
        progress: called with (steps done, steps in all).

    Returns:
        Trainer's state: steps, tokens, and the loss of each step.

    Raises:
        MoetailorError: the loss or the gradient is not finite.
    """
    from transformers import Trainer  # here: it takes a second to import

    folder = Path(str(arguments.output_dir))
    last = last_checkpoint(folder)
    if last is not None and last[1].global_step >= last[1].max_steps:
        # Trainer would take one more step.
        with _going_on(last[0]):
            student.load_state_dict(load_file(last[0] / "model.safetensors"))
        return last[1]
    if last is not None:
        check_parts(last[0])
        resumed(last[1].global_step, last[1].max_steps, "steps")
    watch = _Watch(folder, progress)
    with quiet_transformers():
        trainer = Trainer(
            model=student,
            args=arguments,
            train_dataset=blocks,
            callbacks=[watch, *callbacks],
        )
        if arguments.fsdp and not trainer.is_fsdp_enabled:
            raise MoetailorError(f"--fsdp: accelerate shares models out to GPUs, and this runs on {arguments.device}")
        if trainer.is_fsdp_enabled and not arguments.fsdp:
            raise MoetailorError("accelerate was told to use FSDP; start the processes without that and give --fsdp")
        trainer.remove_callback(PrinterCallback)
        if last is None:
            trainer.train()
        else:
            with _going_on(last[0], until=lambda: watch.began):
                trainer.train(resume_from_checkpoint=str(last[0]))
    return trainer.state


@torch.no_grad()
def mean_losses(
    student: Student, blocks: Blocks, batch_size: int, device: torch.device, progress: Progress | None = None
) -> dict[str, float]:
    """Return the means over held-out tokens of ``task`` and, where there is a teacher, ``kd``.

    Args:
        student: the model with its loss.
        blocks: the held-out examples.
        batch_size: blocks to run at once.
        device: where the student is.
        progress: called with (blocks done, blocks in all).

    Raises:
        MoetailorError: a mean is not finite.
    """
    names = ["task"] if student.teacher is None else ["task", "kd"]
    totals = dict.fromkeys(names, 0.0)
    training = student.training
    student.eval()
    for start in range(0, len(blocks), batch_size):
        part = {name: tensor[start : start + batch_size].to(device) for name, tensor in vars(blocks).items()}
        for name, total in student.sums(**part, names=names).items():
            totals[name] += float(total)
        if progress is not None:
            progress(min(start + batch_size, len(blocks)), len(blocks))
    student.train(training)
    means = {name: total / blocks.counted for name, total in totals.items()}
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise MoetailorError(
                f"the {name} loss on the held-out examples is {mean}; the model gives no finite numbers"
            )
    return means


@contextmanager
def _going_on(checkpoint: Path, until: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Say of a checkpoint that cannot be read that it is damaged; what is raised after `until` has other causes."""
    try:
        yield
    except MoetailorError:
        raise
    except Exception as error:  # whatever damage makes torch, safetensors and Trainer raise
        if until() or out_of_memory(error):
            raise
        raise MoetailorError(
            f"{checkpoint}: cannot be gone on from ({type(error).__name__}: {error}); delete it, and the same command "
            "goes on from the checkpoint before it, or trains anew"
        ) from error


class _Watch(TrainerCallback):
    """Stops at the first loss or gradient that is not finite, and tells how far the training is."""

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        self.folder = folder
        self.progress = progress
        self.began = False

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.began = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            value = logs.get(name, 0.0)
            if not math.isfinite(value):
                last = last_checkpoint(self.folder)
                kept = "none was written yet" if last is None else f"it is {last[0]} of step {last[1].global_step}"
                raise MoetailorError(
                    f"step {state.global_step}: the {what} is {value}. The last good checkpoint: {kept}. Try a "
                    f"lower --lr, after deleting {self.folder}"
                )
        if self.progress is not None and "loss" in logs:
            self.progress(state.global_step, state.max_steps)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
