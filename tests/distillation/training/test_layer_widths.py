"""Training a student whose layers differ in FFN width, compared with padding the narrower layers with zeros."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.trainer import Trainer
from autodistill.models.loading import load_model, stock_model
from autodistill.quantization.grids import Q4_0, Grid
from autodistill.strategy.recipe import Distillation, Lora
from autodistill.strategy.strategy import Init, Strategy
from autodistill.testing import save_tiny_teacher

WIDTHS = (128, 32, 64, 128, 96, 32)
PLAIN = Strategy(init=Init(depth=1.0), distillation=Distillation(learning_rate=1e-2, train_embeddings=True))
LORA = replace(PLAIN, distillation=Distillation(learning_rate=1e-2, lora=Lora(rank=4, layers="ffn")))


@pytest.fixture(scope="module")
def bench(workshop, tmp_path_factory):
    """Return the workshop with an initial student whose layers differ."""
    folder = tmp_path_factory.mktemp("narrow") / "teacher"
    return replace(workshop, teacher=save_tiny_teacher(folder, layers=6, ffn=WIDTHS))


def padded(bench, strategy, **changes):
    """Return a trainer of the same student in transformers' own class."""
    return Trainer(
        stock_model(load_model(bench.teacher, torch.float32)),
        teaching=Teaching(kept_layers=tuple(range(6)), layers=6, width=64, cache=bench.cache),
        strategy=strategy,
        plan=bench.plan(**changes),
        data=bench.data,
        seed=0,
    )


def grid_of(name: str) -> Grid | None:
    return Q4_0 if name.endswith("proj.weight") else None


@pytest.mark.parametrize(("grid", "learned"), [(None, False), (grid_of, False), (grid_of, True)])
@pytest.mark.parametrize("plan", [{}, pytest.param({"checkpointing": True, "micro_batch": 1}, marks=pytest.mark.slow)])
def test_it_trains_as_the_padded_student_does(bench, grid, learned, plan):
    one, other = bench.trainer(PLAIN, **plan), padded(bench, PLAIN, **plan)
    assert (one.model.config.is_heterogeneous, other.model.config.is_heterogeneous) == (True, False)
    pairs = []
    for trainer in (one, other):
        records = [*trainer.train_stable(192), *trainer.train_decay(320, grid, learned=learned)]
        pairs.append([(record.loss, record.gradient_norm) for record in records])
    torch.testing.assert_close(torch.tensor(pairs[0]), torch.tensor(pairs[1]), rtol=2e-3, atol=0)
    assert pairs[0][-1][0] < pairs[0][0][0]
    whole = dict(other.model.named_parameters())
    for name, own in one.model.named_parameters():
        moved = (whole[name][tuple(map(slice, own.shape))] - own).abs().mean()
        assert moved < 2e-3, name
        if own.shape != whole[name].shape and not learned:
            assert torch.count_nonzero(whole[name]) <= own.numel()  # the padding does not learn


@pytest.mark.parametrize("strategy", [PLAIN, LORA], ids=["plain", "lora"])
def test_it_continues_to_the_last_bit(bench, tmp_path, strategy):
    whole, first = bench.trainer(strategy), bench.trainer(strategy)
    records = list(whole.train_stable(384))
    list(first.train_stable(192))
    first.save(tmp_path / "checkpoint")
    second = bench.trainer(strategy)
    second.load(tmp_path / "checkpoint")
    assert [record.loss for record in second.train_stable(384)] == [record.loss for record in records[3:]]
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in second.model.named_parameters())


def test_learned_scales_are_of_each_layers_own_shape(bench):
    trainer = bench.trainer(PLAIN)
    list(trainer.train_decay(128, grid_of, learned=True))
    shapes = [trainer.scales[f"model.layers.{layer}.mlp.down_proj.weight"].scales.shape for layer in range(6)]
    assert shapes == [(64, width // 32) for width in WIDTHS]
