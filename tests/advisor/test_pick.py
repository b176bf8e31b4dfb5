"""The best stored row for some hardware, compared with an exhaustive choice."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from operator import lt
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import autodistill as ad
from autodistill.advisor.candidates import Candidate, recalibrated, stored
from autodistill.advisor.describe import deployment_named
from autodistill.advisor.measurements import Measured
from autodistill.advisor.pick import TIERS, Tier, all_tiers, pick, pick_tiers, tier_of
from autodistill.advisor.requirements import Conditions, requirements_of
from autodistill.cli.app import main
from autodistill.cli.hardware_summary import pick_text
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import speed
from autodistill.hardware.budget import parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.config import config_of, spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.runs.results.memory_correction import Overhead
from autodistill.runs.results.row import WITHIN_LIMITS, Row
from autodistill.runs.results.table import to_parquet
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes, parse_bytes
from autodistill.utils.event_log import EventLog
from autodistill.utils.json_files import read_json, write_json
from tests.runs.results.test_table import read_parquet

Q8 = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32, "symmetric": True, "keep": []}
DEPLOYMENT = Deployment.from_json(Q8)
SPEC = spec_from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 12,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "vocab_size": 8000,
        "max_position_embeddings": 8192,
    }
)


def row(name: str, accuracy: float, megabytes: float, **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": name,
        "trial": name,
        "kind": "student",
        "name": name,
        "deployment": Q8,
        "status": "completed",
        "feasible": True,
        "split": "validation",
        "accuracy": accuracy,
        "memory_bytes": int(megabytes * 1e6),
        "memory_source": "predicted",
        "context": 2048,
        "batch": 1,
        "fidelity": 1.0,
    }
    return Row.from_json(least | fields)


def timing(prompt: int, behind: int) -> dict[str, Any]:
    """Return a row's own timing at one stream: 7 ms a token, and 90 ms to the first."""
    load = {"streams": 1, "prompt_tokens": prompt, "behind_tokens": behind, "tpot_p95_ms": 7.0, "ttft_p95_ms": 90.0}
    return {"latency_source": "measured", "other": {"latency_detail": {"loads": [load]}}}


def candidate(found: Row, spec: ModelSpec | None = SPEC) -> Candidate:
    shaped = replace(found, shape=None if spec is None else config_of(spec))
    return Candidate.of(shaped, "run", "accuracy", "max")


BOARD = [candidate(row("a", 0.5, 400)), candidate(row("b", 0.4, 200)), candidate(row("c", 0.3, 100))]


def test_the_best_that_fits_its_runner_up_and_what_binds() -> None:
    answer = pick(BOARD, Conditions(memory_bytes=250_000_000))
    assert [answer[key]["row_id"] for key in ("pick", "runner_up", "better_left_out")] == ["b", "c", "a"]
    assert answer["binds"] == "memory"
    assert answer["pick"]["margins"]["memory"] == pytest.approx(0.2)
    whole = pick(BOARD, Conditions(memory_bytes=10**9))
    assert (whole["pick"]["row_id"], whole["binds"], whole["better_left_out"]) == ("a", None, None)


@settings(deadline=None)
@example(rows=[(0.0, 1.0)], limit=1.0, least=2.220446049250313e-16)
@given(
    rows=st.lists(st.tuples(st.floats(0, 1), st.floats(1, 1000)), min_size=1, max_size=12),
    limit=st.floats(1, 1000),
    least=st.none() | st.floats(0, 1),
)
def test_it_is_the_choice_of_looking_at_every_row(rows: Any, limit: float, least: float | None) -> None:
    board = [candidate(row(f"r{index}", *figures)) for index, figures in enumerate(rows)]
    wanted = Conditions(memory_bytes=int(limit * 1e6), minimum=least)
    fitting = [
        accuracy for accuracy, size in rows if int(size * 1e6) <= wanted.memory_bytes and accuracy >= (least or 0)
    ]
    if not fitting:
        with pytest.raises(NothingFitsError, match="nothing fits"):
            pick(board, wanted)
        return
    answer = pick(board, wanted)["pick"]
    assert answer["value"] == max(fitting)
    assert answer["memory_bytes"] <= wanted.memory_bytes


def test_no_student_is_picked_for_more_streams_than_any_machine_decodes() -> None:
    with pytest.raises(InputError, match="--streams must be at most 999999"):
        pick([candidate(row("a", 0.5, 400))], Conditions(memory_bytes=10**18, streams=10**6))


def test_another_load_is_solved_anew_from_the_shape() -> None:
    wanted = Conditions(memory_bytes=10**9, context=4096, streams=3)
    solved = requirements_of(candidate(row("a", 0.5, 400)), wanted)
    assert solved is not None
    assert solved.needs["memory"] == memory(SPEC, DEPLOYMENT, context=4096, batch=3).total_bytes
    assert solved.sources["memory"] == "predicted"
    # The difference between a measurement and its prediction stays.
    before = memory(SPEC, DEPLOYMENT, context=2048, batch=1).total_bytes
    measured = requirements_of(candidate(row("a", 0.5, before / 1e6 + 5, memory_source="measured")), wanted)
    assert measured is not None
    assert measured.needs["memory"] - solved.needs["memory"] == pytest.approx(5e6, abs=2)


def test_a_row_whose_shape_is_not_known_holds_at_its_own_load_alone() -> None:
    board = [candidate(row("a", 0.5, 400), None), candidate(row("b", 0.4, 300))]
    answer = pick(board, Conditions(memory_bytes=10**9))
    assert answer["pick"]["row_id"] == "a"
    assert "cannot be told" not in pick_text(answer)
    answer = pick(board, Conditions(memory_bytes=10**9, context=1024))
    assert (answer["pick"]["row_id"], answer["unknown"]) == ("b", 1)
    assert "\nFor 1 better row the memory or time under this load is unknown." in pick_text(answer)
    with pytest.raises(NothingFitsError, match="none of 1 rows can be solved at context 1024"):
        pick(board[:1], Conditions(memory_bytes=10**9, context=1024))
    with pytest.raises(NothingFitsError, match="can be solved"):
        pick(board, Conditions(memory_bytes=10**9, context=100_000))


def test_where_no_context_is_asked_each_student_stands_at_what_it_reads_of_2048() -> None:
    short = replace(SPEC, max_context=512)
    need = memory(short, DEPLOYMENT, context=512, batch=1).total_bytes
    at_home, elsewhere = (row("a", 0.5, 400, context=context) for context in (512, 256))
    board = [candidate(at_home, short), candidate(elsewhere, short), candidate(row("b", 0.4, 300))]
    solved = [requirements_of(one, Conditions(memory_bytes=10**9)) for one in board]
    assert [one and (one.context, one.needs["memory"]) for one in solved] == [(512, 4e8), (512, need), (2048, 3e8)]
    answer = pick(board[:1], Conditions(memory_bytes=10**9))
    assert answer["context"] == answer["pick"]["context"] == 512
    with pytest.raises(NothingFitsError, match="no student reads a context of 2048 tokens"):
        pick(board[:2], Conditions(memory_bytes=10**9, context=2048))
    tiers = pick_tiers(board, Conditions(memory_bytes=1), tiers=(tier(350_000_000), tier(10**9)))
    assert [one["pick"]["context"] for one in tiers["tiers"]][1] == 512
    assert "At context 2048, or what a student reads if that is less;" in pick_text(tiers)


