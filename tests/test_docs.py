"""The docs say what the code does: generated pages, links, flags, and code that runs."""

import json
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from typer.main import get_command

import moetailor
from moetailor.answers import ANSWERS
from moetailor_cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [
    page for folder in (".", "docs", "examples/*", "benchmarks", "plugins/*") for page in ROOT.glob(f"{folder}/*.md")
]


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="the pages list the newest families")
def test_generated_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate

    for file, page in generate.PAGES.items():
        assert (ROOT / "docs" / file).read_text() == page(), f"docs/{file} is stale; run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# Plans say of packed and narrow experts what their layers' `widths` and `neurons` say.
@pytest.mark.parametrize("name", sorted(ANSWERS.keys() - {"packed", "narrow"}))
def test_fields_of_an_answer_are_in_the_page_of_formats(name: str) -> None:
    rows = (ROOT / "docs" / "formats.md").read_text().split("| answer | fields |")[1].splitlines()
    told = next(row for row in rows if row.startswith(f"| `{name}` |"))
    assert [field.name for field in fields(ANSWERS[name]) if f"`{field.name}`" not in told] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_docs_have_flags_that_exist(page: Path) -> None:
    verbs = get_command(app).commands
    for line in re.findall(rf"^\s*(?:\$ )?(moetailor (?:{'|'.join(verbs)}) .*)$", page.read_text(), re.MULTILINE):
        words = shlex.split(line.partition("#")[0])
        words = words[: words.index("--")] if "--" in words else words  # what follows is another program's
        verb = verbs[words[1]]
        known = {option for parameter in verb.params for option in parameter.opts}
        flags = {word for word in words[2:] if re.match(r"--?[a-z]", word)}
        assert flags <= known, f"{page.name}: {line}"


def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks run in order, with the reference model in place of the names."""
    reference = ROOT / "examples" / "reference-moe"
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        code = block.replace("allenai/OLMoE-1B-7B-0125", str(reference)).replace(
            '"text.jsonl"', repr(str(reference / "calibration.jsonl"))
        )
        exec(code.replace("length=2048", "length=64").replace("sequences=128", "sequences=4"), {})
    assert (tmp_path / "OLMoE-small" / "config.json").is_file()


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], *([verb, "--help"] for verb in get_command(app).commands)], ids=" ".join
)
def test_help_is_quick_and_loads_nothing_heavy(words: list[str]) -> None:
    """Less than a second and a half of a processor, whatever else it does meanwhile."""
    code = (
        f"import sys; sys.argv = ['moetailor', *{words}]\n"
        "from moetailor_cli.app import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert shown.strip().endswith("[]")
    if words != ["--help"]:
        return
    verbs = "inspect calibrate methods plan allocate show diff apply compress compare evaluate recover report"
    for verb in verbs.split():
        assert verb in shown


PUBLIC = """
METHODS Allocated Batch Budget Calibration CalibrationError CheckpointError ExampleOptions ExpertWeights MoetailorConfig
MoetailorError MoetailorWarning Plan PlanError RecoveryOptions RecoveryResult Redundancy SampleOptions Scores
SearchOptions TaskOptions TextOptions Width __version__ allocate apply calibrate compare compress evaluate
find_redundancy make_plan precheck read_batches recover
""".split()
FLAGS = {
    "fit": "--choice --context --converter --data --device --dry-run --dtype --engine --held-out --json --memory --out "
    "--overwrite --push-to-hub --quantizer --revision --text-column --trust-remote-code --yes",
    "inspect": "--calibration --json --revision --trust-remote-code",
    "calibrate": "--batch-size --data --device --device-map --dry-run --dtype --length --mask-special --out "
    "--residual --revision --sample-size --sample-tokens --seed --sensitivity --sequences --states "
    "--stream --text-column --trust-remote-code",
    "methods": "",
    "plan": "--allocation --batch-memory --bits --device --dry-run --guard-super-experts --keep --layers --load-dtype "
    "--memory --method --model --native --out --param --protect --remove --size --trust-remote-code --uniform-layers",
    "allocate": "--device --dtype --generations --keep --layers --load-dtype --memory --method --model --out "
    "--param --population --protect --remove --samples --seed --size --survivors --trust-remote-code",
    "show": "--ranking --scores",
    "diff": "",
    "apply": "--allow-other-weights --batch-memory --calibration --converter --device --dry-run --format "
    "--gguf-recipe --out --overwrite --propagate --push-to-hub --quantizer --revision --trust-remote-code --verify",
    "compress": "--allocation --batch-memory --batch-size --bits --calibration --converter --data --device "
    "--device-map --dry-run --dtype --format --guard-super-experts --keep --layers --length --load-dtype "
    "--mask-special --memory --method --native --out --overwrite --param --propagate --protect --push-to-hub "
    "--quantizer --remove --revision --sample-size --sample-tokens --seed --sequences --size --states --stream "
    "--text-column --trust-remote-code --uniform-layers",
    "evaluate": "--against --batch-size --data --device --device-map --dry-run --dtype --json --length --limit "
    "--revision --scratch --sequences --stream --task-data --task-dir --tasks --text-column "
    "--trust-remote-code",
    "compare": "--batch-memory --batch-size --calibration --data --device --dry-run --dtype --held-out "
    "--held-out-sequences --length --mask-special --methods --out --remove --revision --sample-size "
    "--sample-tokens --scratch --seed --sequences --sizes --stream --text-column --trust-remote-code",
    "lm-eval": "--dry-run --engine",
    "serve": "--binary --context --dry-run --engine --host --port",
    "recover": "--accumulate --anneal --anneal-gamma --batch-size --data --device --dtype --epochs --fsdp "
    "--gradient-checkpointing --held-out --json --layer-weight --length --lora-alpha --lora-rank --loss "
    "--loss-on --lr --out --overwrite --revision --save-every --seed --steps --teacher --temperature "
    "--text-column --train --trust-remote-code --warmup --weight-decay",
    "report": "",
}
# Those of every verb.
EVERY = {"--quiet", "--recipe", "--verbose"}


def test_the_surface_is_frozen() -> None:
    """A new name, verb or flag is added to these lists on purpose."""
    assert sorted(moetailor.__all__) == sorted(PUBLIC)
    found = {
        name: {option for p in verb.params for option in p.opts if option.startswith("--")}
        for name, verb in get_command(app).commands.items()
    }
    assert all(flags >= EVERY for flags in found.values())
    assert {name: " ".join(sorted(flags - EVERY)) for name, flags in found.items()} == FLAGS


def test_the_reference_model_is_what_its_card_says() -> None:
    folder = ROOT / "examples" / "reference-moe"
    tensors = load_file(folder / "model.safetensors")
    card = (folder / "README.md").read_text()
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    told = re.search(r"\| parameters \| ([\d.]+) M, of which ([\d.]+) M in experts", card)
    assert told is not None
    counted = (sum(tensor.numel() for tensor in tensors.values()), experts)
    assert told.groups() == tuple(f"{count / 1e6:.2f}" for count in counted)
    assert f"file of {(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB" in card
    # Stored, so that engines load it which know no tied head; the numbers of the embedding, so that nothing changed.
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
