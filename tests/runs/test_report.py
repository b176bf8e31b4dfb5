"""The page holds what the run recorded, and no text breaks the page's tables."""

import re
from pathlib import Path
from typing import Any

from autodistill.hardware.budget import DeviceBudget, parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.runs import report
from autodistill.runs.events import RowTested, TrialEnded
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import Row, Status
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.savings import saved
from autodistill.testing import small_plan
from autodistill.utils.json_files import write_json

BUDGET = DeviceBudget(memory_bytes=80_000_000, device=find_device("pi 5", devices()), latency=parse_latency("50ms"))
Q4 = {"runtime": "llama.cpp", "format": "gguf-q4_0", "bits": 4, "group_size": 32}
SEARCH: dict[str, Any] = {
    "name": "small",
    "command": "autodistill search --budget 80MB --seed 3",
    "teacher": {"reference": "smollm2", "parameters": 134515008},
    "data": "pydoc",
    "budget": BUDGET.to_json(),
    "plan": {"trials": 12, "tokens": 8192, "rungs": [2048, 8192], "notes": ["The box held 12 trials of 20."]},
    "metric": "accuracy",
    "seconds": {"load": 17.25, "total": 590.0},
    "licences": {"SmolLM2-135M-Instruct": "Apache-2.0"},
}


def row(name: str, **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": name,
        "trial": name,
        "kind": "student",
        "name": name,
        "deployment": Q4,
        "status": "completed",
        "feasible": True,
        "fidelity": 1.0,
        "split": "validation",
    }
    return Row.from_json(least | fields)


ROWS = [
    row("t001", accuracy=0.41, accuracy_stderr=0.01, retention=0.9, memory_bytes=70_000_000, memory_source="measured"),
    row("t002", accuracy=0.30, memory_bytes=50_000_000, memory_source="predicted"),
    row("t003", accuracy=0.29, memory_bytes=60_000_000),
    row("t004", accuracy=0.44, memory_bytes=100_000_000, feasible=False, reason="memory 1.25 times | the limit"),
    row("t005", accuracy=0.50, memory_bytes=40_000_000, fidelity=0.25),
]
EVENTS = [
    TrialEnded(trial="t006", status=Status.REJECTED, reason="no deployment fits"),
    TrialEnded(trial="t007", status=Status.FAILED, reason="nan\nin <step> 3"),
    TrialEnded(trial="t001", status=Status.COMPLETED, reason=None),
    RowTested(row=row("t001", accuracy=0.40, split="test", retention=0.88)),
    RowTested(row=row("teacher", kind="teacher", accuracy=0.455, split="test")),
]


def test_the_page_says_what_sharing_stages_and_rejecting_saved() -> None:
    spared = saved([], small_plan()).to_json() | {"sharing": 2, "shared_tokens": 5120, "rejected": 1}
    page = report.report_markdown(SEARCH | {"saved": spared}, rank(ROWS), EVENTS)
    assert "## Compute saved\n\n- 2 trials went on from stages that others had trained: 5,120 tokens (about" in page
    assert "- 1 proposal was rejected without training" in page
    assert "Compute saved" not in report.report_markdown(SEARCH, rank(ROWS), EVENTS)


def test_of_a_run_that_went_on_the_test_table_is_that_of_its_end() -> None:
    later = [row("t009", accuracy=0.45, split="test"), row("teacher", kind="teacher", accuracy=0.455, split="test")]
    events = [*EVENTS, RowTested(row=later[0])]
    page = report.report_markdown(SEARCH | {"test": [one.row_id for one in later]}, rank(ROWS), events)
    shown = page.split("## Test split")[1].split("##")[0]
    assert "0.4500" in shown
    assert "0.4000" not in shown
    assert shown.index("0.4500") < shown.index("0.4550")


def test_tasks_that_do_not_rank_stand_beside_the_metric_of_the_test_split() -> None:
    other = {"task:sums": 0.25, "task:sums_stderr": 0.0625, "kl": 0.5}
    events = [RowTested(row=row("t001", accuracy=0.40, split="test", other=other))]
    (table,) = tables(report.report_markdown(SEARCH, rank(ROWS), events).split("## Test split")[1].split("##")[0])
    assert (table[0][-1], table[2][-1]) == ("task:sums", "0.2500 ± 0.0625")
    assert "task:sums" not in report.report_markdown(SEARCH, rank(ROWS), EVENTS)


