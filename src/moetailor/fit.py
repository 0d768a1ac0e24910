"""A model and a machine in, a result that its engine serves out: what fits is looked up, one of it is made, and judged.

Looking needs config.json and headers alone. Making it is `compress` and `evaluate`, on text that comes with moetailor
unless other text is given; a run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moetailor.calibration.batch import text_fingerprint
from moetailor.calibration.sampling import SampleOptions
from moetailor.calibration.text import TextOptions, read_batches
from moetailor.checkpoint.devices import free_nbytes, give_back, resolve_device
from moetailor.checkpoint.models import longest_sequence, resolve_dtype
from moetailor.checkpoint.original import Original
from moetailor.checkpoint.place import PLAN_FILE, PROVENANCE_FILE, check_place
from moetailor.errors import MoetailorError
from moetailor.estimates.compiling import kinds_of
from moetailor.estimates.estimate import Estimate, Host, in_turn, nothing
from moetailor.estimates.running import of_evaluation
from moetailor.estimates.sizes import cost_of
from moetailor.estimates.together import of_compression
from moetailor.evaluation.evaluate import Scores, evaluate
from moetailor.methods.estimate import budget_words, estimate_plan
from moetailor.pipeline import calibration_folder, compress, finished_calibration
from moetailor.planning.budget import Budget
from moetailor.planning.plan import Plan
from moetailor.progress import Stages
from moetailor.schema import load_json, read
from moetailor.serving import Choice, Engine, Offered, Room, offered
from moetailor.transform.formats import resolve_format
from moetailor.transform.formats.gguf import Gguf
from moetailor.words import nbytes

TEXTS = Path(__file__).parent / "texts"
# Text in five domains, made for the reference model, see the README beside it.
CALIBRATION, HELD_OUT = TEXTS / "calibration.jsonl.gz", TEXTS / "heldout.jsonl.gz"
# Tokens of the context that must fit where nothing else is said.
CONTEXT = 8192
# Blocks that calibrate, and that judge.
SEQUENCES, JUDGED = 128, 64
# Share of the memory that is free beyond which a model does not go into it as a whole.
WHOLE = 0.6


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a model can become on a machine.

    Attributes:
        engine: what shall serve it.
        room: where the memory goes.
        nbytes: bytes of the original's tensors.
        offers: what it can become, the best first; what does not fit last.
    """

    engine: Engine
    room: Room
    nbytes: int
    offers: tuple[Offered, ...]

    @property
    def fits_as_it_is(self) -> bool:
        """Whether nothing has to be done."""
        return self.engine.loads_originals and self.nbytes <= self.room.weights

    def chosen(self, number: int | None = None) -> Choice:
        """Return the choice of a number, from 1 on; the best where none is given.

        Raises:
            MoetailorError: there is none, or it does not fit.
        """
        fitting = [offer.choice for offer in self.offers if offer.fits]
        if not fitting:
            sizes = [offer.nbytes for offer in self.offers if offer.nbytes]
            whys = "; ".join(f"{offer.choice.name}: {offer.why}" for offer in self.offers)
            least = f"the least for {self.engine.name} is {nbytes(min(sizes))}" if sizes else whys
            told = f"weights may take {nbytes(self.room.weights)}, and {least}"
            raise MoetailorError(f"{told}; give more --memory, less --context, or another --engine")
        if number is not None and not 1 <= number <= len(fitting):
            raise MoetailorError(
                f"--choice {number}: there are {len(fitting)} that fit; name one of 1 to {len(fitting)}"
            )
        return fitting[(number or 1) - 1]

    def to_json(self) -> dict:
        """Return it as JSON values."""
        return {
            "format": "moetailor-outlook",
            "version": 1,
            "engine": self.engine.name,
            "original_bytes": self.nbytes,
            "fits_as_it_is": self.fits_as_it_is,
            "room": asdict(self.room) | {"weights": self.room.weights},
            "choices": [offer.to_json() for offer in self.offers],
        }


