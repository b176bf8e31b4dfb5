"""The memory to train a strategy's student: closed forms, and the limits that a search applies to strategies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.advisor.describe import Described, describe, shape
from autodistill.advisor.estimate import appraise, strategy_training, student_of, training_parts
from autodistill.cli.hardware_summary import appraisal_text
from autodistill.distillation.student.check import own_deployment, with_own
from autodistill.errors import InputError
from autodistill.search.planning.trial_memory import TrialMemory
from autodistill.strategy.named import load_strategy, packaged_files
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Lora
from autodistill.strategy.strategy import Init, Strategy
from autodistill.testing import save_tiny_teacher

TEACHER = shape({"layers": 10, "width": 512, "heads": 8, "ffn": 1024, "vocab": 32000}, tied=True)
TABLE, LAYER = 32000 * 512, 4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512
HALF = Init(depth=0.5)
STUDENT = TABLE + 5 * LAYER + 512


def told(strategy: Strategy, teacher: Described = TEACHER, tokens: int = 256) -> dict[str, Any]:
    student = student_of(teacher, strategy, "it")
    return strategy_training(teacher, student, strategy, tokens=tokens)


def test_the_student_is_trained_and_not_the_teacher() -> None:
    student = student_of(TEACHER, Strategy(init=HALF), "half")
    assert student.spec.parameters == STUDENT
    assert student.name == f"student of {TEACHER.name} by half"
    found = told(Strategy(init=HALF))
    assert found["trained"] == "all weights except the embedding table"
    parts = found["all_kept"]
    assert parts["weights_bytes"] == 4 * STUDENT
    # The table is only trained if the strategy says so.
    assert (parts["gradients_bytes"], parts["optimizer_bytes"]) == (4 * (STUDENT - TABLE), 8 * (STUDENT - TABLE))
    assert parts["alignment_bytes"] == parts["teacher_bytes"] == 0


def test_low_rank_changes_have_gradients_and_states_of_their_own_alone() -> None:
    strategy = Strategy(init=HALF, distillation=Distillation(lora=Lora(rank=4, alpha=8.0, layers="all")))
    found = told(strategy)
    # Each of five layers has four attention matrices of 512 by 512, and three of 512 by 1024.
    changes = 4 * 5 * (4 * (512 + 512) + 3 * (512 + 1024))
    moments = {"all_kept": 8, "sixteen_bit_states": 4, "eight_bit_states": 2}
    for way, states in ((way, size * changes) for way, size in moments.items()):
        states += 8 * changes // 256 if way == "eight_bit_states" else 0
        assert found[way]["weights_bytes"] == 4 * (STUDENT + changes)
        assert (found[way]["gradients_bytes"], found[way]["optimizer_bytes"]) == (4 * changes, states)
    assert found["trained"] == "low-rank changes of rank 4"


def test_alignments_the_grid_and_the_teacher_beside_it_are_counted() -> None:
    plain = Strategy(init=HALF)
    aligned = Strategy(init=HALF, distillation=Distillation(alignment=Alignment(count=2, projection="linear")))
    # Two layers have a projection with gradient and two moments. A token has states, projected states and differences.
    assert told(aligned)["all_kept"]["alignment_bytes"] == 2 * (16 * 512 * 512 + 4 * 256 * (512 + 2 * 512))
    both = Strategy(
        init=HALF,
        distillation=Distillation(alignment=Alignment(count=2, projection="linear"), attention=Attention(kind="maps")),
    )
    # The teacher's layer in float32, the queries and keys of both models, and the gradients of the student's.
    more = told(both)["all_kept"]["alignment_bytes"] - told(aligned)["all_kept"]["alignment_bytes"]
    assert more == 4 * LAYER + 4 * 256 * (2 * 512 + 2 * 512 + 2 * 512)
    online = told(Strategy(init=HALF, distillation=Distillation(signal="online", signal_tokens=0)))
    assert online["all_kept"]["teacher_bytes"] == 2 * TEACHER.spec.parameters
    before = told(plain)["all_kept"]["total_bytes"]
    assert online["all_kept"]["total_bytes"] == before + 2 * TEACHER.spec.parameters
    states = told(Strategy(init=HALF, distillation=Distillation(signal="states", signal_tokens=0)))
    assert states["all_kept"]["teacher_bytes"] == 2 * TABLE
    free = Strategy(init=HALF, distillation=Distillation(train_embeddings=True))
    grid = replace(free, finishing=load_strategy("lora").finishing)
    # On the grid, the table is looked up in float32. The bfloat16 copies exist anyway.
    assert told(grid)["all_kept"]["shown_bytes"] - told(free)["all_kept"]["shown_bytes"] == 4 * TABLE


@pytest.mark.parametrize("name", list(packaged_files("strategies")))
def test_every_packaged_strategy_takes_what_a_search_would_hold_it_to(name: str) -> None:
    strategy = load_strategy(name)
    found = told(strategy, tokens=2 * 64)
    trial = TrialMemory(
        limit_bytes=10**12,
        share_bytes=10**12,
        device="cuda",
        threads=1,
        processes=1,
        bf16=True,
        teacher=TEACHER.spec,
        held_bytes=0,
    )
    student = student_of(TEACHER, strategy, name)
    # One sequence is assumed. The number of sequences only matters if a student writes their ends itself.
    fit = trial.fit(strategy, student.spec, *((128, 1) if strategy.distillation.on_policy else (64, 2)))
    assert fit.estimate.total_bytes + trial.beside_bytes([strategy.distillation]) == found["all_kept"]["total_bytes"]
    assert {key: found["all_kept"][key] for key in fit.estimate.parts} == fit.estimate.parts
    assert found["all_kept"]["total_bytes"] >= found["eight_bit_states"]["total_bytes"]


def test_a_pretrained_student_is_itself_with_the_teacher_s_tokens(tmp_path: Path) -> None:
    small = save_tiny_teacher(tmp_path / "small", layers=2)
    strategy = Strategy(init=Init(source="pretrained", model=str(small), depth=1.0))
    student = student_of(TEACHER, strategy, "it")
    own = describe(str(small)).spec
    assert (student.spec.layers, student.spec.vocabulary) == (2, 32000)
    assert student.spec.parameters == own.parameters + (32000 - own.vocabulary) * own.width


def test_a_strategy_for_a_grid_is_served_on_it() -> None:
    assert own_deployment(Strategy(init=HALF)) is None
    deployment = own_deployment(load_strategy("lora"))
    assert deployment is not None
    assert (deployment.runtime, deployment.name) == ("llama.cpp", "gguf-q4_0")
    # A search adds the same deployment to its own ones, and no other.
    assert with_own(load_strategy("lora"), ()) == (deployment,)
    assert with_own(Strategy(init=HALF), (deployment,)) == (deployment,)


def test_the_text_has_the_parts_that_a_teacher_adds_where_it_adds_any() -> None:
    strategy = load_strategy("full_recipe")
    student = student_of(TEACHER, strategy, "full_recipe")
    deployment = own_deployment(strategy)
    assert deployment is not None
    document = appraise(student, deployment)
    text = appraisal_text(document | {"training": strategy_training(TEACHER, student, strategy)})
    lines = text.splitlines()
    table = lines[next(place for place, line in enumerate(lines) if line.startswith("training")) :]
    states = [word for bits in (16, 8) for word in (f"{bits}-bit", "states")]
    assert table[0].split() == ["training", "all", "kept", "checkpointing", *states]
    # The teacher's outputs are cached, so no part of the teacher lies next to the student.
    assert [line.split()[0] for line in table[7:10]] == ["overhead", "alignment", "total"]
    assert "All weights except the embedding table, at the end on the grid of gguf-q8_0, by AdamW" in text
    assert "1024 tokens a step of one pass" in text


@pytest.mark.parametrize(
    ("teacher", "strategy", "said"),
    [
        (
            shape({"layers": 4, "width": 128, "heads": 4, "ffn": 256, "vocab": 1000, "experts": 4}),
            Strategy(init=HALF),
            "llama cannot be trained here: these families can: llama, mistral",
        ),
        (
            TEACHER,
            Strategy(init=HALF, distillation=Distillation(alignment=Alignment(count=9, projection="linear"))),
            "9",
        ),
        (TEACHER, Strategy(init=Init(width=0.01)), "rounds to none"),
    ],
)
def test_what_cannot_be_trained_so_is_said(teacher: Described, strategy: Strategy, said: str) -> None:
    with pytest.raises(InputError, match=said):
        told(strategy, teacher)


def test_a_mixture_of_experts_is_no_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = shape({"layers": 4, "width": 128, "heads": 4, "ffn": 256, "vocab": 1000, "experts": 4})
    monkeypatch.setattr("autodistill.advisor.estimate.describe", lambda reference: mixture)
    with pytest.raises(InputError, match="cannot be trained here: these families can"):
        told(Strategy(init=Init(source="pretrained", model="a/mixture", depth=1.0)))


def test_no_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="--training must be at least 1 token"):
        training_parts(TEACHER.spec, 0)
