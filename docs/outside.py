"""Take into the site what lies outside docs/: the README is its front page, and links lead to where pages are shown.

A hook of mkdocs, see mkdocs.yml. Links to files that the site does not show become their words.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Where in the repository a page lies -> where in the site.
OUTSIDE = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "plugins/vllm/README.md": "vllm-plugin.md",
    "examples/reference-moe/README.md": "reference-model.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changes.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for origin, shown in OUTSIDE.items():
        files.append(File.generated(config, shown, content=(ROOT / origin).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page with links as the site has them."""
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, shown: str) -> str:
    """Return the text of a page with its links as the site has them.

    Args:
        markdown: the text as it lies in the repository.
        shown: the page's place in the site.
    """
    origin = next((origin for origin, place in OUTSIDE.items() if place == shown), f"docs/{shown}")

    def relink(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        named = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        place = OUTSIDE.get(named) or (named.removeprefix("docs/") if re.fullmatch(r"docs/[\w-]+\.md", named) else None)
        if place is None:
            return words
        return f"[{words}]({posixpath.relpath(place, posixpath.dirname(shown) or '.')}{anchor})"

    return LINK.sub(relink, markdown)
