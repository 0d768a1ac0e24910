"""The rules of the house, read off the source: what CONTRIBUTING.md asks of every change holds of every file."""

import ast
import random
import re
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from typer.main import get_command

from moetailor.answers import ANSWERS
from moetailor_cli.app import app
from support.families import FAMILIES, REFUSED
from support.source import ROOT, Source, body_lines, sources

ORDER = (
    "_version",
    "errors",
    "progress",
    "schema",
    "words",
    "checkpoint",
    "ranks",
    "calibration",
    "answers",
    "planning",
    "fitting",
    "methods",
    "inspection",
    "runtime",
    "transform",
    "recovery",
    "evaluation",
    "report",
    "comparison",
    "summary",
    "pipeline",
    "estimates",
    "serving",
    "fit",
)
"""What lies in src/moetailor, down the flow: each imports only from those before it."""

PLACING = {"checkpoint", "calibration", "runtime", "evaluation", "recovery"}
"""Packages that run models, and so may ask which device there is."""

LONGEST, LONGEST_BODY = 300, 60

# What breaks a rule for now, with the reason. An entry that nothing needs any more fails, too.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


NAMING_KINDS = {
    "src/moetailor/planning/layer_plan.py",
    "src/moetailor/recovery/anneal.py",
    "src/moetailor/report/figures.py",
    "src/moetailor/transform/formats/narrow.py",
    "src/moetailor/transform/formats/vllm_mone.py",
}


def library() -> list[Source]:
    """Return the files of src/moetailor but its front door, which imports what is public of all packages."""
    return [source for source in sources("src/moetailor") if source.name != "src/moetailor/__init__.py"]


def test_everything_has_a_place_in_the_order() -> None:
    assert set(ORDER) == {source.package for source in library()}


def test_every_file_is_in_the_layout_that_the_design_draws() -> None:
    """But for what has one file for each of its kind, and a large verb of the command line."""
    drawn = (ROOT / "docs" / "design.md").read_text().split("## Layout")[1].split("## Decisions")[0]
    kinds = ("answers", "methods", "storage", "formats", "engines")
    files = [Path(source.name) for source in sources("src")]
    verbs = {name.replace("-", "_") for name in get_command(app).commands}
    rest = [file for file in files if file.parent.name not in kinds and not file.stem.startswith("_")]
    assert [str(file) for file in rest if not re.search(rf"\b{file.stem}\b", drawn) and file.stem not in verbs] == []


def test_imports_run_down_the_flow() -> None:
    against = []
    for source in library():
        for line, module in source.imports():
            root, first, *_ = *module.split("."), ""
            allowed = ORDER[: ORDER.index(source.package) + 1]
            if root in ("", "moetailor_cli") or (root == "moetailor" and first not in allowed):
                against.append(f"{source.name}:{line} imports {module}")
    assert not against


def test_a_method_is_asked_for_by_its_name() -> None:
    """Nothing leans on the file of a method: what two share lies in fitting/ or in a file that is no method's."""
    files = {source.module: source for source in sources("src/moetailor/methods")}
    methods = {name for name, source in files.items() if re.search(r"^@register$", source.text, re.MULTILINE)}
    assert len(methods) > 15
    borrowed = set()
    for source in sources("src"):
        if source.name != "src/moetailor/methods/__init__.py":
            for _, module in source.imports():
                found = methods & {module, module.rpartition(".")[0]}
                borrowed |= {(source.name, name.rpartition(".")[2]) for name in found}
    assert not borrowed


def test_kinds_of_answers_are_named_by_those_who_decide() -> None:
    """Methods and their algebra, and the files that docs/design.md gives a reason for."""
    kinds = {kind.__name__ for kind in ANSWERS.values()}
    naming = set()
    for source in sources("src"):
        if not source.name.startswith(tuple(f"src/moetailor/{name}/" for name in ("answers", "methods", "fitting"))):
            found = {name.rpartition(".")[2] for _, name in source.imports() if ".answers" in name}
            naming |= {source.name} if kinds & found else set()
    assert naming == NAMING_KINDS


def test_nothing_below_the_command_line_prints() -> None:
    printing = []
    for source in library():
        printing += [f"{source.name}:{line} {name}" for line, name in source.names() if name == "print"]
        printing += [f"{source.name}:{n} {m}" for n, m in source.imports() if m.split(".")[0] in ("rich", "typer")]
    assert not printing


def test_links_are_followed_in_a_way_that_never_fails() -> None:
    """`Path.resolve` raises RuntimeError over a link that leads to itself; `os.path.realpath` does not."""
    calls = [f"{source.name}:{line}" for source in sources("src") for line, name in source.names() if name == "resolve"]
    assert not calls