def tables(page: str) -> list[list[list[str]]]:
    """Return the page's tables as cells, as Markdown reads them: an escaped bar is not a border."""
    found: list[list[list[str]]] = [[]]
    for line in page.split("\n"):
        if line.startswith("| "):
            cells = line.replace("\\|", "\0").strip("| ").split(" | ")
            found[-1].append([cell.replace("\0", "|") for cell in cells])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_the_page_says_what_was_asked_found_and_lost() -> None:
    page = report.report_markdown(SEARCH, rank(ROWS), EVENTS)
    assert page.startswith("# small\n")
    for text in (
        "80.0 MB at context 2048, batch 1, on Raspberry Pi 5 8GB, tpot_p95=50.0ms@streams=1",
        "reference smollm2, parameters 134515008",
        "The box held 12 trials of 20.",
        "**t001** (student) as gguf-q4_0: accuracy 0.4100 ± 0.0100, 90.0% of the teacher's, 70.0 MB of memory (",
        "autodistill search --budget 80MB --seed 3",
        "Apache-2.0",
        "17.2",
    ):
        assert text in page
    by_title = {table[0][0] or table[2][0]: table for table in tables(page)}
    assert [line[2] for line in by_title["#"][2:]] == ["t001", "t002", "t003", "t005", "t004"]
    assert [line[1] for line in by_title["#"][2:]] == [one.row.row_id for one in rank(ROWS)]  # as in export --row
    assert by_title["#"][-1][-1] == "memory 1.25 times | the limit"
    assert by_title["trial"][2:] == [
        ["t006", "rejected", "no deployment fits"],
        ["t007", "failed", "nan in &lt;step> 3"],
    ]
    assert [line[:3:2] for line in by_title["what"][2:]] == [["found student", "t001"], ["teacher", "teacher"]]


def test_types_by_tensor_and_of_the_cache_are_named_on_the_page() -> None:
    typed = Q4 | {"types": {"embeddings": "q5_1"}, "cache_type_k": "q8_0", "cache_type_v": "q4_0"}
    solved = row("t010", accuracy=0.45, memory_bytes=70_000_000, memory_source="predicted", deployment=typed)
    page = report.report_markdown(SEARCH, rank([*ROWS, solved]), EVENTS)
    assert solved.deployment_name.endswith("+k-q8_0-v-q4_0")
    assert f"**t010** (student) as {solved.deployment_name}: accuracy 0.4500" in page


def test_what_is_zero_or_unknown_is_left_out_and_no_note_is_told_twice() -> None:
    teacher = {"name": "big", "rounded": False, "quantised": None, "held_in": "float32"}
    data = {"name": "text", "answers": {"train": {"tokens": 0}}}
    plan = {"notes": ["The box is small."]}
    search = SEARCH | {"teacher": teacher, "data": data, "plan": plan, "notes": ["The box is small.", "It is done."]}
    page = report.report_markdown(search, rank(ROWS), EVENTS)
    assert "| teacher | name big, held in float32 |" in page
    assert "| data | name text |" in page
    assert page.count("The box is small.") == 1
    assert "- It is done." in page


def test_every_line_of_a_table_has_as_many_cells_as_its_head() -> None:
    page = report.report_markdown(SEARCH, rank(ROWS), EVENTS)
    blocks = [block.split("\n") for block in page.strip().split("\n\n") if block.startswith("|")]
    assert len(blocks) == 6
    for block in blocks:
        borders = [len(re.findall(r"(?<!\\)\|", line)) for line in block]
        assert borders == [borders[0]] * len(block)


def test_a_winning_teacher_is_said_plainly() -> None:
    rows = [*ROWS, row("teacher", kind="teacher", accuracy=0.5, memory_bytes=10)]
    page = report.report_markdown(SEARCH | {"students_only": False}, rank(rows), [])
    assert "It is the teacher itself as gguf-q4_0: no trained student is better. The first trained" in page
    assert "student is t001 as gguf-q4_0, accuracy 0.4100" in page
    page = report.report_markdown(SEARCH | {"students_only": True}, rank(rows[3:4] + rows[-1:]), [])
    assert "No trained student fits the budget." in page


