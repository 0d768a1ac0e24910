"""Settings as a file: what a recipe says is taken where the command line says nothing, and artifacts keep what was."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moetailor_cli import output
from moetailor_cli.options import EVERY

# Where the artifact of a verb says what it was made with: in the file of --out or --json, or in this one in its folder.
ARTIFACTS = {
    "calibrate": "calibration.json",
    "plan": "",
    "allocate": "",
    "apply": "moetailor_provenance.json",
    "compress": "moetailor_provenance.json",
    "fit": "moetailor_provenance.json",
    "evaluate": "",
    "recover": "moetailor_provenance.json",
    "compare": "results.json",
}
# Not what an artifact is: where it lies, and how much was said on the way.
ELSEWHERE = ("out", "json", "overwrite", "yes", "dry_run")


def _read(context: typer.Context, file: Path | None) -> Path | None:
    """Take what a file says as the defaults of a verb."""
    if file is not None and not context.resilient_parsing:
        context.default_map = _defaults(file, _flags(context.command.params))
    return file


Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE.yaml",
        help="Settings, a line for each: names of flags without dashes, or of arguments. The command line wins.",
        callback=_read,
        is_eager=True,
        rich_help_panel=EVERY,
    ),
]


def _flags(parameters: list[Any]) -> dict[str, Any]:
    """Return options by their long names without dashes, arguments by their names."""
    found = {}
    for part in parameters:
        long = [name.removeprefix("--") for name in part.opts if name.startswith("--")]
        found[long[0] if long else part.name] = part
    return {name: part for name, part in found.items() if name not in ("recipe", "help")}


def _defaults(file: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe says, by the names of parameters."""
    import yaml

    class Loader(yaml.SafeLoader):
        """What looks like a number is a word as it is written: 3:17 is no number of base 60. Readers differ on which of
        two equal keys counts.
        """

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for number, key in enumerate(keys) if key in keys[:number]]:
                raise ValueError(f"{twice[0]!r} is said twice")
            return super().construct_mapping(node, deep)

    numbers = [f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")]
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag not in numbers]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        content = yaml.load(file.read_bytes(), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"--recipe {file}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise typer.BadParameter(f"--recipe {file}: holds no settings; write lines such as `remove: 25%`")
    found = {}
    for key, value in content.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else "."
            raise typer.BadParameter(f"--recipe {file}: {key!r} is no setting{meant} Known: {', '.join(sorted(known))}")
        if value is not None:
            found[known[key].name] = _value(f"--recipe {file}: {key}", known[key], value)
    return found


def _value(where: str, part: Any, value: Any) -> Any:
    """Return a value as the command line would give it."""
    if isinstance(value, dict) and part.name == "param":
        value = [f"{name}={_word(where, given)}" for name, given in value.items()]
    if getattr(part, "multiple", False):
        return [_word(where, given) for given in (value if isinstance(value, list) else [value])]
    if getattr(part, "is_flag", False):
        if not isinstance(value, bool):
            raise typer.BadParameter(f"{where}: {value!r} is neither true nor false")
        return value
    return _word(where, value)


def _word(where: str, value: Any) -> str:
    if isinstance(value, (dict, list)) or value is None:
        raise typer.BadParameter(f"{where}: {value!r} is not one value")
    return str(value).lower() if isinstance(value, bool) else str(value)


def made(verb: str, given: Mapping[str, Any]) -> Path | None:
    """Return the file or folder that a run made; None where it made none that can say what it is.

    Args:
        verb: the verb.
        given: its arguments and options by name.
    """
    place = given["json" if verb == "evaluate" else "out"] if verb in ARTIFACTS else None
    if place is None or given.get("dry_run"):
        return None
    file = place / ARTIFACTS[verb]
    return place if file.is_file() and file.stat().st_mtime >= output.SINCE - 1 else None  # else it was there before


def keep(verb: str, given: Mapping[str, Any]) -> None:
    """Write the settings of a run into what it made, in the words of a recipe; see `made`."""
    if (place := made(verb, given)) is not None:
        from moetailor.checkpoint.artifact import add_settings

        said = {name.replace("_", "-"): value for name, value in given.items() if name not in ELSEWHERE}
        kept = {name: _plain(value) for name, value in said.items() if value not in (None, False, [])}
        add_settings(place / ARTIFACTS[verb], kept)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
