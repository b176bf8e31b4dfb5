"""When a trial is certain to fall short: against counting by hand, scipy, and trials drawn to be level with the bar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats

from autodistill.evaluation.base import Direction, Measurement
from autodistill.evaluation.early_stopping import PARTS, WRONG, Bar, Reading, ends, expected, order

Values = npt.NDArray[Any]


def measured(documents: Sequence[int], values: Sequence[float], **changes: Any) -> Measurement:
    """A mean of values, as an evaluator gives it; documents are added up one by one."""
    adding: dict[int, list[float]] = {}
    for document, value in zip(documents, values, strict=True):
        held = adding.setdefault(int(document), [0, 0])
        held[0] += 1
        held[1] += value
    whole = all(float(value).is_integer() for value in values)
    found = {
        "ids": sorted(adding),
        "count": [int(adding[one][0]) for one in sorted(adding)],
        "sum": [int(adding[one][1]) if whole else round(adding[one][1], 6) for one in sorted(adding)],
    }
    fields: dict[str, Any] = {"value": float(np.mean(values)), "unit": "fraction", "direction": "max", **changes}
    return Measurement(name="a", source="simulated", documents=found, **fields)


def bar_of(documents: Sequence[int], values: Sequence[float], **changes: Any) -> Bar:
    looks = [measured(documents[:end], values[:end], **changes) for end in ends(len(values))]
    return Bar(trial="t000", value=looks[-1].value, looks=tuple(one.documents for one in looks))


def stopped(documents: Values, mine: Values, bar: Bar) -> tuple[int, float] | None:
    """After which part it is certain, with nothing known of the values' range; and the estimate."""
    for look, end in enumerate(ends(len(mine))[:-1]):
        estimate = expected(measured(documents[:end].tolist(), mine[:end].tolist()), bar, look)
        if estimate is not None:
            return look, estimate
    return None


