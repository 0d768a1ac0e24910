"""recovery/examples.py: examples packed and labelled by hand, and rows that are none named by file and line."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moetailor.errors import CalibrationError
from moetailor.recovery.examples import IGNORED, Blocks, ExampleOptions, read_blocks
from support.letters import BOS, EOS, Letters
from support.reference import REFERENCE

NO = IGNORED
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What an assistant thought is written of the last turn only, as in Qwen3.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}[thought]{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def jsonl(file: Path, rows: Sequence[object]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def read(*data: str, tokenizer: object = None, **options: object) -> Blocks:
    return read_blocks(ExampleOptions(data=data, **({"length": 4} | options)), tokenizer or Letters())  # type: ignore[arg-type]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_prompts_do_not_count_and_completions_do(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "f"}])
    # 1 ab cd 2 | 1 e f 2 is ten tokens: two blocks of four, and two are dropped.
    blocks = read(file)
    assert blocks.input_ids.tolist() == [[BOS, 10, 11, 12], [13, EOS, BOS, 14]]
    # 13 counts, but is the first of its block: nothing precedes it.
    assert blocks.labels.tolist() == [[NO, NO, NO, 12], [NO, EOS, NO, NO]]
    assert blocks.counted == 2
    assert blocks[1]["labels"].tolist() == [NO, EOS, NO, NO]


def test_everything_counts_where_asked(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"prompt": "ab", "completion": "cd"}, {"text": "efghijk"}])
    assert read(file, loss_on="all").labels.tolist() == [[NO, 10, 11, 12], [NO, EOS, BOS, 14], [NO, 16, 17, 18]]


def test_plain_text_counts_whole(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"text": "abc"}, {"text": "de", "domain": "x"}])
    (tmp_path / "t.txt").write_text("fghi")
    blocks = read(file, str(tmp_path / "t.txt"))
    assert blocks.input_ids.tolist() == [[BOS, 10, 11, 12], [BOS, 13, 14, BOS], [15, 16, 17, 18]]
    assert blocks.labels.tolist() == [[NO, 10, 11, 12], [NO, 13, 14, BOS], [NO, 16, 17, 18]]


@pytest.mark.parametrize(("bos", "eos", "ids"), [(None, 2, [2, 10, 11, 2]), (None, None, [10, 11, 10, 11])])
def test_tokenizers_without_special_tokens(tmp_path: Path, bos: int | None, eos: int | None, ids: list[int]) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    assert read(file, tokenizer=Letters(bos, eos)).input_ids[0].tolist() == ids


def test_blocks_in_which_nothing_counts_are_dropped(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"prompt": "abcdefgh", "completion": "i"}, {"prompt": "j", "completion": "k"}])
    # 1 abc | defg | h i 2 1 | j k 2
    assert read(file).input_ids.tolist() == [[17, 18, EOS, BOS]]


def written(blocks: Blocks, tokenizer) -> tuple[str, str]:
    """Return the first block as text, all of it and what counts."""
    ids, labels = blocks.input_ids[0], blocks.labels[0]
    return tokenizer.decode(ids), tokenizer.decode(ids[labels != NO])


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(REFERENCE)


def length_of(tokenizer, *parts: str) -> int:
    return sum(len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)


def test_chat_templates_and_what_the_assistant_says(tmp_path: Path, tokenizer) -> None:
    tokenizer.chat_template = TURNS
    talk = [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello."), turn("user", "And?")]
    file = jsonl(tmp_path / "t.jsonl", [{"messages": [*talk, turn("assistant", "Bye.")]}])
    parts = ["<system>Be brief.\n<user>Hi\n<assistant>", "Hello.\n", "<user>And?\n<assistant>", "Bye.\n"]
    blocks = read(file, tokenizer=tokenizer, length=length_of(tokenizer, *parts))
    assert written(blocks, tokenizer) == ("".join(parts), "Hello.\nBye.\n")
    everything = read(file, tokenizer=tokenizer, length=length_of(tokenizer, *parts), loss_on="all")
    assert everything.counted == everything.input_ids.numel() - 1


def test_turns_that_are_rewritten_later_are_refused_unless_last(tmp_path: Path, tokenizer) -> None:
    tokenizer.chat_template = THINKING
    talk = [turn("user", "Hi"), turn("assistant", "Hello.")]
    parts = ["<user>Hi\n<assistant>", "[thought]Hello.\n"]
    file = jsonl(tmp_path / "t.jsonl", [{"messages": talk}])
    blocks = read(file, tokenizer=tokenizer, length=length_of(tokenizer, *parts))
    assert written(blocks, tokenizer) == ("".join(parts), parts[1])
    file = jsonl(tmp_path / "t.jsonl", [{"messages": talk}, {"messages": [*talk, turn("user", "And?")]}])
    with pytest.raises(CalibrationError, match=r"line 2: .*writes turn 2 otherwise once others follow"):
        read(file, tokenizer=tokenizer)


def test_a_template_that_refuses_is_quoted(tmp_path: Path, tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = jsonl(tmp_path / "t.jsonl", [{"messages": [turn("assistant", "a")]}])
    with pytest.raises(CalibrationError, match=r"line 1: .*the chat template refuses it: roles must alternate"):
        read(file, tokenizer=tokenizer)


def test_conversations_without_a_template(tmp_path: Path, tokenizer) -> None:
    assert not tokenizer.chat_template
    end = tokenizer.eos_token
    file = jsonl(tmp_path / "t.jsonl", [{"messages": [turn("user", "Hi"), turn("assistant", "Hello.")] * 2}])
    parts = [end, "user: ", "Hi", "\nassistant: ", "Hello.", end, "\nuser: ", "Hi", "\nassistant: ", "Hello.", end]
    blocks = read(file, tokenizer=tokenizer, length=length_of(tokenizer, *parts))
    assert written(blocks, tokenizer) == ("".join(parts), f"Hello.{end}Hello.{end}")


WRONG = [
    ([{"txt": "a"}], r"line 1: expected a row with `messages`.*KeyError\('text'\)"),
    ([{"text": "a"}, {"text": 5}], "line 2: .*text is not a string"),
    ([{"text": "a"}, ["b"]], "line 2: .*not an object"),
    ([{"prompt": "a"}], r"line 1: .*KeyError\('completion'\)"),
    ([{"prompt": "a", "completion": None}], r"line 1: .*KeyError\('completion'\)"),
    ([{"prompt": "a", "completion": 5}], "line 1: .*completion is not a string"),
    ([{"messages": []}], "line 1: .*messages is not a list of objects"),
    ([{"messages": "hi"}], "line 1: .*messages is not a list of objects"),
    ([{"messages": [{"role": "user"}]}], r"line 1: .*KeyError\('content'\)"),
    ([{"messages": [turn("user", "hi")]}], "line 1: .*no turn of the assistant"),
    ([], "holds no text"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG)
def test_rows_that_are_no_examples(tmp_path: Path, rows: list, message: str) -> None:
    file = jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(CalibrationError, match=message) as refused:
        read(file)
    assert file in str(refused.value)


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{nope\n')
    with pytest.raises(CalibrationError, match=r"t\.jsonl, line 2: expected"):
        read(str(tmp_path / "t.jsonl"))
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(CalibrationError, match="not UTF-8 text"):
        read(str(tmp_path / "t.jsonl"))
    (tmp_path / "t.txt").write_text(" ")
    with pytest.raises(CalibrationError, match="holds no text"):
        read(str(tmp_path / "t.txt"))
    with pytest.raises(CalibrationError, match=r"no such file|neither a file"):
        read(str(tmp_path / "absent.jsonl"))


def test_options_that_cannot_work(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", [{"text": "abcdefg"}])
    never = jsonl(tmp_path / "n.jsonl", [{"prompt": "abcdefg", "completion": ""}])
    with pytest.raises(CalibrationError, match=r"8 tokens of examples, one block has 9; give more"):
        read(file, length=9)
    with pytest.raises(CalibrationError, match="no token of the 2 blocks counts"):
        read(never, tokenizer=Letters(1, None))
    with pytest.raises(CalibrationError, match="--length 1 predicts nothing"):
        read(file, length=1)
    with pytest.raises(CalibrationError, match="did you mean 'completion'"):
        read(file, loss_on="completions")
    with pytest.raises(CalibrationError, match="no examples given"):
        read()
    with pytest.raises(CalibrationError, match=r"more than the model takes \(3\)"):
        read_blocks(ExampleOptions(data=(file,), length=4), Letters(), max_length=3)
    with pytest.raises(CalibrationError, match="gives token 16, the model has 12"):
        read_blocks(ExampleOptions(data=(file,), length=4), Letters(), vocab_size=12)
