"""Ranking against cases computed by hand, ties against brute force, and the Pareto front against its definition."""

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.hardware.budget import DeviceBudget, parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.runs.results.leaderboard import limits_of, nearest, pareto, rank, rank_students, rests_on
from autodistill.runs.results.row import Row


def row(name: str, **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": name,
        "trial": name,
        "kind": "student",
        "name": name,
        "deployment": {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32},
        "status": "completed",
        "feasible": True,
        "fidelity": 1.0,
        "split": "validation",
    }
    return Row.from_json(least | fields)


def names(rows: list[Row], *args: Any) -> list[str]:
    return [one.row.name for one in rank(rows, *args)]


def documents(sums: list[float], count: int = 100, **more: Any) -> dict[str, Any]:
    return {"ids": list(range(len(sums))), "count": [count] * len(sums), "sum": sums} | more


def test_the_order_of_groups_does_not_depend_on_the_order_of_rows() -> None:
    expected = [
        row("best", accuracy=0.5),
        row("second", accuracy=0.4),
        row("rung", accuracy=0.9, fidelity=0.5),
        row("early rung", accuracy=0.95, fidelity=0.25),
        row("too large", accuracy=0.99, feasible=False),
        row("too large rung", accuracy=1.0, feasible=False, fidelity=0.25),
        row("unknown"),
        row("unknown and too large", feasible=False),
    ]
    for seed in range(20):
        shuffled = random.Random(seed).sample(expected, len(expected))
        assert names(shuffled) == [one.name for one in expected]


def test_a_row_of_unknown_fidelity_comes_after_all_that_are_known() -> None:
    rows = [row("unknown", accuracy=0.9, fidelity=None), row("early", accuracy=0.1, fidelity=0.01)]
    assert names(rows) == names(rows[::-1]) == ["early", "unknown"]


def test_what_needs_nothing_says_nothing_of_a_limit() -> None:
    limits = {"memory_bytes": 100.0, "tpot_p95@streams=1": 50.0}
    assert nearest({"a": {"memory_bytes": 0.0}, "b": {"memory_bytes": None}}, limits) is None
    found = nearest({"b": {"memory_bytes": 0.0, "tpot_p95@streams=1": 60.0}}, limits)
    assert found is not None
    assert (found.limit, found.need, found.allowed) == ("tpot_p95@streams=1", 60.0, 50.0)
    assert found.excess == pytest.approx(math.log(1.2))
    # Of two that miss by equally much, the first name counts.
    both = nearest({name: {"memory_bytes": 150.0} for name in "ba"}, limits)
    assert both is not None
    assert both.candidate == "a"


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
@pytest.mark.parametrize("direction", ["max", "min"])
def test_a_missing_metric_never_ranks_first(missing: float | None, direction: Any) -> None:
    rows = [row("missing", perplexity=missing), row("a", perplexity=20.0), row("b", perplexity=30.0, feasible=False)]
    for order in itertools.permutations(rows):
        assert names(list(order), "perplexity", direction) == ["a", "b", "missing"]


def test_the_direction_decides() -> None:
    rows = [row("a", perplexity=20.0), row("b", perplexity=10.0)]
    assert names(rows, "perplexity", "min") == ["b", "a"]
    assert names(rows, "perplexity", "max") == ["a", "b"]


def test_a_metric_of_another_evaluator_ranks() -> None:
    assert names([row("a", other={"chains": 0.1}), row("b", other={"chains": 0.2})], "chains") == ["b", "a"]


def test_the_teacher_competes_but_is_no_student() -> None:
    rows = [
        row("teacher", kind="teacher", accuracy=0.6, fidelity=None),
        row("initial", kind="initial", accuracy=0.55, fidelity=0.0),
        row("baseline", kind="baseline", accuracy=0.5),
        row("student", accuracy=0.4),
    ]
    assert names(rows) == ["teacher", "initial", "baseline", "student"]


