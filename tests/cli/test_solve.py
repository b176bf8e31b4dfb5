"""The tables of solutions fit a narrow terminal, and have every column on a wide one."""

from __future__ import annotations

from typing import Any

import pytest

from autodistill.cli.solve import solve_text

FIGURES = {
    "predicted_kl": 0.0123,
    "kl": 0.0131,
    "kl_stderr": 0.0009,
    "nll": 3.2101,
    "nll_stderr": 0.0512,
    "accuracy": 0.4312,
    "accuracy_stderr": 0.0099,
}
SOLUTION = {
    "wider_bytes": 0,
    **FIGURES,
    **dict.fromkeys(("weights_bytes", "kv_cache_bytes", "compute_bytes", "overhead_bytes", "left_bytes"), 10**7),
    "name": "gguf-solved-4.6-bits-narrow-0.85",
    "bytes": 10**8,
    "calibration_kl": 0.0128,
    "scores": 30,
    "scores_measured": 3,
    "compensated": False,
    "teacher_copied": 0.9,
    "copied": 0.9,
    "latency": [],
    "types": {"tables": {"embedding": "q6_k"}, "matrices": {"q4_0": 28}, "cache_keys": "f16", "cache_values": "f16"},
}
RIVAL = {
    **FIGURES,
    "name": "gguf-q4_0",
    "what": "plain, smaller table or cache",
    "bytes": 10**8,
    "fits": True,
    "kl_above_solution": 0.0042,
    "kl_above_solution_stderr": 0.0006,
}


def limit(name: str, left: float, gain: float, *, binds: bool = True, unit: str = "bytes") -> dict[str, Any]:
    """Return a limit in the form that `solve` gives it."""
    return {"name": name, "unit": unit, "left": left, "binds": binds, "predicted_gain": gain}


def said_of(**changes: Any) -> str:
    """Return what is printed about one solution, in one line."""
    found = document(1)
    found["solutions"] = [{**found["solutions"][0], **changes}]
    return " ".join(solve_text(found, 120).split())


def document(budgets: int) -> dict[str, Any]:
    """Return the document of `solve` for this many budgets."""
    found = {
        "solution": SOLUTION,
        "budget": {"memory_bytes": 2 * 10**8, "context": 2048, "batch": 1, "tier_bytes": 8 * 10**9},
        "rivals": [RIVAL],
        "next": {"more_bytes": 10**6, "predicted_gain": 0.0001},
        "winner": None,
        "as_good": "gguf-q4_0",
        "plain": None,
        "limits": [limit("memory", 10**7, 0.0031)],
    }
    return {
        "teacher": {"name": "tiny", "stored": None},
        "data": {"name": "text"},
        "held_out_tokens": 4096,
        "teacher_nll": 3.2,
        "teacher_accuracy": 0.44,
        "streamed": False,
        "solutions": [found] * budgets,
        **dict.fromkeys(("nothing_fits", "not_exported", "exported"), ()),
    }


@pytest.mark.parametrize(
    ("budgets", "kept"), [(1, ("storage", "memory", "fits", "KL")), (3, ("budget", "storage", "KL"))]
)
def test_a_narrow_terminal_has_the_columns_that_matter_most_and_says_which_are_left_out(
    budgets: int, kept: tuple[str, ...]
) -> None:
    found = document(budgets)
    narrow, whole = solve_text(found, 80, 80), solve_text(found, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert max(map(len, whole.splitlines())) > 80
    heads = [
        next(line for line in text.splitlines() if " KL" in line and "storage" in line) for text in (narrow, whole)
    ]
    for title in kept:
        assert title in heads[0]
    assert ["NLL" in head for head in heads] == [False, True]
    said = " ".join(narrow.partition("Left out: ")[2].split())
    assert "NLL" in said
    assert "a wider terminal shows them" in said
    assert "Left out" not in whole


def test_a_solution_that_is_a_plain_storage_is_not_advised_against_itself() -> None:
    assert said_of().endswith("gguf-q4_0 is as good, within the error, and simpler: use that one.")
    plain = SOLUTION | {"name": "gguf-q4_0"}
    assert said_of(solution=plain, plain="uniform").endswith("The solution is itself plain: gguf-q4_0 (uniform).")
    told = said_of(solution=plain, plain="uniform", as_good="gguf-q8_0")
    assert told.endswith("itself plain: gguf-q4_0 (uniform). gguf-q8_0 is as good, within the error.")
    assert "take that" not in told
    several = document(2)
    several["solutions"] = [one | {"solution": plain, "plain": "uniform"} for one in several["solutions"]]
    assert "itself, plain" in solve_text(several, 200)


def test_one_line_says_what_binds_and_what_is_left() -> None:
    memory = limit("memory", 945_000, 0.0031)
    assert "What binds: memory (945 kB left; 0.0031 lower predicted KL without it). storage" in said_of(limits=[memory])
    slow = limit("tpot_p95@streams=1", 0.0031, 0.0, binds=False, unit="seconds")
    assert "predicted KL without it). Room: tpot_p95@streams=1 3.1ms." in said_of(limits=[memory, slow])
    free = limit("memory", 10**8, 0.0, binds=False)
    assert "What binds: nothing. Room: memory 100 MB." in said_of(limits=[free])
    both = [limit(name, 10**3, 0.0) for name in ("memory", "file size")]
    told = said_of(limits=both)
    assert "What binds: memory (1.00 kB left; nothing without it alone), file size (1.00 kB left; nothing" in told
    assert "nothing" in solve_text(
        {**(many := document(2)), "solutions": [one | {"limits": [free]} for one in many["solutions"]]}, 200
    )
