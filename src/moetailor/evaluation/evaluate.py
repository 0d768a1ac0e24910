"""The evaluate stage: a compressed model and its original in, scores out."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moetailor.calibration.text import TextOptions, read_batches, words_of
from moetailor.checkpoint.devices import resolve_device
from moetailor.checkpoint.loader import StreamedModel
from moetailor.checkpoint.lock import scratch as scratch_folder
from moetailor.checkpoint.models import longest_sequence, resolve_dtype
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.place import check_apart
from moetailor.errors import MoetailorError
from moetailor.evaluation.fidelity import Fidelity, Reference
from moetailor.evaluation.speed import Speed, measure_speed, resident_nbytes
from moetailor.evaluation.tasks import check_tasks, run_tasks
from moetailor.progress import Stages, part
from moetailor.runtime.parts import in_parts
from moetailor.transform.origin import check_origin, unlike


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness to run on both models.

    Attributes:
        tasks: names of the YAML files, without ending.
        task_dir: where they lie.
        task_data: folder of the files they read.
        limit: rows of each task; all when None.
    """

    tasks: tuple[str, ...] = ()
    task_dir: Path = Path("examples/tasks")
    task_data: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", words_of(self.tasks))

    @property
    def folders(self) -> dict[str, Any]:
        """Where tasks and their files lie, as `run_tasks` takes it."""
        return {"task_dir": self.task_dir, "task_data": self.task_data}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What `evaluate` measured.

    Attributes:
        overall: on all tokens.
        domains: on the tokens of each domain.
        nbytes: bytes of all tensors on disk: original, compressed.
        resident: bytes of weights in memory, in the dtype of the run: original, compressed; None where they were
            streamed.
        speed: original, compressed; None where they were streamed.
        tasks: task -> metric -> (original, compressed).
    """

    overall: Fidelity
    domains: dict[str, Fidelity]
    nbytes: tuple[int, int]
    resident: tuple[int, int] | None
    speed: tuple[Speed, Speed] | None
    tasks: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Return the scores as they stand in scores.json."""
        pair, loaded = ("original", "compressed"), {}
        if self.resident is not None and self.speed is not None:
            loaded["resident_bytes"] = dict(zip(pair, self.resident, strict=True))
            loaded["tokens_per_second"] = dict(zip(pair, [asdict(each) for each in self.speed], strict=True))
        return {
            "format": "moetailor-scores",
            "version": 1,
            **self.overall.to_json(),
            "bytes": dict(zip(pair, self.nbytes, strict=True)),
            **loaded,
            "domains": {name: fidelity.to_json() for name, fidelity in self.domains.items()},
            "tasks": {
                task: {metric: dict(zip(pair, values, strict=True)) for metric, values in metrics.items()}
                for task, metrics in self.tasks.items()
            },
        }


def evaluate(
    model: str | Path,
    against: str | Path,
    *,
    text: TextOptions,
    tasks: TaskOptions | None = None,
    stream: bool = False,
    scratch: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    progress: Stages | None = None,
) -> Scores:
    """Compare a compressed checkpoint with its original, one model in memory at a time, or one layer.

    Args:
        model: folder of the compressed checkpoint.
        against: folder or hub name of the original.
        text: held-out text; its documents may name a ``domain``.
        tasks: tasks to run on both.
        stream: hold one decoder layer in memory at a time; speeds are not measured then.
        scratch: folder for the original's hidden states while they are needed; the system's for temporary files when
            None.
        device: where the models run; CUDA when there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the checkpoint's on CUDA, else float32.
        device_map: as transformers takes it.
        trust_remote_code: run code that comes with the checkpoints or with tasks.
        progress: called with (what is running, batches done, batches in all).

    Raises:
        CheckpointError: a model cannot be loaded.
        CalibrationError: the text cannot be used.
        MoetailorError: no room for the original's hidden states, or a prediction is not finite.
    """
    check_streamed(stream, device_map=device_map, tasks=tasks and tasks.tasks)
    original, compressed = (
        Original(source, takes="anything", trust_remote_code=trust_remote_code) for source in (against, model)
    )
    if original.written_here:
        raise MoetailorError(f"{against}: was written by moetailor; --against takes the original")
    check_predicts(text)
    if tasks is not None and tasks.tasks:
        check_tasks(tasks.tasks, trust_remote_code=trust_remote_code, **tasks.folders)
    config = original.config
    check_apart(scratch, (original.folder, compressed.folder))
    if why := unlike(compressed.config, config):
        raise MoetailorError(f"{against} cannot be the original of {model}: its {why}")
    check_origin(compressed.checkpoint, original.checkpoint)
    tokenizer = original.tokenizer()
    batches = read_batches(text, tokenizer, max_length=longest_sequence(config), vocab_size=config.vocab_size)
    device = resolve_device(device)
    run = {"dtype": resolve_dtype(dtype, device, original.checkpoint), "device": device}
    prompt, measured = batches[0].input_ids[:1], []

    def opened(source: Original) -> nn.Module | StreamedModel:
        return in_parts(source, **run) if stream else source.load(**run, device_map=device_map)

    def measure(model: nn.Module | StreamedModel) -> None:
        if isinstance(model, nn.Module):
            measured.append(_measure(model, prompt, tokenizer, tasks, trust_remote_code))

    with scratch_folder(scratch) as folder:
        first = opened(original)
        reference = Reference(folder, batches).record(first, part(progress, "original"))
        measure(first)
        del first
        gc.collect()
        second = opened(compressed)
        # The original's head is applied again beside the compressed model.
        fidelity = reference.compare(second, in_parts(original, **run), part(progress, "compressed"))
        measure(second)
    resident, speed, scores = zip(*measured, strict=True) if measured else (None, None, ({}, {}))
    return Scores(
        overall=fidelity.pop(""),
        domains=fidelity,
        nbytes=(original.checkpoint.nbytes, compressed.checkpoint.nbytes),
        resident=resident,
        speed=speed,
        tasks={
            task: {metric: (value, scores[1][task][metric]) for metric, value in metrics.items()}
            for task, metrics in scores[0].items()
        },
    )


def _measure(
    model: nn.Module, prompt: torch.Tensor, tokenizer: object, tasks: TaskOptions | None, trust_remote_code: bool
) -> tuple[int, Speed, dict[str, dict[str, float]]]:
    speed = measure_speed(model, prompt)
    scores = {}
    if tasks is not None and tasks.tasks:
        scores = run_tasks(
            model, tokenizer, tasks.tasks, limit=tasks.limit, trust_remote_code=trust_remote_code, **tasks.folders
        )
    return resident_nbytes(model), speed, scores


def check_streamed(stream: bool, *, device_map: str | None, tasks: Sequence[str] | None) -> None:
    """Refuse what no model can do of which one part is in memory at a time.

    Raises:
        MoetailorError: see the message.
    """
    if stream and (given := "device-map" if device_map else "tasks" if tasks else ""):
        raise MoetailorError(f"--stream --{given}: needs the whole model in memory; give one of them")


def check_predicts(text: TextOptions) -> None:
    """Refuse blocks in which no token follows another.

    Raises:
        MoetailorError: see the message.
    """
    if text.length is not None and text.length < 2:
        raise MoetailorError(f"--length {text.length} predicts nothing; use at least 2")