def test_a_limit_of_latency_is_held_against_the_slow_end_of_the_prediction() -> None:
    device = find_device("pi 4", devices())
    guess = speed(SPEC, DEPLOYMENT, device, context=2048)
    for percentile, time in ((95, guess.decode_ms_high), (50, guess.decode_ms)):
        above, below = (parse_latency(f"tpot_p{percentile}={time * factor:.6f}ms") for factor in (1.01, 0.99))
        wanted = Conditions(memory_bytes=10**9, device=device, latency=above)
        assert pick(BOARD, wanted)["pick"]["row_id"] == "a"
        with pytest.raises(NothingFitsError, match=f"times tpot_p{percentile}"):
            pick(BOARD, replace(wanted, latency=below))
    with pytest.raises(InputError, match="name it with --device"):
        pick(BOARD, Conditions(memory_bytes=10**9, latency=parse_latency("1s")))


def test_nothing_fits_names_the_nearest_and_the_change_that_would_do() -> None:
    need = memory(SPEC, DEPLOYMENT, context=2048, batch=1).total_bytes
    board = [candidate(row("a", 0.5, need / 1e6)), candidate(row("b", 0.9, 5 * need / 1e6), None)]
    with pytest.raises(NothingFitsError) as failure:
        pick(board, Conditions(memory_bytes=need - 3_000_000))
    said = str(failure.value)
    assert "the nearest, a of run, needs" in said
    context = int(said.split("--context ")[1].split()[0])
    assert memory(SPEC, DEPLOYMENT, context=context, batch=1).total_bytes <= need - 3_000_000
    assert memory(SPEC, DEPLOYMENT, context=context + 256, batch=1).total_bytes > need - 3_000_000
    assert "a budget of" in said
    with pytest.raises(
        NothingFitsError, match=r"accuracy of 0\.5000, below 0\.6; --min-accuracy 0\.5000 would be enough"
    ):
        pick(board[:1], Conditions(memory_bytes=10**9, minimum=0.6))


def test_what_a_machine_of_unknown_memory_gave_holds_on_the_size_that_is_named() -> None:
    sizes = [find_device(f"m2 max {size}gb", devices()) for size in (32, 64, 96)]
    wanted = [Conditions(memory_bytes=10**9, device=device) for device in (*sizes, find_device("m2 ultra", devices()))]
    assert [one.is_on("Apple M2 Max, 12 cores") for one in wanted] == [True, True, True, False]


CT = Q8 | {"runtime": "vllm", "format": "compressed-tensors"}


def test_rows_of_a_runtime_that_the_device_lacks_are_left_out_and_counted() -> None:
    pi = find_device("pi 5", devices())
    board = [candidate(row("a", 0.5, 400, deployment=CT)), candidate(row("b", 0.4, 200))]
    wanted = Conditions(memory_bytes=10**9, device=pi)
    answer = pick(board, wanted)
    assert (answer["pick"]["row_id"], answer["other_runtimes"]) == ("b", {"vllm": 1})
    assert "1 row of vllm is left out: it does not run on Raspberry Pi 5" in pick_text(answer)
    with pytest.raises(NothingFitsError, match=r"Raspberry Pi 5 .* serves students with llama\.cpp, not vllm"):
        pick(board[:1], wanted)
    assert pick(board, replace(wanted, device=find_device("4090", devices())))["pick"]["row_id"] == "a"
    assert pick(board, replace(wanted, device=None))["pick"]["row_id"] == "a"


@pytest.mark.parametrize(("behind", "picked"), [([1, 0, 0, 1, 0, 1], "small"), ([1, 1, 1, 1, 1, 1], "large")])
def test_of_rows_that_are_tied_the_smallest_is_picked(behind: list[int], picked: str, tmp_path: Path) -> None:
    ids, sums = list("uvwxyz"), [50, 40, 60, 50, 45, 55]
    fewer = [best - less + (1 if less == 0 else 0) for best, less in zip(sums, behind, strict=True)]

    def scored(name: str, size: float, found: list[int], value: float) -> Row:
        documents = {"ids": ids, "count": [100] * 6, "sum": found}
        return row(name, value, size, accuracy_stderr=0.03, documents=documents, shape=config_of(SPEC))

    rows = [scored("large", 400, sums, sum(sums) / 600), scored("small", 200, fewer, sum(fewer) / 600 - 1e-9)]
    run_folder(tmp_path, "one", rows)
    answer = pick(stored(tmp_path), Conditions(memory_bytes=10**9))
    assert (answer["pick"]["row_id"], answer["tied"]) == (picked, 2 if picked == "small" else 1)
    assert answer["runner_up"]["row_id"] == ({"small", "large"} - {picked}).pop()


READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--context": ("context", int),
    "--min-accuracy": ("minimum", float),
    "a budget of": ("memory_bytes", parse_bytes),
    "latency": ("latency", parse_latency),
}


@settings(deadline=None, max_examples=30)
@given(
    accuracy=st.floats(0.01, 0.8),
    limit=st.integers(10**6, 10**8),
    microseconds=st.integers(1, 5000),
    streams=st.integers(1, 8),
    least=st.none() | st.floats(0.1, 1),
)
def test_each_change_that_would_do_does(accuracy, limit, microseconds, streams, least) -> None:
    board = [candidate(row("a", accuracy, 100))]
    wanted = Conditions(
        memory_bytes=limit,
        context=4096,
        streams=streams,
        device=find_device("pi 5", devices()),
        latency=parse_latency(f"{microseconds}us", streams),
        minimum=least,
    )
    with pytest.raises(NothingFitsError) as failure:
        pick(board, wanted)
    for change in str(failure.value).split("; ")[1].split(" or "):
        changed = wanted
        for part in change.removesuffix(" would be enough").split(" and "):
            if part.removesuffix("s").endswith(" stream"):
                changed = changed.with_streams(int(part.split()[0]))
                continue
            name, value = part.rsplit(" ", 1) if " " in part else ("latency", part)
            changed = replace(changed, **{READERS[name][0]: READERS[name][1](value)})
        assert pick(board, changed)["pick"]["row_id"] == "a"


def test_memory_is_held_at_the_streams_of_a_limit_of_latency() -> None:
    device = find_device("4090", devices())
    alone, many = (memory(SPEC, DEPLOYMENT, context=2048, batch=count, on_gpu=True).total_bytes for count in (1, 16))
    board = [candidate(row("a", 0.5, alone / 1e6))]
    wanted = Conditions(memory_bytes=many, device=device, latency=parse_latency("9s@streams=16"))
    answer = pick(board, wanted)
    assert (answer["pick"]["memory_bytes"], answer["streams"]) == (many, 16)
    with pytest.raises(NothingFitsError, match="; 15 streams would be enough"):
        pick(board, replace(wanted, memory_bytes=many - 1))
    # If the user asks for more streams, they stay, and the limit keeps its own number.
    more = replace(wanted, streams=20)
    assert (more.streams, [limit.streams for limit in more.latency]) == (20, [16])


@pytest.mark.parametrize(("stored_on", "asked"), [({}, "4090"), ({"memory_on": "discrete-gpu"}, "pi 5")])
def test_a_row_whose_memory_is_a_process_s_is_predicted_anew_on_a_gpu_and_the_other_way_round(
    stored_on: dict[str, str], asked: str
) -> None:
    one = candidate(row("a", 0.5, 77, other=stored_on))
    wanted = Conditions(memory_bytes=10**9)
    here, there = (
        requirements_of(one, replace(wanted, device=find_device(name, devices()))) for name in ("4090", "pi 5")
    )
    assert here is not None
    assert there is not None
    guess = {
        name: memory(SPEC, DEPLOYMENT, context=2048, batch=1, on_gpu=name == "4090").total_bytes
        for name in ("4090", "pi 5")
    }
    found = {"4090": here.needs["memory"], "pi 5": there.needs["memory"]}
    assert found == {name: guess[name] if name == asked else 77_000_000 for name in found}
    # Without a shape, the stored value is the best available.
    blind = requirements_of(candidate(one.row, None), replace(wanted, device=find_device(asked, devices())))
    assert blind is not None
    assert blind.needs["memory"] == 77_000_000


