"""The end of a search, and a plan, as a user reads them."""

import re
from dataclasses import replace
from typing import Any

import pytest

from autodistill.cli.summary import plan_summary, search_summary
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import Row
from autodistill.runs.savings import saved
from autodistill.strategy.strategy import Strategy
from autodistill.testing import small_plan

Q8 = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
FULL = {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}


def row(trial: str, kind: str, deployment: dict[str, Any] = Q8, **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": f"{trial}-{deployment['format']}",
        "trial": trial,
        "kind": kind,
        "name": trial,
        "deployment": deployment,
        "status": "completed",
        "feasible": True,
        "fidelity": 1.0,
        "strategy": Strategy().to_json(),
    }
    return Row.from_json(least | fields)


TEST = [
    row("teacher", "teacher", FULL, accuracy=0.5, accuracy_stderr=0.0101, split="test"),
    row("teacher", "teacher", accuracy=0.495, accuracy_stderr=0.0102, split="test"),
    row("initial", "initial", accuracy=0.05, accuracy_stderr=0.0103, split="test"),
    row("t003", "student", accuracy=0.42, accuracy_stderr=0.0104, perplexity=31.25, agreement=0.61, split="test"),
    row("b000", "baseline", accuracy=0.40, accuracy_stderr=0.0105, split="test"),
]
DOCUMENT: dict[str, Any] = {
    "name": "small",
    "best": row("t003", "student").to_json(),
    "test": [one.to_json() for one in TEST],
    "exported": {"row_id": "t003-gguf-q8_0", "named": "t003 as gguf-q8_0", "trained": True},
    "gain_over_untrained": {
        "over": "teacher",
        "named": "the teacher itself as gguf-q8_0",
        "value": -0.07,
        "stderr": 0.01,
    },
    "gain_over_baseline": {"over": "b000", "named": "b000 as gguf-q8_0", "value": 0.02, "stderr": 0.0042},
    "gain_unit": "accuracy",
    "confirmation": [],
    "notes": ["the budget of 16.0 GB does not bind"],
    "seconds": {"load": 12.3, "cache": 20.0, "overhead": 3.25, "total": 590.0},
    "budget": {"memory_bytes": 16 * 10**9, "context": 1024, "batch": 1},
    "saved": saved([], small_plan()).to_json(),
    "paths": {"run": "runs/small", "gguf": "runs/small/student/gguf/student.gguf"},
}
RANKED = rank([row(f"t{index:03d}", "student", accuracy=0.4 - index / 1000) for index in range(20)])


def test_the_summary_holds_everything_in_some_forty_lines() -> None:
    text = search_summary(DOCUMENT, RANKED, "accuracy")
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines()[:-1])) <= 120
    assert text.count("-gguf-q8_0") == 15 + 1
    assert "5 more rows: autodistill leaderboard small" in text
    assert "The budget of 16.0 GB does not bind." in text
    assert "Seconds: load 12.3, cache 20.0, overhead 3.2; 9m 50s in all." in text
    assert text.splitlines()[-4].startswith("Serve t003-gguf-q8_0, with the context and the cache")
    assert text.splitlines()[-3] == "  autodistill serve runs/small/student/gguf/student.gguf"
    assert text.splitlines()[-1] == (
        "Gain on test over the best that needs no training (the teacher itself as gguf-q8_0), paired: "
        "-0.0700 ± 0.0100 of accuracy; over the baseline: +0.0200 ± 0.0042."
    )


def test_a_note_that_begins_with_a_name_keeps_its_spelling() -> None:
    notes = ["gguf-q4_0 fits", "model.norm.weight is new", "t003x was trained further", "time-outs: 2", "what is left"]
    text = search_summary(DOCUMENT | {"notes": notes}, RANKED, "accuracy")
    told = ["gguf-q4_0 fits.", "model.norm.weight is new.", "t003x was trained further.", "Time-outs: 2."]
    assert "\n".join([*told, "What is left."]) in text


def test_what_was_saved_is_said() -> None:
    spared = DOCUMENT["saved"] | {"sharing": 3, "shared_tokens": 12288, "shared_flops": 7.5e14, "shared_seconds": 130.0}
    text = search_summary(DOCUMENT | {"saved": spared}, RANKED, "accuracy")
    assert "12,288 tokens (about 7.5e+14 FLOPs, 2m 10s of a worker) saved" in text