@pytest.mark.parametrize(
    ("count", "least", "parts"),
    [
        (8, 1, (2, 4, 6, 8)),
        (5, 1, (2, 3, 4, 5)),
        (1, 1, (1, 1, 1, 1)),
        (40, 16, (16, 32, 40, 40)),
        (130, 16, (48, 80, 112, 130)),
        (0, 16, (0, 0, 0, 0)),
    ],
)
def test_parts_are_quarters_in_whole_passes(count: int, least: int, parts: tuple[int, ...]) -> None:
    assert ends(count, least) == parts
    assert len(parts) == PARTS
    # Reading in parts takes no pass more than reading at once.
    passes = [-(-(end - start) // least) for start, end in zip((0, *parts), parts, strict=False)]
    assert sum(passes) == -(-count // least)


def test_questions_are_read_in_an_order_at_random_that_is_always_the_same() -> None:
    drawn = order(100)
    assert drawn.tolist() == order(100).tolist() != list(range(100))
    assert sorted(drawn.tolist()) == list(range(100))


@pytest.mark.parametrize("right", range(9))
def test_it_is_certain_where_all_that_is_unread_could_not_make_up_for_it(right: int) -> None:
    """12 questions, of which the bar has the first 7 right; after 9, of which some are right, 3 are left."""
    bar = bar_of(range(12), [1] * 7 + [0] * 5)
    mine = measured(range(9), [1] * right + [0] * (9 - right), bound=1.0)
    estimate = expected(mine, bar, 2)
    assert (estimate is not None) == (right + 3 < 7)
    if estimate is not None:
        # No share is below 0, though the bar did better in what was read than in the rest.
        assert estimate == pytest.approx(max(0.0, 7 / 12 + (right - 7) / 9))
    # Nothing is certain of values that may be anything, nor once all was read.
    assert expected(measured(range(9), [0] * 9), bar, 2) is None
    assert expected(measured(range(12), [0] * 12, bound=1.0), bar, 3) is None


def test_less_is_better_where_the_metric_says_so_and_of_a_perplexity_the_logarithm_is_a_mean() -> None:
    """Nats are no less than 0: 4 of them on half of the tokens are 2 on all at least."""
    direction: Direction = "min"
    more: dict[str, Any] = {"unit": "nats", "direction": direction, "bound": 0.0}
    theirs = [1.5, 2.2] * 4
    bar = bar_of(range(8), theirs, **more)
    found = expected(measured(range(4), [4.1, 4.0] * 2, **more), bar, 1)
    assert found == pytest.approx(1.85 + (4.05 - 1.85))
    assert expected(measured(range(4), [3.6, 3.7] * 2, **more), bar, 1) is None
    perplexity = {**more, "unit": "perplexity"}
    logarithms = Bar(trial="t000", value=float(np.exp(1.85)), looks=bar.looks)
    found = expected(measured(range(4), [4.1, 4.0] * 2, **perplexity), logarithms, 1)
    assert found == pytest.approx(np.exp(4.05))


def test_a_difference_is_certain_by_t_and_by_the_signs_of_its_documents() -> None:
    """Recomputed with scipy, over differences of every size; both tests must say so at a third of the probability."""
    dice = np.random.default_rng(3)
    said = set()
    for shift in np.linspace(0, 0.9, 80):
        documents = np.repeat(np.arange(24), 10)[dice.permutation(240)]
        theirs, mine = (dice.random(240) < share for share in (0.9, 0.9 - shift))
        end = ends(240)[1]
        bar = bar_of(documents.tolist(), theirs.astype(int).tolist())
        found = expected(measured(documents[:end].tolist(), mine[:end].astype(int).tolist()), bar, 1)
        gaps = np.array([(mine[:end] * 1 - theirs[:end])[documents[:end] == one].sum() for one in range(24)])
        counts = np.array([(documents[:end] == one).sum() for one in range(24)])
        mean = gaps.sum() / counts.sum()
        error = np.sqrt(24 / 23 * ((gaps - mean * counts) ** 2).sum()) / counts.sum()
        by_t = scipy.stats.t.cdf(mean / error, 23) < WRONG / 3
        signs = scipy.stats.binomtest(int((gaps > 0).sum()), max(1, int((gaps != 0).sum())), alternative="less").pvalue
        assert (found is not None) == bool(by_t and signs < WRONG / 3)
        said.add((bool(by_t), bool(signs < WRONG / 3)))
        if found is not None:
            assert found == pytest.approx(theirs.mean() + mean)
            assert found < bar.value
    assert {(True, True), (True, False), (False, False)} <= said


def test_documents_of_one_size_and_few_of_them_are_never_certain_by_themselves() -> None:
    """All eleven are worse by the same: t has no error at all, and the signs as much by chance in 1 of 2,048 trials."""
    for count, certain in ((11, False), (12, True)):
        documents = np.repeat(np.arange(count), 4)[np.random.default_rng(0).permutation(4 * count)].tolist()
        bar = bar_of(documents * 2, [1] * (8 * count))
        found = expected(measured(documents, [0] * (4 * count)), bar, 1)
        assert (found is not None) == certain


def test_only_the_same_tokens_are_compared() -> None:
    bar = bar_of(range(40), [1] * 40)
    assert expected(measured(range(20), [0] * 20, bound=1.0), bar, 1) is not None
    assert expected(measured(range(1, 21), [0] * 20, bound=1.0), bar, 1) is None
    assert expected(measured([*range(19), 0], [0] * 20, bound=1.0), bar, 1) is None
    no_mean = Measurement(name="ece", value=0.1, unit="fraction", direction="min", source="simulated")
    assert expected(no_mean, bar, 1) is None


def level(kind: str, count: int, dice: np.random.Generator) -> tuple[Values, Values, Values]:
    """Documents, and the right and wrong of two models that are level over all of them, or nearly, in random order."""
    if kind == "opposed questions":  # each is answered by one of the two alone: nothing is more uncertain
        documents, theirs = np.arange(count), np.arange(count) % 2
        mine = 1 - theirs
    elif kind == "questions":  # of any difficulty
        documents, easy = np.arange(count), dice.random(count)
        theirs, mine = (dice.random(count) < easy for _ in range(2))
    else:  # of text: a document says how much better one is there, on most a little worse, on one in eight much better
        documents = np.repeat(np.arange(count), dice.integers(10, 90, count))
        gain = dice.permutation(np.where(np.arange(count) % 8 == 0, 0.35, -0.05))
        theirs, mine = (dice.random(documents.size) < (0.4 + by)[documents] for by in (np.zeros(count), gain))
    drawn = dice.permutation(documents.size)
    return documents[drawn], theirs[drawn].astype(int), mine[drawn].astype(int)


@pytest.mark.parametrize(
    ("kind", "count", "draws"),
    [
        ("opposed questions", 16, 1500),
        ("opposed questions", 48, 3000),
        ("opposed questions", 400, 700),
        ("questions", 64, 2000),
        ("questions", 600, 400),
        ("documents", 6, 1000),
        ("documents", 14, 1500),
        ("documents", 48, 700),
    ],
)
def test_a_trial_that_would_have_reached_the_bar_is_hardly_ever_ended(kind: str, count: int, draws: int) -> None:
    """Of trials that all of the data put no lower than the bar; more than these are three errors above the promise."""
    dice = np.random.default_rng(0)
    wrong = 0
    for _ in range(draws):
        documents, theirs, mine = level(kind, count, dice)
        found = stopped(documents, mine, bar_of(documents.tolist(), theirs.tolist()))
        wrong += found is not None and mine.mean() >= theirs.mean()
    assert wrong <= scipy.stats.binom.ppf(0.999, draws, WRONG)


def test_a_trial_that_is_far_behind_is_ended() -> None:
    """With 200 questions, of which it answers half as many, after a quarter or a half of them."""
    dice, looks = np.random.default_rng(1), []
    for _ in range(50):
        theirs, mine = (dice.random(200) < share for share in (0.7, 0.25))
        found = stopped(np.arange(200), mine.astype(int), bar_of(range(200), theirs.astype(int).tolist()))
        looks.append(found[0] if found else 3)
        if found is not None:
            assert found[1] < theirs.mean()
            assert found[1] == pytest.approx(mine.mean(), abs=0.3)
    assert np.mean(np.array(looks) <= 1) > 0.8


def test_what_was_read_crosses_a_log() -> None:
    reading = Reading(unit="tokens", read=8, of=8, looks=bar_of(range(8), [1] * 8).looks)
    assert Reading.from_json(json.loads(json.dumps(reading.to_json()))) == reading