def test_a_context_that_no_student_reads_is_said() -> None:
    with pytest.raises(NothingFitsError, match="reads a context of 9000 tokens: the longest reads 8192"):
        pick(BOARD, Conditions(memory_bytes=10**9, context=9000))


def tier(usable: int) -> Tier:
    return Tier(nominal_bytes=2 * usable, usable_bytes=usable, device=None)


ON_GPU = [candidate(one.row, None) for one in BOARD]  # their memory stays as stored, because no shape is known


def test_each_tier_has_its_own_row() -> None:
    answer = pick_tiers(ON_GPU, Conditions(memory_bytes=1), tiers=tuple(map(tier, (50_000_000, 150_000_000, 10**9))))
    picked = [one["pick"] and one["pick"]["row_id"] for one in answer["tiers"]]
    assert picked == [None, "c", "a"]
    assert [(one["binds"], one["same_as"]) for one in answer["tiers"]] == [(None, None), ("memory", None), (None, None)]
    lines = pick_text(answer).splitlines()
    assert lines[5:8] == [
        "100 MB: nothing fits; of 100 MB, the nearest, c of run, needs 100 MB at context 2048, 50.0 MB over the "
        "limit; a budget of 100MB would be enough.",
        "300 MB: a student of its own; a better one is excluded by memory.",
        "2.00 GB: a student of its own; the budget does not bind.",
    ]


def test_tiers_that_do_not_bind_have_the_same_row() -> None:
    sizes = (150_000_000, 160_000_000, 10**9, 2 * 10**9)
    answer = pick_tiers(ON_GPU, Conditions(memory_bytes=1), tiers=tuple(map(tier, sizes)))
    assert [one["same_as"] for one in answer["tiers"]] == [None, 300_000_000, None, 2 * 10**9]
    assert pick_text(answer).splitlines()[6:8] == [
        "300 MB, 320 MB: the same student; a better one is excluded by memory.",
        "2.00 GB, 4.00 GB: the same student; the budget does not bind.",
    ]