def test_what_is_first_beside_the_teacher_is_the_best_student() -> None:
    # The teacher is tied with the large student: the differences are -8, +6, -8 and +4 of 100 tokens, with mean 0.015
    # and standard error 0.033. The small student is clearly 0.01 worse in every document, and yet better than the
    # teacher and smaller.
    large = row("large", accuracy=0.5, memory_bytes=700, documents=documents([50.0, 60.0, 40.0, 50.0]))
    small = row("small", accuracy=0.49, memory_bytes=220, documents=documents([49.0, 59.0, 39.0, 49.0]))
    other = row("other", accuracy=0.3, memory_bytes=100, documents=documents([30.0, 40.0, 20.0, 30.0]))
    teacher = row(
        "teacher",
        kind="teacher",
        accuracy=0.485,
        fidelity=None,
        memory_bytes=250,
        documents=documents([42.0, 66.0, 32.0, 54.0]),
    )
    rows = [other, teacher, large, small]
    assert names(rows)[0] == "small"
    assert [one.name for one in rank_students(rows)] == ["small", "large", "other"]
    assert [one.name for one in rank_students([other, large, small])] == ["large", "small", "other"]
    assert rank_students([teacher]) == []


def test_splits_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="test, validation"):
        rank([row("a", accuracy=0.1), row("b", accuracy=0.1, split="test")])


def test_the_smallest_of_the_tied_wins_and_the_rest_sort_by_the_metric() -> None:
    # Differences to the best per document: "near" has +4, -4, +4, -3 of 100 tokens, with mean 0.0025 and standard error
    # sqrt(sum of squared deviations / 3 / 4) = 0.0217, widened 1.197 times for four documents. "far" is always 10
    # worse, with mean 0.1 and standard error 0.
    top = [50.0, 60.0, 40.0, 50.0]
    near = [46.0, 64.0, 36.0, 53.0]
    far = [s - 10 for s in top]
    rows = [
        row("top", accuracy=0.5, memory_bytes=300, documents=documents(top)),
        row("near small", accuracy=0.4975, memory_bytes=100, size_bytes=9, documents=documents(near)),
        row("near smallest", accuracy=0.4975, memory_bytes=100, size_bytes=8, documents=documents(near)),
        row("near, memory unknown", accuracy=0.4975, documents=documents(near)),
        row("far", accuracy=0.4, memory_bytes=1, documents=documents(far)),
    ]
    ranking = rank(rows)
    assert [one.row.name for one in ranking] == [
        "near smallest", "top", "near small", "near, memory unknown", "far"
    ]  # fmt: skip
    assert [one.tied for one in ranking] == [True, True, True, True, False]
    assert [one.place for one in ranking] == [1, 2, 3, 4, 5]
    assert ranking[0].difference == pytest.approx(0.0025)
    assert ranking[0].difference_stderr == pytest.approx(0.0217 * 1.197, rel=0.1)
    assert ranking[4].difference == pytest.approx(0.1)
    assert ranking[4].difference_stderr == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("lead", "tied"), [(0.8, True), (0.95, True), (1.05, False), (1.5, False), (1.95, False)])
def test_rows_tie_within_one_standard_error_and_no_more(lead: float, tied: bool) -> None:
    """Over 400 documents, the mean difference is `lead` times its standard error by the textbook's formula."""
    scatter = np.random.default_rng(0).standard_normal(400)
    scatter = (scatter - scatter.mean()) / scatter.std(ddof=1)
    gaps = scatter + lead / math.sqrt(400)
    best = np.full(400, 50.0)
    rows = [
        row("best", accuracy=0.5, memory_bytes=300, documents=documents(best.tolist())),
        row("smaller", accuracy=0.499, memory_bytes=100, documents=documents((best - gaps).tolist())),
    ]
    first, second = rank(rows)
    assert (first.row.name, first.tied) == (("smaller", True) if tied else ("best", False))
    # Errors from 1,000 draws themselves vary by some percent.
    error = second.difference_stderr if tied is False else first.difference_stderr
    assert error == pytest.approx(0.01 / math.sqrt(400), rel=0.05)