def test_the_first_line_of_the_page_is_the_gain_over_what_needs_no_training_and_then_over_the_baseline() -> None:
    gains = {
        "exported": {"row_id": "t001", "named": "t001 as gguf-q4_0", "trained": True},
        "gain_over_untrained": {
            "over": "teacher-test",
            "named": "the teacher itself",
            "value": 0.0123,
            "stderr": 0.004,
        },
        "gain_over_baseline": {"over": "b000-test", "named": "even", "value": 0.002, "stderr": None},
        "gain_unit": "accuracy",
    }
    page = report.report_markdown(SEARCH | gains, rank(ROWS), EVENTS)
    assert page.splitlines()[2] == (
        "Gain on test over the best that needs no training (the teacher itself), paired: +0.0123 ± 0.0040 of accuracy; "
        "over the baseline: +0.0020."
    )


def test_where_nothing_fits_the_nearest_and_its_limit_are_named() -> None:
    rows = [row("a", accuracy=0.4, memory_bytes=160_000_000, feasible=False), ROWS[3]]
    page = report.report_markdown(SEARCH, rank(rows), [])
    assert (
        "Nothing fits the budget. The nearest candidate, t004 as gguf-q4_0, needs 100 MB of memory, 1.25 times the "
        "limit of 80.0 MB." in page
    )


def test_the_page_says_of_how_many_documents_its_errors_are() -> None:
    documents = {"ids": [1, 2, 3], "count": [5, 5, 5], "sum": [1, 2, 3]}
    rows = [row("t001", accuracy=0.4, documents=documents)]
    events = [RowTested(row=row("t001", split="test", documents=documents))]
    page = report.report_markdown(SEARCH, rank(rows), events)
    board, test = page.split("## Test split")
    assert "± comes from 3 documents: with fewer than 10" in board
    assert "± comes from 3 documents: with fewer than 10" in test


def test_an_empty_run_has_a_page() -> None:
    assert "Nothing fits the budget." in report.report_markdown({"name": "empty"}, [], [])


def written_run(out: Path) -> RunFolder:
    with RunFolder.create(out, "small") as run:
        write_json(run.search_file, SEARCH | {"data": {"reference": "pydoc"}})
        for one in ROWS:
            run.events.append({"event": "row", "row": one.to_json()})
    return run


def test_the_report_lies_in_the_folder(tmp_path: Path) -> None:
    run = written_run(tmp_path)
    report.write_report(run)
    assert "in `report.html`" in (run.path / "report.md").read_text()


def test_the_page_says_what_a_training_was_and_what_its_figures_are_of() -> None:
    data = {"name": "text", "tokens": {"train": 70_000, "validation": 8704, "test": 7936}}
    plan = small_plan(eval_tokens=6400, bf16=True).to_json()
    page = report.report_markdown(SEARCH | {"data": data, "plan": plan}, rank(ROWS), EVENTS)
    assert "| optimiser step | 256 tokens in sequences of 256 |" in page
    assert "| schedule | 512 tokens of warm-up, the last 20% of decay |" in page
    assert "| precision | bf16 |" in page
    assert (
        "| evaluated on | 6,400 of 8,704 tokens of validation, 2,048 of 7,936 tokens of test; "
        "at a rung 1,024 of validation |"
    ) in page


def test_what_runtimes_lose_is_told_with_how_sure_that_is() -> None:
    check = {
        "agreement": 0.941,
        "positions": 2040,
        "loss": 2.5,
        "excess": 0.01,
        "excess_stderr": 0.002,
        "same_cut": 1.0,
    }
    page = report.report_markdown(SEARCH | {"runtime": {"gguf": check}}, rank(ROWS), EVENTS)
    assert "| gguf | 2.5000 | +0.0100 ± 0.0020 | 94.1% of 2,040 | 100.0% |" in page
    assert "The files in their runtimes" not in report.report_markdown(SEARCH, rank(ROWS), EVENTS)
