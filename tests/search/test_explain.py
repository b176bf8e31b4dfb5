"""How a log is explained: the dimension that decides the values comes first; counts and limits are those of the log."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from autodistill.errors import InputError
from autodistill.estimates.fit import Miss, fits, nearest_miss
from autodistill.estimates.serving_memory import memory
from autodistill.hardware.budget import NO_LIMIT, Budget, DeviceBudget, parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.config import spec_from_config
from autodistill.runs.events import RungReached, TrialAdded
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.search.explain import _lost, _race, explain
from autodistill.search.planning.trial_memory import TrainingNeed
from autodistill.search.prior.tried_rates import RangeTest, TriedRate
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy
from autodistill.testing import small_plan
from autodistill.units import format_bytes
from autodistill.utils.json_files import write_json

REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "search-20261126-101010"
PLAN = small_plan()
SPACE = Space.from_json(
    {
        "dimensions": {
            "init.depth": {"low": 0.2, "high": 0.8},
            "distillation.temperature.shape": {"choices": ["constant", "linear"]},
            "distillation.temperature.end": {
                "low": 0.5,
                "high": 3.0,
                "when": {"distillation.temperature.shape": ["linear"]},
            },
            "init.layers": {"choices": ["even", "influence"]},
            "finishing": {"choices": {"none": None, "compressed": {"format": "compressed-tensors", "group_size": 32}}},
            "finishing.bits": {"choices": [8, 4], "when": {"finishing": ["compressed"]}},
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
    return Row.from_json(least | fields | figures)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return thirty trials whose value at the first rung is half their depth. Ten went on, three of them to the end."""
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
                "distillation.temperature.shape": ("constant", "linear")[number % 2],
                **({"distillation.temperature.end": 0.5 + number % 17 * 0.15} if number % 2 else {}),
                "init.layers": "even",
                "finishing": "compressed" if number < 5 else "none",
                **({"finishing.bits": 8} if number < 5 else {}),
            }
            folder.events.append({"event": "trial", "trial": trial, "point": point, "parameters": 1000})
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
    found = explain(run).importance["accuracy"]
    assert found.results == 30
    path, first = next(iter(found.shares.items()))
    assert (path, first.trials) == ("init.depth", 30)
    assert first.share > 0.5
    assert sum(item.share for item in found.shares.values() if item.trials == 30) == pytest.approx(1.0)


def test_equal_results_do_not_tell_what_mattered(run: RunFolder) -> None:
    events = run.events.read()
    run.events.path.write_text("")
    for event in events:
        run.events.append(event | ({"value": 0.0} if event["event"] == "rung" else {}))
    told = explain(run)
    found = told.importance["accuracy"]
    assert (found.results, found.shares) == (30, {})
    assert found.left_out["init.depth"] == "all that have it have the same result"
    assert "The 30 results do not tell which dimensions mattered for accuracy (init.depth: all that" in told.describe()


def test_a_dimension_under_a_condition_is_judged_by_the_trials_that_have_it_and_what_is_left_out_is_said(
    run: RunFolder,
) -> None:
    """With a constant temperature all trials are equally good. Otherwise those with a low end are better."""
    events = run.events.read()
    run.events.path.write_text("")
    points = {event["trial"]: event["point"] for event in events if event["event"] == "trial"}
    for event in events:
        if event["event"] == "rung":
            event["value"] = 1 / points[event["trial"]].get("distillation.temperature.end", 0.5)
        run.events.append(event)
    found = explain(run).importance["accuracy"]
    assert list(found.shares)[-1] == "distillation.temperature.end"
    end = found.shares["distillation.temperature.end"]
    assert end.trials == 15
    assert end.share > 0.5
    assert found.left_out == {
        "finishing.bits": "5 of 30 trials have it",
        "init.layers": "it is the same in all that have it",
    }
    text = explain(run).describe()
    line = f"  {end.share:6.1%}  distillation.temperature.end, among the 15 trials that have it\n"
    assert line in text
    assert "     --   finishing.bits: 5 of 30 trials have it\n" in text


def test_each_objective_has_its_own_table(run: RunFolder) -> None:
    """Memory follows from the depth, and accuracy from the learning rate. Only few trials have a latency."""
    asked = json.loads(run.search_file.read_text()) | {"objectives": ["accuracy", "memory", "latency"]}
    write_json(run.search_file, asked)
    events = run.events.read()
    run.events.path.write_text("")
    points = {event["trial"]: event["point"] for event in events if event["event"] == "trial"}
    for place, event in enumerate(events):
        if event["event"] == "rung":
            point = points[event["trial"]]
            event["value"] = math.log(point["distillation.learning_rate"])
            event["further"] = [1e6 * point["init.depth"], 3.0 if place < 9 else None]
        run.events.append(event)
    found = explain(run)
    firsts = [next(iter(item.shares), None) for item in found.importance.values()]
    assert list(found.importance) == ["accuracy", "memory", "latency"]
    assert firsts == ["distillation.learning_rate", "init.depth", None]
    text = found.describe()
    assert "What mattered for accuracy, in" in text
    assert "What mattered for memory, in" in text
    assert re.search(r"There are too few results \(\d+\) to tell which dimensions mattered for latency\.", text)


