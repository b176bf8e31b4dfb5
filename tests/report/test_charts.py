"""Charts that Vega itself draws to SVG have a mark for each row that should be seen, in the right place."""

from __future__ import annotations

import builtins
import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
import vl_convert

from autodistill.errors import InputError, MissingDependencyError
from autodistill.hardware.budget import NO_LIMIT, Budget
from autodistill.report.charts import importance, pareto
from autodistill.runs.results.row import Row
from autodistill.search.algorithms.optuna_study import Importance, Share
from autodistill.search.explain import Explanation

SVG = "{http://www.w3.org/2000/svg}"
Q4 = {"runtime": "llama.cpp", "format": "gguf-q4_0", "bits": 4, "group_size": 32}


def row(name: str, **fields: Any) -> Row:
    least = {"row_id": f"{name}-q4", "trial": name, "kind": "student", "name": name, "deployment": Q4}
    least |= {"status": "completed", "feasible": True, "fidelity": 1.0, "split": "validation"}
    return Row.from_json(least | fields)


ROWS = [
    row("t001", accuracy=0.41, accuracy_stderr=0.01, memory_bytes=70_000_000, strategy={"init": {"depth": 0.5}}),
    row("t002", accuracy=0.30, memory_bytes=50_000_000, size_bytes=40_000_000),
    row("t003", accuracy=0.29, memory_bytes=60_000_000),
    row("b000", kind="baseline", accuracy=0.44, memory_bytes=100_000_000, feasible=False, reason="memory over"),
    row("teacher", kind="teacher", accuracy=0.5, memory_bytes=120_000_000, feasible=False, latency_ms=3.0),
    # Not drawn: not trained in full, without memory, from the test split, or with a further seed.
    row("t005", accuracy=0.50, memory_bytes=40_000_000, fidelity=0.25),
    row("t006", accuracy=0.45),
    row("t001", accuracy=0.40, memory_bytes=70_000_000, split="test"),
    row("s000", kind="confirmation", accuracy=0.42, memory_bytes=70_000_000),
]


def drawn(chart: Any, mark: str) -> list[tuple[dict[str, str], ElementTree.Element]]:
    """Return the label and the element of each mark of a kind."""
    tree = ElementTree.fromstring(vl_convert.vegalite_to_svg(chart.to_dict()))
    found = []
    for group in tree.iter(f"{SVG}g"):
        if re.search(rf"mark-{mark} role-mark (layer_\d+_)?marks", group.get("class", "")):
            for element in group:
                label = element.get("aria-label", "")
                found.append((dict(part.split(": ", 1) for part in label.split("; ") if ": " in part), element))
    return found


def place(element: ElementTree.Element) -> tuple[float, float]:
    x, y = re.findall(r"[-\d.]+", element.get("transform", ""))[:2]
    return float(x), float(y)


def test_each_row_is_a_point_in_its_place() -> None:
    points = drawn(pareto(ROWS, budget=Budget(memory_bytes=90_000_000)), "symbol")
    said = {label["row"]: label for label, _ in points}
    assert {name: (label["memory (MB)"], label["accuracy"]) for name, label in said.items()} == {
        "t001-q4": ("70", "0.41"),
        "t002-q4": ("50", "0.3"),
        "t003-q4": ("60", "0.29"),
        "b000-q4": ("100", "0.44"),
        "teacher-q4": ("120", "0.5"),
    }
    # More memory is further right, and more accuracy is further up, which is a smaller y in SVG.
    places = {label["row"]: place(element) for label, element in points}
    assert sorted(places, key=lambda name: places[name][0]) == [
        f"{name}-q4" for name in ("t002", "t003", "t001", "b000", "teacher")
    ]
    assert sorted(places, key=lambda name: -places[name][1]) == [
        f"{name}-q4" for name in ("t003", "t002", "t001", "b000", "teacher")
    ]


def test_who_fits_and_who_is_who_can_be_told_apart() -> None:
    points = {label["row"]: (label, element) for label, element in drawn(pareto(ROWS), "symbol")}
    colors = {name: element.get("fill") for name, (_, element) in points.items()}
    assert colors["t001-q4"] == colors["t003-q4"] != colors["b000-q4"] == colors["teacher-q4"]
    outlines = {name: element.get("d") for name, (_, element) in points.items()}
    assert outlines["t001-q4"] == outlines["t002-q4"]
    assert len({outlines[name] for name in ("t001-q4", "b000-q4", "teacher-q4")}) == 3