@pytest.mark.parametrize(("memory", "first"), [(1000, "best"), (1009, "best"), (1011, "smaller")])
def test_of_tied_rows_of_about_one_size_the_better_one_wins(memory: int, first: str) -> None:
    rows = [
        row("best", accuracy=0.5, memory_bytes=memory, documents=documents([50.0, 60.0, 40.0, 50.0])),
        row("smaller", accuracy=0.4975, memory_bytes=1000, documents=documents([46.0, 64.0, 36.0, 53.0])),
    ]
    assert rank(rows)[0].row.name == first


def test_the_smallest_of_the_tied_is_still_so_once_it_was_measured() -> None:
    """Its runtime takes 250 bytes more than predicted, and the same is expected of the other."""
    top = documents([50.0, 60.0, 40.0, 50.0])
    measured = {"memory_source": "measured", "other": {"memory_bytes_predicted": 100}}
    rows = [
        row("large", accuracy=0.5, memory_bytes=300, documents=top),
        row("small", accuracy=0.5, memory_bytes=350, documents=top, **measured),
    ]
    assert [one.row.name for one in rank(rows)] == ["small", "large"]


def test_of_equally_small_rows_the_best_is_still_first_once_its_file_was_measured() -> None:
    """The file contains a tokenizer in addition to the weights. The other's predicted size leaves that out."""
    measured = {"other": {"memory_bytes_predicted": 100, "size_bytes_predicted": 90}}
    rows = [
        row("best", accuracy=0.51, memory_bytes=95, size_bytes=92, documents=documents([51.0, 51.0]), **measured),
        row("other", accuracy=0.50, memory_bytes=100, size_bytes=90, documents=documents([40.0, 60.0])),
    ]
    assert [(one.row.name, one.tied) for one in rank(rows)] == [("best", True), ("other", True)]


def test_of_equal_rows_the_one_that_needs_no_training_wins() -> None:
    same = {"accuracy": 0.5, "memory_bytes": 100, "size_bytes": 10}
    assert names([row("a student", **same), row("the teacher", kind="teacher", **same)]) == ["the teacher", "a student"]
    assert names([row("a student", **same | {"accuracy": 0.51}), row("t", kind="teacher", **same)])[0] == "a student"


def test_a_lone_best_is_not_marked_as_tied() -> None:
    rows = [
        row("a", accuracy=0.5, documents=documents([50.0, 50.0])),
        row("b", accuracy=0.4, documents=documents([40.0, 40.0])),
    ]
    assert [one.tied for one in rank(rows)] == [False, False]


def test_pairing_makes_small_steady_differences_count() -> None:
    generator = np.random.default_rng(0)
    hard = generator.uniform(10, 90, 40)  # documents differ far more than the models do
    steady = hard - generator.uniform(0.5, 1.5, 40)
    rows = [
        row("a", accuracy=hard.mean() / 100, memory_bytes=2, documents=documents(hard.tolist())),
        row("b", accuracy=steady.mean() / 100, memory_bytes=1, documents=documents(steady.tolist())),
    ]
    assert hard.std() / 100 / math.sqrt(40) > 0.01 > rows[0].accuracy - rows[1].accuracy  # type: ignore[operator]
    assert [(one.row.name, one.tied) for one in rank(rows)] == [("a", False), ("b", False)]


@pytest.mark.parametrize(
    "other",
    [
        None,
        {"ids": [0, 2], "count": [100, 100], "sum": [50.0, 40.0]},
        {"ids": [0, 1], "count": [100, 50], "sum": [50.0, 40.0]},
        {"ids": [0, 1], "count": [100, 100], "sum": [50.0, None]},
        documents([50.0, 40.0], metric="perplexity"),
    ],
)
def test_rows_that_cannot_be_paired_do_not_tie(other: Any) -> None:
    rows = [
        row("a", accuracy=0.5, memory_bytes=2, documents=documents([60.0, 40.0])),
        row("b", accuracy=0.4999, memory_bytes=1, documents=other),
    ]
    assert [(one.row.name, one.tied, one.difference) for one in rank(rows)] == [("a", False, 0.0), ("b", False, None)]


