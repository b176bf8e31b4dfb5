"""Describes the solution of a budget, its rivals and candidates as plain data, for people and for records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from autodistill.estimates.fit import latencies
from autodistill.hardware.budget import NO_LIMIT
from autodistill.models.families import FAMILIES
from autodistill.search.solve.bench import Measured, Sample, copying
from autodistill.search.solve.call.limits import MEMORY, limits_of, without
from autodistill.search.solve.call.opened import Opened
from autodistill.search.solve.compensation import compensate, gains
from autodistill.search.solve.forms import CUTS, Form, best_forms, copied, with_measured_cut
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import Options
from autodistill.search.solve.rivals import Rival, fitting, rivals
from autodistill.search.solve.shapes import Shapes
from autodistill.search.solve.solver import SolvedStorage, Solver
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import WHOLE
from autodistill.utils.hashing import content_hash

_PROBED, _PROBED_COARSELY = 1024, 512  # longest text for the copying test, in tokens
_MORE = 5 * 10**6  # additional bytes whose gain is reported
_CLEAR = 2.0  # standard errors by which a solution must be better than a plain storage


def of_budget(
    opened: Opened, options: Options, library: Library, shapes: Callable[[], Shapes]
) -> dict[str, Any] | None:
    """Return the solution for a budget with its rivals and candidates as plain data, or None if nothing fits.

    Args:
        opened: The checked and loaded inputs of the call.
        options: The options of the budget.
        library: Scores of types, already built.
        shapes: Returns the scores of cuts; called only if they are needed.
    """
    calibration, held_out, own = opened.calibration, opened.held_out, opened.own

    def predicted(one: Deployment) -> float:
        return library.predict(one)[0]

    plain = rivals(options, own, options.budget.memory_bytes, predicted)
    near = fitting(plain, options, predicted)
    longest = _PROBED_COARSELY if opened.request.coarse else _PROBED
    probe = copying(opened.bench, calibration.data, min(options.budget.context, longest))
    thorough = opened.request.thorough
    forms = best_forms(options, library, shapes, calibration, near, thorough=thorough, probe=probe)
    if not forms:
        return None
    forms = _visited(forms, calibration, held_out, probe)
    best, *others = forms
    nearest = best.scores.joint(best.deployment, held_out)
    made_up = _compensated_measurements(opened, options, library, best, shapes)
    mine = nearest if made_up is None else made_up[1]
    least = best.joint.kl if made_up is None else made_up[0].kl
    lines = [_of_plain(one, options, library, mine, held_out, measured=one.deployment in (*near, own)) for one in plain]
    lines += [_of_form(one, mine, held_out) for one in others]
    tried, winner = _of_candidates(opened, options, library, least, mine)
    lines += tried
    won = winner and winner["name"]
    same = (one.what for one in plain if best.init == WHOLE and one.deployment == best.deployment)
    return {
        "budget": options.budget.to_json(),
        "solution": {
            "family": best.family,
            "init": best.init.to_json(),
            **_solution(best, mine),
            "compensated": made_up is not None,
            "compensated_calibration_kl": None if made_up is None else made_up[0].kl,
            "nearest_kl": nearest.kl,
            "nearest_kl_stderr": nearest.kl_stderr,
            "copied": copied(best, probe),
            "teacher_copied": probe.teacher.accuracy,
        },
        "plain": next(same, None),
        "limits": _limits(options, library, best, calibration),
        "next": _next(Solver(best.options, best.scores, calibration), best.found, options.budget.memory_bytes),
        "rivals": lines,
        "as_good": next((line["name"] for line in lines if _as_good(line) and line["name"] != won), None),
        "winner": winner,
    }


def _visited(forms: Sequence[Form], calibration: Sample, held_out: Sample, probe: Sample) -> list[Form]:
    """Return the same students after all measurements that are needed of each, the best first.

    A cut student is made anew whenever another one was measured, so each gets all of its measurements in a row. The
    best is the last: it may be needed again.
    """
    made = []
    for one in reversed(forms):
        made.append(with_measured_cut(one, calibration))
        one.scores.joint(one.deployment, held_out)
    copied(forms[0], probe)
    return made[::-1]


def _compensated_measurements(
    opened: Opened, options: Options, library: Library, best: Form, shapes: Callable[[], Shapes]
) -> tuple[Measured, Measured] | None:
    """Return the measurements on both texts of a solution with error compensation, or None if it is no better.

    Compensation needs the whole model in memory, and a minute for SmolLM2. So only a thorough request tries it.
    """
    known = options.spec.architecture in FAMILIES  # models whose blocks can be read one after another
    if not opened.request.thorough or not options.cuts or not opened.bench.weighed or not known:
        return None
    bench = opened.bench if best.init == WHOLE else shapes().student(best.init)
    if not gains(bench, best.deployment):
        return None
    samples = (opened.calibration, opened.held_out)

    def measure(*texts: Sample) -> tuple[Measured, ...]:
        """Return the measurements with error compensation on each text."""
        made = compensate(bench, best.deployment, opened.compensation)
        return bench.measure_weights(made.weights(bench), best.deployment.cache_types, texts)

    key = f"compensated {content_hash([best.init.to_json(), best.deployment.to_json()], 16)}"
    calibration, held_out = library.kept(key, f"{best.name}, with its errors compensated,", samples, measure)
    return (calibration, held_out) if calibration.kl < best.joint.kl else None


def _limits(options: Options, library: Library, best: Form, calibration: Sample) -> list[dict[str, Any]]:
    """Return how much of each limit is left, and which limits bind.

    The options without a limit are those of the whole teacher, even if the solution is a cut student.
    """
    whole = replace(options, without_caches=best.options.without_caches)

    @cache
    def solver(names: frozenset[str]) -> Solver:
        return Solver(without(whole, names), library, calibration)

    def predicted(names: frozenset[str]) -> float | None:
        limit = NO_LIMIT if MEMORY in names else options.budget.memory_bytes
        found = solver(names - {MEMORY}).predicted(limit)
        return found and found[0]

    sums = [predicted(frozenset()), None if best.init == WHOLE else best.found.predicted[0]]
    here = min((one for one in sums if one is not None), default=best.found.predicted[0])
    return limits_of(best.options, best.deployment, here, predicted)


def _of_plain(
    rival: Rival, options: Options, library: Library, mine: Measured, held_out: Sample, *, measured: bool
) -> dict[str, Any]:
    """Return a plain storage compared with the solution."""
    deployment = rival.deployment
    need = options.memory(deployment).total_bytes
    return {
        "what": rival.what,
        "name": deployment.name,
        "deployment": deployment.to_json(),
        "bytes": need,
        "fits": options.fits(deployment),
        "predicted_kl": library.predict(deployment)[0],
        **_compared_with(mine, library.joint(deployment, held_out) if measured else None),
    }


def _of_form(form: Form, mine: Measured, held_out: Sample) -> dict[str, Any]:
    """Return the best of another family compared with the solution."""
    return {
        "what": form.family,
        "name": form.name,
        "init": form.init.to_json(),
        "deployment": form.deployment.to_json(),
        "bytes": form.bytes,
        "fits": True,
        "predicted_kl": form.found.predicted[0],
        **_compared_with(mine, form.scores.joint(form.deployment, held_out)),
    }


def _of_candidates(
    opened: Opened, options: Options, library: Library, least: float, mine: Measured
) -> tuple[list[dict[str, Any]], dict[str, str] | None]:
    """Return files of other tools compared with the solution, and the best one that beats it on the calibration text.

    Args:
        opened, options, library: As for `of_budget`.
        least: KL of the solution on the calibration text.
        mine: Measurement of the solution on the held-out text.
    """
    bench, samples = opened.bench, (opened.calibration, opened.held_out)
    lines, winner = [], None
    for candidate in (one.fitting(options) for one in opened.candidates):
        known, joint = library.kept(
            candidate.key,
            candidate.name,
            samples,
            lambda *texts, one=candidate: bench.measure_weights(one.weights(bench), one.cache_types, texts),
        )
        need = candidate.memory(options)
        takes = need.total_bytes
        fits = takes <= options.budget.memory_bytes and options.fits_file(need.weights_bytes)
        fits = fits and options.in_time(candidate.deployment)
        if fits and known.kl < least:
            least, winner = known.kl, {"name": candidate.name, "path": str(candidate.path)}
        lines.append(
            {
                "what": "candidate",
                "name": candidate.name,
                "path": str(candidate.path),
                "deployment": None if candidate.stored is None else candidate.deployment.to_json(),
                "bytes": takes,
                "fits": fits,
                "predicted_kl": None,
                **_compared_with(mine, joint),
            }
        )
    return lines, winner


def _compared_with(mine: Measured, joint: Measured | None) -> dict[str, float | None]:
    """Return the figures of a rival, and how far its KL is above the solution's."""
    above = None if joint is None else joint.kl_above(mine)
    return {
        **_figures(joint),
        "kl_above_solution": above and above[0],
        "kl_above_solution_stderr": above and above[1],
    }


