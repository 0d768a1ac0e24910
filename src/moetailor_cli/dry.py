"""Dry runs: what cannot work is refused, what would be done is foretold; config, headers and counts alone are read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetailor_cli import output

if TYPE_CHECKING:
    from moetailor import Budget, Calibration
    from moetailor.estimates.estimate import Estimate

Options = Mapping[str, Any]


def calibrate(model: str, out: Path, run: Options, *, device: str | None, trust_remote_code: bool) -> None:
    """Say what a calibration would take.

    Args:
        model: the original.
        out: folder of the calibration.
        run: as `of_calibration` takes it.
        device: where it runs.
        trust_remote_code: run code that comes with the checkpoint.
    """
    from moetailor.calibration.fingerprint import check_same_run
    from moetailor.calibration.resume import noted
    from moetailor.checkpoint.original import looked_at
    from moetailor.estimates.estimate import Host
    from moetailor.estimates.running import of_calibration
    from moetailor.pipeline import finished_calibration

    stored = noted(out)[0]
    check_same_run(out, stored, stored or {})  # whether it holds another run, only the text would say
    with looked_at(model, trust_remote_code=trust_remote_code) as original:
        _ = original.facts
        host = Host.measured(output.BEGAN, original, device=device, dtype=run["dtype"])
        if (there := finished_calibration(original, out)) is not None:
            run = {**run, "finished": True, "sensitivity": run["sensitivity"] and not there.holds("sensitivity")}
        output.estimate(of_calibration(host, original, **run))


def plan(
    calibration: Calibration,
    method: str,
    parameters: Options,
    budget: Budget,
    given: Options,
    source: str,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Say what a plan would take.

    Args:
        calibration: the calibration.
        method: name of the method.
        parameters: those of the method.
        budget: how much stays.
        given: as `estimate_plan` takes it.
        source: the original; empty for a model that was calibrated in memory.
        device: where it computes.
        trust_remote_code: run code that comes with the checkpoint.
    """
    from moetailor.checkpoint.original import looked_at
    from moetailor.errors import PlanError
    from moetailor.estimates.deciding import Sampled, of_plan
    from moetailor.estimates.estimate import Host
    from moetailor.methods.estimate import estimate_plan
    from moetailor.methods.registry import find_method
    from moetailor.methods.run import check_recorded, check_same

    chosen, facts = find_method(method).of(parameters), calibration.model
    check_recorded(calibration, chosen)
    found = estimate_plan(facts, chosen, budget, **given)
    if chosen.reads_weights and not source:
        raise PlanError(f"{chosen.name} reads expert weights, and the model was calibrated in memory; name its --model")
    looked = looked_at(source, trust_remote_code=trust_remote_code) if chosen.reads_weights else nullcontext()
    with looked as original:
        if original is not None:
            check_same(original, facts)
        host = Host.measured(output.BEGAN, original, device=device)
        output.estimate(of_plan(host, facts, chosen, found, Sampled.of(calibration), original=original))


def apply(
    model: str,
    plan: Path,
    out: Path,
    calibration: Path | None,
    run: Options,
    *,
    device: str | None,
    trust_remote_code: bool,
) -> None:
    """Say what applying a plan would take.

    Args:
        model: the original.
        plan: the plan's file.
        out: folder of the result.
        calibration: folder of the plan's calibration.
        run: the other options of `apply`.
        device: where it computes.
        trust_remote_code: run code that comes with the checkpoint.
    """
    import moetailor
    from moetailor.checkpoint.original import looked_at
    from moetailor.checkpoint.place import check_place
    from moetailor.estimates.deciding import Sampled, of_apply
    from moetailor.estimates.estimate import Host
    from moetailor.transform.disk import plan_for
    from moetailor.transform.formats import resolve_format

    refuse_converter(run["converter"])
    made, given = moetailor.Plan.load(plan), None if calibration is None else moetailor.Calibration.open(calibration)
    with looked_at(model, trust_remote_code=trust_remote_code) as original:
        inputs = {"the original": original.folder, "the calibration": calibration}
        check_place(out, overwrite=run["overwrite"], inputs=inputs)
        # Of holes no weights can be told apart.
        other = run["allow_other_weights"] or original.headers_only
        fitted = plan_for(original, made, given, propagate=run["propagate"], allow_other_weights=other)
        form = resolve_format(fitted, run["format"], original)
        form.check(fitted, original)
        fitted = form.carried(fitted)
        host = Host.measured(output.BEGAN, original, device=device)
        sampled = Sampled(tokens=0) if given is None else Sampled.of(given)
        front = run["propagate"] == "compressed"
        output.estimate(of_apply(host, fitted, original, form, sampled, compressed=front, verify=run["verify"]))


