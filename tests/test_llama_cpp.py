"""llama.cpp as an engine: what is offered, written with stand-ins for its tools and with these, and started."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

import moetailor
from moetailor.answers import Width
from moetailor.checkpoint.experts import ExpertShape
from moetailor.checkpoint.original import Original
from moetailor.fit import look
from moetailor.serving import find_engine, offered
from moetailor.transform.gguf_recipe import tensor_types
from support.serving import KINDS, LLAMA, pairs
from support.source import ROOT

pytest.importorskip("gguf")
REFERENCE = ROOT / "examples" / "reference-moe"
ENGINE = find_engine("llama.cpp")
# Where llama.cpp was built (llama-server, llama-quantize), and its converter, which must know the toy tokenizer.
BINARIES, CONVERTER = (os.environ.get(f"MOETAILOR_LLAMA_CPP{name}") for name in ("", "_CONVERTER"))
TEXT = ["--data", REFERENCE / "calibration.jsonl", "--held-out", REFERENCE / "heldout.jsonl"]
FAKE_CONVERTER = """
import pathlib, sys
assert pathlib.Path(sys.argv[1], "tokenizer.json").stat().st_size
pathlib.Path(sys.argv[3]).write_text("GGUF " + " ".join(sys.argv[4:]))
"""
FAKE_QUANTIZER = f"""#!{sys.executable}
import pathlib, sys
source, target, rest = sys.argv[-3:]
assert pathlib.Path(source).read_text() == "GGUF --outtype auto --model-name reference-moe"
pathlib.Path(target).write_text("GGUF " + rest)
"""
# Bits of a weight that types of GGUF take: of 32 or 256 weights a scale or some in 16 bits, and more in the larger.
TYPE_BITS = {"q8_0": 8.5, "q6_k": 6.5625, "q5_1": 6, "q5_0": 5.5, "q5_k": 5.5, "q4_k": 4.5, "iq4_nl": 4.5}
TYPE_BITS |= {"q3_k": 3.4375, "iq2_xs": 2.3125}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """Stand-ins for llama.cpp's tools; runs are short."""
    monkeypatch.setattr("moetailor.fit.SEQUENCES", 2)
    (tmp_path / "convert.py").write_text(FAKE_CONVERTER)
    (tmp_path / "quantize").write_text(FAKE_QUANTIZER)
    (tmp_path / "quantize").chmod(0o755)
    return ["--converter", tmp_path / "convert.py", "--quantizer", tmp_path / "quantize"]


def words(memory: str, out: Path, *more: object) -> list:
    return ["fit", REFERENCE, "--memory", memory, "--engine", "llama.cpp", "--context", "256", "-o", out, *more]


def test_what_is_no_expert_is_counted_in_8_bits() -> None:
    room = look(Original(REFERENCE), memory=9_000_000, engine=ENGINE, context=256).room
    # Two matrices of 4,096 words and four of attention in each of 4 layers go from 16 bits to 8.5; a router of 32 rows,
    # four norms in each layer and the last one from 16 to 32.
    rounded = 2 * 4096 * 192 + 4 * 4 * 192 * 192
    whole = 4 * (32 + 4) * 192 + 192
    assert room.saved == rounded * 7.5 / 8 - whole * 2
    assert room.planned == room.weights + room.saved
    others = 18_536_832 - 7_077_888 * 2
    assert 2 * (rounded + whole) == others


@pytest.mark.parametrize(("wide", "inner"), [(192, 96), (2048, 768)])
def test_types_take_no_more_bytes_than_the_plan(wide: int, inner: int) -> None:
    """Each choice, at a size that it has just room for."""
    facts = Original(REFERENCE).facts
    numbers = 3 * wide * inner
    stacks = [
        replace(s, shape=ExpertShape(width=wide, intermediate=inner), expert_bytes=2 * numbers) for s in facts.stacks
    ]
    outside = facts.nbytes - sum(stack.num_experts * stack.expert_bytes for stack in facts.stacks)
    facts = replace(facts, stacks=tuple(stacks), nbytes=outside + 4 * 32 * 2 * numbers, dtypes={})
    found = 0
    for share in (0.2, 0.25, 0.4, 0.5, 0.9):
        room = outside + int(4 * 32 * 2 * numbers * share)
        for offer in offered(ENGINE.choices(facts), facts, room):
            if offer.fits:
                plan, found = offer.choice.estimate(facts, room), found + 1
                types, written = tensor_types(plan), float(outside)
                for stack in stacks:
                    layer = plan.layers[stack.prefix]
                    kinds = [types[rf"blk\.{stack.index}\.ffn_{part}_exps\.weight"] for part in ("gate", "up", "down")]
                    written += sum(TYPE_BITS[kind] / 8 * wide * inner for kind in kinds) * len(layer.pool)
                    written -= (len(layer.slots) - len(layer.pool)) * stack.slot_bytes
                assert plan.nbytes * 0.9 < written <= plan.nbytes, (offer.choice.name, types)
    assert found >= 5