def look(original: Original, *, memory: int, engine: Engine, context: int | None = None) -> Outlook:
    """Say what a model can become to be served in some memory; no weights are read.

    Args:
        original: the model; headers are enough.
        memory: bytes that the engine may take, for weights, cache and itself.
        engine: which.
        context: tokens of the one sequence whose keys and values must fit; 8,192, or what the model takes at most, when
            None.

    Raises:
        MoetailorError: nothing is left for weights, or the model takes no such context.
    """
    longest = longest_sequence(original.plain_config)
    if context is not None and longest is not None and context > longest:
        raise MoetailorError(f"--context {context:,}: the model takes {longest:,} tokens at most")
    room = engine.room(original, memory, context or min(CONTEXT, longest or CONTEXT))
    offers = offered(engine.choices(original.facts), original.facts, room.planned, original)
    served = (replace(offer, nbytes=max(offer.nbytes - room.saved, 0)) for offer in offers)
    return Outlook(engine=engine, room=room, nbytes=original.facts.nbytes, offers=tuple(served))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A choice to be made true.

    Attributes:
        choice: which.
        room: where the memory goes.
        data: calibration text, as `TextOptions` takes it.
        held_out: text to measure on.
        text_column: the column that holds the text of a row; what comes along has one of its own.
        tools: the programs that write the result, by the options of `compress`, see `Engine.tools`.
        device: where models run.
        dtype: dtype of the runs.
    """

    choice: Choice
    room: Room
    data: tuple[str, ...] = (str(CALIBRATION),)
    held_out: tuple[str, ...] = (str(HELD_OUT),)
    text_column: str | None = None
    tools: Mapping[str, Path] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None

    @property
    def budget(self) -> Budget:
        """What the choice is asked to stay within."""
        return self.choice.budget(self.room.planned)

    @property
    def text(self) -> TextOptions:
        """What it is calibrated on."""
        return self._options(self.data, SEQUENCES)

    @property
    def judging(self) -> TextOptions:
        """What it is measured on."""
        return replace(self._options(self.held_out, JUDGED), batch_size=1)

    def _options(self, names: tuple[str, ...], sequences: int) -> TextOptions:
        own = set(names) <= {str(CALIBRATION), str(HELD_OUT)}
        return TextOptions(data=names, sequences=sequences, text_column=None if own else self.text_column)

    def streams(self, original: Original) -> bool:
        """Say whether the model must run a layer at a time, since it does not go whole into the memory that is free."""
        device = resolve_device(self.device)
        itemsize = resolve_dtype(self.dtype, device, original.checkpoint).itemsize
        return cost_of(original).numbers * itemsize > WHOLE * free_nbytes(device)

    def made(self, out: Path, original: Original) -> Plan | None:
        """Return the plan of a result that is what this makes of a model, where there is one."""
        if not (out / PLAN_FILE).is_file() or not (out / PROVENANCE_FILE).is_file():
            return None
        plan = Plan.load(out / PLAN_FILE)
        method, budget = self.choice.made_by, budget_words(self.budget, "uniform", self.choice.width)
        wanted = (method.name, dict(method.parameters), budget, original.facts.fingerprint)
        if (plan.method, dict(plan.parameters), plan.budget, plan.model.fingerprint) != wanted:
            return None
        cure = "move the folder away, or name another one"
        run = load_json(out / PROVENANCE_FILE, error=MoetailorError, cure=cure).get("calibration")
        if not isinstance(run, dict) or (options := run.get("options")) is None:
            return None
        text = read(TextOptions, options, f"{out / PROVENANCE_FILE}: options", error=MoetailorError, cure=cure)
        dtype = str(resolve_dtype(self.dtype, resolve_device(self.device), original.checkpoint))
        # The length is that of the model where none was said.
        if replace(text, length=self.text.length) != self.text or run.get("dtype") != dtype:
            return None
        limits = {"max_length": longest_sequence(original.config), "vocab_size": original.config.vocab_size}
        known = text_fingerprint(read_batches(self.text, original.tokenizer(), **limits))
        return plan if known.items() <= (run.get("text") or {}).items() else None


def foretold(host: Host, original: Original, job: Job, out: Path | None = None, *, overwrite: bool = False) -> Estimate:
    """Return what making and measuring it will take, as `fit` does it; the text that is there may end sooner.

    Raises:
        MoetailorError: `fit` would refuse it.
    """
    made = out is not None and not overwrite and job.made(out, original) is not None
    if out is not None and not made:
        check_place(out, overwrite=overwrite, inputs={"the original": original.folder})
    given = {"budget": job.budget, "text": job.text, "format": job.choice.format}
    given |= {"layers": None, "protect": (), "allocation": "uniform", "width": job.choice.width}
    run = {"stream": job.streams(original), "dtype": job.dtype}
    if made:
        parts = [nothing("fit", host)]
    else:
        measured = None if out is None else finished_calibration(original, calibration_folder(out))
        compression = {"calibration": measured, "sample": SampleOptions(), **run}
        parts = of_compression(host, original, job.choice.made_by, given, **compression)
    if job.choice.format != Gguf.name:
        plan = estimate_plan(original.facts, job.choice.made_by, job.budget, width=job.choice.width)
        kinds = kinds_of(plan, resolve_format(plan, job.choice.format, original))
        nbytes = min(job.room.planned, original.facts.nbytes)
        parts.append(of_evaluation(host, original, nbytes, kinds=kinds, text=job.judging, **run))
    elif job.tools and not made:
        told = "what llama.cpp's programs take to convert and round it is not foretold"
        parts[-1] = replace(parts[-1], notes=(*parts[-1].notes, told))
    return in_turn("fit", parts, host.startup)


def fit(
    original: Original, out: Path, job: Job, *, overwrite: bool = False, progress: Stages | None = None
) -> tuple[Plan, Scores | None]:
    """Calibrate, plan and write, unless that was done, and measure the result on text that it was not made with.

    What transformers does not load, GGUF, is not measured.

    Args:
        original: the model.
        out: folder of the result; the calibration is in ``OUT.calibration``.
        job: what it becomes.
        overwrite: replace an earlier result.
        progress: called with (stage, done, in all).

    Raises:
        MoetailorError: see `compress` and `evaluate`.
    """
    run: dict[str, Any] = {"device": job.device, "dtype": job.dtype, "stream": job.streams(original)}
    run |= {"trust_remote_code": original.trust_remote_code, "progress": progress}
    plan = None if overwrite else job.made(out, original)
    if plan is None:
        _, plan = compress(
            original.source,
            out,
            text=job.text,
            method=job.choice.method,
            parameters=job.choice.parameters,
            budget=job.budget,
            width=job.choice.width,
            format=job.choice.format,
            overwrite=overwrite,
            **job.tools,
            **run,
        )
    if job.choice.format == Gguf.name:
        return plan, None
    give_back()
    return plan, evaluate(out, original.source, text=job.judging, **run)
