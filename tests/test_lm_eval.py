"""moetailor lm-eval: the harness's own command line on results, with scores as transformers' own logits give them."""

import json
import logging
import sys
from collections.abc import Callable
from copy import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moetailor
from moetailor.errors import MoetailorError
from moetailor.serving import find_engine
from moetailor.serving.harness import CODE, harness_command
from support.source import ROOT

pytest.importorskip("lm_eval")
REFERENCE = ROOT / "examples" / "reference-moe"
ROWS = [
    {"ctx": "The patient was given", "choices": [" a drug", " the moon"], "label": 0},
    {"ctx": "def add(a, b):\n    return", "choices": [" a patient", " a + b"], "label": 1},
    {"ctx": "He opened the", "choices": [" and of", " door"], "label": 0},
    {"ctx": "Two and two are", "choices": [" four", " drug drug"], "label": 1},
]
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{ctx}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model with constants and experts in few bits, in moetailor format."""
    text = moetailor.TextOptions(data=(str(REFERENCE / "calibration.jsonl"),), sequences=8, length=64)
    budget, out = moetailor.Budget.parse(size="30%"), tmp_path_factory.mktemp("made") / "out, in {4} bits"
    width, given = moetailor.Width(bits=4), {"method": "mone", "format": "moetailor"}
    moetailor.compress(REFERENCE, out, text=text, budget=budget, width=width, **given)
    return out


@torch.no_grad()
def right(folder: Path) -> list[bool]:
    """Return for which rows the first of the likeliest answers is the label, by sums of log-probabilities."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in ROWS:
        sums = []
        for choice in row["choices"]:
            begun, ids = (tokenizer(text)["input_ids"] for text in (row["ctx"], row["ctx"] + choice))
            assert ids[: len(begun)] == begun
            logp = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            sums.append(sum(float(logp[at - 1, ids[at]]) for at in range(len(begun), len(ids))))
        found.append(sums.index(max(sums)) == row["label"])
    return found


@pytest.mark.filterwarnings("ignore")  # as where the harness is at home
def test_the_harness_runs_a_task_on_a_result_in_moetailor_format(
    run: Callable, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program that this process would become runs in it: what that loads is there already."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    given = [
        "--tasks",
        "mine",
        "--include_path",
        tmp_path,
        "--output_path",
        tmp_path / "scores.json",
        "--device",
        "cpu",
    ]
    become: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, words: become.append(words))
    code, _, err = run("lm-eval", result, "--", *given, "--model_args", "dtype=float32", "--log_samples")
    assert code == 0, err
    ((python, _, code, *words),) = become
    assert python == sys.executable
    monkeypatch.setattr(sys, "argv", ["-c", *words])
    for name in ("handlers", "level"):  # the harness sets up logging for a process of its own
        monkeypatch.setattr(logging.getLogger(), name, copy(getattr(logging.getLogger(), name)))
    exec(code, {})
    assert "|mine |" in capsys.readouterr().out
    (file,) = tmp_path.glob("scores_*.json")
    scores = json.loads(file.read_text())
    assert scores["config"]["model_args"] == {"pretrained": str(result), "dtype": "float32"}
    expected = right(result)
    assert 0 < sum(expected) < len(expected)
    assert scores["results"]["mine"]["acc,none"] == sum(expected) / len(expected)
    (samples,) = tmp_path.glob("samples_mine_*.jsonl")
    found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda doc: doc["doc_id"])
    assert [bool(doc["acc"]) for doc in found] == expected


def test_the_command_is_printed_and_what_an_engine_does_not_load_is_refused(
    run: Callable, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetailor.serving.engines.vllm.find_spec", lambda name: None)
    code, shown, _ = run("lm-eval", REFERENCE, "--engine", "vllm", "--dry-run", "--", "--tasks", "mine", "-L", "2")
    assert code == 0
    assert shown.strip() == (
        f"{sys.executable} -c '{CODE}' run --model vllm --model_args "
        f"""'{{"pretrained": "{REFERENCE}"}}' --tasks mine -L 2"""
    )
    given = harness_command(result, find_engine("transformers"))[-3:]
    assert given == ["hf", "--model_args", json.dumps({"pretrained": str(result)})]
    code, _, err = run("lm-eval", result, "--engine", "vllm", "--dry-run")
    assert code == 1
    assert "vLLM needs a plug-in for the moetailor format" in err
    code, _, err = run("lm-eval", result, "--engine", "llama.cpp", "--dry-run")
    assert code == 1
    assert "runs nothing with llama.cpp here; give --engine transformers, vllm" in err
    monkeypatch.setattr("moetailor.serving.harness.find_spec", lambda name: None)
    code, _, err = run("lm-eval", REFERENCE)
    assert code == 1
    assert "pip install 'moetailor[tasks]'" in err


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoetailorError, match=r"config\.json"):
        harness_command(tmp_path, find_engine("transformers"))