def test_without_documents_only_equal_figures_tie() -> None:
    rows = [row("a", accuracy=0.5, memory_bytes=2), row("b", accuracy=0.5, memory_bytes=1), row("c", accuracy=0.49)]
    assert [(one.row.name, one.tied) for one in rank(rows)] == [("b", True), ("a", True), ("c", False)]


def test_documents_without_tokens_and_rows_with_a_sum_that_is_no_number_are_left_out_of_pairs() -> None:
    sums = {"a": [50.0, math.nan], "b": [49.0, 7.0], "c": [48.0, math.nan, 50.0], "d": [47.0, 50.0, 51.0]}
    counts = {"a": [100, 0], "b": [100, 0], "c": [100, 100, 100], "d": [100, 100, 100]}
    rows = [
        replace(row(name, accuracy=value), documents=documents(sums[name]) | {"count": counts[name]})
        for name, value in (("a", 0.5), ("b", 0.49), ("c", 0.48), ("d", 0.47))
    ]
    # The second document of a and b has no tokens, so its sums mean nothing. That of c has, so c has no pairs.
    assert [one.difference and round(one.difference, 6) for one in rank(rows)[:2]] == [0.0, 0.01]
    alone = rank([rows[2], rows[3]])
    assert (alone[0].row.name, alone[1].difference) == ("c", None)


def test_of_one_document_only_equal_figures_tie() -> None:
    rows = [
        row("a", accuracy=0.5, memory_bytes=2, documents=documents([50.0])),
        row("b", accuracy=0.5, memory_bytes=1, documents=documents([50.0])),
        row("c", accuracy=0.49, memory_bytes=1, documents=documents([49.0])),
    ]
    ranking = rank(rows)
    assert [(one.row.name, one.tied) for one in ranking] == [("b", True), ("a", True), ("c", False)]
    assert (ranking[2].difference, ranking[2].difference_stderr) == (pytest.approx(0.01), None)


def test_a_page_says_of_how_many_documents_its_errors_are_and_warns_of_few() -> None:
    many = row("a", documents={"ids": list(range(12)), "count": [5] * 11 + [0], "sum": [1] * 12})
    some = row("b", documents=documents([1.0] * 40))
    assert rests_on([row("c"), many]) == "± comes from 11 documents."
    assert rests_on([many, some]) == "± comes from 11 to 40 documents."
    few = rests_on([row("d", documents=documents([1.0] * 4))])
    assert few.startswith("± comes from 4 documents: with fewer than 10, errors")
    alone = rests_on([row("e", documents=documents([1.0]))])
    assert alone == "No ± is given: all was read in one document, and an error needs several."
    assert rests_on([row("c")]) == rests_on([]) == ""
    assert rests_on([row("h", documents=documents([1.0] * 20, count=1))]) == "± comes from 20 documents."
    blocks = {**documents([1.0] * 12), "in_a_row": 5}
    assert rests_on([row("f", documents=blocks)]) == "± comes from 12 blocks of 5 sequences in a row of one long text."
    one = rests_on([row("g", documents={**documents([1.0]), "in_a_row": 2})])
    assert one.startswith("No ± is given: all was read in one block of 2 sequences in a row of one long text, and")


def test_ties_of_a_minimised_metric() -> None:
    rows = [
        row("a", perplexity=10.0, memory_bytes=2, documents=documents([230.0, 228.0, 233.0], metric="perplexity")),
        row("b", perplexity=10.1, memory_bytes=1, documents=documents([232.0, 227.5, 233.0], metric="perplexity")),
        row("c", perplexity=12.0, memory_bytes=1, documents=documents([248.0, 246.0, 252.0], metric="perplexity")),
    ]
    ranking = rank(rows, "perplexity", "min")
    # Differences of b are 2, -0.5 and 0 over 300 tokens: mean 0.005 and standard error sqrt(sum of squared deviations /
    # 2 / 3) = 0.0076, widened 1.321 times for three documents.
    assert [(one.row.name, one.tied) for one in ranking] == [("b", True), ("a", True), ("c", False)]
    assert ranking[0].difference == pytest.approx(0.005)
    assert ranking[0].difference_stderr == pytest.approx(0.0076 * 1.321, rel=0.1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 3)), max_size=25))
