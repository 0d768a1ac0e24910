"""What the site does for a narrow screen and a screen reader with a page's HTML.

A hook of mkdocs, see mkdocs.yml. Commands wrap where a line ends, no flag is cut, and a remark behind a command goes to
a line of its own; a table's empty head is no head.
"""

from __future__ import annotations

import re
from typing import Any

# A block without a language is commands where a line begins with one of these. All else keeps its lines: it is aligned.
COMMANDS = ("moetailor ", "make ", "pip ", "torchrun ", "vllm ", "python", ".venv/bin/", "git ", "cd ")
BLOCK = re.compile(r'<div class="highlight">(<pre>.*?<code>)(.*?\n)(</code></pre>)</div>', re.DOTALL)
INLINE = re.compile(r"<pre>.*?</pre>|<code>(.*?)</code>", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--?\w[\w-]*")
WHOLE = r'<span class="flag">\g<0></span>'
REMARK = re.compile(r"( {2,})(#.*)")
HEAD = re.compile(r"<thead>\s*<tr>(?:\s*<th(?: [^>]*)?></th>)+\s*</tr>\s*</thead>\s*")
CELL = re.compile(r"<th((?: [^>]*)?)></th>")


def on_page_content(html: str, **_: Any) -> str:
    """Return the HTML of a page as the site shows it."""
    return narrowed(html)


def narrowed(html: str) -> str:
    """Return HTML whose commands are marked to wrap, whose flags are marked to stay whole, without empty heads.

    Args:
        html: of a page, as Markdown makes it.
    """

    def block(found: re.Match[str]) -> str:
        before, text, after = found.groups()
        if not re.search(rf"^(?:{'|'.join(map(re.escape, COMMANDS))})", text, re.MULTILINE):
            return found[0]
        text = REMARK.sub(r'\1<span class="remark">\2</span>', FLAG.sub(WHOLE, text))
        lines = "".join(f'<span class="line">{line}</span>' for line in text.splitlines(keepends=True))
        return f'<div class="highlight wraps">{before}{lines}{after}</div>'

    def inline(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0]
        return f"<code>{FLAG.sub(WHOLE, found[1])}</code>"

    return CELL.sub(r"<td\1></td>", HEAD.sub("", INLINE.sub(inline, BLOCK.sub(block, html))))
