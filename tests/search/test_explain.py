"""What a log tells: the dimension that made the values comes first; counts and limits are those of the log."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from autodistill.errors import InputError
from autodistill.estimate import memory, spec_from_config
from autodistill.records.json_files import write_json
from autodistill.records.row import Row
from autodistill.records.store import RunFolder
from autodistill.search.explain import explain
from autodistill.space import Space
from autodistill.strategy import Deployment
from autodistill.testing import small_plan
from autodistill.units import format_bytes

PLAN = small_plan()
SPACE = Space.from_json(
    {
        "dimensions": {
            "init.depth": {"low": 0.2, "high": 0.8},
            "distillation.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
            "distillation.divergence_weight": {"low": 0.0, "high": 1.0},
        },
        "deployments": [{"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}],
    }
)


def row(trial: str, memory: int, accuracy: float, feasible: bool) -> Row:
    least = {"row_id": f"{trial}-gguf-q8_0", "trial": trial, "kind": "student", "name": "name", "strategy_id": None}
    fields = {
        "strategy": None,
        "deployment": SPACE.deployments[0].to_json(),
        "status": "completed",
        "split": "validation",
    }
    figures = {"accuracy": accuracy, "memory_bytes": memory, "feasible": feasible, "fidelity": 1.0}
    return Row(**least | fields | figures)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Thirty trials whose value at the first rung is half their depth; ten went on, three to the end."""
    source = random.Random(5)
    folder = RunFolder.create(tmp_path, "run")
    asked = {"plan": PLAN.to_json(), "space_definition": SPACE.to_json(), "metric": "accuracy", "direction": "max"}
    with folder:
        write_json(folder.search_file, {**asked, "budget": {"memory_bytes": 100_000_000}})
        for number in range(32):
            trial = f"t{number:03d}"
            point = {
                "init.depth": source.uniform(0.2, 0.8),
                "distillation.learning_rate": 10 ** source.uniform(-5, -3),
                "distillation.divergence_weight": source.random(),
            }
            folder.events.append({"event": "trial", "trial": trial, "point": point})
            if number >= 30:
                folder.events.append(
                    {"event": "status", "trial": trial, "status": "rejected", "reason": "needs 7 MB too much"}
                )
                continue
            for rung in range(1 + (number < 10) + (number < 3)):
                folder.events.append(
                    {
                        "event": "rung",
                        "trial": trial,
                        "rung": rung,
                        "tokens": PLAN.rungs[rung],
                        "value": point["init.depth"] / 2 + rung / 100,
                    }
                )
        for one in (
            row("t000", 90_000_000, 0.30, True),
            row("t001", 102_100_000, 0.40, False),
            row("t002", 101_000_000, 0.20, False),
        ):
            folder.events.append({"event": "row", "row": one.to_json()})
    return folder


def test_the_dimension_that_made_the_values_matters_most(run: RunFolder) -> None:
    found = explain(run)
    assert found.results == 30
    assert next(iter(found.importance)) == "init.depth"
    assert found.importance["init.depth"] > 0.5
    assert sum(found.importance.values()) == pytest.approx(1.0)


def test_counts_and_tokens_are_those_of_the_log(run: RunFolder) -> None:
    found = explain(run)
    assert found.stopped == {1024: 20, 3072: 7, 9216: 3}
    assert found.rejected == {"needs 7 MB too much": 2}
    assert (found.tokens_trained, found.tokens_full) == (20 * 1024 + 7 * 3072 + 3 * 9216, 30 * 9216)
    assert found.tokens_rejected == 2 * 1024
    reached, whole = 20 * 1024 + 7 * 3072 + 3 * 9216, 30 * 9216
    said = f"Trials reached {reached:,} of the {whole:,} tokens that all of them to the end would be"
    assert f"{said} ({1 - reached / whole:.0%} saved by stopping)." in found.describe()


def test_what_would_fit_next_is_what_is_better_and_how_much_it_lacks(run: RunFolder) -> None:
    found = explain(run)
    assert "90.0 MB of 100 MB (90%)" in found.binding
    (sentence,) = found.next
    assert sentence.startswith("2.10 MB more would hold")
    assert "accuracy 0.4000 instead of 0.3000" in sentence
    assert sentence in found.describe()


def test_a_run_without_trials_has_nothing_to_explain(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "empty")
    asked = {"plan": PLAN.to_json(), "space_definition": SPACE.to_json(), "metric": "accuracy", "direction": "max"}
    with folder:
        write_json(folder.search_file, {**asked, "budget": {"memory_bytes": 1}})
    with pytest.raises(InputError, match="no trial yet"):
        explain(folder)