def test_the_test_split_names_the_five_that_are_compared() -> None:
    lines = search_summary(DOCUMENT, RANKED, "accuracy").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("test split"))
    table = [re.split(r"  +", line) for line in lines[start + 1 : start + 6]]
    assert [(cells[0], cells[1], cells[2]) for cells in table] == [
        ("found student", "gguf-q8_0", "0.4200 ± 0.0104"),
        ("baseline", "gguf-q8_0", "0.4000 ± 0.0105"),
        ("untrained student", "gguf-q8_0", "0.0500 ± 0.0103"),
        ("teacher", "huggingface", "0.5000 ± 0.0101"),
        ("quantised teacher", "gguf-q8_0", "0.4950 ± 0.0102"),
    ]
    assert table[0][3:5] == ["31.25", "0.6100"]


def test_what_was_solved_is_told_from_the_beginning_of_what_trained_its_weights() -> None:
    solved = row("solved", "initial", accuracy=0.06, split="test")
    lines = search_summary(DOCUMENT | {"test": [solved.to_json(), *DOCUMENT["test"]]}, RANKED, "accuracy").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("test split"))
    titles = [re.split(r"  +", line)[0] for line in lines[start + 1 : start + 5]]
    assert titles == ["found student", "baseline", "solved, untrained", "untrained student"]


def test_the_end_says_of_how_many_documents_its_errors_are_and_has_a_gain_without_one() -> None:
    documents = {"ids": [1], "count": [100], "sum": [40]}
    test = [replace(one, documents=documents).to_json() for one in TEST]
    single = DOCUMENT["gain_over_baseline"] | {"stderr": None}
    text = search_summary(DOCUMENT | {"test": test, "gain_over_baseline": single}, RANKED, "accuracy")
    assert text.endswith("; over the baseline: +0.0200.")
    assert "\nNo ± is given: all was read in one document, and an error needs several." in text
    board = rank([replace(one.row, documents={"ids": [1] * 30, "count": [5] * 30, "sum": [1] * 30}) for one in RANKED])
    assert "\n± comes from 30 documents.\n" in search_summary(DOCUMENT, board, "accuracy")


def test_a_student_that_was_trained_on_is_shown_as_it_was_before_too() -> None:
    before = row("t003", "student", accuracy=0.39, split="test")
    best = row("t003x", "student", accuracy=0.42, fidelity=4.0, split="test")
    test = [one.to_json() for one in (*TEST[:3], best, TEST[4], before)]
    lines = search_summary(DOCUMENT | {"best": best.to_json(), "test": test}, RANKED, "accuracy").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("test split"))
    titles = [re.split(r"  +", line)[0] for line in lines[start + 1 : start + 7]]
    assert titles[:3] == ["found student", "found, at 100%", "baseline"]


def test_memory_on_the_test_split_is_what_was_measured_of_the_exported_student_and_else_marked_as_predicted() -> None:
    predicted = [replace(one, memory_bytes=22_500_000, memory_source="predicted").to_json() for one in TEST]
    best = DOCUMENT["best"] | {"memory_bytes": 42_600_000, "memory_source": "measured"}
    lines = search_summary(DOCUMENT | {"best": best, "test": predicted}, RANKED, "accuracy").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("test split"))
    assert [re.split(r"  +", line)[-1] for line in lines[start + 1 : start + 6]] == ["42.6 MB", *["~22.5 MB"] * 4]


def test_a_baseline_that_won_is_the_found_student_and_has_no_gain() -> None:
    document = DOCUMENT | {
        "best": row("b000", "baseline").to_json(),
        "test": [one.to_json() for one in TEST if one.kind != "student"],
        "gain_over_baseline": None,
        "confirmation": [],
    }
    text = search_summary(document, RANKED, "accuracy")
    assert re.search(r"found student +gguf-q8_0 +0.4000", text)
    assert "over the baseline" not in text


def test_what_was_not_trained_and_is_exported_stands_first_and_is_marked() -> None:
    document = DOCUMENT | {
        "best": row("teacher", "teacher").to_json(),
        "test": [one.to_json() for one in TEST if one.kind not in ("initial", "student")],
        "exported": {"row_id": "teacher", "named": "the teacher itself as gguf-q8_0", "trained": False},
        "gain_over_untrained": None,
    }
    lines = search_summary(document, RANKED, "accuracy").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("test split"))
    titles = [re.split(r"  +", line)[0] for line in lines[start + 1 : start + 4]]
    assert titles == ["quantised teacher, exported", "baseline", "teacher"]
    assert lines[-1] == (
        "No trained student is better than the teacher itself as gguf-q8_0, which is exported as it is. Gain "
        "on test over the baseline, paired: +0.0200 ± 0.0042 of accuracy."
    )