@pytest.mark.parametrize(
    ("gigabytes", "usable", "device"),
    [
        (8, 8 * 2**30 - 600_000_000, "NVIDIA GeForce RTX 3060 Ti"),
        (16, 15360 * 2**20 - 600_000_000, "NVIDIA T4"),
        (24, 23028 * 2**20 - 600_000_000, "NVIDIA A10"),
        (48, 46068 * 2**20 - 600_000_000, "NVIDIA L40S"),
        (80, 81559 * 2**20 - 600_000_000, "NVIDIA H100 80GB HBM3"),
        (4, 3_400_000_000, None),
    ],
)
def test_of_a_tier_what_is_usable_of_every_listed_gpu_counts(gigabytes: int, usable: int, device: str | None) -> None:
    found = tier_of(gigabytes * 10**9, devices())
    assert (found.usable_bytes, found.device) == (usable, device)
    # A student that fits the tier fits each of its GPUs.
    alike = [one for one in devices() if one.discrete and one.memory_bytes // 2**30 in (gigabytes, gigabytes - 1)]
    assert all(one.usable_bytes >= usable for one in alike)


def test_a_pick_for_a_tier_fits_each_gpu_of_it_and_says_what_is_usable() -> None:
    l4 = find_device("l4", devices())
    between = (l4.usable_bytes + 24 * 10**9) // 2  # fits 24 GB, but no L4
    large, small = (
        candidate(row(name, worth, size / 1e6), None)
        for name, worth, size in (
            ("large", 0.9, between),
            ("small", 0.5, 10**9),
        )
    )
    answer = pick_tiers([large, small], Conditions(memory_bytes=1), [tier_of(24 * 10**9, devices())])
    (found,) = answer["tiers"]
    assert (found["memory_bytes"], found["pick"]["row_id"]) == (24 * 10**9, "small")
    assert pick([small], Conditions(memory_bytes=l4.usable_bytes, device=l4))["pick"]["row_id"] == "small"
    with pytest.raises(NothingFitsError):
        pick([large], Conditions(memory_bytes=l4.usable_bytes, device=l4))
    load, head, line, *notes = pick_text(answer).splitlines()
    assert load == "At context 2048, or what a student reads if that is less; 1 stream:"
    assert head.split()[:3] == ["tier", "usable", "least"]
    assert line.startswith("24.0 GB")
    assert format_bytes(found["usable_bytes"]) in line
    assert "NVIDIA A10" in line
    assert any("Memory in llama.cpp is predicted, not measured on a GPU: " in note for note in notes)


def test_memory_of_a_tier_is_that_of_a_gpu() -> None:
    plain = Q8 | {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}
    need = memory(SPEC, Deployment.from_json(plain), context=2048, batch=1, on_gpu=True).total_bytes
    # The stored memory was predicted and measured for a process.
    fields = {"memory_source": "measured", "other": {"memory_parts": {"device_class": "cpu", "machine": "here"}}}
    board = [candidate(row("a", 0.5, need / 1e6 + 400, deployment=plain, **fields))]
    (fits, none) = pick_tiers(board, Conditions(memory_bytes=1), [tier(need), tier(need - 1)])["tiers"]
    assert (fits["pick"]["memory_bytes"], fits["pick"]["memory_source"]) == (need, "predicted")
    assert none["pick"] is None


def test_below_gpus_a_tier_is_a_limit_of_a_process() -> None:
    tiers = all_tiers(devices())
    assert [one.nominal_bytes for one in tiers] == [512 * 10**6, 10**9, 2 * 10**9, *TIERS]
    assert [one.gpu for one in tiers] == [False] * 3 + [True] * len(TIERS)
    assert [one.usable_bytes for one in tiers[:3]] == [512 * 10**6, 10**9, 2 * 10**9]
    need = memory(SPEC, DEPLOYMENT, context=4096, batch=1, on_gpu=False).total_bytes
    process = replace(tiers[0], usable_bytes=need)
    (found,) = pick_tiers([candidate(row("a", 0.5, 1))], Conditions(memory_bytes=1, context=4096), [process])["tiers"]
    assert (found["pick"]["memory_bytes"], found["gpu"]) == (need, False)


def test_a_student_that_was_not_held_to_what_it_forgot_comes_last() -> None:
    old, older = (
        replace(candidate(row(name, worth, 90), None), forgetting_limited=False)
        for name, worth in (("old", 0.9), ("z", 0.3))
    )
    new = candidate(row("new", 0.5, 100), None)
    plain = candidate(row("plain", 0.4, 50, kind="teacher"), None)
    answer = pick([old, older, new, plain], Conditions(memory_bytes=150_000_000))
    assert (answer["pick"]["row_id"], answer["last"], answer["not_held"]) == ("new", ["run"], False)
    assert "Students of run come last: when they were trained, AutoDistill did not yet measure what" in pick_text(
        answer
    )
    # Compared with rows that need no training, the metric decides again, and the text says so.
    answer = pick([old, older, new, plain], Conditions(memory_bytes=95_000_000))
    assert (answer["pick"]["row_id"], answer["binds"], answer["not_held"]) == ("old", None, True)
    assert "The student was trained when AutoDistill did not yet measure" in pick_text(answer)
    answer = pick([older, new, plain], Conditions(memory_bytes=95_000_000))
    assert (answer["pick"]["row_id"], answer["not_held"]) == ("plain", False)


def test_runs_of_versions_that_did_not_look_at_what_was_forgotten_are_known(tmp_path: Path) -> None:
    rows = [row("student", 0.6, 100), row("teacher", 0.5, 100, kind="teacher")]
    run_folder(tmp_path, "old", rows, students_only=False)
    run_folder(tmp_path, "new", rows, students_only=False, goal="task")
    assert {(one.run, one.row.row_id): one.forgetting_limited for one in stored(tmp_path)} == {
        ("old", "student"): False,
        ("old", "teacher"): True,
        ("new", "student"): True,
        ("new", "teacher"): True,
    }


def test_of_the_reference_runs_one_of_this_version_is_picked() -> None:
    reference = Path(__file__).parents[2] / "results" / "reference"
    answer = ad.pick(budget="16GB", runs=reference).document
    assert answer["pick"]["run"] == "search-20261129-210357"
    assert not answer["not_held"], "its students were held to general text"


def test_several_loads_have_a_table_each(capsys: pytest.CaptureFixture[str]) -> None:
    reference = str(Path(__file__).parents[2] / "results" / "reference")
    assert main(["pick", "--tiers", "--context", "8192", "--streams", "1,16", "--runs", reference, "--json"]) == 0
    one, many = json.loads(capsys.readouterr().out)["loads"]
    assert (one["streams"], many["streams"]) == (1, 16)
    assert all(tier["pick"] for tier in one["tiers"])
    assert [tier["memory_bytes"] for tier in many["tiers"] if tier["pick"] is None] == [512 * 10**6, 10**9, 2 * 10**9]
    for words, said in (
        ("--budget 1GB --streams 1,16", "several --streams go with --tiers"),
        ("--tiers --streams 1,many", "--streams takes a number, or several like 1,16"),
        ("--tiers --streams 0", "--streams must be at least 1, not 0"),
    ):
        assert main(["pick", *words.split(), "--runs", reference]) == 2
        assert said in capsys.readouterr().err


def test_tiers_that_bind_get_students_of_their_own_as_the_page_of_results_shows() -> None:
    results = Path(__file__).parents[2] / "results"
    answer = ad.pick(tiers=True, context=8192, streams=11, runs=results / "postgresql-four-budgets").document
    none, first, second, *others = answer["tiers"]
    assert [tier["memory_bytes"] for tier in (none, first, second)] == [512 * 10**6, 10**9, 2 * 10**9]
    assert (none["pick"], first["pick"]["run"], first["binds"]) == (None, "postgresql-150MB", "memory")
    assert (second["pick"]["run"], second["binds"]) == ("postgresql-175MB", None)
    assert first["pick"]["memory_bytes"] <= 10**9 < second["pick"]["memory_bytes"]
    assert {(tier["pick"]["run"], tier["pick"]["row_id"]) for tier in others} == {
        (second["pick"]["run"], second["pick"]["row_id"])
    }
    page = (results / "README.md").read_text(encoding="utf-8")
    block = page.split("<!-- tiers that bind -->\n```\n")[1].split("\n```")[0].splitlines()
    shown = pick_text(answer, 120).splitlines()
    assert len(block) > 8
    assert [line for line in block if line != "..." and line not in shown] == []
    assert "1.00 GB: a student of its own; a better one is excluded by memory." in block


DATA = {"data": {"name": "text", "fingerprint": "1"}, "teacher": {"name": "big", "fingerprint": "2"}}


def run_folder(out: Path, name: str, rows: list[Row], metric: str = "accuracy", **changes: Any) -> None:
    (out / name).mkdir(parents=True)
    write_json(out / name / "search.json", {"metric": metric, "direction": "max"} | DATA | changes)
    to_parquet(rows, out / name / "leaderboard.parquet")


@pytest.mark.parametrize("reason", WITHIN_LIMITS)
def test_what_a_search_passed_over_is_not_picked(reason: str, tmp_path: Path) -> None:
    """It does not matter whether the row fits: the student forgot general text, or is not stored as it was trained."""
    over = row("over", 0.6, 900, feasible=False, reason="memory: 900000000 bytes, over the budget")
    rows = [row("better", 0.7, 100, feasible=False, reason=reason), row("plain", 0.5, 100), over]
    run_folder(tmp_path / "runs", "one", rows)
    # On other hardware another budget applies.
    assert {one.row.row_id for one in stored(tmp_path / "runs")} == {"plain", "over"}
    (tmp_path / "runs" / "one" / "leaderboard.parquet").unlink()
    for one in rows:
        EventLog(tmp_path / "runs" / "one" / "trials.jsonl").append({"event": "row", "row": one.to_json()})
    assert {one.row.row_id for one in stored(tmp_path / "runs")} == {"plain", "over"}


def test_types_by_tensor_and_of_the_cache_are_read_and_counted_at_another_context(tmp_path: Path) -> None:
    types = {"types": {"embeddings": "q4_0"}, "cache_type_k": "q8_0", "cache_type_v": "q4_0"}
    typed = Deployment.from_json(Q8 | types)
    run_folder(tmp_path, "one", [row("solved", 0.5, 400, deployment=typed.to_json(), shape=config_of(SPEC))])
    (found,) = stored(tmp_path)
    assert found.deployment == found.row.deployment == typed
    answer = pick([found], Conditions(memory_bytes=10**9, context=8192))
    need = memory(SPEC, typed, context=8192, batch=1).total_bytes
    assert answer["pick"]["needs"]["memory"] == need != memory(SPEC, DEPLOYMENT, context=8192, batch=1).total_bytes
    assert answer["pick"]["deployment"] == typed.name != DEPLOYMENT.name


def test_rows_of_the_first_schema_are_read_and_those_of_a_later_one_refused(tmp_path: Path) -> None:
    for name, version in (("first", 1), ("now", 2), ("later", 3)):
        run_folder(tmp_path, name, [replace(row("a", 0.5, 400), schema_version=version)])
    assert {one.row.schema_version for one in stored(tmp_path, ["first", "now"])} == {1, 2}
    with pytest.raises(InputError, match="schema version 3, this version of autodistill reads up to 2") as told:
        stored(tmp_path, ["later"])
    assert "\n" not in str(told.value)


def test_rows_are_read_from_the_leaderboards_of_runs(tmp_path: Path) -> None:
    whole = row("a", 0.5, 400, shape=config_of(SPEC), documents={"ids": ["x"], "count": [1], "sum": [1]})
    others = [
        row("t", 0.9, 10, kind="teacher"),
        row("s", 0.9, 10, split="test"),
        row("r", 0.9, 10, fidelity=0.3),
    ]
    run_folder(tmp_path / "runs", "one", [whole, *others])
    (found,) = stored(tmp_path / "runs")
    assert (found.run, found.row.row_id) == ("one", "a")
    assert found.spec == SPEC
    # A run in progress only has its log.
    run_folder(tmp_path / "runs", "two", [])
    (tmp_path / "runs" / "two" / "leaderboard.parquet").unlink()
    EventLog(tmp_path / "runs" / "two" / "trials.jsonl").append({"event": "row", "row": whole.to_json()})
    (logged,) = stored(tmp_path / "runs", ["two"])
    assert logged.row.accuracy == 0.5
    assert logged.spec == SPEC
    # A resumed run has more rows in its log than in its table, until it ends again.
    log, table = (tmp_path / "runs" / "one" / name for name in ("trials.jsonl", "leaderboard.parquet"))
    for name, accuracy in (("a", 0.5), ("b", 0.6)):
        one = replace(whole, row_id=name, accuracy=accuracy, memory_source="measured")
        EventLog(log).append({"event": "row", "row": one.to_json()})
    for ends, accuracies in ((2, [0.5, 0.6]), (0, [0.5])):
        os.utime(log, (ends, ends))
        os.utime(table, (1, 1))
        assert [one.row.accuracy for one in stored(tmp_path / "runs", ["one"])] == accuracies
    run_folder(tmp_path / "runs", "three", [whole], metric="agreement")
    with pytest.raises(InputError, match="three by agreement"):
        stored(tmp_path / "runs")
    with pytest.raises(InputError, match="no student that was trained to the end"):
        pick([], Conditions(memory_bytes=1))


@pytest.mark.parametrize(
    ("metric", "first", "second", "refused"),
    [
        ("accuracy", {}, {"data": {"name": "sums", "fingerprint": "3"}}, "a on text 1, b on sums 3"),
        ("accuracy", {}, {"teacher": {"name": "bigger", "fingerprint": "4"}}, None),
        (
            "agreement",
            {},
            {"teacher": {"name": "bigger", "fingerprint": "4"}},
            "a on text 1 of big 2, b on text 1 of bigger 4",
        ),
        ("lm-eval:arc", {}, {"data": {"name": "sums", "fingerprint": "3"}}, None),
        (
            "task:quiz",
            {"asked": {"fingerprints": {"quiz": "5"}}},
            {"asked": {"fingerprints": {"quiz": "5"}}, "data": {"name": "sums", "fingerprint": "3"}},
            None,
        ),
        (
            "task:quiz",
            {"asked": {"fingerprints": {"quiz": "5"}}},
            {"asked": {"fingerprints": {"quiz": "6"}}},
            "a on quiz 5, b on quiz 6",
        ),
    ],
)
def test_runs_are_compared_where_their_metric_is_of_the_same_data(
    metric: str, first: dict[str, Any], second: dict[str, Any], refused: str | None, tmp_path: Path
) -> None:
    for name, value, changes in (("a", 0.45, first), ("b", 0.93, second)):
        figure = {"other": {metric: value}} if ":" in metric else {metric: value}
        run_folder(tmp_path, name, [replace(row(name, 0.5, 400), **figure)], metric, **changes)
    if refused is None:
        assert {one.run for one in stored(tmp_path)} == {"a", "b"}
        return
    with pytest.raises(InputError, match=rf"different data cannot be compared \({refused}\): name those of one"):
        stored(tmp_path)
    assert [one.value for one in stored(tmp_path, ["a"])] == [0.45]


def test_a_run_that_does_not_say_what_it_ranked_by_is_left_out_and_named_and_refused_if_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("new", "old"):
        run_folder(tmp_path, name, [row(name, 0.5, 400)], "accuracy")
    described = tmp_path / "old" / "search.json"
    described.write_text(json.dumps({key: value for key, value in read_json(described).items() if key != "data"}))
    assert [one.run for one in stored(tmp_path)] == ["new"]
    assert capsys.readouterr().err.startswith("warning: the run old is left out: ")
    with pytest.raises(InputError, match=r"by which metric and on which data old was ranked.*leave that run out"):
        stored(tmp_path, ["new", "old"])
    assert [one.run for one in stored(tmp_path, ["new"])] == ["new"]
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    figures=st.lists(
        st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["student", "baseline", "confirmation", "teacher", "initial"]),
                "split": st.sampled_from([None, "validation", "test"]),
                "fidelity": st.sampled_from([None, 0.1, 1.0]),
                "accuracy": st.none() | st.floats(0, 1),
                "machine": st.none() | st.text(max_size=5),
                "shape": st.sampled_from([None, config_of(SPEC), config_of(SPEC) | {"num_hidden_layers": 3}]),
                "other": st.dictionaries(
                    st.sampled_from(["kl", "more"]), st.none() | st.floats() | st.text(max_size=3) | st.booleans()
                ),
            }
        ),
        max_size=6,
    ),
    metric=st.sampled_from(["accuracy", "kl", "none of them"]),
)
def test_candidates_are_the_rows_that_were_trained_to_the_end(figures: Any, metric: str) -> None:
    """The rows of a table that is read by columns are compared with each row on its own."""
    rows = [replace(row(f"r{index}", 0, 100), **found) for index, found in enumerate(figures)]
    with tempfile.TemporaryDirectory() as folder:
        run_folder(Path(folder), "run", rows, metric)
        found = stored(Path(folder))
        whole = read_parquet(Path(folder) / "run" / "leaderboard.parquet")
    expected = [
        one
        for one in whole
        if one.kind in ("student", "baseline")
        and one.split != "test"
        and one.fidelity == 1.0
        and one.figure(metric) is not None
    ]
    assert [one.row for one in found] == [replace(one, shape=None) for one in expected]
    assert [one.value for one in found] == [one.figure(metric) for one in expected]
    assert [one.shape and one.shape.config for one in found] == [one.shape for one in expected]


