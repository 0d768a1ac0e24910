"""The recover stage: a compressed checkpoint and examples in, the same checkpoint with trained tensors out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import TrainerState

from moetailor._version import __version__
from moetailor.calibration.text import words_of
from moetailor.checkpoint.anatomy import Anatomy, discover
from moetailor.checkpoint.files import Checkpoint, open_checkpoint
from moetailor.checkpoint.loader import load_config
from moetailor.checkpoint.models import load_model, load_tokenizer, longest_sequence, resolve_device, resolve_dtype
from moetailor.errors import MoetailorError, did_you_mean
from moetailor.progress import Progress, Stages
from moetailor.progress import part as part_of
from moetailor.recovery.anneal import Annealing
from moetailor.recovery.examples import Blocks, ExampleOptions, files_of, read_blocks
from moetailor.recovery.folder import begin_training, check_training, end_training, place_of, training_folder
from moetailor.recovery.fsdp import check_shardable, shard
from moetailor.recovery.loss import Loss, Objective, Student
from moetailor.recovery.result import provenance_of, write_recovered
from moetailor.recovery.train import RecoveryOptions, mean_losses, training_arguments
from moetailor.recovery.train import train as train_student
from moetailor.recovery.trainable import Adapters, Selection, check_words, select
from moetailor.runtime.quantizer import original_config


@dataclass(frozen=True, kw_only=True)
class RecoveryResult:
    """What `recover` did.

    Attributes:
        out: the result.
        steps: optimizer steps, those before a stop included.
        tokens: tokens of the blocks that were trained on, whether they count or not.
        seconds: of this call.
        losses: what was minimised, at each step.
        before: held-out means before training, ``task`` and, with a teacher in memory, ``kd``; empty without such data.
        after: the same after it.
    """

    out: Path
    steps: int
    tokens: int
    seconds: float
    losses: tuple[float, ...]
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


def recover(
    model: str | Path,
    out: str | Path,
    *,
    examples: ExampleOptions | Blocks,
    teacher: str | Path | None = None,
    train: str | Iterable[str] = ("router",),
    loss: Loss = "kd",
    options: RecoveryOptions = RecoveryOptions(),  # noqa: B008 (frozen)
    held_out: ExampleOptions | Blocks | None = None,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
    progress: Stages | None = None,
) -> RecoveryResult:
    """Train a part of a checkpoint and write the result, in the format it had.

    Trainer's checkpoints lie in ``OUT.training`` until the result is complete: the same call after a stop goes on from
    the last of them. What does not train is copied to the byte; what does is float32 meanwhile, and rounded to its
    dtype on disk at the end. In bfloat16 the student runs under autocast. Under torchrun each process calls this.

    Args:
        model: folder or hub name of the checkpoint to train, compressed or not.
        out: folder of the result; it appears when it is complete.
        examples: what to train on.
        teacher: folder or hub name of the original; loaded when the loss or a callback needs it.
        train: what trains: ``router``, ``standins``, ``experts`` and ``rest`` (both through adapters of low rank,
            merged at the end), or ``all``.
        loss: ``task``, ``kd`` or ``both``, see `Objective`.
        options: how to train.
        held_out: examples to measure the loss on, before and after.
        overwrite: replace an earlier result, at the end.
        device: ``cpu`` or ``cuda``; CUDA when there is one.
        dtype: ``float32`` or ``bfloat16``, of what does not train; the checkpoint's on CUDA, else float32.
        trust_remote_code: run code that comes with the checkpoints.
        callbacks: more of Trainer's callbacks; their ``model`` is the `Student`, which has the teacher.
        progress: called with (what is running, done, in all).

    Raises:
        CheckpointError: a model cannot be loaded.
        CalibrationError: the examples cannot be used.
        MoetailorError: nothing trains, the teacher is of another kind, ``OUT.training`` belongs to other settings or
            has lost a part, another run writes there, or the loss is not finite.
    """

    def part(name: str) -> Progress | None:
        return part_of(progress, name) if PartialState().is_main_process else None

    started, out = time.monotonic(), Path(out)
    train, callbacks = words_of(train), list(callbacks)
    words, objective = _check(train, loss, options, teacher, held_out)
    source = open_checkpoint(model)
    wanted = objective.needs_teacher or callbacks or options.anneal
    original = open_checkpoint(teacher) if teacher is not None and wanted else None
    config = load_config(source, trust_remote_code=trust_remote_code)
    if original is not None:
        check_teacher(config, load_config(original, trust_remote_code=trust_remote_code))
    arguments = training_arguments(training_folder(out), options, resolve_device(device))
    inputs = {"the model": source.folder, "the examples": [*files_of(examples), *files_of(held_out)]}
    inputs |= {} if original is None else {"the teacher": original.folder}
    with place_of(out, overwrite=overwrite, inputs=inputs) as work:
        # A part of what is shared out goes to each GPU; the whole may not fit on one.
        place = torch.device("cpu") if options.fsdp else arguments.device
        load = partial(_load, dtype=dtype, device=arguments.device, place=place, trust_remote_code=trust_remote_code)
        blocks, held = (_blocks(part, source, config, trust_remote_code) for part in (examples, held_out))
        assert blocks is not None
        settings = _settings(source, original, blocks, words, loss, options, dtype)
        check_training(training_folder(out), settings)
        provenance_of(source)  # refused before the training, not after it

        # The config says how it was compressed; what is looked for is the anatomy of the original.
        anatomy = discover(original_config(config), trust_remote_code=trust_remote_code)

        def begin(teacher: Any) -> tuple[Student, Selection, Adapters]:
            student = Student(load(source), objective, teacher)
            selection = select(student.model, anatomy, train)
            set_seed(options.seed)
            adapters = Adapters(student.model, anatomy, selection, rank=options.lora_rank, alpha=options.lora_alpha)
            return student, selection, adapters

        taught = None if original is None else load(original)
        student, selection, adapters = begin(taught if objective.needs_teacher or callbacks else None)
        if options.fsdp:
            check_shardable(student.model)
            shard(student.teacher)
        if options.gradient_checkpointing:
            _checkpoint_layers(student.model)
        annealing = _annealing(options, anatomy, student.model, taught)
        del taught  # what fades out is held by the annealing alone
        begin_training(training_folder(out), settings, work)
        measure = partial(_measure, student, held, options.batch_size, arguments.device)
        before = measure(part("held out, before"))
        state = train_student(student, blocks, arguments, callbacks=[*callbacks, *annealing], progress=part("train"))
        for mixtures in annealing:
            mixtures.release()
        after = measure(part("held out, after"))
        if PartialState().is_main_process:
            if options.fsdp:  # here is a part of each tensor; the last checkpoint has the whole of what trained
                student, selection, adapters = begin(None)
                train_student(student, blocks, arguments)
            adapters.merge()
            written: dict[str, Any] = {"settings": settings, "overwrite": overwrite, "progress": part("write")}
            write_recovered(out, source, student.model, selection.names, **written)
            end_training(training_folder(out))
        PartialState().wait_for_everyone()
    return _result(out, state, started, before, after)


def check_teacher(config: Any, teacher: Any) -> None:
    """Refuse a teacher whose words or layers are not those of the student.

    Args:
        config: transformers config of the student.
        teacher: that of the teacher.

    Raises:
        MoetailorError: see the message.
    """
    facts = {
        "model_type": "model type",
        "vocab_size": "words",
        "hidden_size": "width",
        "num_hidden_layers": "decoder layers",
    }
    for name, what in facts.items():
        has, needs = getattr(teacher, name, None), getattr(config, name, None)
        if has != needs:
            raise MoetailorError(f"the teacher's {what}: {has}, the model's: {needs}; give the original of the model")


def _check(
    train: Sequence[str], loss: str, options: RecoveryOptions, teacher: object, held_out: object
) -> tuple[tuple[str, ...], Objective]:
    """Refuse what needs no file to be read."""
    options.check()
    if loss not in get_args(Loss):
        raise MoetailorError(f"--loss {loss!r}" + did_you_mean(loss, get_args(Loss)))
    objective = Objective(loss=cast(Loss, loss), temperature=options.temperature, layer_weight=options.layer_weight)
    if objective.needs_teacher and teacher is None:
        raise MoetailorError(
            "the loss compares with a teacher; name the original with --teacher, or use --loss task alone"
        )
    if options.fsdp and held_out is not None:
        raise MoetailorError(
            "--fsdp leaves no process with the whole model to measure; run moetailor evaluate on the result"
        )
    if options.anneal and teacher is None:
        raise MoetailorError("--anneal fades the original's experts out; name the original with --teacher")
    return check_words(train), objective


def _annealing(options: RecoveryOptions, anatomy: Anatomy, model: nn.Module, original: Any) -> list[Annealing]:
    if not options.anneal:
        return []
    annealing = Annealing(anatomy, options.anneal, options.anneal_gamma)
    annealing.attach(model, original)
    return [annealing]


def _load(
    checkpoint: Checkpoint, *, dtype: str | None, device: torch.device, place: torch.device, trust_remote_code: bool
) -> Any:
    """Load a model in the dtype that suits the device it will run on, to where it is to lie first."""
    resolved = resolve_dtype(dtype, device.type, checkpoint)
    if resolved not in (torch.float32, torch.bfloat16):
        raise MoetailorError(f"training runs in float32 or bfloat16, not {resolved}; choose with --dtype")
    return load_model(checkpoint.folder, dtype=resolved, device=str(place), trust_remote_code=trust_remote_code)


def _blocks(
    examples: ExampleOptions | Blocks | None, source: Checkpoint, config: Any, trust_remote_code: bool
) -> Blocks | None:
    if not isinstance(examples, ExampleOptions):
        return examples
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    return read_blocks(examples, tokenizer, max_length=longest_sequence(config), words=config.vocab_size)


def _measure(
    student: Student, held: Blocks | None, batch_size: int, device: torch.device, progress: Progress | None
) -> dict[str, float]:
    return {} if held is None else mean_losses(student, held, batch_size, device, progress)


def _settings(
    source: Checkpoint,
    original: Checkpoint | None,
    blocks: Blocks,
    words: Sequence[str],
    loss: str,
    options: RecoveryOptions,
    dtype: str | None,
) -> dict[str, Any]:
    """Return everything that the trained weights depend on."""
    return {
        "version": __version__,
        "model": source.fingerprint(),
        "teacher": None if original is None else original.fingerprint(),
        "examples": blocks.fingerprint(),
        "train": list(words),
        "loss": loss,
        **asdict(options),
        "dtype": dtype,
        "processes": PartialState().num_processes,
    }


def _checkpoint_layers(model: Any) -> None:
    # Releases of transformers before 5.23 have it under another name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _result(
    out: Path, state: TrainerState, started: float, before: dict[str, float], after: dict[str, float]
) -> RecoveryResult:
    return RecoveryResult(
        out=out,
        steps=state.global_step,
        tokens=state.num_input_tokens_seen,
        seconds=time.monotonic() - started,
        losses=tuple(entry["loss"] for entry in state.log_history if "loss" in entry),
        before=before,
        after=after,
    )