def test_the_pareto_front_is_what_nothing_dominates(points: list[tuple[int, int, int]]) -> None:
    rows = [
        row(str(index), accuracy=float(a), memory_bytes=m, latency_ms=float(t))
        for index, (a, m, t) in enumerate(points)
    ]
    front = pareto(rows, {"accuracy": "max", "memory_bytes": "min", "latency_ms": "min"})

    def beats(p: tuple[int, int, int], q: tuple[int, int, int]) -> bool:
        return p != q and p[0] >= q[0] and p[1] <= q[1] and p[2] <= q[2]

    expected = {str(index) for index, q in enumerate(points) if not any(beats(p, q) for p in points)}
    assert {one.name for one in front} == expected
    assert [one.accuracy for one in front] == sorted((one.accuracy for one in front), reverse=True)


def test_rows_without_an_objective_are_not_on_the_front() -> None:
    rows = [row("a", accuracy=0.9), row("b", accuracy=0.1, memory_bytes=5)]
    assert [one.name for one in pareto(rows, {"accuracy": "max", "memory_bytes": "min"})] == ["b"]


def test_the_nearest_has_the_smallest_worst_ratio() -> None:
    limits = limits_of(
        DeviceBudget(memory_bytes=1000, device=find_device("pi 5", devices()), latency=parse_latency("10ms"))
    )
    assert limits == {"memory_bytes": 1000, "tpot_p95@streams=1": 10.0}
    found = nearest(
        {
            "slow": {"memory_bytes": 500, "tpot_p95@streams=1": 40.0},
            "near": {"memory_bytes": 1500, "tpot_p95@streams=1": 12.0},
            "large": {"memory_bytes": 3000, "tpot_p95@streams=1": None},
            "unknown": {"memory_bytes": None},
        },
        limits,
    )
    assert found is not None
    assert (found.candidate, found.limit, found.excess) == ("near", "memory_bytes", pytest.approx(math.log(1.5)))
    assert found.describe() == "needs 1.50 kB of memory, 1.5 times the limit of 1.00 kB"
    assert nearest({"unknown": {}}, limits) is None


def test_latencies_of_several_machines_or_runtimes_are_not_ranked() -> None:
    here = [row("a", latency_ms=9.0, machine="pi"), row("b", latency_ms=8.0, machine="pi")]
    assert names(here, "latency_ms", "min") == ["b", "a"]
    vllm = {"runtime": "vllm", "format": "huggingface", "bits": 16, "group_size": 0}
    for other in (row("c", latency_ms=1.0, machine="t4"), row("c", latency_ms=1.0, machine="pi", deployment=vllm)):
        with pytest.raises(InputError, match="latency_ms cannot rank rows of several machines or runtimes"):
            rank([*here, other], "latency_ms", "min")
    assert names([*here, row("c", machine="t4")], "latency_ms", "min")[:2] == ["b", "a"]


@pytest.mark.slow
def test_ten_thousand_rows_are_ranked_in_the_order_of_plain_sorting() -> None:
    generator = np.random.default_rng(1)
    sums = generator.binomial(100, generator.uniform(0.2, 0.6, (10_000, 1)), (10_000, 20)).astype(float)
    rows = [
        row(f"r{index}", accuracy=s.mean() / 100, memory_bytes=index, documents=documents(s.tolist()))
        for index, s in enumerate(sums)
    ]
    ranking = rank(rows)
    rest = [one.row.accuracy for one in ranking[1:]]
    assert rest == sorted(rest, reverse=True)  # type: ignore[type-var]
    assert len(pareto(rows, {"accuracy": "max", "memory_bytes": "min"})) > 0
