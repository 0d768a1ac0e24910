"""Scores on lm-evaluation-harness tasks that read local files.

A task is an ordinary lm-eval YAML file whose `dataset_kwargs.data_files` are names without a folder. The folder comes
at run time: each requested task is rendered into a scratch folder as `include: <the YAML>` plus absolute paths, and
lm-eval sees that folder only.
"""

import io
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from moetailor.checkpoint.artifact import write_text
from moetailor.checkpoint.lock import scratch
from moetailor.errors import MoetailorError, did_you_mean
from moetailor.evaluation.task_code import refuse_code, sandboxed

_BUILDERS = ("json", "csv", "parquet", "text")  # values of `dataset_path` that need no hub


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_dir: Path,
    task_data: Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, float]]:
    """Score a model on lm-eval tasks, offline and silently; inputs longer than its window are cut on the left.

    Args:
        model: a transformers causal language model on its device; it is left in eval mode.
        tokenizer: its tokenizer; one without a pad token is given one.
        tasks: names of tasks; repeats count once.
        task_dir: folder with the YAML files of the tasks.
        task_data: folder of the data files, plain or .xz whichever the task names; None is `task_dir`.
        batch_size: sequences in one forward pass.
        limit: documents of each task, the first of its file; None is all.
        seed: of the draw of few-shot examples, for tasks that have them.
        trust_remote_code: run code that tasks name: functions of Python files, metrics that are scripts, and templates
            outside the sandbox.

    Returns:
        For each task its metrics and `n`, the number of documents. `acc` and `acc_norm` are fractions in [0, 1] with
        standard errors `acc_stderr` and `acc_norm_stderr` (if n > 1); `perplexity` is per continuation, not per token.

    Raises:
        MoetailorError: lm-eval or a data file is missing, a task is unknown, not local or would run code, or rows do
            not fit it.
    """
    safe = nullcontext() if trust_remote_code else sandboxed()
    with _quiet(), _lm_eval() as (evaluate, HFLM, TaskManager), safe, scratch() as folder:
        rendered = _rendered(TaskManager, tasks, task_dir, task_data, trust_remote_code)
        for name, task in rendered.items():
            task["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
            write_text(folder / f"{name}.yaml", json.dumps(task))  # JSON is YAML
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        loaded = {}
        for name in rendered:
            try:
                loaded[name] = manager.load([name])["tasks"][name]
            except Exception as error:  # whatever rows, templates and YAML make lm-eval and datasets raise
                cause = error.__cause__ or error
                raise MoetailorError(f"task {name!r} does not fit its data: {type(cause).__name__}: {cause}") from error
            loaded[name].set_fewshot_seed(seed)
        # evaluate, not simple_evaluate: that one runs git and pip (2 s) and reseeds the global generators.
        # bootstrap_iters=0: else lm-eval forks a pool of processes for the error of a perplexity.
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # pyright: ignore[reportCallIssue]
        try:
            results: Any = evaluate(lm, {"tasks": loaded}, limit=limit, bootstrap_iters=0, log_samples=False)
        except TemplateError as error:
            raise MoetailorError(f"a task does not fit its data: {type(error).__name__}: {error}") from error
    return {name: _scores(results["results"][name]) for name in rendered}


def check_tasks(
    tasks: Sequence[str], *, task_dir: Path, task_data: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Refuse what `run_tasks` would refuse without looking at rows; see there."""
    with _quiet(), _lm_eval() as (_, _, TaskManager):
        _rendered(TaskManager, tasks, task_dir, task_data, trust_remote_code)


def _rendered(
    TaskManager: Any, tasks: Sequence[str], task_dir: Path, task_data: Path | None, trust_remote_code: bool
) -> dict[str, dict[str, Any]]:
    """Return each task as what its YAML file says, with absolute data paths."""
    index, rendered = TaskManager(include_path=str(task_dir), include_defaults=False), {}
    for name in dict.fromkeys(tasks):
        if name not in index.all_subtasks:
            known = did_you_mean(name, index.all_subtasks) if index.all_subtasks else ": it has none; see --task-dir"
            raise MoetailorError(f"unknown task {name!r} in {task_dir}{known}")
        entry = index.task_index[name]
        if not trust_remote_code:
            refuse_code(name, entry)
        options = dict(entry.cfg.get("dataset_kwargs") or {})
        if "data_files" not in options or entry.cfg.get("dataset_path") not in _BUILDERS:
            cure = f"give it dataset_kwargs.data_files and a dataset_path of {', '.join(_BUILDERS)}"
            raise MoetailorError(f"task {name!r} ({entry.yaml_path}) does not read local files: {cure}")
        options["data_files"] = _locate(options["data_files"], name, Path(task_data or task_dir))
        rendered[name] = {"include": os.path.realpath(entry.yaml_path), "task": name, "dataset_kwargs": options}
    return rendered


def _locate(files: Any, name: str, folder: Path) -> Any:
    """Replace each file name in a str, list or mapping of them by its absolute path."""
    if isinstance(files, Mapping):
        return {split: _locate(value, name, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_locate(value, name, folder) for value in files]
    path = Path(os.path.realpath(folder / files))
    for candidate in (path, path.with_suffix("") if path.suffix == ".xz" else path.with_name(f"{path.name}.xz")):
        if candidate.is_file():
            return str(candidate)
    raise MoetailorError(f"task {name!r} reads {files}, not found in {folder}: name its folder with --task-data")


def _scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Turn lm-eval's `{"acc,none": .., "sample_len": n, ..}` into `{"acc": .., "acc_stderr": .., "n": n}`."""
    n = metrics["sample_len"]
    scores = {key.removesuffix(",none"): value for key, value in metrics.items() if "," in key and value != "N/A"}
    for name in ("acc", "acc_norm"):
        if name in scores and n > 1:
            # sqrt(var / n), where the sample variance of 0/1 outcomes with mean p is var = n p (1 - p) / (n - 1)
            scores[f"{name}_stderr"] = math.sqrt(scores[name] * (1 - scores[name]) / (n - 1))
    return {**scores, "n": n}


@contextmanager
def _lm_eval() -> Iterator[tuple[Any, Any, Any]]:
    """Give what is used of lm-eval.

    Raises:
        MoetailorError: it is not installed.
    """
    try:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MoetailorError(f"tasks need lm-eval ({error}): pip install moetailor[tasks]") from error
    yield evaluate, HFLM, TaskManager


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what lm-eval, datasets and transformers log or draw on stderr; exceptions still pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
