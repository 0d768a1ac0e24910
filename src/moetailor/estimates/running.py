"""What calibrate and evaluate will take: models that run over text, in memory or a layer at a time.

Shapes: T tokens, B sequences of a batch, L tokens of a sequence, D model width, E experts, N sampled tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moetailor.calibration.capture import PORTION_CPU
from moetailor.calibration.layers import PREDICTIONS
from moetailor.calibration.sampling import SampleOptions
from moetailor.calibration.sensitivity import TOKENS
from moetailor.calibration.text import TextOptions, files_of, length_of
from moetailor.checkpoint.files import DTYPE_NAMES
from moetailor.checkpoint.models import longest_sequence, resolve_dtype, stored_dtype
from moetailor.checkpoint.original import Original
from moetailor.estimates.compiling import of_loops
from moetailor.estimates.estimate import LIBRARIES, Estimate, Host, nothing
from moetailor.estimates.sizes import ModelCost, cost_of, downloads_of, statistics_nbytes
from moetailor.evaluation.evaluate import check_predicts
from moetailor.planning.work import Work

# Bytes that the file of a text has for each token, and those of a small file's header or of a manifest.
TOKEN, SMALL = 33, 1000
# How often numbers are gone over while they are loaded, while predictions are compared, and while experts are rounded
# to see what that costs.
LOADED, COMPARED, ROUNDED = 6, 16, 90
# Portions of outputs that lie there while a layer's statistics are taken: what its experts are given and work out, and
# sums in float64.
PORTIONS = 7
# Share of all experts that transformers has read, and not stacked yet, when there is most: .5 and .97 were measured.
AHEAD = 0.7
SHORTER = "for {:,} tokens; a text that ends sooner takes less"
# Tokens that `measure_speed` runs: prompts of prefill and decode, as shares of one, and new tokens.
PROMPTS, NEW = 4 + 1.5, 96


@dataclass(frozen=True, kw_only=True)
class Run:
    """A model that runs over text.

    Attributes:
        cost: the model's.
        width: bytes of a number in the dtype of the run.
        tokens: of the text, T.
        batch: tokens of a batch, B L.
        length: tokens of a sequence, L.
        stream: whether a layer is in memory at a time.
        mapped: whether some weights of a model in memory are its files' own, which then stay mapped.
    """

    cost: ModelCost
    width: int
    tokens: int
    batch: int
    length: int
    stream: bool
    mapped: bool

    @property
    def states(self) -> int:
        """Bytes of the hidden states of the text in front of a layer."""
        return self.tokens * self.cost.width * self.width

    @property
    def batches(self) -> float:
        """Batches of the text."""
        return self.tokens / self.batch

    @property
    def loading(self) -> Work:
        """The work of bringing the weights into memory, beside reading them."""
        return Work(elements=LOADED * self.cost.numbers)

    def memory(self, held: int, *, captured: bool = False) -> int:
        """Return the bytes of memory of a run.

        While a whole model is loaded its files are mapped, and of experts that lie one by one more are read ahead than
        are stacked, whose memory the process keeps; after that there is what is held beside it.

        Args:
            held: bytes of that, without a batch's own.
            captured: whether statistics are taken, for which experts run on a portion of a batch at a time.
        """
        cost, held = self.cost, held + LIBRARIES
        batch = self.activations + (PORTIONS * PORTION_CPU if captured else self.outputs)
        if self.stream:
            resting, loading = max(cost.largest.numbers, cost.outside), 2 * cost.stacked
            return max(resting * self.width + held + batch, loading * self.width + held)
        ahead = AHEAD * sum(layer.routed_all for layer in cost.layers) if cost.stacked else 0
        return int(cost.numbers + ahead) * self.width + max(cost.nbytes, self.mapped * cost.nbytes + held + batch)

    @property
    def predictions(self) -> int:
        """Bytes of memory that predictions of two models take while they are compared."""
        return 2 * min(PREDICTIONS, self.batch * self.cost.vocabulary) * self.width

    @property
    def activations(self) -> int:
        """Bytes of memory that a batch takes beside its experts."""
        return self.batch * self.cost.width * self.width * 12

    @property
    def outputs(self) -> int:
        """Bytes of memory that all experts of a layer take that run on a batch: 3 D and 4 F numbers a pair."""
        width = self.cost.width
        # The K experts of a token have 3 K D F weights.
        numbers = max(3 * layer.top_k * width + 4 * layer.routed // (3 * width) for layer in self.cost.layers)
        return self.batch * numbers * self.width


def run_of(original: Original, text: TextOptions, *, stream: bool, device: str, dtype: str | None) -> Run:
    """Return how a checkpoint runs over a text, of which nothing is read.

    Raises:
        CalibrationError: blocks are longer than the model takes.
    """
    _ = files_of(text.data)  # which refuses those that are not there
    assert text.sequences is not None  # how much text there is would be known once it is read
    length = length_of(text.length, longest_sequence(original.plain_config))
    run, keys = resolve_dtype(dtype, device, original.checkpoint), Counter(original.skeleton.names.values())
    alone = (key for key, name in original.skeleton.names.items() if keys[name] == 1)
    return Run(
        cost=cost_of(original),
        width=run.itemsize,
        tokens=text.sequences * length,
        batch=min(text.batch_size, text.sequences) * length,
        length=length,
        stream=stream,
        mapped=any(original.checkpoint.numbers[key].dtype == DTYPE_NAMES[run] for key in alone),
    )


def of_calibration(
    host: Host,
    original: Original,
    *,
    text: TextOptions,
    sample: SampleOptions,
    residual: bool = False,
    sensitivity: bool = False,
    stream: bool = False,
    states: str = "auto",
    dtype: str | None = None,
    finished: bool = False,
) -> Estimate:
    """Return what `calibrate` will take on a machine: the other arguments are those of `calibrate`, but for `finished`:
    whether sensitivities are all that is not there.
    """
    run = run_of(original, text, stream=stream, device=host.device, dtype=dtype)
    if finished and not sensitivity:
        return nothing("calibrate", host)
    cost, moe, sampled = run.cost, original.anatomy.layers, min(sample.of_model(original.facts, run.width), run.tokens)
    layers = [
        sum(statistics_nbytes(layer.num_experts, layer.width, original.anatomy.top_k, sampled, run.width))
        for layer in moe.values()
    ]
    writes = SMALL if finished else sum(layers) + run.tokens * TOKEN + SMALL * (len(layers) + 4)
    on_disk, held, streams = states == "disk" or (states == "auto" and stream), 0, 0
    passes, work = sensitivity + (not finished), Work() if finished else _captured(run, residual)
    work += passes * run.loading
    if sensitivity:
        # Three streams for each layer alone, three for all together, and the original's
        streams = (3 * len(moe) + 4) * min(TOKENS, run.tokens) * cost.width * run.width
        predicted = run.length * cost.vocabulary * 4
        # While experts are rounded their numbers are kept as the checkpoint has them; predictions come afterwards
        kept = cost.largest.routed_all * min(run.width, stored_dtype(original.checkpoint).itemsize)
        held = max(kept, predicted + 2 * min(PREDICTIONS * 4, predicted))
        held += 0 if on_disk else streams
        work += _sensitivities(run)
    between = 0 if finished else run.states
    held = max(held, 2 * max(layers, default=0) + (0 if on_disk else between))
    reads, meanwhile = passes * cost.nbytes, 2 * between + streams if on_disk else 0
    moved = reads + writes + (2 * between * len(cost.layers) if on_disk else 0)
    return Estimate(
        verb="calibrate",
        seconds=host.seconds(work, moved=moved),
        **host.memory(run.memory(held, captured=True), cost.nbytes),
        reads=reads,
        writes=writes,
        meanwhile=meanwhile,
        downloads=downloads_of(original),
        notes=(SHORTER.format(run.tokens),),
    )


def _captured(run: Run, residual: bool) -> Work:
    """Return the work of a calibration: each layer once, what its experts give gone over in float64, and with
    `residual` all but the experts again.
    """
    cost = run.cost
    total = run.batches * cost.forward(run.batch, run.length)
    for layer in cost.layers:
        pairs = run.tokens * layer.top_k
        # sum [1, g, g^2] y in float64: 6 D for each pair; index, gate, norm and sum of it: a dozen looks at D numbers
        total += Work(doubles=6 * pairs * cost.width, elements=24 * pairs * cost.width)
        total += run.batches * Work(steps=30 * (layer.experts > 0) + 10 * layer.experts)
        if residual and layer.experts:
            total += Work(products=2 * run.tokens * layer.dense, elements=60 * run.tokens * cost.width)
    return total


def _sensitivities(run: Run) -> Work:
    """Return the work of `measure_sensitivities` over the layers 0 .. n-1, all with experts: streams in which layers
    before it answered otherwise, 3 i, three that fork there, three for all layers, and the original's; where constants
    answer, in two of these, no experts run. Then each stream meets the head.
    """
    cost, tokens = run.cost, min(TOKENS, run.tokens)
    sequences, total, before = max(tokens // run.length, 1), Work(), 0
    for number, layer in enumerate(cost.layers):
        once = sequences * cost.layer(number, run.length, run.length)
        if not layer.experts:
            total += (before + 4) * once
            continue
        total += (before + 7) * once + Work(products=-4 * tokens * layer.routed)
        total += Work(elements=ROUNDED * layer.routed_all)
        before += 3
    predicted = tokens * cost.vocabulary
    return total + (before + 4) * (cost.head(tokens) + Work(elements=COMPARED / 2 * predicted))


def of_evaluation(
    host: Host,
    original: Original,
    compressed: int,
    *,
    kinds: frozenset[tuple[int, int]] = frozenset(),
    text: TextOptions,
    downloads: int = 0,
    tasks: bool = False,
    stream: bool = False,
    dtype: str | None = None,
) -> Estimate:
    """Return what `evaluate` will take on a machine, where the compressed model computes as much as the original.

    The other arguments are those of `evaluate`, but for these.

    Args:
        host: the machine.
        original: the original.
        compressed: bytes of the compressed checkpoint.
        kinds: of its codes, see `kinds_of`.
        text: what is evaluated on.
        downloads: bytes of it that the hub would have to give.
        tasks: whether some run, of which nobody knows how long.
        stream: see `evaluate`.
        dtype: see `evaluate`.
    """
    check_predicts(text)
    run = run_of(original, text, stream=stream, device=host.device, dtype=dtype)
    cost, reads = run.cost, run.cost.nbytes + compressed
    # The original's head lies beside the compressed model.
    compiling = of_loops(host.device, kinds)
    taken = run.memory(cost.outside * run.width + run.predictions + compiling.nbytes)
    work = compiling + 2 * run.loading + judging(run, speed=not stream)
    moved = reads + run.states * (2 + 4 * stream * len(cost.layers))
    return Estimate(
        verb="evaluate",
        seconds=None if tasks else host.seconds(work, moved=moved),
        why="tasks take as long as they take" if tasks else "",
        **host.memory(taken, cost.nbytes),
        reads=reads,
        writes=0,
        meanwhile=run.states * (3 if stream else 1),
        downloads=downloads_of(original) + downloads,
        notes=(f"measured on {run.tokens:,} tokens",),
    )


def judging(run: Run, *, speed: bool, models: int = 2) -> Work:
    """Return the work of running models over text and comparing their predictions.

    Args:
        run: how.
        speed: whether prefill and decode are measured.
        models: how many.
    """
    cost = run.cost
    total = models * run.batches * cost.forward(run.batch, run.length)
    total += models * cost.head(run.tokens) + Work(elements=COMPARED * run.tokens * cost.vocabulary)
    if speed:
        prompts = PROMPTS * (cost.forward(run.length, run.length) + cost.head(run.length))
        # One token meets each weight once: no more is done than to read it, half of going over it.
        steps = Work(elements=cost.active / 2, steps=cost.forward(1, run.length).steps)
        total += models * (prompts + NEW * steps)
    return total