def test_files_are_written_in_one_place() -> None:
    """There they are whole or not there, and obey the umask; temporary folders carry a mark."""
    own = {f"src/moetailor/checkpoint/{name}.py" for name in ("artifact", "lock", "writer")}
    methods = {"write_text", "write_bytes", "touch", "save_pretrained", "symlink_to"}
    functions = {"save_file", "mkdtemp", "mkstemp", "TemporaryDirectory", "NamedTemporaryFile", "TemporaryFile"}
    writing = []
    for source in sources("src"):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and source.name not in own:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                mode = (
                    [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)] if name == "open" else []
                )
                opened = any(isinstance(word, str) and re.fullmatch("[rbt]*[wax+][rbt+]*", word) for word in mode)
                if name in functions or opened or (name in methods and isinstance(node.func, ast.Attribute)):
                    writing.append(f"{source.name}:{node.lineno} {name}")
    assert not writing


def test_functions_are_short() -> None:
    long = set()
    for source in sources("src", "plugins", "benchmarks", "examples", "docs", "tests"):
        long |= {f"{source.name}: {f.name}" for f in source.functions() if body_lines(f) > LONGEST_BODY}
    assert long == LONG_FUNCTIONS.keys()


def test_files_are_short() -> None:
    files = {source.name for source in sources("src", "plugins") if source.lines > LONGEST}
    assert files == LONG_FILES.keys()


def test_only_what_runs_models_names_devices() -> None:
    """Strings that name one, and torch's module of one; a tensor may be moved by `.cpu()`."""
    device, naming = re.compile(r"(cpu|cuda|mps|xpu|npu|hpu)(:\d+)?"), []
    for source in library():
        if source.package not in PLACING:
            naming += [f"{source.name}:{line} {text!r}" for line, text in source.strings() if device.fullmatch(text)]
            naming += [f"{source.name}:{line} {n}" for line, n in source.names() if n != "cpu" and device.fullmatch(n)]
    assert not naming


def test_only_the_table_of_families_names_them() -> None:
    """Model types, and transformers' modules and classes for them; prose may give an example."""
    families = tuple(name.replace("_", "") for name in (FAMILIES | REFUSED))
    naming = []
    for source in sources("src"):
        if source.name != "src/moetailor/checkpoint/family.py":
            for line, text in (*source.names(), *source.strings(), *source.imports()):
                words = (word.lower().replace("_", "") for word in re.findall(r"\w+", text))
                naming += [f"{source.name}:{line} {word}" for word in words if word.startswith(families)]
    assert not naming


def test_tests_share_through_support_only() -> None:
    sharing = []
    for source in sources("tests", "docs", "benchmarks", "examples"):
        for line, module in source.imports():
            if re.search(r"(^|\.)(test_\w+|conftest)\b", module):
                sharing.append(f"{source.name}:{line} imports {module}")
    assert not sharing


def test_draws_begin_from_the_name_of_the_test(request: pytest.FixtureRequest) -> None:
    def drawn() -> list[float]:
        return [random.random(), numpy.random.random(), float(torch.rand(()))]

    found, seed = drawn(), zlib.crc32(request.node.nodeid.encode())
    random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)
    assert drawn() == found


# The rulers themselves


FUNCTIONS = '''
def one_line(): return 1

def short(
    a: int,
    b: dict[
        str, int
    ],
) -> tuple[
    int, int
]:
    """Say what it does.

    And more.
    """

    # why
    c = a
    return c, b

def told(a):
    """Say it."""

class Some:
    def method(self):
        def inner():
            return 1
        return inner
'''


def test_a_body_is_counted_without_signature_and_docstring() -> None:
    found = {function.name: body_lines(function) for function in Source("a.py", FUNCTIONS).functions()}
    assert found == {"one_line": 0, "short": 4, "told": 0, "method": 3, "inner": 1}


def test_every_import_is_seen() -> None:
    text = "import a.b as c\nfrom d import e, f\ndef g():\n    from .h import i\n    from . import j\n"
    found = sorted(Source("a.py", text).imports())
    assert found == [(1, "a.b"), (2, "d.e"), (2, "d.f"), (4, ".h.i"), (5, "..j")]


def test_names_and_strings_are_seen_and_prose_is_not() -> None:
    text = '''"""prose"""
def f(a, *, b="c"):
    "prose"  # prose
    return a.d(e=f"{p} q")
x: int = 1
"""prose"""
from k import l as m
class N(O): pass
'''
    source = Source("a.py", text)
    assert {name for _, name in source.names()} == {"f", "a", "b", "d", "e", "p", "x", "int", "l", "N", "O"}
    assert sorted(source.strings()) == [(2, "c"), (4, " q")]
