"""run_tasks against log-likelihoods summed token by token, on the task files of examples/tasks."""

import json
import lzma
import math
import socket
import statistics
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

import moetailor
from moetailor.checkpoint.original import Original
from moetailor.errors import MoetailorError
from moetailor.evaluation.tasks import check_tasks, run_tasks

TASK_DIR = Path(__file__).parents[1] / "examples" / "tasks"
CHOICE_ROWS = [
    {"ctx": "The cat sat on the", "choices": ["mat", "of", "zebra crossing"], "label": 0},
    {"ctx": "Question: 2 + 2?\nAnswer:", "choices": ["four", "5"], "label": 0},
    {"ctx": "Water is", "choices": ["wet.", "a kind of cheese", "dry", "über"], "label": 0},
    {"ctx": 'It\'s "so" {{cold}}', "choices": ['that it\'s "ice"', "hot\\"], "label": 0},
    {"ctx": "A bird can", "choices": ["fly", "bark"], "label": 0},
]
WINO_ROWS = [
    {"ctx_options": ["Ann met Eve, so Ann", "Ann met Eve, so Eve"], "continuation": " said hello.", "label": 0},
    {"ctx_options": ["Box in bag, as the box", "Box in bag, as the bag"], "continuation": " is big.", "label": 1},
    {"ctx_options": ["Tom ran, and he", "Tom ran, and it"], "continuation": " won.", "label": 1},
]
BLIMP_ROWS = [
    {"good": "Cats sleep.", "bad": "Cats sleeps."},
    {"good": 'She\'s "here".', "bad": 'She\'re "here".'},
    {"good": "Who did he see?", "bad": "Who did he see him?"},
    {"good": "The same.", "bad": "The same."},  # a tie is not a success
]
LAMBADA_ROWS = [{"ctx": "He opened it and went", "continuation": " in"}, {"ctx": "One, two,", "continuation": " three"}]
SPECIAL_ROWS = {"winogrande": WINO_ROWS, "blimp": BLIMP_ROWS, "lambada": LAMBADA_ROWS}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other make tiny products take seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte, and an end-of-text token."""
    vocab = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eot>"])}
    bytes_ = Tokenizer(models.BPE(vocab, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<eot>", eos_token="<eot>", pad_token="<eot>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=257,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    return OlmoeForCausalLM(config).eval()


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Reference: nats of `continuation`, one forward pass a token, and whether greedy decoding would write it."""
    ids = tokenizer.encode(context) or [tokenizer.bos_token_id]
    total, greedy = 0.0, True
    for token in tokenizer.encode(continuation):
        log_probs_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        total += log_probs_V[token].item()
        greedy &= log_probs_V.argmax().item() == token
        ids.append(token)
    return total, greedy