def test_a_test_of_learning_rates_is_told_where_there_was_one(run: RunFolder) -> None:
    assert explain(run).rates == ""
    tried = [
        TriedRate(rate=rate, gain=gain, stderr=0.002, sums=(1.0, 2.0), seconds=0.5)
        for rate, gain in ((1e-4, 0.03), (3e-4, 0.08), (1e-3, 0.06))
    ]
    found = RangeTest(
        first=1e-4, steps=48, horizon=600, counts=(10, 20), sums=(1.5, 2.5), tried=tuple(tried), chosen=4e-4
    )
    write_json(run.search_file, json.loads(run.search_file.read_text()) | {"rates": found.to_json()})
    said = "Learning rates, by the gain in nats per held-out token after 48 steps: 0.0001 +0.0300 ± 0.0020, "
    assert said in explain(run).describe()
    assert "; 0.0004 is used.\n" in explain(run).describe()
    largest = {"rates": found.to_json() | {"chosen": 1e-3}}
    write_json(run.search_file, json.loads(run.search_file.read_text()) | largest)
    assert "; no lower one is clearly better, so 0.001 is used.\n" in explain(run).describe()


def test_counts_and_tokens_are_those_of_the_log(run: RunFolder) -> None:
    found = explain(run)
    assert found.stopped == {1024: 20, 3072: 7, 9216: 3}
    (rejected,) = found.rejected
    assert (rejected.count, rejected.said, rejected.alike) == (2, "needs 7 MB too much", True)
    assert "\n     2  rejected without training: needs 7 MB too much\n" in found.describe()
    assert (found.tokens_trained, found.tokens_full) == (20 * 1024 + 7 * 3072 + 3 * 9216, 30 * 9216)
    assert found.tokens_rejected == 2 * 1024
    reached, whole = 20 * 1024 + 7 * 3072 + 3 * 9216, 30 * 9216
    said = f"Trials reached {reached:,} of the {whole:,} tokens that all of them would take to the end"
    assert f"{said} ({1 - reached / whole:.0%} fewer)." in found.describe()


def test_what_would_fit_next_is_what_is_better_and_how_much_it_lacks(run: RunFolder) -> None:
    found = explain(run)
    assert "90.0 MB of 100 MB (90%)" in found.binding
    (sentence,) = found.next
    assert sentence.startswith("2.10 MB more would hold")
    assert "accuracy 0.4000 instead of 0.3000" in sentence
    assert sentence in found.describe()


def test_rejections_are_told_by_cause_with_the_nearest_miss(run: RunFolder) -> None:
    """Reasons read as the rejecting code writes them: students of many sizes, each with its own bytes."""
    pi = find_device("pi 5", devices())
    events = [event for event in run.events.read() if event["event"] != "status"]
    run.events.path.write_text("")
    found_out: list[Miss | str | None] = []
    for width in (512, 768, 640, 1024):
        spec = spec_from_config({**SHAPE, "hidden_size": width})
        small = Budget(memory_bytes=1000)
        found_out.append(nearest_miss(fits(spec, SPACE.deployments, small), small))
        slow = DeviceBudget(memory_bytes=10**10, device=pi, latency=parse_latency("ttft_p95=1us,tpot_p95=1us"))
        found_out.append(nearest_miss(fits(spec, SPACE.deployments, slow), slow))
        need = TrainingNeed(need_bytes=width * 10**6, limit_bytes=10**6, micro_batch=1, remedy="less would help")
        found_out.append(need.miss)
        found_out.append(f"init.heads 0.5 leaves {width} heads: too many")
    reasons = [one.text if isinstance(one, Miss) else str(one) for one in found_out]
    for number, (one, reason) in enumerate(zip(found_out, reasons, strict=True)):
        ended = {"event": "status", "trial": f"r{number:03d}", "status": "rejected", "reason": reason}
        if isinstance(one, Miss):
            ended["miss"] = {"limit": one.limit, "slack": one.slack}
        events += [{"event": "trial", "trial": f"r{number:03d}", "point": None, "parameters": 10}, ended]
    for number in range(3):
        failed = {"event": "status", "status": "failed", "cause": "nan", "reason": f"nan: at token {number}"}
        events.append({**failed, "trial": f"t{number:03d}"})
    for event in events:
        run.events.append(event)
    found = explain(run)
    assert [(ended.cause, ended.count, ended.nearest) for ended in found.rejected] == [
        ("the student takes too much memory", 4, True),
        ("the student is too slow", 4, True),
        ("training takes too much memory", 4, True),
        ("init.heads … leaves … heads: too many", 4, False),
    ]
    assert [ended.said for ended in found.rejected] == reasons[:4]  # those of the smallest, which came first
    text = found.describe()
    said = f"     4  rejected without training: the student takes too much memory; the nearest: {reasons[0]}\n"
    assert said in text
    assert f"rejected without training: init.heads … leaves … heads: too many; the first: {reasons[3]}\n" in text
    assert "     3  failed: nan; the first: nan: at token 0\n" in text
    json.dumps(found.to_json())