def refuse_converter(converter: Path | None) -> None:
    """Refuse to say what another program's work would take."""
    from moetailor.errors import PlanError

    if converter is not None:
        raise PlanError("--dry-run: nothing is foretold of --converter; leave one of them out")


def compress(
    model: str, out: Path, given: Options, run: Options, *, device: str | None, trust_remote_code: bool
) -> None:
    """Say what all stages would take.

    Args:
        model: the original.
        out: folder of the result.
        given: as `precheck` takes it.
        run: how the model runs, and what stand-ins are fitted on.
        device: where it runs.
        trust_remote_code: run code that comes with the checkpoint.
    """
    import moetailor
    from moetailor.checkpoint.original import looked_at
    from moetailor.estimates.estimate import Host, in_turn
    from moetailor.estimates.together import of_compression
    from moetailor.methods.registry import find_method
    from moetailor.pipeline import calibration_folder, finished_calibration

    with looked_at(model, trust_remote_code=trust_remote_code) as original:
        output.say(moetailor.precheck(original, out, **given))
        used = finished_calibration(original, given["calibration"] or calibration_folder(out))
        method = find_method(given["method"]).of(given["parameters"])
        host = Host.measured(output.BEGAN, original, device=device, dtype=run["dtype"])
        stages = of_compression(host, original, method, given, calibration=used, **run)
        output.estimate(in_turn("compress", stages, host.startup))


def evaluate(compressed: str, against: str, run: Options, *, device: str | None, trust_remote_code: bool) -> Estimate:
    """Say what an evaluation would take, and return it.

    Args:
        compressed: the compressed checkpoint.
        against: the original.
        run: as `of_evaluation` takes it.
        device: where it runs.
        trust_remote_code: run code that comes with the checkpoints.
    """
    from moetailor.checkpoint.original import looked_at
    from moetailor.errors import MoetailorError
    from moetailor.estimates.compiling import kinds_in
    from moetailor.estimates.estimate import Host
    from moetailor.estimates.running import of_evaluation
    from moetailor.estimates.sizes import downloads_of
    from moetailor.transform.origin import unlike

    given: dict[str, Any] = {"takes": "anything", "trust_remote_code": trust_remote_code}
    with looked_at(against, **given) as original, looked_at(compressed, **given) as result:
        if original.written_here:
            raise MoetailorError(f"{against}: was written by moetailor; --against takes the original")
        if why := unlike(result.config, original.config):
            raise MoetailorError(f"{against} cannot be the original of {compressed}: its {why}")
        host = Host.measured(output.BEGAN, original, device=device, dtype=run["dtype"])
        nbytes, downloads = result.checkpoint.nbytes, downloads_of(result)
        found = of_evaluation(host, original, nbytes, kinds=kinds_in(result), downloads=downloads, **run)
    output.estimate(found)
    return found


def compare(model: str, out: Path, wanted: Options, *, device: str | None, trust_remote_code: bool) -> None:
    """Say what a comparison would take.

    Args:
        model: the original.
        out: folder of the comparison.
        wanted: the options of `compare`.
        device: where it runs.
        trust_remote_code: run code that comes with the checkpoint.
    """
    import moetailor
    from moetailor.checkpoint.original import looked_at
    from moetailor.comparison.compare import CALIBRATION, CELLS, asked_for, noted
    from moetailor.estimates.estimate import Host
    from moetailor.estimates.together import of_comparison
    from moetailor.pipeline import finished_calibration

    _ = noted(out, {})  # which refuses what is no comparison
    cells = asked_for(wanted["methods"], wanted["remove"], wanted["sizes"], wanted["text"], wanted["calibration"])
    cells = [cell for cell in cells if not (out / CELLS / cell.file).exists()]
    with looked_at(model, trust_remote_code=trust_remote_code) as original:
        used = finished_calibration(original, (named := wanted["calibration"]) or out / CALIBRATION)
        if used is None and named is not None:
            _ = moetailor.Calibration.open(named)  # which says why it cannot be used
        host = Host.measured(output.BEGAN, original, device=device, dtype=wanted["dtype"])
        run = {name: wanted[name] for name in ("held_out", "text", "sample", "stream", "dtype")}
        output.estimate(of_comparison(host, original, cells, calibration=used, **run))