def test_less_is_better_where_the_run_says_so() -> None:
    board = [
        Candidate.of(row(name, 0.1, 100, perplexity=value), "run", "perplexity", "min")
        for name, value in (("a", 20.0), ("b", 15.0), ("c", math.inf))
    ]
    assert pick(board, Conditions(memory_bytes=10**9))["pick"]["row_id"] == "b"


@pytest.mark.parametrize(("metric", "direction"), [("accuracy", "max"), ("perplexity", "min")])
@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_what_was_not_measured_is_never_picked(
    tmp_path: Path, metric: str, direction: str, missing: float | None
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "search.json", {"metric": metric, "direction": direction} | DATA)
    whole = [row("a", 0.5, 400), row("b", 0.4, 300)]
    broken = [row("broken", 0.0, 1), row("weightless", 0.5, 1, memory_bytes=None)]
    rows = [replace(one, **{"accuracy": None, metric: one.accuracy}) for one in (*whole, broken[1])]
    rows.append(replace(broken[0], **{"accuracy": None, metric: missing}))
    to_parquet(rows, folder / "leaderboard.parquet")
    answer = pick(stored(tmp_path), Conditions(memory_bytes=10**9))
    assert answer["pick"]["row_id"] == {"max": "a", "min": "b"}[direction]
    assert answer["unknown"] == (1 if direction == "max" else 0)


def test_a_row_measured_on_the_device_is_held_to_that_and_one_of_another_is_not() -> None:
    device = find_device("pi 4", devices())
    timed = timing(512, 1500)
    here = candidate(row("a", 0.5, 400, machine=device.name, **timed))
    wanted = Conditions(
        memory_bytes=10**9, context=1500, device=device, latency=parse_latency("tpot_p95=1s,ttft_p95=1s")
    )
    found = requirements_of(here, wanted)
    assert found is not None
    names = ("tpot_p95=1.0s@streams=1", "ttft_p95=1.0s@streams=1")
    assert [(found.needs[name], found.sources[name]) for name in names] == [(0.007, "measured"), (0.09, "measured")]
    elsewhere = requirements_of(candidate(row("a", 0.5, 400, machine="another", **timed)), wanted)
    assert elsewhere is not None
    guess = speed(SPEC, DEPLOYMENT, device, context=1500)
    assert elsewhere.needs["tpot_p95=1.0s@streams=1"] == pytest.approx(guess.decode_ms_high / 1e3)
    # It was not timed with several streams, so this is predicted even on the same device.
    several = requirements_of(here, replace(wanted, latency=parse_latency("tpot_p95=1s@streams=4")))
    assert several is not None
    assert several.sources["tpot_p95=1.0s@streams=4"] == "predicted"


