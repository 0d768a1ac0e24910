"""The model card: whatever names, parameters and the card of the original hold, it stays one card.

The front matter is read back with a YAML parser, the text with the Markdown parser of rich.
"""

import dataclasses
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

import moetailor
from moetailor.checkpoint.facts import ModelFacts
from moetailor.checkpoint.family import Groups
from moetailor.transform.card import model_card, original_licence
from moetailor.transform.formats import Native

FACTS = ModelFacts(
    source="", fingerprint={}, model_type="olmoe", width=4, top_k=1, groups=Groups(), nbytes=1000, stacks=()
)
PLAN = moetailor.Plan(method="mone", parameters={"score": "exact"}, budget="keep 2", model=FACTS, calibration="")
NASTY = [
    "a\nlicense: mit\n---\n# Owned",
    "`code` **bold** _slanted_ ~~gone~~ [a](http://b) ![i](j) <script>alert(1)</script> &lt; $x$",
    "<!-- open",
    "| a | b |",
    "\x1b[31mred\x07 \x9b1m \u202egnirts\u202c \ud800",
    "---",
    "\\`\\<b>",
]


def card(folder: Path, plan: moetailor.Plan = PLAN) -> tuple[dict, str]:
    """Return the front matter and the body of a card, which must be writable."""
    whole = model_card(plan, folder, Native(), plan.nbytes)
    whole.encode()
    opened, front, body = whole.split("---\n", 2)
    assert opened == ""
    return yaml.safe_load(front), body


class Words(HTMLParser):
    """Reads a rendered card: its words and its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words, self.tags = "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("place", ["method", "budget", "parameter", "value", "source"])
def test_what_is_not_ours_is_shown_letter_by_letter(text: str, place: str, tmp_path: Path) -> None:
    given = {"method": {"method": text}, "budget": {"budget": text}, "parameter": {"parameters": {text: 1}}}
    given |= {"value": {"parameters": {"a": text}}}
    given |= {"source": {"model": dataclasses.replace(FACTS, source=text.replace("/", "%"))}}
    front, body = card(tmp_path, dataclasses.replace(PLAN, **given[place]))
    assert front == {"library_name": "transformers", "tags": ["moetailor", "mixture-of-experts"]}
    shown = Words(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body))
    assert shown.tags == ["h1", "ul", *["li"] * 6]
    letters = "".join(letter for letter in text.replace("/", "%" if place == "source" else "/") if letter.isprintable())
    assert letters.replace(" ", "") in "".join(shown.words.split())
    assert not [letter for letter in body if not letter.isprintable() and letter != "\n"]


LICENCES = {
    "a colon": ('license_name: "Foo: a licence"', {"license_name": "Foo: a licence"}),
    "lines": ('license: "a\\nbase_model: b\\n---\\n"', {"license": "a base_model: b ---"}),
    "words YAML takes for others": ('license_name: "no"\nlicense: "1.0"', {"license_name": "no", "license": "1.0"}),
    "several": ("license: [mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
    "signs": ("license_link: '# > | {a'", {"license_link": "# > | {a"}),
    "numbers and trees": ("license: 3\nlicense_name: {a: b}\nlicense_link: [[a]]", {}),
    "CRLF": ("license: mit\r\nlanguage: en\r", {"license": "mit"}),
    "no mapping": ("- license: mit", {}),
    "no YAML": ("license: [", {}),
    "a date that is none": ("license: mit\nwhen: 2020-99-99", {}),
    "tags": ("license: !!python/object:os.system x", {}),
    "deep": ("license: " + "[" * 5000, {}),
    # Each level is ten of the one before: 10^9 entries.
    "aliases": (
        "a0: &a0 {x: y}\n"
        + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10))
        + "license: mit",
        {},
    ),
}


@pytest.mark.parametrize("case", LICENCES)
def test_the_licence_is_quoted_as_it_must_be(case: str, tmp_path: Path) -> None:
    given, licence = LICENCES[case]
    (tmp_path / "README.md").write_bytes(f"---\n{given}\n---\n# Original\n".encode())
    front, body = card(tmp_path)
    assert front == licence | {"library_name": "transformers", "tags": ["moetailor", "mixture-of-experts"]}
    assert ("the original names none here" in body) == (not licence)


def test_a_card_that_cannot_be_read_names_no_licence(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    assert original_licence(tmp_path) == {}
    for content in (b"", b"# Original", b"\n---\nlicense: mit\n---\n", b"---\nlicense: mit\n", b"\x00" * 100):
        file.write_bytes(content)
        assert original_licence(tmp_path) == {}
    file.write_bytes(b"---\nlicense: mit\nauthor: \xff\xfe\n---\n")
    assert original_licence(tmp_path) == {"license": "mit"}
    file.write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\n" + b"x" * 10**6)
    assert original_licence(tmp_path) == {"license": "mit"}
    file.write_bytes(b"---\n" + b"x: y\n" * 10**6 + b"license: mit\n---\n")
    assert original_licence(tmp_path) == {}
    file.rename(tmp_path / "elsewhere")
    for target in (tmp_path / "elsewhere", tmp_path / "nowhere", file, tmp_path):
        file.symlink_to(target)
        assert original_licence(tmp_path) == {}
        file.unlink()
    os.mkfifo(file)
    assert original_licence(tmp_path) == {}


def test_only_a_name_of_the_hub_is_a_base_model(tmp_path: Path) -> None:
    def base(source: str) -> str | None:
        return card(tmp_path, dataclasses.replace(PLAN, model=dataclasses.replace(FACTS, source=source)))[0].get(
            "base_model"
        )

    assert base("allenai/OLMoE-1B-7B-0125") == "allenai/OLMoE-1B-7B-0125"
    for source in (
        "",
        "model",
        "a/b/c",
        "./a/b",
        "../b",
        "a/b\nlicense: mit",
        "a/b: c",
        "a/" + "b" * 5000,
        "/a",
        "a/\0",
    ):
        assert base(source) is None
