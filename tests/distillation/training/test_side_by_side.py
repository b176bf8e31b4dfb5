"""Processes that divide a step: they have the gradients of one process and the same student, and their copies end."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from autodistill.distillation.training.side_by_side import SideBySide, usable
from autodistill.models.config import spec_from_config
from autodistill.strategy.strategy import Distillation, Finishing, Init, Strategy

FINISHING = Finishing(format="gguf-q4_1", bits=4, group_size=32, symmetric=False, scales="alone")
ALONE = Strategy(
    init=Init(depth=1.0), distillation=Distillation(learning_rate=1e-3, divergence_weight=0.5), finishing=FINISHING
)

pytestmark = pytest.mark.skipif(not usable("cpu"), reason="a process that has a GPU is not forked")


@pytest.mark.parametrize("processes", [2, 3])
def test_a_step_that_processes_divide_is_that_of_one(workshop, processes):
    one = workshop.trainer(ALONE, batch_tokens=128)
    some = workshop.trainer(ALONE, side_by_side=processes, batch_tokens=128)
    plain = workshop.trainer(replace(ALONE, finishing=None))
    before = {name: weight.detach().clone() for name, weight in plain.model.named_parameters()}
    steps = [list(trainer.train_stable(512)) for trainer in (one, some)]
    for alone, divided in zip(*steps, strict=True):
        assert divided.tokens == alone.tokens
        assert divided.loss == pytest.approx(alone.loss, rel=1e-5)
        assert divided.divergence == pytest.approx(alone.divergence, rel=1e-5)
        assert divided.gradient_norm == pytest.approx(alone.gradient_norm, rel=1e-4)
    assert some._gradients.beside is not None
    for trainer in (one, some):
        list(trainer.finish(640, spec_from_config(trainer.model.config.to_dict())))
    for (name, expected), (_, found) in zip(one.model.named_parameters(), some.model.named_parameters(), strict=True):
        # AdamW's first steps all have one size. If a gradient is about 0, the rounding of sums decides its sign.
        moved = (expected - before[name]).abs().mean()
        assert (found - expected).abs().mean() < 0.02 * moved, name


def test_copies_end_with_the_training_and_with_their_process(workshop):
    trainer = workshop.trainer(ALONE, side_by_side=2, batch_tokens=128)
    next(trainer.train_stable(512))
    (copy,) = trainer._gradients.beside._processes
    assert copy.is_alive()
    trainer.close()
    assert not copy.is_alive()
    # Training goes on as before, with new copies.
    next(trainer.train_stable(512))
    (copy,) = trainer._gradients.beside._processes
    os.kill(copy.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with code -9"):
        list(trainer.train_stable(512))
    assert trainer._gradients.beside is None


def test_what_fails_in_a_copy_fails_here():
    def work(value):
        if value < 0:
            raise ValueError("below 0")
        (parameter * value).sum().backward()
        return {"value": value}

    parameter = torch.nn.Parameter(torch.ones(3))
    beside = SideBySide(work, [parameter], 2)
    beside.ask((2.0,), (3.0,))
    work(1.0)
    assert beside.answers() == [{"value": 2.0}, {"value": 3.0}]
    assert parameter.grad.tolist() == [6.0] * 3
    beside.ask((-1.0,))
    with pytest.raises(RuntimeError, match="ValueError: below 0"):
        beside.answers()
    beside.close()