P90 = "tpot_p90@streams=1"


def several(**other: Any) -> dict[str, Any]:
    """Return a row's timing with three percentiles of a token at one stream, and further fields."""
    steps = {"tpot_p50_ms": 5.0, "tpot_p95_ms": 7.0, "tpot_p99_ms": 8.0, "ttft_p50_ms": 80.0, "ttft_p95_ms": 90.0}
    load = {"streams": 1, "prompt_tokens": 512, "behind_tokens": 1500} | steps
    return {"latency_source": "measured", "other": {"latency_detail": {"loads": [load]}} | other}


@pytest.mark.parametrize(
    ("asked", "other", "need", "source"),
    [
        # If the row's own search had the same limit, its value is used, whichever version wrote it.
        ("tpot_p90", {P90: 6.5}, 0.0065, "measured"),
        ("tpot_p90", {"latency_detail": {"limits": {P90: 6.25}}, P90: 6.5}, 0.00625, "measured"),
        # A value outside the stored values on both sides was predicted, possibly for another device.
        ("tpot_p90", {P90: 7.5}, 0.007, "measured at p95, an upper bound"),
        ("tpot_p90", {"tpot_p90@streams=4": 6.5}, 0.007, "measured at p95, an upper bound"),
        ("tpot_p40", {}, 0.005, "measured at p50, an upper bound"),
        ("tpot_p97", {}, 0.008, "measured at p99, an upper bound"),
        ("ttft_p75", {}, 0.09, "measured at p95, an upper bound"),
        ("tpot_p95", {P90: 6.5}, 0.007, "measured"),
        ("ttft_p99", {"ttft_p99@streams=1": 95.0}, None, "predicted"),
    ],
)
def test_a_percentile_that_was_not_stored_is_the_row_s_own_limit_or_the_next_higher_one(
    asked: str, other: dict[str, Any], need: float | None, source: str
) -> None:
    device = find_device("pi 4", devices())
    fields = several()
    detail = other.pop("latency_detail", {}) | fields["other"]["latency_detail"]
    fields["other"] |= other | {"latency_detail": detail}
    wanted = Conditions(memory_bytes=10**9, context=1500, device=device, latency=parse_latency(f"{asked}=9s"))
    found = requirements_of(candidate(row("a", 0.5, 400, machine=device.name, **fields)), wanted)
    assert found is not None
    name = f"{asked}=9.0s@streams=1"
    assert found.sources[name] == source
    assert need is None or found.needs[name] == need
    answer = pick([candidate(row("a", 0.5, 400, machine=device.name, **fields))], wanted)
    assert f"\n{name} is {source}." in pick_text(answer)
    # With a longer context, it is scaled, and remains a bound.
    longer = requirements_of(
        candidate(row("a", 0.5, 400, machine=device.name, **fields)), replace(wanted, context=2000)
    )
    assert longer is not None
    if asked.startswith("tpot"):
        assert longer.sources[name] == source.replace("measured", "corrected")


def test_a_limit_on_a_device_whose_runtime_was_never_measured_is_assumed() -> None:
    device = find_device("4090", devices())
    plain = Q8 | {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}
    board = [candidate(row("a", 0.5, 400, deployment=plain)), candidate(row("b", 0.4, 300))]
    wanted = Conditions(memory_bytes=10**9, device=device, latency=parse_latency("1s"))
    sources = [requirements_of(one, wanted).sources["tpot_p95=1.0s@streams=1"] for one in board]  # type: ignore[union-attr]
    assert sources == ["assumed", "predicted"]
    assert "tpot_p95=1.0s@streams=1 is assumed." in pick_text(pick(board, wanted))


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 3060", "3060"),
        ("NVIDIA GB10", "dgx spark"),
        ("Raspberry Pi 5 Model B Rev 1.0, 4 cores", "pi 5"),
    ],
)
def test_what_a_machine_gave_under_its_own_name_counts_for_the_listed_device(machine: str, name: str) -> None:
    device = find_device(name, devices())
    timed = candidate(row("a", 0.5, 400, machine=machine, **timing(512, 1500)))
    wanted = Conditions(memory_bytes=10**9, context=1500, device=device, latency=parse_latency("tpot_p95=1s"))
    found = requirements_of(timed, wanted)
    assert found is not None
    assert found.sources["tpot_p95=1.0s@streams=1"] == "measured"
    other = requirements_of(timed, replace(wanted, device=find_device("4090", devices())))
    assert other is not None
    assert other.sources["tpot_p95=1.0s@streams=1"] == "predicted"


def test_memory_is_measured_on_the_machine_it_was_measured_on_and_predicted_elsewhere() -> None:
    guess, on_gpu = (memory(SPEC, DEPLOYMENT, context=2048, batch=1, on_gpu=gpu).total_bytes for gpu in (False, True))
    parts = {"memory_parts": {"machine": "Tesla T4", "device_class": "discrete-gpu"}}
    measured = {"memory_source": "measured", "other": parts | {"memory_bytes_predicted": guess}}
    one = candidate(row("a", 0.5, guess / 1e6 + 7, **measured))
    overheads = {("discrete-gpu", "llama.cpp"): Overhead(correction_bytes=3_000_000, pairs=3)}
    wanted = Conditions(memory_bytes=10**9, overheads=overheads)
    for name, need, source in (
        (None, guess + 7_000_000, "measured"),
        ("t4", guess + 7_000_000, "measured"),
        ("4090", on_gpu + 3_000_000, "predicted"),
        ("pi 5", guess, "predicted"),
    ):
        device = None if name is None else find_device(name, devices())
        answer = pick([one], replace(wanted, device=device))
        assert answer["pick"]["memory_bytes"] == pytest.approx(need, abs=1)
        assert answer["pick"]["memory_source"] == source
        assert (f"~{format_bytes(need)}" in pick_text(answer)) == (source == "predicted")
        assert ("\nMemory is predicted, not measured on a GPU: " in pick_text(answer)) == (name == "4090")
    # Under another load, the difference also only applies on its own machine.
    load = replace(wanted, context=1024)
    less = [memory(SPEC, DEPLOYMENT, context=1024, batch=1, on_gpu=gpu).total_bytes for gpu in (True, False)]
    more = [requirements_of(one, replace(load, device=find_device(name, devices()))) for name in ("t4", "pi 5")]
    assert more[0] is not None
    assert more[1] is not None
    assert more[0].needs["memory"] == pytest.approx(less[0] + guess + 7e6 - on_gpu, abs=2)
    assert more[1].needs["memory"] == less[1]
    # A row that names no machine was not measured on any requested one. A row's memory was measured where it was timed.
    old = {"memory_source": "measured", "other": {"memory_bytes_predicted": guess}}
    wanted = replace(wanted, device=find_device("t4", devices()))
    nowhere = requirements_of(candidate(row("a", 0.5, 400, **old)), wanted)
    timed = requirements_of(candidate(row("a", 0.5, 400, machine="Tesla T4", latency_source="measured", **old)), wanted)
    assert nowhere is not None
    assert timed is not None
    assert (nowhere.sources["memory"], timed.sources["memory"]) == ("predicted", "measured")