def test_rejections_of_an_older_log_are_told_by_what_it_says(run: RunFolder) -> None:
    """An older log does not say which limit was missed, or by how much."""
    for number in (3, 2):
        reason = f"the smallest deployment, gguf-q4_0, needs {number} MB, {number - 1}.00 MB over the 1.00 MB budget"
        run.events.append({"event": "trial", "trial": f"r{number}", "point": None, "parameters": 10})
        run.events.append({"event": "status", "trial": f"r{number}", "status": "rejected", "reason": reason})
    (found,) = [ended for ended in explain(run).rejected if ended.cause.startswith("the smallest deployment, gguf-q")]
    assert (found.count, found.nearest) == (2, False)
    assert "needs 3 MB" in found.said  # the reason of the first


def test_one_student_is_not_said_to_have_been_raced(run: RunFolder) -> None:
    found = explain(run)
    assert "What was trained, without a race:\n  one" in replace(found, race=("one",)).describe()
    assert "What the race decided:\n  one\n  two" in replace(found, race=("one", "two")).describe()


def test_of_a_student_that_was_trained_alone_the_end_is_told() -> None:
    """By the reference run: validation perplexity after the trial's tokens, and at the end of the trunk."""
    runs = Path(__file__).parents[2] / "results" / "reference"
    (said,) = explain(RunFolder.open(runs, "search-20261129-210357")).race
    rows = {
        row.train_tokens: row for row in RunFolder.open(runs, "search-20261129-210357").events.rows(split="validation")
    }
    assert said.endswith(f"{math.log(rows[129_280].perplexity or 0):.4f} nats a token after 129,280 tokens")


def test_a_run_of_one_strategy_without_a_budget_is_explained(tmp_path: Path) -> None:
    """Its space has no dimension, so none can matter. Its limit is a number that nobody gave."""
    folder = RunFolder.create(tmp_path, "one")
    alone = replace(SPACE, dimensions=(), baselines={"mine": Strategy()})
    asked = {"plan": PLAN.to_json(), "space_definition": alone.to_json(), "metric": "accuracy", "direction": "max"}
    with folder:
        write_json(folder.search_file, {**asked, "budget": {"memory_bytes": NO_LIMIT}})
        folder.events.append({"event": "trial", "trial": "b000", "point": {}})
        folder.events.append({"event": "rung", "trial": "b000", "rung": 2, "tokens": PLAN.tokens, "value": 0.5})
        folder.events.append({"event": "row", "row": row("b000", 90_000_000, 0.30, True).to_json()})
    found = explain(folder)
    deployment = SPACE.deployments[0].name
    assert found.binding == f"The best, name as {deployment}, needs 90.0 MB: there is no memory limit."
    assert found.importance == {}
    assert "mattered" not in found.describe()
    assert "1  ended at" in found.describe()


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
    """Return that student's bytes: Q8_0 takes 34/32 bytes a weight, and Q4_0 18/32."""
    spec = spec_from_config(SHAPE)
    wide, narrow = (memory(spec, Deployment(**one), context=512, batch=1).total_bytes for one in PACKINGS)
    return wide, narrow


