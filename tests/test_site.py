"""The site shows every page, leads nowhere else, and asks nothing of the network; what it says in Python runs."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import moetailor
from moetailor.methods.registry import METHODS
from support.source import ROOT

DOCS = ROOT / "docs"
MKDOCS = shutil.which("mkdocs", path=os.pathsep.join([str(ROOT / ".venv-docs" / "bin"), os.environ["PATH"]]))


def hook(name: str) -> ModuleType:
    """Return a hook of the site, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


outside, narrow = hook("outside"), hook("narrow")
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav: object) -> Iterator[str]:
    """Yield the pages that a part of the navigation names."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages(part)


def test_the_navigation_names_every_page_once() -> None:
    named = sorted(pages(SETTINGS["nav"]))
    assert named == sorted([*(page.name for page in DOCS.rglob("*.md")), *outside.OUTSIDE.values()])


def test_links_lead_to_where_pages_are_shown() -> None:
    cases = {
        ("which.md", "[a](../README.md)"): "[a](index.md)",
        ("which.md", "[a](../benchmarks/README.md#on-a-gpu-gpupy)"): "[a](benchmarks.md#on-a-gpu-gpupy)",
        ("which.md", "[a](bits.md), [b](#c)"): "[a](bits.md), [b](#c)",
        ("index.md", "[a](docs/bits.md#b) [c](https://d.e/f.md)"): "[a](bits.md#b) [c](https://d.e/f.md)",
        ("vllm-plugin.md", "[a](../../docs/serving.md)"): "[a](serving.md)",
        ("formats.md", "[`a`](../benchmarks/llama.py) and [b](../src/c.py)"): "`a` and b",
    }
    for (page, text), shown in cases.items():
        assert outside.relinked(text, page) == shown


def test_every_link_of_a_page_is_one_of_a_page_in_the_site() -> None:
    shown = set(pages(SETTINGS["nav"]))
    for origin in [*DOCS.glob("*.md"), *(ROOT / name for name in outside.OUTSIDE)]:
        place = outside.OUTSIDE.get(str(origin.relative_to(ROOT)), origin.name)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", outside.relinked(origin.read_text(), place)):
            assert target.startswith(("http:", "https:", "mailto:")) or target in shown, (place, target)


def test_commands_wrap_flags_stay_whole_and_an_empty_head_is_none() -> None:
    start, end = "<pre><span></span><code>", "</code></pre></div>"
    cases = {
        f'<div class="highlight">{start}make a  # of\n# b --c\n{end}': f'<div class="highlight wraps">{start}'
        f'<span class="line">make a  <span class="remark"># of</span>\n</span>'
        f'<span class="line"># b <span class="flag">--c</span>\n</span>{end}',
        f'<div class="highlight">{start}a    makes\n{end}': None,
        f'<div class="language-python highlight">{start}make = 1\n{end}': None,
        "<code>plan --uniform-layers -p a=b-c</code>": '<code>plan <span class="flag">--uniform-layers</span> '
        '<span class="flag">-p</span> a=b-c</code>',
        "<thead>\n<tr>\n<th></th>\n<th></th>\n</tr>\n</thead>\n<tbody>": "<tbody>",
        "<tr>\n<th></th>\n<th>KL</th>\n</tr>": "<tr>\n<td></td>\n<th>KL</th>\n</tr>",
    }
    for made, shown in cases.items():
        assert narrow.narrowed(made) == (made if shown is None else shown)


def test_the_method_of_the_page_about_your_own_can_be_planned(tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", (DOCS / "own.md").read_text(), re.DOTALL)
    assert block is not None
    reference = ROOT / "examples" / "reference-moe"
    text = moetailor.TextOptions(data=(str(reference / "calibration.jsonl"),), sequences=4, length=64)
    calibration = moetailor.calibrate(str(reference), tmp_path / "calib", text=text)
    budget = moetailor.Budget.parse(remove="25%")
    try:
        exec(block[1], {"__name__": __name__})
        (mine, reap) = (moetailor.make_plan(calibration, name, budget) for name in ("loudest", "reap"))
        twice = moetailor.make_plan(calibration, "loudest", budget, parameters={"power": 2.0})
    finally:
        del METHODS["loudest"]
    slots = [{name: layer.slots for name, layer in plan.layers.items()} for plan in (mine, reap, twice)]
    assert slots[0] == slots[1] == slots[2]  # a power keeps the order
    assert mine.layers != twice.layers  # and changes the scores


@pytest.mark.slow
@pytest.mark.skipif(MKDOCS is None, reason="needs mkdocs: `make site` sets it up")
def test_the_site_is_built_and_asks_for_nothing_outside(tmp_path: Path) -> None:
    """Strictly: a page that is in no navigation, a link or an anchor that leads nowhere, ends it."""
    assert MKDOCS is not None
    shown = subprocess.run(
        [MKDOCS, "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    for page in pages(SETTINGS["nav"]):
        text = (tmp_path / page.replace(".md", ".html")).read_text()
        asked = re.findall(r'<(?:script|img|iframe)[^>]* src="([^"]*)"|<link[^>]* href="([^"]*)"', text)
        assert [place for pair in asked for place in pair if place.startswith(("http", "//"))] == []