def _as_good(line: Mapping[str, Any]) -> bool:
    above = line["kl_above_solution"]
    return bool(
        line["what"] not in CUTS
        and line["fits"]
        and above is not None
        and above <= _CLEAR * line["kl_above_solution_stderr"]
    )


def _solution(best: Form, held_out: Measured) -> dict[str, Any]:
    options, found, deployment = best.options, best.found, best.deployment
    estimate, scores = options.memory(deployment), best.scores.behind(deployment)
    in_file, usual = options.file_sizes(deployment)
    return {
        "name": best.name,
        "deployment": deployment.to_json(),
        "types": _counted(options, deployment),
        "bytes": estimate.total_bytes,
        "weights_bytes": estimate.weights_bytes,
        "file_bytes": in_file,
        "wider_bytes": in_file - usual,
        "kv_cache_bytes": estimate.kv_cache_bytes,
        "compute_bytes": estimate.compute_bytes,
        "overhead_bytes": estimate.overhead_bytes,
        "left_bytes": options.budget.memory_bytes - estimate.total_bytes,
        "latency": _latency(options, deployment),
        "predicted_kl": found.predicted[0],
        "predicted_kl_stderr": found.predicted[1] if math.isfinite(found.predicted[1]) else None,
        "scores": len(scores),
        "scores_measured": sum(one.exact for one in scores),
        "calibration_kl": found.joint.kl,
        "calibration_kl_stderr": found.joint.kl_stderr,
        **_figures(held_out),
    }


