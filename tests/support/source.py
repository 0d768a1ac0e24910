"""The source as data, for the rules that it is held to."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[2]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        name: its path from the root of the repository.
        text: what it holds.
    """

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def package(self) -> str:
        """The folder of src/moetailor that it lies in, or its own name if it lies in none."""
        return Path(self.name).relative_to("src/moetailor").parts[0].removesuffix(".py")

    @property
    def module(self) -> str:
        """Its name in an import, if it lies in src."""
        return ".".join(Path(self.name).relative_to("src").with_suffix("").parts)

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yield (line, module) for everything it imports, wherever in it: names of a package may be modules too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)

    def functions(self) -> Iterator[Function]:
        """Yield its functions and methods, those within others too."""
        yield from (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def names(self) -> Iterator[tuple[int, str]]:
        """Yield (line, name) for what the code names: variables, attributes, arguments, definitions, imports."""
        for node in ast.walk(self.tree):
            for field in ("id", "attr", "arg", "name"):
                if isinstance(name := getattr(node, field, None), str):
                    yield getattr(node, "lineno", 0), name

    def strings(self) -> Iterator[tuple[int, str]]:
        """Yield (line, string) for the strings of the code, without docstrings."""
        prose = {id(text) for node in ast.walk(self.tree) if (text := docstring_of(node)) is not None}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                yield node.lineno, node.value


def docstring_of(node: ast.AST) -> ast.Constant | None:
    """Return the string that a module, class, function or attribute begins with or is followed by, if it is one."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value
    return None


def body_lines(function: Function) -> int:
    """Return the lines of a function from the end of its signature, without its docstring.

    A signature is a list of declarations: that of a verb has a line for each option, with its help.
    """
    parts = [*ast.walk(function.args), *([function.returns] if function.returns else [])]
    begin = max(getattr(part, "end_lineno", function.lineno) for part in parts)
    if (text := docstring_of(function.body[0])) is not None:
        begin = text.end_lineno or begin
    return (function.end_lineno or begin) - begin


def sources(*folders: str) -> list[Source]:
    """Return the Python files below folders of the repository."""
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return [_read(file.relative_to(ROOT).as_posix()) for file in files]


@cache
def _read(name: str) -> Source:
    return Source(name, (ROOT / name).read_text())


def lengths() -> str:
    """Say how long the files of src are."""
    lines = sorted(source.lines for source in sources("src"))
    return (
        f"src: {len(lines)} files, {sum(lines):,} lines; half have at most {median(lines):.0f}, nine in ten at most "
        f"{quantiles(lines, n=10)[-1]:.0f}, the longest {lines[-1]}"
    )