def test_a_least_accuracy_is_of_the_metric_that_ranks_where_more_of_it_is_better() -> None:
    def ranked(metric: str, direction: str, accuracy: float | None, **other: float) -> Candidate:
        found = replace(row("a", 0.0, 100, other=other), accuracy=accuracy)
        return Candidate.of(found, "run", metric, direction)

    wanted = Conditions(memory_bytes=10**9, minimum=0.6)
    task = ranked("task:obqa", "max", 0.42, **{"task:obqa": 0.71})
    answer = pick([task], wanted)
    assert answer["pick"]["needs"]["accuracy"] == 0.71
    assert "below the limit, task:obqa 0.1100 above the limit." in pick_text(answer)
    with pytest.raises(NothingFitsError, match=r"a value of task:obqa of 0\.7100, below 0\.8; --min-accuracy 0\.7100"):
        pick([task], replace(wanted, minimum=0.8))
    # If the metric should be low, the limit applies to accuracy. A value that was not measured meets no limit.
    assert pick([ranked("kl", "min", 0.7, kl=0.1)], wanted)["pick"]["row_id"] == "a"
    for metric, direction in (("kl", "min"), ("task:obqa", "max")):
        missing = ranked(metric, direction, None if metric == "kl" else 0.9, kl=0.1)
        score = "accuracy" if metric == "kl" else metric
        for least in (0.0, 0.99):
            with pytest.raises(NothingFitsError, match=f"has no {score}; no --min-accuracy would be enough"):
                pick([missing], replace(wanted, minimum=least))


def test_a_measurement_of_a_lighter_load_is_scaled_to_the_one_that_is_asked() -> None:
    device = find_device("pi 4", devices())
    timed = timing(64, 88)
    wanted = Conditions(
        memory_bytes=10**9, context=8192, device=device, latency=parse_latency("tpot_p95=9s,ttft_p95=9s")
    )
    found = requirements_of(candidate(row("a", 0.5, 400, context=8192, machine=device.name, **timed)), wanted)
    assert found is not None
    assert set(found.sources.values()) == {"predicted", "corrected"}
    # By hand, at the slow end: a step reads the matrices, 34 bytes for 32 weights, and for each earlier token 16-bit
    # keys and values of 4 heads of 64 in 12 layers. Or it waits for its products and the attention of 8 heads. A prompt
    # waits for these. A layer costs 100 us more.
    layers, head = 12 * (2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 1024), 8000 * 512
    bandwidth, rate = 0.25 * device.bandwidth, 0.08 * device.rate("int8")

    def step(behind: int) -> float:
        reading = ((layers + head) * 34 / 32 + 12 * 2 * 4 * 64 * 2 * behind) / bandwidth
        return max(reading, (2 * (layers + head) + 12 * 4 * 8 * 64 * behind) / rate) + 12e-4

    def first(tokens: int) -> float:
        return (2 * (tokens * layers + head) + 12 * 4 * 8 * 64 * tokens * tokens / 2) / rate + 12e-4

    assert found.needs["tpot_p95=9.0s@streams=1"] == pytest.approx(0.007 * step(8192) / step(88), rel=1e-3)
    assert found.needs["ttft_p95=9.0s@streams=1"] == pytest.approx(0.09 * first(512) / first(64), rel=1e-3)
    # Without a shape, nothing can be scaled.
    assert (
        requirements_of(candidate(row("a", 0.5, 400, context=8192, machine=device.name, **timed), None), wanted) is None
    )


def test_rows_without_what_lay_behind_a_step_are_scaled_from_their_prompt() -> None:
    device = find_device("pi 4", devices())
    loads = [{"streams": 1, "prompt_tokens": 64, "tpot_p50_ms": 7.0}]
    old = {"latency_source": "measured", "machine": device.name, "other": {"latency_detail": {"loads": loads}}}
    wanted = Conditions(memory_bytes=10**9, device=device, latency=parse_latency("tpot_p50=9s"))
    found = requirements_of(candidate(row("a", 0.5, 400, **old)), wanted)
    long, short = (speed(SPEC, DEPLOYMENT, device, context=behind).decode_ms for behind in (2048, 64))
    assert found is not None
    assert found.needs["tpot_p50=9.0s@streams=1"] == pytest.approx(0.007 * long / short)


def test_predictions_are_corrected_by_what_was_measured_on_the_device() -> None:
    device = find_device("pi 4", devices())
    step = speed(SPEC, DEPLOYMENT, device, context=100)
    read = speed(SPEC, DEPLOYMENT, device, context=64, prompt=64)
    measured = Measured(
        student="x",
        name="x",
        shape=config_of(SPEC),
        deployment=DEPLOYMENT.to_json(),
        size_bytes=memory(SPEC, DEPLOYMENT, context=1, batch=1).weights_bytes,
        machine=device.name,
        how="llama-bench",
        threads=4,
        prompt=64,
        context=100,
        ttft_ms=3 * read.time_to_first_token_ms,
        tpot_ms=2 * step.decode_ms,
        tpot_p95_ms=2 * step.decode_ms,
        tokens_per_second=1.0,
        prompt_tokens_per_second=1.0,
    )
    plain = Conditions(memory_bytes=10**9, device=device, latency=parse_latency("ttft_p50=9s,tpot_p50=9s"))
    before, after = (requirements_of(BOARD[0], wanted) for wanted in (plain, replace(plain, measured=(measured,))))
    assert before is not None
    assert after is not None
    ratios = [after.needs[name] / before.needs[name] for name in before.needs if name != "memory"]
    assert ratios == pytest.approx([3, 2], rel=0.02)
    assert set(after.sources.values()) == {"predicted", "corrected"}
    # A measurement on a board that slowed itself down counts if there is no other, and the text says so.
    slow = replace(measured, tpot_ms=8 * step.decode_ms, doubts=("the board slowed itself down meanwhile",))
    for kept, ratio, behind in (((slow,), 8, " by doubtful measurements alone"), ((slow, measured), 2, "")):
        answer = pick(BOARD[:1], replace(plain, measured=kept))["pick"]
        name = "tpot_p50=9.0s@streams=1"
        assert answer["needs"][name] == pytest.approx(ratio * before.needs[name], rel=0.02)
        assert answer["sources"][name] == f"corrected{behind}"


def test_predicted_memory_has_the_overhead_that_pairs_speak_for() -> None:
    pairs = {("cpu", "llama.cpp"): Overhead(correction_bytes=10_000_000, margin_bytes=2_000_000, pairs=4)}
    wanted = Conditions(memory_bytes=410_000_000, overheads=pairs)
    answer = pick(BOARD, wanted)
    assert answer["pick"]["row_id"] == "b"  # a's 400 MB would need 412
    assert answer["memory_overhead"] == {"correction_bytes": 10_000_000, "margin_bytes": 2_000_000, "pairs": 4}
    measured = [candidate(row("m", 0.9, 405, memory_source="measured")), *BOARD]
    assert pick(measured, wanted)["pick"]["row_id"] == "m"
    # The pairs say nothing about a device of another class.
    other = replace(wanted, device=find_device("4090", devices()))
    assert pick(BOARD, other)["pick"]["row_id"] == "a"