def _latency(options: Options, deployment: Deployment) -> list[dict[str, Any]]:
    """Return the predicted time for each limit of latency, its source, and the roofline's prediction."""
    budget, times, found = options.budget, options.times, []
    roofline = latencies(options.spec, deployment, budget)
    for limit, seconds in options.latencies(deployment).items():
        timed = times and times.limit_seconds(options.spec, deployment, limit, context=budget.context) is not None
        found.append(
            {
                "name": limit.name,
                "limit_seconds": limit.seconds,
                "seconds": seconds,
                "by": times.name if times and timed else "the roofline",
                "roofline_seconds": roofline[limit],
            }
        )
    return found


def _figures(joint: Measured | None) -> dict[str, float | None]:
    names = ("kl", "kl_stderr", "nll", "nll_stderr", "accuracy", "accuracy_stderr")
    return {name: None if joint is None else getattr(joint, name) for name in names}


def _counted(options: Options, deployment: Deployment) -> dict[str, Any]:
    """Return the types of the tables and of the cache, and how many other matrices have each type."""
    types = options.types(deployment)
    matrices: dict[str, int] = {}
    for name in options.matrices:
        matrices[types[name]] = matrices.get(types[name], 0) + 1
    tables = {name.split(".")[-2]: types[name] for name in options.tables}
    keys, values = deployment.cache_types
    return {"tables": tables, "cache_keys": keys, "cache_values": values, "matrices": matrices}


def _next(solver: Solver, found: SolvedStorage, limit: int) -> dict[str, Any]:
    """Return how much KL some more bytes would save, by the scores alone."""
    here, more = solver.predicted(limit), solver.predicted(limit + _MORE)
    assert here is not None
    assert more is not None
    return {"more_bytes": _MORE, "predicted_kl": more[0], "predicted_gain": max(0.0, here[0] - more[0])}
