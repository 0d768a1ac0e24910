"""What fits an engine and its memory, against transformers' own cache and numbers worked by hand; what is then made."""

import gzip
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moetailor
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.rates import Rates
from moetailor.estimates.estimate import Host
from moetailor.estimates.running import of_evaluation
from moetailor.fit import CALIBRATION, HELD_OUT, TEXTS, Job, foretold, look
from moetailor.serving import ENGINES, Choice, Served, find_engine, offered
from moetailor.serving.choices import RULES, bits_of, expected_of
from moetailor.serving.needs import cache_nbytes
from moetailor.words import GRADES
from support.families import FAMILIES, tiny_model
from support.source import ROOT
from support.tiny import load

REFERENCE = ROOT / "examples" / "reference-moe"
CONTEXT = 24


@pytest.fixture(autouse=True)
def without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the vLLM plug-in be missing, as it mostly is; the tests find it beside them."""
    monkeypatch.setattr("moetailor.serving.engines.vllm.find_spec", lambda name: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_as_large_as_what_the_model_really_keeps(family: str, checkpoint: Callable[[str], Path]) -> None:
    def kept(part: Any) -> list[torch.Tensor]:
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
        return [part] if isinstance(part, torch.Tensor) else [tensor for each in parts for tensor in kept(each)]

    original = Original(checkpoint(family))
    with torch.no_grad():
        model: Any = load(checkpoint(family))
        cache = model(input_ids=torch.arange(CONTEXT)[None] % 32 + 2, use_cache=True).past_key_values
    there = sum(tensor.numel() for layer in cache.layers for tensor in kept(vars(layer)) if tensor.is_floating_point())
    # Of a sliding window transformers keeps all but the token that is next to be forgotten.
    forgotten = sum(
        layer.keys[:, :, :1].numel() + layer.values[:, :, :1].numel()
        for layer in cache.layers
        if CONTEXT >= (getattr(layer, "sliding_window", None) or CONTEXT + 1)
    )
    assert cache_nbytes(original, CONTEXT) == 2 * (there + forgotten)


def test_deepseek_v3_keeps_what_keys_and_values_are_made_of(checkpoint: Callable[[str], Path]) -> None:
    original = Original(checkpoint("deepseek_v3"))
    text = original.plain_config
    assert cache_nbytes(original, 1000) == 2 * 1000 * 3 * (text.kv_lora_rank + text.qk_rope_head_dim)


def test_memory_is_shared_by_cache_engine_and_weights() -> None:
    original = Original(REFERENCE)
    room = find_engine("VLLM").room(original, 10_000_000, 512)
    cache = 512 * 4 * 2 * 192 * 2  # 4 layers, keys and values of 192 numbers, two bytes each
    assert (room.cache, room.overhead, room.weights) == (cache, 1_500_000, 8_500_000 - cache)
    with pytest.raises(moetailor.MoetailorError, match=r"1,600,000 bytes: .* take 1,572,864.*--memory, or less"):
        find_engine("vllm").room(original, 1_600_000, 512)


def test_rules_say_their_points_and_what_lies_between_by_logarithms() -> None:
    for rule, points in RULES.items():
        for bits, nats in points.items():
            assert expected_of(rule, bits) == pytest.approx(nats)
        costs = [nats for _, nats in sorted(points.items())]
        assert costs == sorted(costs, reverse=True)
        assert expected_of(rule, 16.0) == pytest.approx(costs[-1])
        assert expected_of(rule, 0.1) == pytest.approx(costs[0])
    assert expected_of("one width", 4.7) == pytest.approx((2.1e-3 * 6e-4) ** 0.5)


def test_offers_fit_or_say_why_and_the_best_comes_first() -> None:
    facts = Original(REFERENCE).facts
    assert bits_of(facts, facts.nbytes) == 16
    found = {engine: offered(ENGINES[engine].choices(facts), facts, 9_000_000) for engine in ENGINES}
    for offers in found.values():
        fitting = [offer for offer in offers if offer.fits]
        assert fitting
        assert [offer.fits for offer in offers] == sorted((offer.fits for offer in offers), reverse=True)
        assert all(offer.nbytes <= 9_000_000 and offer.grade in GRADES.values() for offer in fitting)
        costs = [offer.expected for offer in fitting]
        assert costs == sorted(costs, key=lambda cost: cost or 0.0)
        assert all(offer.why for offer in offers if not offer.fits)
    fewer = next(offer for offer in found["vllm"] if offer.choice.bits)
    assert (fewer.fits, fewer.why) == (False, "nothing is left to remove")  # 4 bits of all are 8.4 MB
    small = offered(ENGINES["vllm"].choices(facts), facts, 8_000_000)
    assert [offer.fits for offer in small] == [True, False, False]
    assert small[0].choice.bits == "int4g32"  # 96 inputs are three groups of 32


def test_nothing_is_offered_that_its_format_does_not_hold(run, tmp_path: Path) -> None:
    """Experts of gpt_oss have biases, which compressed-tensors does not hold; of what is not made nothing is warned."""
    tiny_model("gpt_oss", hidden_size=32, intermediate_size=32).save_pretrained(tmp_path)
    original = Original(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offers = {
            name: look(original, memory=original.facts.nbytes, engine=ENGINES[name], context=32).offers
            for name in ("vllm", "transformers")
        }
    assert {offer.choice.format for offer in offers["vllm"]} == {"compressed-tensors"}
    assert not any(offer.fits for offer in offers["vllm"])
    assert any("without biases" in offer.why for offer in offers["vllm"])
    assert any(offer.fits for offer in offers["transformers"])
    # At 80 columns the names of choices stay whole, and why one is refused stands below.
    words = ["fit", tmp_path, "--memory", "120kB", "--context", "32"]
    for engine, told in (("transformers", "\nfewer experts: "), ("vllm", "4 bits for all")):
        _, shown, err = run(*words, "--engine", engine, "--dry-run")
        assert told in shown
        assert max(map(len, shown.splitlines())) <= 80
        assert ("format compressed-tensors holds experts without biases" in err) == (engine == "vllm")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_told_what_it_can_become(family: str, checkpoint: Callable[[str], Path]) -> None:
    original = Original(checkpoint(family))
    whole = original.facts.nbytes
    for engine in ENGINES.values():
        found = look(original, memory=10 * whole, engine=engine, context=32)
        assert found.fits_as_it_is == found.to_json()["fits_as_it_is"] == (engine.name != "llama.cpp")
        assert found.offers[0].nbytes <= whole
        (tight, nothing) = (offered(engine.choices(original.facts), original.facts, room) for room in (whole - 1, 99))
        assert tight[0].fits
        assert not any(offer.fits for offer in nothing)
        for offers, told in ((tight, "--choice 99: "), (nothing, f"the least for {engine.name} is .*--memory, less")):
            with pytest.raises(moetailor.MoetailorError, match=told):
                replace(found, offers=tuple(offers)).chosen(99)


def test_the_text_that_comes_along_is_that_of_the_reference_model() -> None:
    for file in (CALIBRATION, HELD_OUT):
        assert gzip.decompress(file.read_bytes()) == (REFERENCE / file.name.removesuffix(".gz")).read_bytes()
    card, told = ((folder / "README.md").read_text() for folder in (REFERENCE, TEXTS))
    for title in ("Texts, sources and licences", "Licence texts"):
        begin = card.index(f"## {title}")
        end = card.find("\n## ", begin + 1)
        assert card[begin : end if end > 0 else None].strip() in told


@pytest.mark.filterwarnings("always::moetailor.MoetailorWarning")
def test_fit_makes_what_fits_and_goes_on_where_it_was(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, data = tmp_path / "out", tmp_path / "text.jsonl"
    rows = (REFERENCE / "calibration.jsonl").read_text()
    data.write_text(rows)
    text = ["--data", data, "--held-out", REFERENCE / "heldout.jsonl"]
    monkeypatch.setattr("moetailor.fit.SEQUENCES", 16)
    monkeypatch.setattr("moetailor.fit.JUDGED", 2)
    monkeypatch.setattr("moetailor.calibration.text.LENGTH", 128)
    words = ["fit", REFERENCE, "--memory", "11MB", "--engine", "vllm", "--context", "128", *text, "-o", out]
    code, shown, err = run(*words)
    assert code == 1
    assert "nobody can be asked here which to make: give --yes" in err
    assert not out.exists()
    code, shown, err = run(*words, "--choice", "2")
    assert code == 0, err
    assert "\n2  4 bits for all" in shown
    assert f"serve it: vllm serve {out} --host 127.0.0.1 --port 8000 --max-model-len 128" in err
    assert ("on a CPU vLLM 0.32 stops at experts" in " ".join(err.split())) != torch.cuda.is_available()
    # Eight 4-bit codes in a word, and a scale of two bytes for 32 of them: 4.5 bits for each of 7,077,888 weights
    assert moetailor.Plan.load(out / "moetailor_plan.json").nbytes == 18_536_832 - 7_077_888 * 2 + 7_077_888 * 9 // 16
    assert Original(out).config.quantization_config["config_groups"]["group_0"]["weights"]["group_size"] == 32
    before = (out / "model.safetensors").stat().st_mtime_ns
    # Other text, or another model of that shape, makes another result; and none takes the place of what is there.
    other = tmp_path / "other.jsonl"
    other.write_text(rows)
    code, _, err = run(*words, "--data", other, "--choice", "2")
    assert (code, f"{out}: exists; choose another folder" in " ".join(err.split())) == (1, True), err
    data.write_text("".join(reversed(rows.splitlines(keepends=True))))
    code, _, err = run(*words, "--choice", "2")
    assert (code, f"{out}: exists; choose another folder" in " ".join(err.split())) == (1, True), err
    data.write_text(rows)
    monkeypatch.setattr("moetailor.fit.compress", lambda *args, **options: pytest.fail("it is there already"))
    assert run(*words, "--choice", "2")[0] == 0
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_fit_without_a_place_foretells_and_what_fits_is_left_alone(run, tmp_path: Path) -> None:
    code, shown, err = run("fit", REFERENCE, "--memory", "10MB")
    assert code == 0
    assert "\n1  bits and stand-ins  " in shown
    assert "time:   about" in err
    found = json.loads(run("fit", REFERENCE, "--memory", "10MB", "--json")[1])
    assert found["room"]["weights"] == 10_000_000 - 1_000_000 - 512 * 4 * 2 * 192 * 2
    assert [choice["fits"] for choice in found["choices"]] == [True, True, False]
    code, _, err = run("fit", REFERENCE, "--memory", "1GB", "-o", tmp_path / "out")
    assert code == 0
    assert "It fits as it is: moetailor serve" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run("fit", REFERENCE, "--memory", "10MB", "--context", "4096")
    assert code == 1
    assert "the model takes 512 tokens at most" in err
    assert "did you mean 'vllm'" in run("fit", REFERENCE, "--memory", "10MB", "--engine", "vlm")[2]


def test_measuring_is_foretold_with_making_where_the_result_is_measured() -> None:
    original, rates = Original(REFERENCE), Rates(products=1e9, elements=1e8, step=1e-6, reading=1e9)
    host, parts = Host(device="cpu", startup=5, rates=rates, resident=10**8), {}
    for engine in ("transformers", "llama.cpp"):
        found = look(original, memory=10_000_000, engine=find_engine(engine), context=128)
        job = Job(choice=found.chosen(), room=found.room)
        parts[engine] = foretold(host, original, job)
    measuring = of_evaluation(host, original, found.room.planned, text=job.judging)
    # 64 blocks of as many tokens as the model takes
    assert measuring.notes == ("measured on 32,768 tokens",)
    assert parts["transformers"].notes[-1:] == measuring.notes
    assert measuring.notes[0] not in parts["llama.cpp"].notes
    assert parts["transformers"].seconds > measuring.seconds


def test_a_column_is_that_of_texts_that_are_given() -> None:
    outlook = look(Original(REFERENCE), memory=11_000_000, engine=find_engine("vllm"), context=128)
    job = Job(choice=outlook.chosen(), room=outlook.room, data=("mine.jsonl",), text_column="body")
    assert (job.text.data, job.text.text_column) == (("mine.jsonl",), "body")
    assert (job.judging.data, job.judging.text_column) == ((str(HELD_OUT),), None)


def test_fit_streams_what_does_not_go_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Original(REFERENCE)
    outlook = look(original, memory=10_000_000, engine=find_engine("transformers"))
    job = Job(choice=outlook.chosen(), room=outlook.room)
    numbers = original.checkpoint.parameters
    monkeypatch.setattr("moetailor.fit.free_nbytes", lambda device: 4 * numbers)
    assert job.streams(original)
    monkeypatch.setattr("moetailor.fit.free_nbytes", lambda device: 8 * numbers)
    assert not job.streams(original)


def test_serve_says_what_it_would_run_and_refuses_what_the_engine_does_not_load(run, tmp_path: Path) -> None:
    code, shown, _ = run("serve", REFERENCE, "--engine", "vllm", "--context", "256", "--port", "81", "--dry-run")
    assert code == 0
    assert shown.split() == f"vllm serve {REFERENCE} --host 127.0.0.1 --port 81 --max-model-len 256".split()
    text = ["--data", REFERENCE / "calibration.jsonl", "--sequences", "8", "--length", "128"]
    assert run("compress", REFERENCE, "-o", tmp_path / "out", "--method", "mone", "--remove", "25%", *text)[0] == 0
    code, _, err = run("serve", tmp_path / "out", "--engine", "vllm", "--dry-run")
    assert code == 1
    assert "vLLM needs a plug-in for the moetailor format" in err
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr("moetailor.serving.engines.vllm.find_spec", lambda name: name)
        assert run("serve", tmp_path / "out", "--engine", "vllm", "--dry-run")[0] == 0
        facts = Original(REFERENCE).facts
        assert offered(ENGINES["vllm"].choices(facts), facts, 8_000_000)[0].choice.format == "moetailor"
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        code, _, err = run("serve", REFERENCE, "--engine", "vllm")
    assert code == 1
    assert "vllm: not found here; install it, name it with --binary, or run where it is: vllm serve" in err
    assert run("serve", tmp_path, "--dry-run")[0] == 1


def test_what_is_missing_is_said_when_it_is_needed_and_not_before(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking for llama.cpp needs no library of its own; the last line of fit is a command, and says what it lacks."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    words = ["fit", REFERENCE, "--memory", "8MB", "--context", "256", "--engine", "llama.cpp"]
    code, shown, err = run(*words)
    assert (code, "\n1  fewer, in 4 bits" in shown) == (0, True), err
    code, shown, err = run(*words, "-o", tmp_path / "out", "--yes")
    assert (code, "\n1  fewer, in 4 bits" in shown) == (1, True)
    assert "error: format gguf: writing an importance matrix needs the gguf library: pip install" in err
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    code, _, err = run("fit", REFERENCE, "--memory", "1GB")
    assert code == 0
    told, last = err.splitlines()[-2:]
    assert told == "note: transformers cannot serve here: pip install 'moetailor[serve]'"
    assert last.startswith(f"It fits as it is: moetailor serve {REFERENCE}")
    code, _, err = run("serve", REFERENCE)
    assert (code, "http://" in err) == (1, False)


def test_vllm_is_given_a_revision_as_it_takes_it(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    hub, here = (find_engine("vllm").command(Served(folder=folder)) for folder in (Path("a/b@v2"), tmp_path / "a@b"))
    assert " ".join(hub) == "vllm serve a/b --host 127.0.0.1 --port 8000 --revision v2"
    assert " ".join(here) == f"vllm serve {tmp_path / 'a@b'} --host 127.0.0.1 --port 8000"


def test_a_choice_says_its_estimate() -> None:
    facts = Original(REFERENCE).facts
    plan = Choice(name="8 bits", method="quantize", parameters={"bits": 8}).estimate(facts, facts.nbytes)
    # 7,077,888 weights of experts: 8 bits, and 16 + 8 for each group of 96
    assert plan.nbytes == facts.nbytes - 7_077_888 * 2 + 7_077_888 + 7_077_888 // 96 * 3
