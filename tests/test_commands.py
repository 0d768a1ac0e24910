"""The commands of README and docs run, each in a folder of its own, on a tiny model in place of the names."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import moetailor
from moetailor.planning.budget import Budget
from support.families import tiny_model
from support.reference import REFERENCE
from support.source import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What is not run here, and why; that its flags exist is a test of test_docs.py.
ELSEWHERE = {
    "--engine llama.cpp": "needs llama.cpp's tools: test_llama_cpp.py",
    "--converter": "the same",
    "lm-eval": "becomes the harness: test_lm_eval.py",
    "--anneal": "goes on from a result of lightmoe: test_anneal.py",
    "loudest": "a method that the page writes",
}
# Of other programs than moetailor.
PROGRAMS = {
    "torchrun": "several processes: test_ranks.py, test_recovery.py",
    "pip": "installs",
    "make": "sets up an environment and runs what tests run",
    "vllm": "plugins/vllm/tests/test_serving.py",
    "curl": "asks a server that runs",
    "llama-server": "test_llama_cpp.py",
    "python": "llama.cpp's converter: test_llama_cpp.py",
}
TEXTS = ("text.jsonl", "yours.jsonl", "calibration.jsonl", "task.jsonl", "heldout.jsonl", "other.jsonl")
# What a plan must be for a format.
FOR = {
    "compressed-tensors": ("quantize", {"bits": 4, "codes": "int", "group": 32}),
    "gguf": ("quantize", {"bits": 4, "codes": "uint", "group": 32}),
    "expanded": ("conmoe", {}),
}


def lines_of(page: Path) -> list[str]:
    """Return the lines of shell code of a page: indented ones outside fences, and those in fences of no language."""
    found, fence = [], None
    for line in page.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
        elif fence in ("", "bash") or (fence is None and line.startswith("    ") and line[4:5].isalpha()):
            found.append(" ".join(re.split(r"\s+#", line)[0].split()))
    return found


def commands() -> list[str]:
    """Return every command of moetailor that a page shows, once."""
    found = (line for page in PAGES for line in lines_of(page) if re.match(r"moetailor [a-z-]+( |$)", line))
    return [command for command in dict.fromkeys(found) if "[FLAGS]" not in command]


RUN = [command for command in commands() if not any(word in command for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what commands go on from: model, calibration, plans, a result, a comparison."""
    folder = tmp_path_factory.mktemp("made")
    tiny_model("olmoe", hidden_size=32, intermediate_size=32, vocab_size=4096).save_pretrained(folder / "MODEL")
    for file in REFERENCE.glob("tokenizer*"):
        shutil.copy(file, folder / "MODEL")
    for name in TEXTS:
        rows = (REFERENCE / "calibration.jsonl").read_text().splitlines()[:40]
        (folder / name).write_text("\n".join(rows) + "\n")
    text = moetailor.TextOptions(data=(str(folder / "text.jsonl"),), sequences=4, length=32)
    calibration = moetailor.calibrate(folder / "MODEL", folder / "calib", text=text, sensitivity=True)
    for form, (method, parameters) in {"": ("mone", {}), **FOR}.items():
        budget = Budget.parse(remove="0%" if method == "quantize" else "25%")
        plan = moetailor.make_plan(calibration, method, budget, parameters=parameters)
        plan.save(folder / f"plan{form}.json")
    shutil.copy(folder / "plan.json", folder / "other.json")
    moetailor.apply(
        moetailor.Plan.load(folder / "plan.json"), folder / "MODEL", folder / "OUT", calibration=calibration
    )
    shutil.copytree(folder / "OUT", folder / "OLMoE-small")
    compared = {"text": text, "held_out": text, "methods": ["frequency"], "remove": "25%"}
    moetailor.compare(folder / "MODEL", folder / "comparison", **compared)
    return folder


def on_little(command: str, verb: str) -> list[str]:
    """Return the words of a command on the tiny model, on little text."""
    words = [
        re.sub(r"^[A-Za-z][\w-]*/[\w.-]+$|^examples/reference-moe$", "MODEL", word) for word in shlex.split(command)[1:]
    ]
    for flag, value in (
        ("--size", "93%"),
        ("--sizes", "97%,93%"),
        ("--memory", "1400kB"),
        ("--context", "32"),
        ("--sequences", "4"),
    ):
        if flag in words:
            words[words.index(flag) + 1] = value
    if verb == "fit" and "-o" in words:
        words += ["--yes"]
    if verb == "recover":
        words += ["--steps", "2", "--length", "32"]
    elif "--data" in words or "--held-out" in words:
        words += [] if verb == "fit" else ["--sequences", "4", "--length", "32"]
    if verb == "compare" and "--methods" not in words:
        words += ["--methods", "quantize@4"]
    return [*words, "--dry-run"] if verb == "serve" and "--dry-run" not in words else words


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_docs_runs(
    command: str, run: Callable, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command)
    verb = words[1]
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("moetailor.fit.SEQUENCES", 4)
    monkeypatch.setattr("moetailor.fit.JUDGED", 2)
    monkeypatch.setattr("moetailor.calibration.text.LENGTH", 32)
    monkeypatch.setattr("moetailor.serving.engines.vllm.find_spec", lambda name: name)
    out = Path(words[words.index("-o") + 1]) if "-o" in words else None
    if out is not None and out.exists():
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    if "--format" in words and (file := Path(f"plan{words[words.index('--format') + 1]}.json")).exists():
        shutil.copy(file, "plan.json")
    code, _, err = run(*on_little(command, verb))
    assert code == 0, err
    if out is not None and "--dry-run" not in words and "fits as it is" not in err:
        assert out.exists()


def test_every_line_of_code_is_a_command_that_is_held_by_a_test() -> None:
    """Of a program that is new, say above by which."""
    # Where equations, drawings and output stand, too.
    pages = [page for page in PAGES if page.name not in ("design.md", "estimates.md", "methods.md")]
    indented = {line.split()[0] for page in pages for line in lines_of(page) if re.match(r"[a-z][\w.-]* \S", line)}
    assert indented <= {"moetailor", *PROGRAMS}
