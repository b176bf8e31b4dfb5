"""How the solver keeps to limits of latency: it uses times of blocks if they exist.

It is compared with every choice.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from autodistill.advisor.describe import shape
from autodistill.cli.solve import solve_text
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimates.block_times import (
    FFN_IN,
    FFN_OUT,
    HEAD,
    BlockTimes,
    Pass,
    Time,
    keep_times,
    key_of,
    part_weights,
)
from autodistill.hardware.budget import DeviceBudget, LatencyLimit
from autodistill.hardware.catalog import device_classes, listed
from autodistill.hardware.machine import cores
from autodistill.models.config import resized
from autodistill.quantization.formats import TYPES
from autodistill.search.solve import SolveRequest
from autodistill.search.solve.bench import Measured
from autodistill.search.solve.call.document import _latency
from autodistill.search.solve.call.request import check_fits, options_of
from autodistill.search.solve.cuts import allowed_widths
from autodistill.search.solve.library import Score
from autodistill.search.solve.options import CACHE, Options
from autodistill.search.solve.solver import Solver
from autodistill.strategy.deployment import Deployment

SPEC = shape({"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn": 128, "vocab": 512}, tied=True)
CONTEXT = 512
CPU = next(one for one in listed() if "llama.cpp" in one.runtimes and not one.discrete)
KINDS = ("q8_0", "q5_1", "q4_0")
TPOT = LatencyLimit(quantity="tpot", percentile=50, seconds=math.inf, streams=1)
TTFT = replace(TPOT, quantity="ttft")


class Few(Options):
    """Three types and one cache."""

    def kinds(self, tensor: Any) -> tuple[str, ...]:
        return KINDS


class Costs:
    """Scores by a rule: fewer bits cost more, and the embeddings cost most."""

    def score(self, name: str, kind: str) -> Score:
        bits = {"f16": 16, "q8_0": 8, "q5_1": 5, "q4_0": 4}.get(kind, 4)
        scale = 3.0 if "embed" in name else 1.0 + (len(name) % 5) / 10
        return Score(kl=scale * 4.0**-bits, stderr=0.0, exact=True)

    def predict(self, deployment: Deployment) -> tuple[float, float]:
        return self.cost(options().types(deployment), deployment.cache_types), 0.0

    def cost(self, types: dict[str, str], cache: tuple[str, str]) -> float:
        names = [*types.items(), ("cache keys", cache[0]), ("cache values", cache[1])]
        return sum(self.score(*one).kl for one in names)

    def joint(self, deployment: Deployment, sample: Any) -> Measured:
        kl = self.predict(deployment)[0]
        errors = dict.fromkeys(("kl_stderr", "nll_stderr", "accuracy_stderr"))
        return Measured(kl=kl, nll=0.0, accuracy=0.0, **errors, counts=(1.0,), kl_sums=(kl,), nll_sums=(0.0,))


def a_pass(slow_kind: str, factor: float) -> Pass:
    """Return a pass in which each part takes a second, or half of that in four bits.

    `slow_kind` takes `factor` times as long.
    """

    def of(seconds: float) -> dict[str, Time]:
        speeds = {kind: seconds * (0.5 if kind == "q4_0" else 1.0) for kind in TYPES}
        speeds[slow_kind] *= factor
        return {kind: Time(seconds=one, spread=0.0) for kind, one in speeds.items()}

    nothing = {kind: Time(seconds=0.0, spread=0.0) for kind in ("f16", "q8_0", "q4_0")}
    parts = {part: of(1.0) for part in ("attention", FFN_IN, FFN_OUT, HEAD)}
    return Pass(tokens=512, constant=Time(seconds=0.0, spread=0.0), parts=parts, cache=nothing, each=nothing, slow=1.0)


def times(decode: Pass, prompt: Pass | None = None, device: str = CPU.name) -> BlockTimes:
    return BlockTimes(
        key=key_of(device, SPEC.spec, CONTEXT, cores()),
        weights=part_weights(SPEC.spec),
        decode=decode,
        prompt=prompt or decode,
        widths=(),
        layers=2,
        doubts=(),
        time="2026-11-29T10:00:00+00:00",
    )


def options(*latency: LatencyLimit, table: BlockTimes | None = None) -> Options:
    budget = DeviceBudget(memory_bytes=10**9, context=CONTEXT, device=CPU, latency=latency)
    return Few(spec=SPEC.spec, budget=budget, times=table, cache_type="f16")


def solved(asked: Options) -> Deployment | None:
    found = Solver(asked, Costs(), None).solve(10**9, (), thorough=False)  # type: ignore[arg-type]
    return found and found.deployment


def kinds_of(deployment: Deployment | None) -> set[str]:
    assert deployment is not None
    types = options().types(deployment)
    return {kind for name, kind in types.items() if "embed" not in name}


def test_a_type_that_is_slow_here_is_avoided_under_a_limit_whatever_its_bytes() -> None:
    even, slow = times(a_pass("q5_1", 0.6)), times(a_pass("q5_1", 4.0))
    free = solved(options(TPOT, table=slow))
    assert free is not None
    assert kinds_of(free) == {"q8_0"}
    whole = slow.seconds(SPEC.spec, free, slow.decode, CONTEXT)
    assert whole is not None
    tight = replace(TPOT, seconds=0.8 * whole)
    assert "q5_1" in kinds_of(solved(options(tight, table=even)))
    found = solved(asked := options(tight, table=slow))
    assert kinds_of(found) == {"q8_0", "q4_0"}
    assert found is not None
    assert asked.in_time(found)
    # Without a table, the same limit does not bind on a fast processor.
    assert kinds_of(solved(options(tight))) == {"q8_0"}


def test_what_is_found_under_a_limit_is_near_the_best_of_every_choice() -> None:
    table, costs = times(a_pass("q8_0", 1.7)), Costs()
    asked = replace(options(TPOT, table=table), spec=resized(SPEC.spec, range(1)))
    names = [*asked.matrices, *asked.tables]
    slowest = asked.deployment(dict.fromkeys(names, "q8_0"), ("f16", "f16"))
    limit = replace(TPOT, seconds=0.8 * asked.latencies(slowest)[TPOT])
    asked = replace(asked, budget=options(limit).budget)
    found = solved(asked)
    assert found is not None
    assert asked.in_time(found)
    best = math.inf
    for kinds in product(KINDS, repeat=len(names)):
        types = dict(zip(names, kinds, strict=True))
        cost = costs.cost(types, ("f16", "f16"))
        if cost < best and asked.in_time(asked.deployment(types, ("f16", "f16"))):
            best = cost
    # A price of time can only find choices that are the best at some price. Here these come close to the best of all.
    assert best <= costs.cost(asked.types(found), ("f16", "f16")) <= 1.15 * best


def test_two_limits_that_pull_apart_are_both_kept_to() -> None:
    decode, prompt = a_pass("q8_0", 2.0), a_pass("q4_0", 6.0)
    table = times(decode, prompt)
    plain = options(TPOT, TTFT, table=table)
    five = plain.deployment(dict.fromkeys(plain.matrices | plain.tables, "q5_1"), ("f16", "f16"))
    limits = [replace(one, seconds=1.01 * plain.latencies(five)[one]) for one in (TPOT, TTFT)]
    found = solved(options(*limits, table=table))
    assert kinds_of(found) <= {"q5_1", "q8_0", "q4_0"}
    asked = options(*limits, table=table)
    assert found is not None
    assert asked.in_time(found)
    impossible = [replace(one, seconds=0.5 * plain.latencies(five)[one]) for one in (TPOT, TTFT)]
    assert solved(options(*impossible, table=table)) is None


def test_shares_are_the_changes_of_whole_sums() -> None:
    limit = replace(TPOT, seconds=2.0)
    plain = options(limit, table=times(a_pass("q8_0", 3.0)))
    base = plain.deployment(dict.fromkeys(plain.matrices | plain.tables, "q5_1"), ("f16", "f16"))
    shares = plain.shares(base, (limit,))
    name = next(one for one in plain.matrices if one.endswith("1.mlp.down_proj.weight"))
    changed = plain.deployment(plain.types(base) | {name: "q8_0"}, ("f16", "f16"))
    assert shares[name, "q5_1"] == 0
    assert shares[name, "q8_0"] == pytest.approx((plain.latencies(changed)[limit] - plain.latencies(base)[limit]) / 2)
    assert shares[name, "q8_0"] == pytest.approx((3.0 - 1.0) / 2.0)
    assert shares[CACHE, "f16,f16"] == 0
    assert kinds_of(plain.fastest(limit)) == {"q4_0"}


def test_a_solution_says_what_predicted_its_latency() -> None:
    limit = replace(TPOT, seconds=100.0)
    table = times(a_pass("q8_0", 1.0))
    (told,) = _latency(asked := options(limit, table=table), asked.smallest()[0])
    assert told["by"] == f"blocks timed on {CPU.name}, 2026-11-29"
    assert told["seconds"] == asked.latencies(asked.smallest()[0])[limit] != told["roofline_seconds"]
    (plain,) = _latency(options(limit), asked.smallest()[0])
    assert plain["by"] == "the roofline"
    assert plain["seconds"] == plain["roofline_seconds"] == told["roofline_seconds"]


def test_a_budget_of_which_all_that_fits_is_too_slow_is_told_so() -> None:
    document = {
        "teacher": {"name": "it", "stored": None},
        "data": {"name": "text"},
        "held_out_tokens": 1,
        "teacher_nll": 1.0,
        "teacher_accuracy": 0.5,
        "streamed": False,
        "solutions": [],
        "smallest": {"name": "small", "bytes": 100},
        "not_exported": None,
        "exported": None,
    }
    told = [solve_text(document | {"nothing_fits": [{"memory_bytes": size}]}, 100) for size in (99, 100)]
    assert told[0].endswith("Nothing fits 99 B: the smallest, small, needs 100 B.")
    assert told[1].endswith("Nothing fits 100 B: whatever fits is too slow for --latency.")


def request(cache: Path, *latency: LatencyLimit) -> SolveRequest:
    budget = DeviceBudget(memory_bytes=10**9, context=CONTEXT, device=CPU, latency=latency)
    return SolveRequest(budgets=(budget,), cache=cache, teacher="it")


def test_a_call_reads_the_table_of_its_device_and_refuses_what_no_storage_meets(tmp_path: Path) -> None:
    config = {"model_type": "llama"}
    limit = replace(TPOT, seconds=1.0)
    (none,) = options_of(request(tmp_path, limit), SPEC.spec, config)
    assert none.times is None
    path = keep_times(tmp_path, table := times(a_pass("q8_0", 1.0)))
    (found,) = options_of(request(tmp_path, limit), SPEC.spec, config)
    assert found.times == table
    # By the table, the fastest storage takes seconds; by the roofline, microseconds.
    check_fits([none])
    with pytest.raises(NothingFitsError, match=r"nothing keeps to the latency: for the fastest .* is predicted 3\..*s"):
        check_fits([replace(found, cuts=False)])
    path.write_text("{}")
    with pytest.raises(InputError, match="holds no whole times of blocks"):
        options_of(request(tmp_path, limit), SPEC.spec, config)
    # Without a limit of latency, the table is not read.
    assert options_of(request(tmp_path), SPEC.spec, config)[0].times is None


def test_widths_are_in_multiples_that_a_device_likes() -> None:
    wide = shape({"layers": 2, "width": 64, "heads": 2, "ffn": 1536, "vocab": 512}).spec
    gpu = next(one for one in listed() if one.discrete)
    for device in (CPU, gpu):
        budget = DeviceBudget(memory_bytes=10**9, context=CONTEXT, device=device)
        multiple = device_classes()[device.kind.name].ffn_multiple
        widths = allowed_widths(Options(spec=wide, budget=budget))
        assert widths[0] == 1536
        assert {width % multiple for width in widths} == {0}
        assert widths[0] - widths[1] == multiple
