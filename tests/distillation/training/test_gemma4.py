"""Students of Gemma 4 in training: capped logits, a further table, and layers that read the keys of earlier ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from transformers import AutoModelForCausalLM

from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.models.loading import token_tables
from autodistill.strategy.strategy import Init, Strategy
from tests.conftest import Workshop, make_workshop
from tests.distillation.training import test_on_policy as on_policy
from tests.distillation.training import test_trainer as training

WHOLE = replace(training.PLAIN, init=Init(depth=1.0))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"), architecture="gemma4_text")


def test_loss_and_gradient_are_those_of_an_independent_computation(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights of a new student are trained, on a text that it goes on with itself."""
    recipe = replace(on_policy.RECIPE, train_embeddings=True)
    monkeypatch.setattr(on_policy, "RECIPE", recipe)
    monkeypatch.setattr(on_policy, "STRATEGY", Strategy(init=Init(source="scratch", depth=1.0), distillation=recipe))
    on_policy.test_loss_and_gradient_are_those_of_an_independent_computation(workshop, monkeypatch, "reverse_kl", 1)


@pytest.mark.parametrize("kind", ["learned", "lora on a grid", "scales alone", "uncertain"])
def test_each_way_of_training_goes_on_with_its_own_text(workshop: Workshop, kind: str) -> None:
    on_policy.test_it_works_beside_what_else_a_strategy_may_have(workshop, kind)


def test_it_continues_to_the_last_bit(workshop: Workshop, tmp_path: Path) -> None:
    training.test_continues_to_the_last_bit(workshop, tmp_path, WHOLE, {"checkpointing": True, "micro_batch": 1})


def test_checkpointing_changes_no_gradient(workshop: Workshop) -> None:
    plain, checkpointed = (training._gradients(workshop.trainer(WHOLE, checkpointing=on))[0] for on in (False, True))
    training._same(checkpointed, plain)


@pytest.mark.parametrize("trained", [False, True])
def test_both_tables_are_trained_or_neither(workshop: Workshop, trained: bool) -> None:
    recipe = replace(WHOLE.distillation, train_embeddings=trained)
    trainer = workshop.trainer(replace(WHOLE, distillation=recipe))
    tables = token_tables(trainer.model)
    before = [table.detach().clone() for table in tables]
    next(trainer.train_stable(training.STEP))
    assert [tuple(table.shape) for table in tables] == [(300, 64), (300, 6 * 32)]
    assert [not torch.equal(table, one) for table, one in zip(tables, before, strict=True)] == [trained, trained]


def test_a_cap_counts_in_targets_and_in_a_frozen_head(workshop: Workshop, tmp_path: Path) -> None:
    """With a low cap all logits are near it, so a loss without it would differ much."""
    teacher = copytree(workshop.teacher, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 0.3}))
    tokens = torch.from_numpy(workshop.data.tokens[:2]).long()
    stock = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        logits = stock(tokens).logits[:, :-1].flatten(0, 1)
        states = stock.model(tokens).last_hidden_state[:, :-1].flatten(0, 1)
    assert logits.abs().max() > 0.25
    ((_, outputs),) = LiveTeacher(teacher).target(states, 1.0).parts(len(states))
    torch.testing.assert_close(outputs.logits, logits)
    low = replace(workshop, teacher=teacher)
    recipe = replace(WHOLE.distillation, signal="online", signal_tokens=0, train_embeddings=False)
    strategy = replace(WHOLE, distillation=recipe)
    exact, brief = (next(low.trainer(strategy, bf16=bf16).train_stable(training.STEP)) for bf16 in (False, True))
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert exact.cross_entropy == pytest.approx(float(expected), rel=0.02)  # other sequences
    assert brief.cross_entropy == pytest.approx(exact.cross_entropy, rel=1e-3)
    assert max(exact.divergence, brief.divergence) < 1e-4  # from itself