def write(folder: Path, name: str, rows: list[dict]) -> None:
    folder.joinpath(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def argmax(values) -> int:
    values = list(values)
    return values.index(max(values))


@pytest.mark.parametrize(("task", "strip"), [("arc_easy", False), ("hellaswag", True)])
def test_multiple_choice_equals_hand_scoring(task, strip, model, tokenizer, tmp_path):
    rows, acc, acc_norm = [], [], []
    for i, row in enumerate(CHOICE_ROWS):
        choices = [" " * (strip and j % 2) + choice for j, choice in enumerate(row["choices"])]
        lls = [log_likelihood(model, tokenizer, row["ctx"], " " + choice)[0] for choice in row["choices"]]
        label = (argmax(lls) + (i == 1)) % len(choices)  # all right but one
        rows.append({**row, "choices": choices, "label": label})
        acc.append(argmax(lls) == label)
        acc_norm.append(argmax(ll / len(choice) for ll, choice in zip(lls, row["choices"], strict=True)) == label)
    write(tmp_path, f"{task}.validation.jsonl", rows)

    scores = run_tasks(model, tokenizer, [task, task], task_dir=TASK_DIR, task_data=tmp_path, batch_size=3)

    n = len(rows)
    assert sum(acc) == n - 1
    assert scores == {
        task: {
            "acc": pytest.approx(sum(acc) / n),
            "acc_stderr": pytest.approx(statistics.stdev(acc) / n**0.5),
            "acc_norm": pytest.approx(sum(acc_norm) / n),
            "acc_norm_stderr": pytest.approx(statistics.stdev(acc_norm) / n**0.5),
            "n": n,
        }
    }


def test_winogrande_compares_the_contexts(model, tokenizer, tmp_path):
    rows = []
    for row in WINO_ROWS:
        lls = [log_likelihood(model, tokenizer, context, row["continuation"])[0] for context in row["ctx_options"]]
        rows.append({**row, "label": argmax(lls)})
    rows.append({**rows[0], "label": 1 - rows[0]["label"]})
    write(tmp_path, "winogrande.validation.jsonl", rows)
    scores = run_tasks(model, tokenizer, ["winogrande"], task_dir=TASK_DIR, task_data=tmp_path)
    assert scores["winogrande"] == {"acc": 0.75, "acc_stderr": pytest.approx(0.25), "n": 4}


def test_blimp_compares_sentences_and_gives_ties_to_the_bad_one(model, tokenizer, tmp_path):
    rows = []
    for row in BLIMP_ROWS:
        good, bad = sorted([row["good"], row["bad"]], key=lambda s: -log_likelihood(model, tokenizer, "", s)[0])
        rows.append({"good": good, "bad": bad})
    rows.append({"good": rows[0]["bad"], "bad": rows[0]["good"]})
    write(tmp_path, "blimp.test.jsonl", rows)
    scores = run_tasks(model, tokenizer, ["blimp"], task_dir=TASK_DIR, task_data=tmp_path)
    assert scores["blimp"]["acc"] == pytest.approx(3 / 5)  # three likelier, one tie, one less likely


def test_lambada_is_greedy_accuracy_and_perplexity_of_the_word(model, tokenizer, tmp_path):
    ids = tokenizer.encode("The end is")
    greedy = tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False)[0, len(ids) :])
    rows = [*LAMBADA_ROWS, {"ctx": "The end is", "continuation": greedy}]
    outcomes = [log_likelihood(model, tokenizer, row["ctx"], row["continuation"]) for row in rows]
    write(tmp_path, "lambada.test.jsonl", rows)
    scores = run_tasks(model, tokenizer, ["lambada"], task_dir=TASK_DIR, task_data=tmp_path)["lambada"]
    assert [hit for _, hit in outcomes] == [False, False, True]
    assert scores["acc"] == pytest.approx(1 / 3)
    assert scores["perplexity"] == pytest.approx(math.exp(-statistics.mean(ll for ll, _ in outcomes)), rel=1e-4)


