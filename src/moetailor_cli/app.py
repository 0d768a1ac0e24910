"""The command line: its verbs, and what becomes of errors and warnings."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import typer

from moetailor_cli import output
from moetailor_cli.apply import apply, compress
from moetailor_cli.compare import compare
from moetailor_cli.fit import fit
from moetailor_cli.lm_eval import lm_eval
from moetailor_cli.measure import calibrate, evaluate, inspect
from moetailor_cli.methods import methods
from moetailor_cli.plan import allocate, diff, plan, show
from moetailor_cli.recover import recover
from moetailor_cli.report import report
from moetailor_cli.serve import serve
from moetailor_cli.verb import Root, Verb, whole

app = typer.Typer(
    name="moetailor",
    cls=Root,
    help="Make Mixture-of-Experts language models fit: one calibration, any method, any budget.",
    epilog="Start with: moetailor fit MODEL --memory 24GB",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# Their exit codes; typer makes that of Ctrl-C.
STOPPED = tuple(128 + number for number in SIGNALS)
VERBS = (fit, inspect, calibrate, methods, plan, allocate, show, diff)
VERBS += (apply, compress, evaluate, compare, report, recover, serve, lm_eval)


for verb in VERBS:
    app.command(cls=Verb)(whole(verb))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"moetailor {installed('moetailor')}")
        raise typer.Exit


class Messages(logging.Handler):
    """Prints what moetailor notes while it works."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one note."""
        if output.speaks():
            output.say(record.getMessage())


def main() -> None:
    """Run the command line; a refused input is one message and exit code 1."""
    # Else the collector goes through what torch and transformers have loaded when Python ends: 1.5 seconds a command.
    atexit.register(gc.freeze)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logger = logging.getLogger("moetailor")
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [Messages()], False
    warnings.showwarning = partial(_show_warning, set())
    try:
        with _stoppable():
            app(prog_name="moetailor")
    except SystemExit as stop:
        if stop.code in STOPPED:
            output.complain("stopped; nothing half-written stays, and the same command can be given again")
        raise
    except OSError as error:
        output.complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(1)
    except Exception as error:
        # Only an error that moetailor raised on purpose is a user's, or memory that ran out; its module is loaded then.
        errors = sys.modules.get("moetailor.errors")
        if errors is not None and (told := errors.out_of_memory(error)):
            output.complain(f"{told}; give less with --batch-size, --batch-memory or --stream, or another --device")
            sys.exit(1)
        if errors is None or not isinstance(error, errors.MoetailorError):
            raise
        output.complain(str(error))
        sys.exit(1)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let the signals that end a process end it as an exception does, so that what it wrote aside is deleted."""

    def stop(number: int, frame: object) -> None:
        for other in taken:
            signal.signal(other, signal.SIG_IGN)  # once is enough: what is deleted now must not be left halfway
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def swallowed(raised: Any) -> None:
        # Python drops what is raised while a destructor runs, so the signal is sent again a moment later.
        error = raised.exc_value
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "code", None)
        if code not in STOPPED:
            hook(raised)
            return
        for other in taken:
            signal.signal(other, stop)
        threading.Timer(0.05, os.kill, (os.getpid(), SIGNALS[STOPPED.index(code)])).start()

    # Those that are ignored stay so: nohup wants that.
    before, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook
    taken = [n for n, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    for number in taken:
        signal.signal(number, stop)
    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number in taken:
            signal.signal(number, before[number])


def _show_warning(said: set[str], message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    """Print what moetailor says to its user, once, and of what libraries say to theirs nothing but with --verbose."""
    if category.__name__ == "MoetailorWarning":
        if str(message) not in said:
            output.warn(str(message))
        said.add(str(message))
    elif logging.getLogger("moetailor").level == logging.DEBUG:  # --verbose
        logging.getLogger(category.__name__).warning(str(message))