SHAPE = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
PACKINGS = [{"runtime": "llama.cpp", "format": f"gguf-q{bits}_0", "bits": bits, "group_size": 32} for bits in (8, 4)]


@pytest.fixture
def needs() -> tuple[int, int]:
    """Bytes of that student: as Q8_0 a weight takes 34/32 of one, as Q4_0 18/32."""
    spec = spec_from_config(SHAPE)
    wide, narrow = (memory(spec, Deployment(**one), context=512, batch=1).total_bytes for one in PACKINGS)
    return wide, narrow


def told(folder: Path, limit: int, *rows: Row) -> tuple[str, tuple[str, ...]]:
    """What is said of the limit, and of what would fit next, in a run of these rows."""
    space = {**SPACE.to_json(), "deployments": PACKINGS}
    asked = {"plan": PLAN.to_json(), "space_definition": space, "metric": "accuracy", "direction": "max"}
    run = RunFolder.create(folder, "run")
    with run:
        write_json(run.search_file, {**asked, "budget": {"memory_bytes": limit, "context": 512, "batch": 1}})
        run.events.append({"event": "trial", "trial": "t000", "point": None})
        for one in rows:
            run.events.append({"event": "row", "row": one.to_json()})
    found = explain(run)
    return found.binding, found.next


def test_a_student_that_lacks_room_is_told_how_it_would_be_packed_into_it(
    tmp_path: Path, needs: tuple[int, int]
) -> None:
    """The limit lies between what the two packings need."""
    wide, narrow = needs
    rows = row("t000", narrow, 0.30, True), replace(row("t001", wide, 0.40, False), shape=SHAPE)
    _, (sentence,) = told(tmp_path, (wide + narrow) // 2, *rows)
    assert f"or it fits as gguf-q4_0, which needs {format_bytes(narrow)}" in sentence


def test_a_runtime_that_takes_more_than_predicted_does_so_packed_otherwise(
    tmp_path: Path, needs: tuple[int, int]
) -> None:
    """As Q8_0 it took as much more as lies between the two packings: the limit is what Q4_0 needs with that."""
    wide, narrow = needs
    more = wide - narrow
    measured = replace(
        row("t001", wide + more, 0.40, False),
        shape=SHAPE,
        memory_source="measured",
        other={"memory_bytes_predicted": wide},
    )
    fitting = row("t000", narrow - more, 0.30, True)
    _, (sentence,) = told(tmp_path / "holds", narrow + more, fitting, measured)
    assert sentence.startswith(f"{format_bytes(wide - narrow)} more would hold")
    assert f"or it fits as gguf-q4_0, which needs {format_bytes(narrow + more)}" in sentence
    _, (sentence,) = told(tmp_path / "does not", narrow + more - 1, fitting, measured)
    assert "or it fits" not in sentence
    # One that keeps to the limit by prediction alone does not hold either, and then nothing does.
    binding, found = told(tmp_path / "nothing", wide, row("t000", wide - 1, 0.30, True), measured)
    assert (binding, found) == (
        f"Nothing fits {format_bytes(wide)}: the nearest needs {format_bytes(more - 1)} more.",
        (),
    )


def test_the_best_is_told_what_a_wider_packing_of_it_lacks(tmp_path: Path, needs: tuple[int, int]) -> None:
    wide, narrow = needs
    best = replace(row("t000", narrow, 0.30, True), shape=SHAPE, deployment=PACKINGS[1])
    binding, (sentence,) = told(tmp_path, wide - 2_100_000, best)
    assert "as gguf-q4_0" in binding
    assert sentence == "2.10 MB more would hold the best as gguf-q8_0, which was not evaluated for want of it."


def test_a_limit_of_latency_binds_only_what_was_kept_out_by_one(tmp_path: Path) -> None:
    """What was passed over for the 15 MB that A took beyond its prediction would fit with the 10 MB that C took."""
    more = {"memory_source": "measured"}
    first = replace(row("A", 215_000_000, 0.45, False), other={"memory_bytes_predicted": 200_000_000}, **more)
    passed = replace(
        row("B", 198_000_000, 0.40, False), reason="memory: 198000000 bytes predicted, 213000000 with what"
    )
    third = replace(row("C", 190_000_000, 0.35, True), other={"memory_bytes_predicted": 180_000_000}, **more)
    binding, _ = told(tmp_path / "memory", 210_000_000, first, passed, third)
    assert "latency" not in binding
    late = replace(passed, reason="latency: tpot_p95 is predicted 80.0ms, over 50.0ms")
    binding, _ = told(tmp_path / "latency", 210_000_000, first, late, third)
    assert binding.endswith("A limit of latency binds.")
