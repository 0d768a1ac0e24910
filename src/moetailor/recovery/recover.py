"""The recover stage: a compressed checkpoint and examples in, the same checkpoint with trained tensors out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
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
from moetailor.checkpoint.anatomy import Anatomy
from moetailor.checkpoint.devices import resolve_device
from moetailor.checkpoint.files import Checkpoint
from moetailor.checkpoint.models import longest_sequence, resolve_dtype
from moetailor.checkpoint.original import Original
from moetailor.errors import MoetailorError, did_you_mean
from moetailor.progress import Progress, Stages
from moetailor.progress import part as part_of
from moetailor.recovery.anneal import Annealing
from moetailor.recovery.examples import Blocks, ExampleOptions, files_of, read_blocks
from moetailor.recovery.folder import begin_training, check_training, end_training, place_of, training_folder
from moetailor.recovery.fsdp import check_shardable, shard
from moetailor.recovery.loss import Loss, Objective, Student
from moetailor.recovery.result import check_writable, provenance_of, write_recovered
from moetailor.recovery.train import RecoveryOptions, mean_losses, training_arguments
from moetailor.recovery.train import train as train_student
from moetailor.recovery.trainable import Adapters, Selection, check_words, select
from moetailor.transform.origin import check_origin, unlike


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
    source = Original(model, takes="results", trust_remote_code=trust_remote_code)
    _refuse_codes(source)
    wanted = objective.needs_teacher or callbacks or options.anneal
    original = None
    if teacher is not None and wanted:
        original = Original(teacher, takes="anything", trust_remote_code=trust_remote_code)
    if original is not None:
        check_teacher(source.config, original.config)
        check_origin(source.checkpoint, original.checkpoint)
    arguments = training_arguments(training_folder(out), options, resolve_device(device))
    inputs = {"the model": source.folder, "the examples": [*files_of(examples), *files_of(held_out)]}
    inputs |= {} if original is None else {"the teacher": original.folder}
    with place_of(out, overwrite=overwrite, inputs=inputs) as work:
        blocks, held_out_blocks = (_blocks(part, source) for part in (examples, held_out))
        assert blocks is not None
        settings = _settings(source.checkpoint, original and original.checkpoint, blocks, words, loss, options, dtype)
        check_training(training_folder(out), settings)
        provenance_of(source.checkpoint)  # refused before the training, not after it

        # A part of what is shared out goes to each GPU; the whole may not fit on one.
        place = torch.device("cpu") if options.fsdp else arguments.device
        load = partial(_load, dtype=dtype, device=arguments.device, place=place)
        begin = partial(_begin, source, load, train, objective, options)
        taught = None if original is None else load(original)
        student, selection, adapters = begin(taught if objective.needs_teacher or callbacks else None)
        _prepare(student, options)
        annealing = _annealing(options, source.anatomy, student.model, taught)
        del taught  # what fades out is held by the annealing alone
        begin_training(training_folder(out), settings, work)
        measure = partial(_measure, student, held_out_blocks, options.batch_size, arguments.device)
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
            how: dict[str, Any] = {"settings": settings, "overwrite": overwrite, "trust_remote_code": trust_remote_code}
            write_recovered(out, source.checkpoint, student.model, selection.names, progress=part("write"), **how)
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
    if why := unlike(config, teacher):
        raise MoetailorError(f"the teacher's {why}; give the original of the model")


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


def _begin(
    source: Original,
    load: Callable[[Original], Any],
    train: Sequence[str],
    objective: Objective,
    options: RecoveryOptions,
    teacher: Any,
) -> tuple[Student, Selection, Adapters]:
    """Load the student as it is before the training, and say what of it trains."""
    student = Student(load(source), objective, teacher)
    selection = select(student.model, source.anatomy, train)
    check_writable(source.checkpoint, student.model, selection.names)
    set_seed(options.seed)
    adapters = Adapters(student.model, source.anatomy, selection, rank=options.lora_rank, alpha=options.lora_alpha)
    return student, selection, adapters


def _prepare(student: Student, options: RecoveryOptions) -> None:
    """Arrange how a student runs."""
    if options.fsdp:
        check_shardable(student.model)
        shard(student.teacher)
    if options.gradient_checkpointing:
        # Releases of transformers before 5.23 have it under another name.
        model: Any = student.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _annealing(options: RecoveryOptions, anatomy: Anatomy, model: nn.Module, original: Any) -> list[Annealing]:
    if not options.anneal:
        return []
    annealing = Annealing(anatomy, options.anneal, options.anneal_gamma)
    annealing.attach(model, original)
    return [annealing]


def _load(source: Original, *, dtype: str | None, device: torch.device, place: torch.device) -> Any:
    """Load a model in the dtype that suits the device it will run on, to where it is to lie first."""
    resolved = resolve_dtype(dtype, device.type, source.checkpoint)
    if resolved not in (torch.float32, torch.bfloat16):
        raise MoetailorError(f"training runs in float32 or bfloat16, not {resolved}; choose with --dtype")
    return source.load(dtype=resolved, device=str(place))


def _blocks(examples: ExampleOptions | Blocks | None, source: Original) -> Blocks | None:
    if not isinstance(examples, ExampleOptions):
        return examples
    limit, vocab_size = longest_sequence(source.config), source.config.vocab_size
    return read_blocks(examples, source.tokenizer(), max_length=limit, vocab_size=vocab_size)


def _measure(
    student: Student, held_out: Blocks | None, batch_size: int, device: torch.device, progress: Progress | None
) -> dict[str, float]:
    return {} if held_out is None else mean_losses(student, held_out, batch_size, device, progress)


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


def _refuse_codes(source: Original) -> None:
    """Refuse weights that are no numbers which an optimizer can move."""
    if coded := next(iter(source.checkpoint.coded.values()), None):
        raise MoetailorError(
            f"{source.source}: weights lie as codes ({coded.lies}), and only numbers are trained; recover a result of "
            "the bf16 or fp32 original"
        )


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
