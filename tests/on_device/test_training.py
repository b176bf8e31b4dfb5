"""Every named strategy on a device that is not the CPU: cache, steps, a checkpoint and decay give the CPU's figures."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from autodistill.data.dataset import TokenSet
from autodistill.distillation.student.check import student_spec
from autodistill.distillation.training.fsdp import Sharding
from autodistill.models.config import spec_from_config
from autodistill.quantization.grids import Grid
from autodistill.strategy.recipe import Alignment, Distillation, Lora
from autodistill.strategy.strategy import Finishing, Init, Strategy
from tests.strategy.test_named_strategies import NAMES, bench_of

STEP = 64
# These have parts that no other test of a device has. The parts of the others are in these, in the tests with another
# rendering, or in those of a trial.
QUICK = ("full_recipe", "on_policy", "taid")
STRATEGIES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES]


def _spec(workshop):
    return spec_from_config(json.loads((workshop.teacher / "config.json").read_text()))


def _train(workshop, name, folder, device):
    """Return records and weights of a segment with a checkpoint, and of the decay, which another trainer does."""
    workshop = dataclasses.replace(workshop, data=workshop.data.head(4 * workshop.data.tokens.shape[1]))
    folder.mkdir()
    strategy, bench, calibration, storage_of = bench_of(workshop, name, folder, device)
    options = {"calibration": calibration, "tokens": 3 * STEP, "device": device}
    first = bench.trainer(strategy, **options)
    records = [*first.train_stable(STEP)]
    first.save(folder / "checkpoint")
    second = bench.trainer(strategy, **options)
    second.load(folder / "checkpoint")
    learned = strategy.finishing is not None and strategy.finishing.scales == "learned"
    records += [*second.train_decay(3 * STEP, storage_of, learned=learned)]
    weights = {key: value.detach() for key, value in second.model.named_parameters()}
    assert {value.device.type for value in weights.values()} == {device}
    return records, weights


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_trains_as_on_the_cpu(workshop, tmp_path, device, name):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        here, expected = _train(workshop, name, tmp_path / "cpu", "cpu")
    there, weights = _train(workshop, name, tmp_path / "device", device)
    for field in ("loss", "divergence", "cross_entropy", "alignment", "attention", "gradient_norm"):
        values = ([getattr(record, field) for record in records] for records in (there, here))
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6, err_msg=field)
    for key, value in weights.items():
        torch.testing.assert_close(value.cpu(), expected[key], rtol=0, atol=2e-4, msg=key)


TWINNED = {
    "cached tokens": Distillation(
        divergence_weight=0.5,
        learning_rate=1e-3,
        positions="uncertain",
        uncertain_share=0.5,
        alignment=Alignment(projection="mlp", layers="all", distance="l2", balance=True),
    ),
    "cached draws": Distillation(divergence_weight=0.5, learning_rate=1e-3, signal="sampled", signal_tokens=12),
    "cached states": Distillation(divergence_weight=1.0, learning_rate=1e-3, signal="states", signal_tokens=0),
    "the teacher itself": Distillation(
        divergence_weight=0.5, learning_rate=1e-3, signal="online", signal_tokens=0, standardise=True, lora=Lora(rank=4)
    ),
}


class _OneProcess(Sharding):
    """Stands for all processes of a trial: it holds the whole student on the device, where FSDP2 has its shards."""

    def __init__(self, device):
        self.rank, self.count, self._device = 0, 1, device

    def shard(self, model):
        model.to(self._device)
        model.forward = model.base_model.forward

    def sum(self, values):
        return values

    def average(self, parameters):
        pass

    def norm(self, gradients):
        return torch.nn.utils.get_total_norm(gradients)


def test_what_lies_beside_a_sharded_student_is_where_its_shards_are(workshop, device):
    recipe = Distillation(
        learning_rate=1e-3,
        lora=Lora(rank=4),
        alignment=Alignment(layers="even", count=2, projection="low-rank", rank=8, weight=0.3),
    )
    found = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for sharding in (None, _OneProcess(device)):
            trainer = workshop.trainer(Strategy(distillation=recipe), tokens=4 * STEP, device=device, sharding=sharding)
            found.append([(record.loss, record.gradient_norm) for record in trainer.train_stable(2 * STEP)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def _twinned(workshop):
    """Return a workshop whose student reads another rendering, shifted by a token, with another end token."""
    data, dice = workshop.data, np.random.default_rng(1)
    shared = dice.random(data.tokens.shape) < 0.4
    shared[:, [0, -1]] = False
    answers = shared | (dice.random(shared.shape) < 0.3)
    own = TokenSet(
        tokens=np.roll(data.tokens, 1, axis=1),
        documents=data.documents,
        answers=np.roll(answers, 1, axis=1),
        shared=np.roll(shared, 1, axis=1),
        teacher=dataclasses.replace(data, answers=answers, shared=shared),
        ends=(1, 2),
    )
    return dataclasses.replace(workshop, data=own)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=name, marks=[pytest.mark.slow] if name in ("cached draws", "cached states") else [])
        for name, recipe in TWINNED.items()
    ],
)
def test_a_rendering_of_its_own_and_a_grid_train_as_on_the_cpu(workshop, device, recipe):
    grid = Finishing(format="gguf-q4_0", bits=4, group_size=32)
    strategy = Strategy(init=Init(depth=0.5), distillation=recipe, finishing=grid)
    storages = {tensor.name: grid.storage(tensor) for tensor in student_spec(strategy, _spec(workshop)).tensors}
    grids = {name: storage for name, storage in storages.items() if isinstance(storage, Grid)}
    found = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for kind in ("cpu", device):
            trainer = _twinned(workshop).trainer(strategy, tokens=4 * STEP, device=kind, micro_batch=1)
            records = [*trainer.train_decay(2 * STEP, grids.get, learned=True)]
            found.append([(record.loss, record.gradient_norm) for record in records])
            assert {parameter.device.type for parameter in trainer.model.parameters()} == {kind}
            assert trainer.scales
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3)