def test_over_a_point_stand_its_figures_and_its_strategy() -> None:
    points = {label["row"]: label for label, _ in drawn(pareto(ROWS), "symbol")}
    assert points["t001-q4"]["metric"] == "accuracy 0.4100 ± 0.0100"
    assert points["t001-q4"]["strategy"] == "init.depth 0.5"
    assert points["teacher-q4"]["strategy"] == "the teacher, unchanged"
    assert points["b000-q4"]["limits"] == "memory over"
    assert points["t002-q4"]["needs"] == "50 MB"


def test_the_front_the_errors_and_the_budget_are_lines() -> None:
    chart = pareto(ROWS, budget=Budget(memory_bytes=90_000_000))
    front = next(layer for layer in chart.to_dict()["layer"] if layer["mark"]["type"] == "line")
    assert front["data"]["values"] == [{"memory": 50.0, "accuracy": 0.3}, {"memory": 70.0, "accuracy": 0.41}]
    errors = [label for label, _ in drawn(chart, "rule") if "accuracy_high" in label]
    assert [(label["accuracy"], label["accuracy_high"]) for label in errors] == [("0.4", "0.42")]
    ((text, _),) = drawn(chart, "text")
    assert (text["memory (MB)"], text["limit"]) == ("90", "budget: 90.0 MB")
    assert not drawn(pareto(ROWS, budget=Budget(memory_bytes=NO_LIMIT)), "text")
    assert not drawn(pareto(ROWS, against="latency", budget=Budget(memory_bytes=10**9)), "text")


def test_size_or_latency_may_be_drawn_instead() -> None:
    assert [label["size of the weights (MB)"] for label, _ in drawn(pareto(ROWS, against="size"), "symbol")] == ["40"]
    ((label, _),) = drawn(pareto(ROWS, against="latency"), "symbol")
    assert (label["row"], label["needs"]) == ("teacher-q4", "3 ms")


def test_less_may_be_better() -> None:
    rows = [row("a", perplexity=9.0, memory_bytes=10**7), row("b", perplexity=8.0, memory_bytes=2 * 10**7)]
    rows.append(row("c", perplexity=10.0, memory_bytes=3 * 10**7))
    front = pareto(rows, metric="perplexity", direction="min").to_dict()["layer"][0]
    assert front["data"]["values"] == [{"memory": 10.0, "perplexity": 9.0}, {"memory": 20.0, "perplexity": 8.0}]


def explanation(**importance: Importance) -> Explanation:
    fields = dict.fromkeys(Explanation.__dataclass_fields__)
    return Explanation(**fields | {"metric": "accuracy", "importance": importance})  # type: ignore[arg-type]


FOUND = Importance(
    results=9,
    shares={"init.depth": Share(share=0.75, trials=9), "distillation.mixture": Share(share=0.25, trials=8)},
    left_out={},
)


def test_dimensions_are_bars_of_their_shares_the_largest_first() -> None:
    bars = drawn(importance(explanation(accuracy=FOUND)), "rect")
    assert [(label["dimension"], label["share"]) for label, _ in bars] == [
        ("init.depth", "75.0%"),
        ("distillation.mixture", "25.0%"),
    ]
    lengths = [float(re.findall(r"h([\d.]+)", element.get("d", ""))[0]) for _, element in bars]
    assert lengths[0] == pytest.approx(3 * lengths[1])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: pareto(ROWS, metric="kl"), "no row has both kl and memory"),
        (lambda: pareto([], against="size"), "no row has both accuracy and size"),
        (lambda: pareto(ROWS, against="bits"), "against is 'bits'; it can be memory, size, latency"),
        (lambda: importance(explanation(accuracy=FOUND), "kl"), "not judged by kl; its objectives are accuracy"),
        (
            lambda: importance(explanation(accuracy=replace(FOUND, results=3, shares={}))),
            "3 trials have reached the first rung, and it takes 8 with different strategies",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(draw: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw()


def test_without_altair_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "altair":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match="charts need Vega-Altair: pip install"):
        pareto(ROWS)