def test_every_shipped_task_runs_offline_and_silently(model, tokenizer, tmp_path, capfd, monkeypatch):
    def refuse(*_args):
        raise AssertionError("a task asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    names = sorted(path.stem for path in TASK_DIR.glob("[!_]*.yaml"))
    for name in names:
        split = "test" if name in ("blimp", "lambada", "mmlu") else "validation"
        with lzma.open(tmp_path / f"{name}.{split}.jsonl.xz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in SPECIAL_ROWS.get(name, CHOICE_ROWS))
    scores = run_tasks(model, tokenizer, names, task_dir=TASK_DIR, task_data=tmp_path, limit=2)
    assert list(scores) == names
    assert capfd.readouterr() == ("", "")
    assert len(names) == 13
    for name in names:
        second = {"winogrande": None, "blimp": None, "lambada": "perplexity"}.get(name, "acc_norm")
        assert {key for key in scores[name] if not key.endswith("_stderr")} == {"acc", "n", second} - {None}
        assert scores[name]["n"] == 2


def test_own_task_with_data_beside_it_and_one_document(model, tokenizer, tmp_path):
    write(tmp_path, "mine.jsonl", CHOICE_ROWS[:1])
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": ["mine.jsonl"]}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "ctx",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    scores = run_tasks(model, tokenizer, ["mine"], task_dir=tmp_path)
    assert scores["mine"].keys() == {"acc", "n"}  # one document has no standard error


def test_errors_name_the_cure(model, tokenizer, tmp_path, monkeypatch):
    def message(task: str, task_dir: Path = TASK_DIR) -> str:
        with pytest.raises(MoetailorError) as info:
            run_tasks(model, tokenizer, [task], task_dir=task_dir, task_data=tmp_path)
        return str(info.value)

    unknown = f"unknown task 'arc_eazy' in {TASK_DIR}; did you mean 'arc_easy'? Known: arc_challenge, arc_easy, blimp,"
    assert message("arc_eazy").startswith(unknown)
    assert message("xyz", tmp_path) == f"unknown task 'xyz' in {tmp_path}: it has none; see --task-dir"
    missing = f"task 'copa' reads copa.validation.jsonl.xz, not found in {tmp_path}: name its folder with --task-data"
    assert message("copa") == missing
    (tmp_path / "hub.yaml").write_text("{task: hub, dataset_path: some/dataset, dataset_kwargs: {data_files: x}}")
    assert message("hub", tmp_path).startswith(
        f"task 'hub' ({tmp_path / 'hub.yaml'}) does not read local files: give it"
    )
    write(tmp_path, "rte.validation.jsonl", [{"question": "no ctx here"}])
    assert message("rte").startswith("task 'rte' does not fit its data: UndefinedError: 'ctx' is undefined")
    (tmp_path / "rte.validation.jsonl").write_text("not json\n")
    assert message("rte").startswith("task 'rte' does not fit its data: ")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert message("copa").endswith("pip install moetailor[tasks]")


# Tasks that bring code along

PLAIN = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": ["mine.jsonl"]}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "ctx",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}


def yaml_of(**changes: object) -> str:
    """Return a task as YAML; what is given as text after ``!`` keeps its tag, what is None is left out."""
    lines = []
    for key, value in (PLAIN | changes).items():
        if value is None:
            continue
        tagged = isinstance(value, str) and value.startswith("!")
        lines.append(f"{key}: {value if tagged else json.dumps(value)}\n")
    return "".join(lines)


@pytest.fixture
def foreign(tmp_path):
    """A folder with a task's rows and a Python file that leaves a mark when it is imported or called."""
    write(tmp_path, "mine.jsonl", CHOICE_ROWS[:2])
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').close()\n"
    (tmp_path / "utils.py").write_text(code + "def context(doc):\n    return doc['ctx']\nclass Own:\n    pass\n")
    return tmp_path, mark


CODE = {
    "text": {"mine.yaml": yaml_of(doc_to_text="!function utils.context")},
    "list": {
        "mine.yaml": yaml_of(metric_list=[{"metric": "acc"}]) + "filter_list: [{filter: [!function utils.context]}]\n"
    },
    "key": {"mine.yaml": yaml_of() + "metadata: {? !function utils.context : 1}\n"},
    "included": {
        "mine.yaml": "include: more/base.yaml\ntask: mine\n",
        "more/base.yaml": yaml_of(task=None, doc_to_text="!function ..utils.context"),
    },
    "second of two": {
        "mine.yaml": "include: [a.yaml, b.yaml]\ntask: mine\n",
        "a.yaml": yaml_of(task=None),
        "b.yaml": "process_docs: !function utils.context\n",
    },
    "merged": {
        "mine.yaml": "<<: &base {include: b.yaml}\ntask: mine\n",
        "b.yaml": yaml_of(task=None, doc_to_text="!function utils.context"),
    },
    "other spelling": {"mine.yaml": "%TAG !f! !func\n---\n" + yaml_of(doc_to_text="!f!tion utils.context")},
    "verbatim": {"mine.yaml": yaml_of(doc_to_text="!<!function> utils.context")},
    "metric that is a script": {"mine.yaml": yaml_of(metric_list=[{"metric": "utils.py"}])},
    "metric of a library": {"mine.yaml": yaml_of(metric_list=[{"metric": "acc", "hf_evaluate": True}])},
}


@pytest.mark.parametrize("files", CODE.values(), ids=CODE)
def test_code_of_a_task_does_not_run_unasked(files, foreign, model, tokenizer):
    folder, mark = foreign
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    for check in (check_tasks, lambda names, **given: run_tasks(model, tokenizer, names, **given)):
        with pytest.raises(MoetailorError) as refused:
            check(["mine"], task_dir=folder)
        assert str(refused.value).startswith(f"task 'mine' ({folder / 'mine.yaml'}) would run code: ")
        assert str(refused.value).endswith("; pass --trust-remote-code if you trust it")
    assert not mark.exists()


def test_code_of_a_task_runs_when_it_is_trusted(foreign, model, tokenizer):
    folder, mark = foreign
    (folder / "mine.yaml").write_text(yaml_of(doc_to_text="!function utils.context"))
    trusted = run_tasks(model, tokenizer, ["mine"], task_dir=folder, trust_remote_code=True)
    assert mark.exists()
    (folder / "mine.yaml").write_text(yaml_of())
    assert run_tasks(model, tokenizer, ["mine"], task_dir=folder) == trusted


def test_python_beside_a_task_is_not_imported(foreign, model, tokenizer):
    folder, mark = foreign
    # The filter that lm-eval adds to templates is there.
    (folder / "mine.yaml").write_text(yaml_of(doc_to_text="{{ ctx | regex_replace('a', 'o') }}"))
    (folder / "__init__.py").write_text((folder / "utils.py").read_text())
    # Another task of the folder names it; the one that is asked for does not.
    (folder / "other.yaml").write_text(yaml_of(task="other", doc_to_text="!function utils.context"))
    assert run_tasks(model, tokenizer, ["mine"], task_dir=folder)["mine"]["n"] == 2
    assert not mark.exists()


@pytest.mark.parametrize("first", [0, 1], ids=["every row", "a later row"])
def test_templates_reach_their_rows_only(first, foreign, model, tokenizer):
    folder, mark = foreign
    rows = [row | {"safe": number < first} for number, row in enumerate(CHOICE_ROWS[:2])]
    write(folder, "mine.jsonl", rows)
    reach = "cycler.__init__.__globals__.os.system('touch " + str(mark) + "')"
    template = "{% if not safe %}{{ " + reach + " }}{% endif %}{{ ctx }}"
    (folder / "mine.yaml").write_text(yaml_of(doc_to_text=template))
    with pytest.raises(MoetailorError, match="does not fit its data: SecurityError: access to attribute '__init__'"):
        run_tasks(model, tokenizer, ["mine"], task_dir=folder)
    assert not mark.exists()
    run_tasks(model, tokenizer, ["mine"], task_dir=folder, trust_remote_code=True)
    assert mark.exists()


def test_a_task_is_refused_before_a_model_runs(foreign, monkeypatch):
    folder, mark = foreign
    (folder / "mine.yaml").write_text(yaml_of(doc_to_text="!function utils.context"))
    monkeypatch.setattr(Original, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    reference = TASK_DIR.parent / "reference-moe"
    text = moetailor.TextOptions(data=(str(reference / "heldout.jsonl"),), sequences=1, length=16)
    for name, said in (("mine", "would run code: !function utils.context"), ("absent", "unknown task 'absent'")):
        tasks = moetailor.TaskOptions(tasks=(name,), task_dir=folder)
        with pytest.raises(MoetailorError, match=said):
            moetailor.evaluate(reference, reference, text=text, tasks=tasks)
    assert not mark.exists()
