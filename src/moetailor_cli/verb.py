"""What all verbs have in common: how help is shown, how much is said, recipes, revisions, uploads, what comes next."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo

from moetailor_cli import log, output
from moetailor_cli.options import EVERY, PANELS, Push, Revision
from moetailor_cli.recipe import Recipe, keep, made
from moetailor_cli.steps import following

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.", rich_help_panel=EVERY)]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Also print what transformers and other libraries say.", rich_help_panel=EVERY
    ),
]

# Libraries by their loggers, with the settings that they read when they are loaded.
LIBRARIES = {
    "transformers": "TRANSFORMERS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "datasets": "DATASETS_VERBOSITY",
}
# What stands beside a flag for its value, in few letters: what a wide column takes, help lacks. A flag that takes none
# has nothing there, and choices are named.
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}


# The model that a verb may take from the hub, of which a revision may be asked for.
HUB: dict[str, str] = dict.fromkeys(("fit", "inspect", "calibrate", "apply", "compress", "compare"), "model")
HUB |= {"evaluate": "against", "recover": "teacher"}

# The verbs whose result may go there.
PUSHING = ("fit", "apply", "compress")


def whole(verb: Callable[..., bool | None]) -> Callable[..., None]:
    """Return a verb with the options that every verb has; it ends with what comes next.

    Args:
        verb: the verb; where it returns False, it has said itself what comes next.
    """

    @functools.wraps(verb)
    def run(*, recipe: Path | None, quiet: bool, verbose: bool, **given: Any) -> None:
        if quiet and verbose:
            raise typer.BadParameter("--quiet and --verbose: give one of them")
        output.set_quiet(quiet)
        log.begin()
        if verbose:
            _let_libraries_speak()
        if revision := given.pop("revision", None):
            given[HUB[verb.__name__]] = _at(given[HUB[verb.__name__]], revision)
        if (pushed := given.pop("push_to_hub", None)) and not given["dry_run"]:
            _check_pushed(pushed, given["out"])
        told = verb(**given) is False
        if not output.speaks():
            return
        keep(verb.__name__, given)
        artifact = made(verb.__name__, given)
        if pushed and artifact:
            _push(given["out"], pushed)
        elif pushed and not given["dry_run"]:
            there = f"; `hf upload {pushed} {given['out']}` uploads what is there" if given["out"].exists() else ""
            output.warn(f"nothing was made, and nothing uploaded{there}")
        if not told and (artifact or not quiet) and (line := following(verb.__name__, given)):
            output.say(line, copied=True)
        if artifact:
            _log(artifact)

    added: dict[str, tuple[Any, Any]] = {"recipe": (Recipe, None), "quiet": (Quiet, False), "verbose": (Verbose, False)}
    added |= {"revision": (Revision, None)} if verb.__name__ in HUB else {}
    added |= {"push_to_hub": (Push, None)} if verb.__name__ in PUSHING else {}
    hints = get_type_hints(verb, include_extras=True) | {name: hint for name, (hint, _) in added.items()}
    for hint in hints.values():
        _name_value(hint)
    signature = inspect.signature(verb)
    own = [part.replace(annotation=hints[name]) for name, part in signature.parameters.items()]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own += [inspect.Parameter(name, kind, default=value, annotation=hint) for name, (hint, value) in added.items()]
    run.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return run


def _name_value(hint: Any) -> None:
    """Say what the value of an option is called, where it does not say so itself."""
    kind, *told = get_args(hint) or [hint]
    for option in told:
        if isinstance(option, OptionInfo) and option.metavar is None:
            while get_args(kind):  # list[str] | None
                kind = get_args(kind)[0]
            option.metavar = METAVARS.get(kind)


def _at(model: str | None, revision: str) -> str:
    """Return the name of a model on the hub with its revision."""
    if model is None or Path(model).exists() or "@" in model:
        told = "names no model on the hub" if "@" not in (model or "") else "names its revision already"
        raise typer.BadParameter(f"--revision {revision}: {model or 'nothing'} {told}; leave it out")
    return f"{model}@{revision}"


def _check_pushed(name: str, out: Path | None) -> None:
    """Refuse what could not be uploaded once it is made."""
    if out is None:
        raise typer.BadParameter(f"--push-to-hub {name}: nothing is made without --out")
    if output.speaks():
        from moetailor.checkpoint.hub import check_upload

        check_upload(name)


def _push(folder: Path, name: str) -> None:
    """Upload a result."""
    from moetailor.checkpoint.hub import upload

    output.say(f"uploaded to {upload(folder, name)}")


def _log(artifact: Path) -> None:
    """Keep the log; what was made is complete without it, as where only its own folder can be written to."""
    from moetailor.errors import UnwritableError

    try:
        log.keep(artifact)
    except UnwritableError as error:
        output.warn(f"no log was kept: {error}")


def _let_libraries_speak() -> None:
    """Have libraries say what they do, those that are loaded later, too."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("moetailor").setLevel(logging.DEBUG)
    for name, setting in LIBRARIES.items():
        os.environ.setdefault(setting, "info")
        logging.getLogger(name).setLevel(logging.INFO)


class Verb(TyperCommand):
    """A verb whose help is shown as it is written: brackets are brackets, but for our own [dim]."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for part in (self, *self.params):
            part.help = _escaped(getattr(part, "help", None))  # type: ignore[union-attr]

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments and options, these group by group."""
        found: list[Any] = super().get_params(ctx)
        for part in found:
            if part.param_type_name == "option" and part.rich_help_panel is None:
                part.rich_help_panel, part.metavar = EVERY, ""  # --help
        return sorted(found, key=lambda part: PANELS.index(part.rich_help_panel) if part.rich_help_panel else -1)


class Root(TyperGroup):
    """The command of which the verbs are parts."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return its options, which take no value."""
        found = super().get_params(ctx)
        for part in found:
            part.metavar = ""
        return found


def _escaped(text: str | None) -> str | None:
    """Return help with every bracket escaped that is no [dim]."""
    parts = re.split(r"(\[/?dim\])", text or "")
    return text and "".join(part if number % 2 else escape(part) for number, part in enumerate(parts))