def test_a_metric_that_is_no_mean_is_shown_of_the_test_split_without_a_gain() -> None:
    documents = {"ids": [1], "count": [100], "sum": [40], "metric": "accuracy"}
    rows = [replace(one, documents=documents, other={"ece": 0.1 + index / 100}) for index, one in enumerate(TEST)]
    unpaired = {name: DOCUMENT[name] | {"value": None} for name in ("gain_over_untrained", "gain_over_baseline")}
    document = DOCUMENT | {"test": [one.to_json() for one in rows], "gain_unit": "ece", **unpaired}
    lines = search_summary(document, RANKED, "ece").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("test split"))
    table = [re.split(r"  +", line) for line in lines[start : start + 6]]
    # The order is the student, the baseline, the untrained student and the teachers. It is not the order of the rows.
    assert [cells[-1] for cells in table] == ["ece", "0.1300", "0.1400", "0.1200", "0.1000", "0.1100"]
    assert lines[-1].endswith(
        "paired: unknown, since it is not recorded for each document; over the baseline: unknown, since it is not "
        "recorded for each document."
    )


@pytest.mark.parametrize(
    ("paths", "line"),
    [({"compressed-tensors": "c"}, "  vllm serve c"), ({"huggingface": "h"}, "huggingface  h")],
)
def test_the_line_before_the_gain_serves_what_was_exported(paths: dict[str, str], line: str) -> None:
    assert search_summary(DOCUMENT | {"paths": paths}, RANKED, "accuracy").splitlines()[-3] == line


def test_a_gguf_that_is_not_the_found_student_is_not_served_as_it() -> None:
    text = search_summary(DOCUMENT | {"best": row("t003", "student", FULL).to_json()}, RANKED, "accuracy")
    assert "Serve the GGUF (not the row whose test figures are above)" in text


def test_a_plan_is_its_trials_rungs_tokens_cache_and_time() -> None:
    plan = {
        "trials": 9,
        "tokens": 9216,
        "rungs": [1024, 3072, 9216],
        "keep": [5, 2],
        "batch_tokens": 256,
        "workers": 2,
        "threads": 1,
        "bf16": True,
        "rung_eval_tokens": 1024,
        "eval_tokens": 2048,
        "test_tokens": 4096,
        "box_seconds": 600.0,
        "seconds": {"load": 20.0, "workers": 0.0, "trials": 400.0},
        "micro_batch": 1,
        "checkpointing": True,
        "optimizer_state": "int8",
        "longest": 1.0,
        "alone": 0,
        "notes": ["the time budget holds 9 trials; 12 are usual: give it more --time"],
    }
    memory = {
        "weights_bytes": 1.5e9,
        "shown_bytes": 0.5e9,
        "gradients_bytes": 1e9,
        "writing_bytes": 0,
        "total_bytes": 3e9,
    }
    document = {"plan": plan, "cache_bytes": 3.5e6, "expected_seconds": 420.0, "training_bytes": memory}
    document |= {"baselines": ["hand_designed"], "notes": ["2 of 9 records are left out: they have no text"]}
    document["evaluation_bytes"] = 1.5e9
    document |= {"students": 4, "students_bytes": 24e9}
    document["budget"] = DOCUMENT["budget"]
    hours = {"machine_hours": 0.1167, "worker_hours": 0.2222, "gpu_hours": 0.0}
    text = plan_summary(document | hours, width=500)
    assert "0.12 machine-hours, 0.22 worker-hours of trials\n" in text
    half = plan_summary(document | hours | {"plan": plan | {"optimizer_state": "bfloat16"}}, width=500)
    assert "1 sequence at a time, checkpointing, 16-bit optimiser states: weights" in half
    full = plan_summary(document | hours | {"plan": plan | {"optimizer_state": "float32"}}, width=500)
    assert "1 sequence at a time, checkpointing: weights" in full
    paid = {"price_per_hour": 2.5, "price_of": "GPU", "cost": 5.0, "currency": "EUR", "cost_shown": "5.00 EUR"}
    dear = plan_summary(document | hours | {"gpu_hours": 2.0} | paid)
    assert "2.00 GPU-hours, 0.22 worker-hours of trials; 5.00 EUR at 2.50 EUR an hour of a GPU" in dear
    for words in (
        "16.0 GB at context 1024, batch 1",
        "24.0 GB of disk at most for 4 of them, kept in float32, and checkpoints in addition; "
        "--checkpoint-limit covers both\n",
        "9 proposed, and the baseline hand_designed\n",
        "2 of 9 records are left out: they have no text.\n",
        "1,024, 3,072, 9,216 tokens, reached by 9, 5, 2 of them",
        "9,216 a trial",
        "2 with 1 thread each, bf16",
        "3.50 MB of disk",
        "3.00 GB to train the largest student, 1 sequence at a time, checkpointing, 8-bit optimiser states: "
        "weights 1.50 GB, rounded copies 500 MB, gradients 1.00 GB; 1.50 GB to evaluate it",
        "7m 00s expected, time budget 10m 00s",
        "load 20.0s, trials 6m 40s",
        "The time budget holds 9 trials; 12 are usual: give it more --time.",
    ):
        assert words in text
    assert "the best" not in text
    further = plan | {"longest": 34.0, "expected": 4.25, "alone": 2, "seconds": plan["seconds"] | {"longer": 150.0}}
    text = plan_summary(document | hours | {"plan": further | {"by_labels": 0.0}})
    assert "the best    trained for another 2m 30s, alone on 2 threads, to about 4.25 times those tokens\n" in text
    text = plan_summary(document | hours | {"plan": further | {"by_labels": 7.5}}, width=500)
    assert "to about 4.25 times those tokens, or 7.5 times if the labels alone teach best\n" in text
    assert "9 proposed, and no baseline to beat" in plan_summary(document | hours | {"baselines": []})
    narrow = plan_summary(document | hours, width=80).splitlines()
    assert max(map(len, narrow)) <= 80
    memory_at = next(place for place, line in enumerate(narrow) if line.startswith("memory "))
    assert narrow[memory_at + 1].startswith(" " * 12), "what goes on stands under its own column"


