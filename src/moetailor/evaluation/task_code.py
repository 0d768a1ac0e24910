"""Code that lm-eval tasks bring along: found before any of it runs, and templates that reach nothing but their rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from moetailor.errors import MoetailorError


def refuse_code(name: str, entry: Any) -> None:
    """Refuse a task that runs code of others when it is loaded.

    Args:
        name: the task.
        entry: what lm-eval's index of tasks, which runs none, knows of it.

    Raises:
        MoetailorError: it names Python functions, or metrics that lm-eval would look up as scripts.
    """
    from lm_eval.api import metrics
    from lm_eval.api.registry import metric_registry

    assert metrics  # its import fills the registry
    found = [f"!function {function}" for function in _functions(entry.yaml_path, set())]
    for metric in entry.cfg.get("metric_list") or ():
        if metric.get("hf_evaluate") or str(metric.get("metric")) not in metric_registry:
            found.append(f"metric {metric.get('metric')}")
    if found:
        raise MoetailorError(
            f"task {name!r} ({entry.yaml_path}) would run code: {', '.join(found)}; pass --trust-remote-code if you "
            "trust it"
        )


@contextmanager
def sandboxed() -> Iterator[None]:
    """Let templates of tasks reach nothing but the rows that they are given, while the context lasts."""
    from lm_eval import utils

    before = utils.env
    utils.env = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    utils.env.filters.update(before.filters)
    try:
        yield
    finally:
        utils.env = before


def _functions(file: Path, seen: set[Path]) -> Iterator[str]:
    """Yield the Python functions that a YAML file names, and those of the files that it includes."""
    if (file := Path(os.path.realpath(file))) in seen or not file.is_file():
        return
    seen.add(file)
    for node, key in _nodes(yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader), None, set()):
        if node.tag == "!function":
            yield str(node.value)
        elif key == "include" and isinstance(node, yaml.ScalarNode):
            yield from _functions(file.parent / node.value, seen)


def _nodes(node: Any, key: str | None, seen: set[int]) -> Iterator[tuple[Any, str | None]]:
    """Yield a node of YAML, all that is inside it, and the key of each."""
    if node is None or id(node) in seen:  # an alias may lead back
        return
    seen.add(id(node))
    yield node, key
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _nodes(name, None, seen)
            yield from _nodes(value, str(name.value), seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _nodes(value, key, seen)