def told(folder: Path, limit: int, *rows: Row) -> tuple[str, tuple[str, ...]]:
    """Return the text about the limit, and about what would fit next, for a run of these rows."""
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
    """The limit lies between the needs of the two packings."""
    wide, narrow = needs
    rows = row("t000", narrow, 0.30, True), replace(row("t001", wide, 0.40, False), shape=SHAPE)
    _, (sentence,) = told(tmp_path, (wide + narrow) // 2, *rows)
    assert f"or it fits as gguf-q4_0, which needs {format_bytes(narrow)}" in sentence


def test_a_runtime_that_takes_more_than_predicted_does_so_packed_otherwise(
    tmp_path: Path, needs: tuple[int, int]
) -> None:
    """As Q8_0, it exceeded its prediction by the difference of the packings. The limit is what Q4_0 needs plus that."""
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
    # A row that only fits by its prediction does not fit either. Then nothing fits.
    binding, found = told(tmp_path / "nothing", wide, row("t000", wide - 1, 0.30, True), measured)
    assert (binding, found) == (
        f"Nothing fits {format_bytes(wide)}: the nearest needs {format_bytes(more - 1)} more.",
        (),
    )


def test_the_best_is_told_what_a_wider_packing_of_it_lacks(tmp_path: Path, needs: tuple[int, int]) -> None:
    wide, narrow = needs
    best = replace(row("t000", narrow, 0.30, True), shape=SHAPE, deployment=Deployment.from_json(PACKINGS[1]))
    binding, (sentence,) = told(tmp_path, wide - 2_100_000, best)
    assert "as gguf-q4_0" in binding
    assert sentence == "2.10 MB more would hold the best as gguf-q8_0, which was not evaluated because it does not fit."


def test_what_was_exported_before_any_trial_reached_the_end_is_the_best(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    asked = {"plan": PLAN.to_json(), "space_definition": SPACE.to_json(), "metric": "accuracy", "direction": "max"}
    exported = {"row_id": "t000-gguf-q8_0", "named": "name as gguf-q8_0", "trained": True}
    short = replace(row("t000", 60_000_000, 0.30, True), fidelity=0.5, name="the exported one")
    with run:
        run.events.append({"event": "trial", "trial": "t000", "point": None})
        for one in (short, replace(row("teacher", 80_000_000, 0.10, True), kind="teacher")):
            run.events.append({"event": "row", "row": one.to_json()})
        write_json(run.search_file, {**asked, "budget": {"memory_bytes": 100_000_000}})
        assert "the exported one" not in explain(run).binding
        gains = {"gain_unit": "accuracy", "gain_over_untrained": None, "gain_over_baseline": None}
        write_json(run.search_file, {**asked, "budget": {"memory_bytes": 100_000_000}, "exported": exported} | gains)
        assert explain(run).binding.startswith("The best, the exported one as gguf-q8_0, needs 60.0 MB of 100 MB")


def test_a_limit_of_latency_binds_only_what_was_kept_out_by_one(tmp_path: Path) -> None:
    """B was passed over because of the 15 MB that A took beyond its prediction. With C's 10 MB it would fit."""
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
    assert binding.endswith("A latency limit excludes better rows.")


def test_a_race_is_told_by_the_best_row_of_each_trial_and_its_paired_distance() -> None:
    def raced(trial: str, sums: list[float], kind: str = "student") -> Row:
        likelihood = {"ids": [1, 2], "count": [10, 10], "sum": sums}
        documents = likelihood | {"sum": [1, 2], "others": {"perplexity": likelihood}}
        figures = {"perplexity": math.exp(sum(sums) / 20), "documents": documents}
        return replace(row(trial, 90_000_000, 0.3, True), train_tokens=PLAN.tokens, kind=kind, **figures)

    rows = [raced("t003", [24.0, 26.0]), raced("t004", [20.0, 22.0]), raced("t003", [22.0, 24.0])]
    first, second = _race([*rows, raced("teacher", [10.0, 10.0], "teacher")], PLAN)
    assert first.endswith("2.1000 nats a token")
    assert second.endswith("2.3000 nats a token, 0.2000 ± 0.0000 behind")


def test_students_that_a_race_left_behind_are_told_with_the_best_of_their_rung() -> None:
    def reached(trial: str, rung: int, tokens: int, loss: float) -> RungReached:
        return RungReached(trial=trial, rung=rung, tokens=tokens, value=0.3, judged=math.exp(loss))

    names = {"t000": "wide", "t001": "narrow", "t002": "shallow", "b000": "recipe"}
    trials = {
        trial: TrialAdded(trial=trial, point=None, number=None if trial == "b000" else place, name=name)
        for place, (trial, name) in enumerate(names.items())
    }
    end = PLAN.tokens
    events = [reached(trial, 0, end // 9, 3.0 + place / 10) for place, trial in enumerate(names)]
    events += [reached("t000", 1, end // 3, 2.5), reached("t001", 1, end // 3, 2.7), reached("t000", 2, end, 2.0)]
    assert _lost(events, trials, PLAN) == (
        f"narrow: 2.7000 nats a token after {end // 3:,} tokens; the best there had 2.5000",
        f"shallow: 3.2000 nats a token after {end // 9:,} tokens; the best there had 3.0000",
    )


def test_a_run_that_does_not_name_its_budget_is_refused(tmp_path: Path) -> None:
    run = RunFolder.open(Path(shutil.copytree(REFERENCE, tmp_path / REFERENCE.name)).parent, REFERENCE.name)
    asked = json.loads(run.search_file.read_text())
    del asked["budget"]
    run.search_file.write_text(json.dumps(asked))
    with pytest.raises(InputError, match="search lacks budget"):
        explain(run)