def test_one_more_row_is_one_row() -> None:
    board = rank([row(f"t{index:03d}", "student", accuracy=0.4 - index / 1000) for index in range(16)])
    assert "\n1 more row: autodistill leaderboard small" in search_summary(DOCUMENT, board, "accuracy")


def test_tasks_that_do_not_rank_are_shown_of_the_test_split_as_many_in_a_table_as_a_line_holds() -> None:
    names = [f"task:{name}" for name in ("sums", "capitals", "proverbs")]
    figures = {name: 0.1 * place for place, name in enumerate(names, start=1)}
    errors = {f"{name}_stderr": 0.01 for name in names}
    test = [replace(one, other=figures | errors | {"kl": 0.5}).to_json() for one in TEST]
    for width, heads in ((120, [names]), (80, [names[:2], names[2:]]), (20, [[name] for name in names])):
        text = search_summary(DOCUMENT | {"test": test}, RANKED, "accuracy", width)
        tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("tasks ")]
        assert [re.split(r"  +", lines[0])[2:] for lines in tables] == heads
        assert all(len(lines) == 1 + len(TEST) for lines in tables)
        assert re.split(r"  +", tables[0][1])[:3] == ["found student", "gguf-q8_0", "0.1000 ± 0.0100"]
    # The task that ranks stands in the table above.
    text = search_summary(DOCUMENT | {"test": test}, RANKED, "task:sums")
    assert sum(line.count("task:sums") for line in text.splitlines() if line.startswith(("test split", "tasks "))) == 1
    assert "\ntasks " not in search_summary(DOCUMENT, RANKED, "accuracy")


def test_what_was_confirmed_is_shown_with_means_and_differences() -> None:
    found = [
        {"trial": "t003", "name": f"80% even, {', '.join(['last none x5.71'] * 8)}", "mean": 0.42, "stderr": 0.002},
        {"trial": "b000", "name": "hand_designed", "mean": 0.4, "stderr": 0.001},
    ]
    found = [{"row_id": f"{one['trial']}-gguf-q8_0", "seeds": [0, 1, 2]} | one for one in found]
    gaps = [{"difference": 0.0, "difference_stderr": 0.0}, {"difference": -0.02, "difference_stderr": 0.003}]
    document = DOCUMENT | {"confirmation": [one | gap for one, gap in zip(found, gaps, strict=True)]}
    text = search_summary(document, RANKED, "accuracy", width=80)
    assert re.search(r"on 3 seeds +mean +minus best", text)
    section = text.partition("on 3 seeds")[2].partition("\n\n")[0]
    assert max(map(len, section.splitlines())) <= 80
    assert "\nt003: 80% even, last none x5.71" in section
    assert "\nb000: hand_designed" in section
    assert re.search(r"b000-gguf-q8_0 +0\.4000 ± 0\.0010 +-0\.0200 ± 0\.0030", text)
