"""A teacher that runs next to the student gives the same layer states as its cache, up to the cache's rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.models.loading import load_model
from autodistill.strategy.recipe import Alignment, Attention, Distillation
from autodistill.strategy.strategy import Init, Strategy

CACHED = Distillation(
    signal="states",
    signal_tokens=0,
    alignment=Alignment(layers="even", count=2, distance="l2"),
    attention=Attention(kind="relations", relation_heads=2),
    learning_rate=1e-3,
)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_training_beside_the_teacher_is_that_on_its_cache(workshop, distance):  # type: ignore[no-untyped-def]
    recipe = replace(CACHED, alignment=replace(CACHED.alignment, distance=distance))
    losses = {}
    for signal in ("states", "online"):
        strategy = Strategy(init=Init(depth=0.5), distillation=replace(recipe, signal=signal))
        trainer = workshop.trainer(strategy)
        losses[signal] = [(one.alignment, one.attention, one.divergence) for one in trainer.train_stable(256)]
    assert losses["online"] == [pytest.approx(one, rel=5e-3, abs=1e-5) for one in losses["states"]]


def test_one_pass_gives_all_that_is_read_of_the_same_sequences(workshop):  # type: ignore[no-untyped-def]
    teacher, ids = LiveTeacher(workshop.teacher), torch.arange(64).reshape(2, 32)
    passes = []
    teacher._model.base_model.register_forward_hook(lambda *_: passes.append(1))
    teacher.read(ids, (0, 1))
    final, state = teacher.final(ids), teacher.state(ids.clone(), 1, (0, 1))
    assert len(passes) == 1
    with torch.no_grad():
        found = load_model(workshop.teacher, torch.float32)(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(state, found[2][:, :-1].flatten(0, 1), atol=1e-5)
    assert torch.allclose(final, found[-1][:, :-1].flatten(0, 1), atol=1e-5)
    teacher.final(ids + 1)
    assert len(passes) == 2