def test_a_stored_row_has_its_shape(tmp_path: Path) -> None:
    run_folder(tmp_path / "runs", "one", [row("a", 0.5, 400, shape=config_of(SPEC))])
    (found,) = stored(tmp_path / "runs")
    answer = pick([found], Conditions(memory_bytes=10**9, context=4096))
    assert answer["pick"]["memory_bytes"] == memory(SPEC, DEPLOYMENT, context=4096, batch=1).total_bytes


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(st.floats(0, 1), st.floats(1, 1000), st.booleans()), min_size=1, max_size=8),
    limit=st.floats(20, 1000),
    context=st.sampled_from([512, 2048, 4096]),
    streams=st.integers(1, 4),
    milliseconds=st.integers(1, 200),
    correction=st.integers(-(10**7), 10**7),
)
def test_what_is_picked_exceeds_no_limit(rows, limit, context, streams, milliseconds, correction) -> None:
    board = [
        candidate(row(f"r{index}", accuracy, size, memory_source="measured" if known else "predicted"))
        for index, (accuracy, size, known) in enumerate(rows)
    ]
    wanted = Conditions(
        memory_bytes=int(limit * 1e6),
        context=context,
        streams=streams,
        device=find_device("i9-13900k", devices()),
        latency=parse_latency(f"{milliseconds}ms", streams),
        overheads={("cpu", "llama.cpp"): Overhead(correction_bytes=correction, margin_bytes=10**6, pairs=3)},
    )
    try:
        answer = pick(board, wanted)
    except NothingFitsError:
        return
    for one in filter(None, (answer["pick"], answer["runner_up"])):
        assert all(one["needs"][name] <= allowed for name, allowed in one["limits"].items())
        assert min(one["margins"].values()) >= -1e-12


SIZES = {
    "num_hidden_layers": st.integers(1, 6),
    "hidden_size": st.sampled_from([128, 256, 384]),
    "heads": st.sampled_from([(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]),
    "head_dim": st.sampled_from([32, 64]),
    "intermediate_size": st.sampled_from([64, 256, 1024]),
    "vocab_size": st.sampled_from([512, 4096]),
}
FORMS = (
    *("gguf-f16", "gguf-q4_0", "gguf-q4_k", "gguf-q5_k", "huggingface"),
    *("compressed-tensors-int4-g32", "compressed-tensors-int8-g64"),
)


def shaped(family: str, sizes: dict[str, Any]) -> ModelSpec:
    heads, kv_heads = sizes["heads"]
    return spec_from_config(
        {
            "model_type": family,
            "max_position_embeddings": 8192,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": True,
            "sliding_window": 64 if family == "gemma3_text" else None,
            "sliding_window_pattern": 3,
        }
        | {name: value for name, value in sizes.items() if name != "heads"}
    )


@settings(deadline=None, max_examples=60)
@given(
    family=st.sampled_from(["llama", "qwen2", "qwen3", "gemma3_text"]),
    students=st.lists(st.tuples(st.fixed_dictionaries(SIZES), st.sampled_from(FORMS), st.floats(0, 1)), min_size=1),
    device=st.sampled_from(["pi 5", "4090", "i9-13900k"]),
    kilobytes=st.integers(1, 10**6),
    microseconds=st.integers(1, 10**5),
    quantity=st.sampled_from(["tpot_p95", "tpot_p50", "ttft_p95"]),
    load=st.tuples(st.sampled_from([64, 2048, 4096]), st.integers(1, 4)),
)
def test_rows_that_are_passed_over_change_nothing(
    family, students, device, kilobytes, microseconds, quantity, load
) -> None:
    """Compared with solving every row, the same row is picked, or the same one is named as the nearest."""
    board = []
    for index, (sizes, form, accuracy) in enumerate(students):
        spec, deployment = shaped(family, sizes), deployment_named(form)
        need = memory(spec, deployment, context=2048, batch=1)
        found = row(
            f"r{index:03}",
            accuracy,
            need.total_bytes / 1e6,
            deployment=deployment.to_json(),
            size_bytes=need.weights_bytes,
        )
        board.append(candidate(found, spec))
    context, streams = load
    wanted = Conditions(
        memory_bytes=1000 * kilobytes,
        context=context,
        streams=streams,
        device=find_device(device, devices()),
        latency=parse_latency(f"{quantity}={microseconds}us", streams),
    )
    assert wanted.device is not None
    served = [one for one in board if not wanted.device.lacks(one.deployment.runtime)]
    if not served:
        with pytest.raises(NothingFitsError, match="serves students with"):
            pick(board, wanted)
        return
    ranked = sorted(served, key=lambda one: (-one.worth, one.row.memory_bytes or 0, one.row.row_id))
    solved = [found for one in ranked if (found := requirements_of(one, wanted)) is not None]
    fitting = [found for found in solved if found.fits]
    if fitting:
        answer = pick(board, wanted)
        runner_up = fitting[1].to_json() if len(fitting) > 1 else None
        assert (answer["pick"], answer["runner_up"]) == (fitting[0].to_json(), runner_up)
    else:
        nearest = min(solved, key=lambda found: max(found.excess.values()))
        with pytest.raises(NothingFitsError, match=f"the nearest, {nearest.candidate.row.row_id} of run"):
            pick(board, wanted)


def test_a_wider_student_is_not_passed_over_for_a_narrower_one_whose_rows_are_on_another_grid() -> None:
    """Q5_K of 960 channels is stored as Q5_1 except the down projections.

    It has fewer bytes than 1024 channels, but is slower.
    """
    sizes = {"num_hidden_layers": 12, "head_dim": 64, "intermediate_size": 4096, "vocab_size": 512}
    narrow = shaped("llama", sizes | {"hidden_size": 960, "heads": (15, 5)})
    wide = shaped("llama", sizes | {"hidden_size": 1024, "heads": (16, 8)})
    deployment, device = deployment_named("gguf-q5_k"), find_device("i9-13900k", devices())
    board, times, needs = [], [], []
    for name, accuracy, spec in (("narrow", 0.5, narrow), ("wide", 0.4, wide)):
        need = memory(spec, deployment, context=2048, batch=1)
        packed = {"deployment": deployment.to_json(), "size_bytes": need.weights_bytes}
        board.append(candidate(row(name, accuracy, need.total_bytes / 1e6, **packed), spec))
        times.append(speed(spec, deployment, device, context=2048).time_to_first_token_ms_high)
        needs.append((need.weights_bytes, need.total_bytes))
    assert all(map(lt, *needs))
    assert times[0] > times[1]
    limit = parse_latency(f"ttft_p95={sum(times) / 2:.3f}ms")
    answer = pick(board, Conditions(memory_bytes=10**10, context=2048, device=device, latency=limit))
    assert (answer["pick"]["row_id"], answer["better_left_out"]["row_id"]) == ("wide", "narrow")


def test_the_pairs_of_all_runs_of_a_folder_are_learnt_from(tmp_path: Path) -> None:
    assert recalibrated(tmp_path / "none") == {}
    parts = {"memory_parts": {"device_class": "cpu"}}
    rows = [
        row(name, 0.5, 400 + gap, memory_source="measured", other={"memory_bytes_predicted": 400e6, **parts})
        for name, gap in (("a", 10), ("b", 12), ("c", 17))
    ]
    run_folder(tmp_path, "one", rows[:2])
    run_folder(tmp_path, "two", [*rows[2:], row("d", 0.5, 900)], metric="agreement")
    expected = Overhead(correction_bytes=12_000_000, margin_bytes=5_000_000, pairs=3)
    assert recalibrated(tmp_path) == {("cpu", "llama.cpp"): expected}