def test_fit_writes_a_file_and_says_what_serves_it(run: Callable, tools: list, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, shown, err = run(*words("9MB", out, *TEXT, *tools, "--yes"))
    assert code == 0, err
    assert "\n1  bits by layer     7.31 MB" in shown
    assert (out / "model.gguf").read_text() == "GGUF Q8_0"
    assert not (out / "model.safetensors").exists()
    plan = moetailor.Plan.load(out / "moetailor_plan.json")
    assert plan.nbytes <= 9_000_000 - 786_432 - 900_000 + 1_971_840
    said = " ".join(err.split())
    assert "18.54 MB becomes 9.16 MB (gguf format)" in said
    assert "9 bytes written, weights may take 7.31 MB not measured: llama.cpp alone loads it" in said
    served = f"llama-server --model {out / 'model.gguf'} --host 127.0.0.1 --port 8000 --ctx-size 256"
    assert f"serve it: {served}" in err
    before = (out / "model.gguf").stat().st_mtime_ns
    assert run(*words("9MB", out, *TEXT, *tools, "--yes"))[0] == 0  # it is there
    assert (out / "model.gguf").stat().st_mtime_ns == before


def test_compress_runs_the_tools(run: Callable, tools: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, bits = tmp_path / "out", ["-p", "bits=4", "-p", "codes=uint", "-p", "group=32"]
    command = [
        "compress",
        REFERENCE,
        "-o",
        out,
        *TEXT[:2],
        "--sequences",
        "2",
        "--length",
        "64",
        "--method",
        "quantize",
    ]
    command += [*bits, "--format", "gguf"]
    code, _, err = run(*command, *tools[:3], tmp_path / "lost")
    assert code == 1
    assert f"--quantizer {tmp_path / 'lost'}: there is no such file" in " ".join(err.split())
    assert not list(tmp_path.glob("out*"))  # nothing was calibrated before that was said
    code, _, err = run(*command, *tools, "--dry-run")
    assert code == 1
    assert "nothing is foretold of --converter" in err
    (tmp_path / "quantize").chmod(0o644)
    code, _, err = run(*command, *tools)
    assert code == 1
    assert f"is no program that may be run; chmod +x {tmp_path / 'quantize'}" in " ".join(err.split())
    (tmp_path / "quantize").chmod(0o755)
    # As ./quantize, which no folder of programs has.
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*command, "--converter", "convert.py", "--quantizer", "./quantize")
    assert code == 0, err
    assert (out / "model.gguf").read_text() == "GGUF Q8_0"


def test_fewer_experts_are_written_when_all_do_not_fit(run: Callable, tools: list, tmp_path: Path) -> None:
    code, shown, err = run(*words("8MB", tmp_path / "out", *TEXT, *tools, "--yes"))
    assert code == 0, err
    assert "\n1  fewer, in 4 bits" in shown
    plan = moetailor.Plan.load(tmp_path / "out" / "moetailor_plan.json")
    kept = {(len(layer.pool), width) for layer in plan.layers.values() for width in layer.widths.values()}
    assert kept == {(31, Width(bits=4, group=32))}


def test_missing_tools_are_said_before_anything_is_made(
    run: Callable, tools: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("PATH", str(tmp_path))
    code, shown, err = run(*words("9MB", out, "--yes"))
    assert code == 1
    assert "bits by layer" in shown
    assert "convert_hf_to_gguf.py and llama-quantize are not found here; name them with --converter" in err
    assert "\ngit clone --depth 1 https://github.com/ggml-org/llama.cpp\n" in err
    code, _, err = run(*words("9MB", out, *tools[:2], "--yes"))
    assert code == 1
    assert "and llama-quantize is not found here" in err
    code, _, err = run(*words("9MB", out, *tools[:2], "--quantizer", tmp_path / "lost", "--yes"))
    assert code == 1
    assert f"--quantizer {tmp_path / 'lost'}: there is no such file" in err
    (tmp_path / "convert.py").write_text("print('Model is not supported')\nraise SystemExit(1)")
    code, _, err = run(*words("9MB", out, *tools, "--yes"))
    assert code == 1
    assert "--converter: ended with status 1" in err
    assert "Model is not supported" in err
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("out")]
    code, _, err = run("fit", REFERENCE, "--memory", "10MB", *tools, "-o", out)
    assert code == 1
    assert "--converter and --quantizer write GGUF, for --engine llama.cpp; transformers loads none" in err


def test_the_tools_are_found_on_path(tools: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for file, name in (("convert.py", "convert_hf_to_gguf.py"), ("quantize", "llama-quantize")):
        (tmp_path / file).rename(tmp_path / "bin" / name)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert ENGINE.tools(Original(REFERENCE), None, None) == {
        "converter": tmp_path / "bin" / "convert_hf_to_gguf.py",
        "quantizer": tmp_path / "bin" / "llama-quantize",
    }


def test_serve_names_the_file_that_is_meant(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def served(folder: Path, *more: str) -> tuple[int, str, str]:
        code, shown, err = run("serve", folder, "--engine", "llama.cpp", *more, "--dry-run")
        return code, shown.strip(), " ".join(err.split())

    assert served(REFERENCE)[0] == 1
    assert (
        "llama.cpp loads GGUF files, and there is none; moetailor fit --engine llama.cpp writes" in served(REFERENCE)[2]
    )
    (tmp_path / "imatrix.gguf").write_text("")
    assert served(tmp_path)[0] == 1
    for part in (1, 2):
        (tmp_path / f"big-0000{part}-of-00002.gguf").write_text("")
    first = f"--model {tmp_path}/big-00001-of-00002.gguf --host 127.0.0.1 --port 8000"
    assert served(tmp_path) == (0, f"llama-server {first}", "")
    assert served(tmp_path, "--binary", "/opt/my server", "--context", "64") == (
        0,
        f"'/opt/my server' {first} --ctx-size 64",
        "",
    )
    (tmp_path / "mine").write_text("")
    monkeypatch.chdir(tmp_path)
    assert served(tmp_path, "--binary", "./mine")[1].startswith(f"{tmp_path / 'mine'} --model")
    assert served(tmp_path, "--binary", "theirs")[1].startswith("theirs --model")
    (tmp_path / "other.gguf").write_text("")
    assert "holds big-00001-of-00002.gguf, other.gguf; name the one that is meant" in served(tmp_path)[2]
    assert served(tmp_path / "other.gguf")[1].startswith(f"llama-server --model {tmp_path / 'other.gguf'}")
    (tmp_path / "model.gguf").write_text("")
    assert served(tmp_path)[1].startswith(f"llama-server --model {tmp_path / 'model.gguf'}")
    code, _, err = run("serve", REFERENCE, "--binary", "/bin/true", "--dry-run")
    assert code == 1
    assert "--binary: transformers is served by moetailor's own program; leave it out" in err
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("serve", tmp_path, "--engine", "llama.cpp")
    assert code == 1
    assert "llama-server: not found here; get llama.cpp" in " ".join(err.split())


def test_serve_starts_the_program(tmp_path: Path) -> None:
    """In a process of its own, which becomes the program."""
    (tmp_path / "model.gguf").write_text("")
    (tmp_path / "server").write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    (tmp_path / "server").chmod(0o755)
    command = [sys.executable, "-c", "from moetailor_cli.app import main; main()", "serve", tmp_path, "--engine"]
    command += ["llama.cpp", "--binary", tmp_path / "server", "--port", "81"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(["--model", f"{tmp_path}/model.gguf", "--host", "127.0.0.1", "--port", "81"])


@contextmanager
def serving(*command: str | Path) -> Iterator[str]:
    """Give the address of a server that is started, and ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = [sys.executable, "-c", "from moetailor_cli.app import main; main()", *command, "--port", str(port)]
    with subprocess.Popen(began, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(240):
                assert process.poll() is None, process.stderr and process.stderr.read()[-2000:]
                try:
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.skipif(not (BINARIES and CONVERTER), reason="MOETAILOR_LLAMA_CPP and .._CONVERTER name no llama.cpp")
@pytest.mark.parametrize("name", pairs(LLAMA, "run", made=False))
def test_llama_cpp_answers_with_what_fit_wrote(
    name: str, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BINARIES
    assert CONVERTER
    memory = KINDS[name].memory
    monkeypatch.setattr("moetailor.fit.SEQUENCES", 4)
    out, tools = tmp_path / "out", ["--converter", CONVERTER, "--quantizer", Path(BINARIES) / "llama-quantize"]
    code, shown, err = run(*words(memory, out, *TEXT, *tools, "--yes"))
    assert code == 0, err
    assert f"\n1  {'bits by layer' if name == 'gguf bits' else 'fewer, in 4 bits'}" in shown
    room = look(Original(REFERENCE), memory=int(memory[0]) * 10**6, engine=ENGINE, context=256).room
    assert (out / "model.gguf").stat().st_size <= room.weights
    with serving("serve", out, "--engine", "llama.cpp", "--binary", Path(BINARIES) / "llama-server") as address:
        asked = {"prompt": "The patient", "max_tokens": 8, "temperature": 0}
        request = Request(f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        with urlopen(request) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 8
