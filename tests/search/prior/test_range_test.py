"""A range test on a tiny student: what it finds, how it ends, and that it leaves everything unchanged."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import InputError, TrialFailedError
from autodistill.inference.scoring import score
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.search.prior import range_test as range_test_module
from autodistill.search.prior.range_test import HeldOut, range_test, train_briefly
from autodistill.search.prior.tried_rates import (
    FACTOR,
    RangeTest,
    TriedRate,
    choose,
    next_rate,
    next_rate_of_many,
    paired,
    rate_of_many,
)
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.strategy.recipe import Distillation, Lora
from autodistill.strategy.strategy import Finishing, Strategy
from autodistill.testing import save_tiny_teacher, small_plan

LENGTH, DOCUMENTS = 32, 12
Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
PLAN = small_plan(sequence_length=LENGTH, batch_tokens=2 * LENGTH, micro_batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("range") / "teacher", layers=2, width=32, ffn=64)


def text(seed, sequences=DOCUMENTS):
    """Return sequences that count upwards, so that a model can learn them. Each is a document."""
    starts = np.random.default_rng(seed).integers(3, 40, (sequences, 1))
    tokens = (starts + np.arange(LENGTH) % 8).astype(np.int32)
    return TokenSet(tokens=tokens, documents=np.repeat(np.arange(sequences, dtype=np.int32)[:, None], LENGTH, axis=1))


class Subject:
    """A student, and range tests on it."""

    def __init__(self, folder, **recipe):
        self.width = recipe.pop("width", 32)
        self.model = load_model(folder, torch.float32)
        self.spec = spec_from_config(self.model.config.to_dict())
        self.finishing = recipe.pop("finishing", None)
        self.recipe = Distillation(divergence_weight=0.0, **recipe)
        self.trained = []

    def trainer(self, strategy, plan):
        self.trained.append(strategy.distillation.learning_rate)
        return Trainer(
            self.model,
            teaching=Teaching(kept_layers=(0, 1), layers=2, width=self.width),
            strategy=strategy,
            plan=plan,
            data=text(1, 64),
            seed=0,
        )

    def test(self, rate, **options):
        asked = {"held_out": text(2), "deployment": IN_16_BITS, "horizon": 8, "steps": 8} | options
        strategy = Strategy(
            distillation=Distillation(**{**self.recipe.__dict__, "learning_rate": rate}), finishing=self.finishing
        )
        return range_test(self.model, self.trainer, spec=self.spec, strategy=strategy, plan=PLAN, **asked)


def test_it_goes_down_from_too_high_a_rate_and_up_from_too_low_a_one(folder):
    high, low = Subject(folder).test(0.9), Subject(folder).test(1e-5)
    assert [one.rate for one in high.tried[:2]] == pytest.approx([0.9, 0.9 / FACTOR])
    assert high.chosen < 0.3
    assert max(one.rate for one in low.tried) == pytest.approx(1e-5 * FACTOR**4)
    assert high.beats_beginning
    # The reported gain equals what an independent scoring finds.
    assert high.best.gain == pytest.approx((sum(high.sums) - sum(high.best.sums)) / sum(high.counts))


def test_gains_are_those_of_the_product_s_own_training(folder):
    subject = Subject(folder)
    found = subject.test(1e-2)
    model = load_model(folder, torch.float32)
    before = score(model, text(2))[0].nll
    assert sum(found.sums) == pytest.approx(before.sum(), rel=1e-3)  # the test stores weights in bfloat16
    assert found.counts == (LENGTH - 1,) * DOCUMENTS
    one = found.tried[0]
    gaps = (np.array(found.sums) - np.array(one.sums)) / (LENGTH - 1)
    assert one.gain == pytest.approx(gaps.mean())
    # Documents are equally long, so the error is that of a mean. The tolerance covers the bootstrap and few documents.
    assert one.stderr == pytest.approx(gaps.std(ddof=1) / math.sqrt(DOCUMENTS), rel=0.15)


@pytest.mark.parametrize("recipe", [{}, {"train_embeddings": True}, {"lora": Lora(rank=4)}])
def test_model_flags_and_random_state_are_left_as_they_were(folder, recipe):
    subject = Subject(folder, **recipe)
    subject.model.eval()
    next(subject.model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in subject.model.parameters()]
    random, threads = torch.random.get_rng_state(), torch.get_num_threads()
    found = subject.test(1e-2)
    assert found.beats_beginning
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert [parameter.requires_grad for parameter in subject.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert not subject.model.training


def test_the_same_seed_finds_the_same_whatever_was_drawn_before(folder):
    first = Subject(folder).test(1e-2)
    torch.rand(7)
    second = Subject(folder).test(1e-2)

    def untimed(found):
        return [(one.rate, one.gain, one.sums) for one in found.tried], found.chosen

    assert untimed(first) == untimed(second)


def test_a_rate_that_explodes_is_worse_than_any_other(folder):
    subject = Subject(folder)
    make = subject.trainer

    def exploding(strategy, plan):
        if strategy.distillation.learning_rate > 0.05:
            raise TrialFailedError("nan", "loss or gradient was not finite")
        return make(strategy, plan)

    subject.trainer = exploding
    found = subject.test(0.09)
    first, second = found.tried[:2]
    assert (first.gain, first.sums) == (None, ())
    assert second.gain > 0
    assert found.chosen < 0.05
    assert "not finite" in found.describe()
    with pytest.raises(ValueError, match="no difference"):
        found.difference(first, second)


def test_weights_that_became_infinite_are_not_finite_and_come_back(folder):
    subject = Subject(folder)
    make = subject.trainer

    class Spoilt:
        def __init__(self, trainer):
            self.trainer, self.scales = trainer, {}

        def train_stable(self, until):
            return self.trainer.train_stable(until)

        def finish(self, until, spec):
            yield from self.trainer.finish(until, spec)
            with torch.no_grad():
                next(subject.model.parameters()).fill_(math.inf)

    subject.recipe = Distillation(divergence_weight=0.0, train_embeddings=True)
    subject.trainer = lambda strategy, plan: (
        Spoilt(make(strategy, plan)) if strategy.distillation.learning_rate > 0.005 else make(strategy, plan)
    )
    found = subject.test(0.01)
    assert found.tried[0].gain is None
    assert found.tried[1].gain is not None


def test_another_failure_is_not_hidden(folder):
    subject = Subject(folder)

    def failing(strategy, plan):
        raise TrialFailedError("out-of-memory", "full")

    subject.trainer = failing
    with pytest.raises(TrialFailedError, match="full"):
        subject.test(1e-3)


def test_it_says_when_no_rate_beats_the_untrained_student(folder):
    """The model has learned the held-out text. Its training data now contradict that text."""
    subject = Subject(folder)
    learnt = text(2)
    subject.trainer = lambda strategy, plan: Trainer(
        subject.model,
        teaching=Teaching(kept_layers=(0, 1), layers=2, width=32),
        strategy=strategy,
        plan=plan,
        data=learnt,
        seed=0,
    )
    trainer = subject.trainer(Strategy(distillation=subject.recipe), PLAN)
    for _ in trainer.train_stable(120 * PLAN.batch_tokens):
        pass
    noise = np.random.default_rng(3).integers(3, 60, (64, LENGTH)).astype(np.int32)
    learnt = TokenSet(tokens=noise, documents=np.zeros_like(noise))
    found = subject.test(1e-2)
    assert not found.beats_beginning
    assert "none beats" in found.describe()
    assert found.chosen < 1e-2


@pytest.mark.parametrize(
    ("architecture", "width"),
    [("llama", 32), *(pytest.param(*size, marks=pytest.mark.slow) for size in (("qwen3", 64), ("gemma3_text", 96)))],
)
def test_the_chosen_rate_does_not_ruin_what_was_learnt(tmp_path, architecture, width):
    """The model already knows the text.

    The test starts from a rate that would ruin it; training then uses the chosen rate.
    """
    start = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, layers=2, width=width, ffn=64)
    subject = Subject(start, width=width)
    strategy = Strategy(distillation=Distillation(divergence_weight=0.0, learning_rate=5e-3))
    for _ in subject.trainer(strategy, PLAN).train_stable(100 * PLAN.batch_tokens):
        pass
    found = subject.test(0.5, horizon=32)
    assert found.tried[0].gain is None or found.tried[0].gain < 0
    recipe = Distillation(divergence_weight=0.0, learning_rate=found.chosen)
    records, _ = train_briefly(
        subject.trainer, Strategy(distillation=recipe), PLAN, subject.spec, found.chosen, found.horizon
    )
    assert len(records) == 32
    after = HeldOut(subject.model, subject.spec, text(2), IN_16_BITS, "cpu").sums(None)
    gain, stderr = paired(found.counts, found.sums, after)
    assert gain > -2 * stderr


def test_it_trains_on_the_grid_that_the_strategy_finishes_on(folder):
    finishing = Finishing(format="gguf-q4_0", bits=4, group_size=32)
    on_grid = Subject(folder, finishing=finishing).test(1e-2, deployment=Q4_0)
    off_grid = Subject(folder).test(1e-2, deployment=Q4_0)
    assert on_grid.sums == off_grid.sums
    assert on_grid.tried[0].sums != off_grid.tried[0].sums


def test_seconds_bound_it(folder):
    subject = Subject(folder)
    assert subject.test(1e-2, seconds=1e-3).tried == ()
    none = subject.test(1e-2, seconds=1e-3)
    assert (none.chosen, none.steps, none.beats_beginning) == (1e-2, 0, False)
    assert "lack of time" in none.describe()
    plenty = subject.test(1e-2, seconds=1e6)
    assert plenty.steps == 8
    assert len(plenty.tried) >= 2


def test_what_is_compiled_on_a_first_call_is_no_part_of_what_a_rate_takes(folder, monkeypatch):
    """On this clock, the first packing and the first training take a hundred times as long as the time limit."""
    subject, now, slow = Subject(folder), [0.0], {"packing", "training"}
    monkeypatch.setattr(range_test_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    make, deployed = subject.trainer, range_test_module.deployed_weights

    def takes(what):
        now[0] += 1000.0 if what in slow else 0.01
        slow.discard(what)

    def trainer(strategy, plan):
        takes("training")
        return make(strategy, plan)

    @contextmanager
    def packed(*arguments):
        takes("packing")
        with deployed(*arguments) as same:
            yield same

    subject.trainer = trainer
    monkeypatch.setattr(range_test_module, "deployed_weights", packed)
    found = subject.test(1e-2, seconds=10.0)
    assert found.steps == 8
    assert len(found.tried) >= 2
    assert found.sums == Subject(folder).test(1e-2).sums  # evaluated before any training


def test_of_a_training_of_many_tokens_a_weight_the_rate_does_not_fall_with_its_length(folder):
    """The tokens per weight are above a twentieth in one test, and half as many in the other."""
    subject = Subject(folder)
    many = 0.05 * subject.spec.parameters / PLAN.batch_tokens
    long, short = (subject.test(1e-2, horizon=int(share * many)) for share in (1.5, 0.75))
    assert short.chosen == choose(short.tried, short.horizon / short.steps)
    assert long.chosen == rate_of_many(1e-2, long.tried, long.counts) > short.chosen
    assert any(one.rate == long.chosen for one in long.tried)


def test_too_few_steps_are_refused(folder):
    with pytest.raises(ValueError, match="at least 4"):
        Subject(folder).test(1e-2, steps=3)


def test_plain_data_come_back_as_they_were(folder):
    found = Subject(folder).test(0.9)
    assert RangeTest.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(InputError, match="lacks the field chosen"):
        RangeTest.from_json({name: value for name, value in found.to_json().items() if name != "chosen"})


COUNTS = (10,) * 30


def tried(**gains):
    """Return tried rates, named by their power of the factor.

    A gain is the same in all documents, plus a little noise.
    """
    dice = np.random.default_rng(0).normal(0, 0.01, 30)
    found = []
    for power, gain in gains.items():
        place = int(power.replace("m", "-").replace("p", ""))
        sums = () if gain is None else tuple(30 - 10 * gain + np.roll(dice, place))
        found.append(TriedRate(rate=1e-3 * FACTOR**place, gain=gain, stderr=0.001, sums=sums, seconds=1.0))
    return found


@pytest.mark.parametrize(
    ("gains", "power"),
    [
        ({}, 0),
        ({"p0": 0.1}, 1),
        ({"p0": 0.001}, -1),
        ({"p0": None}, -2),
        ({"p0": -0.1}, -2),
        ({"p0": -0.0005}, -1),
        ({"p0": -3.0, "m2": -3.0}, -4),
        ({"p0": -3.0, "m2": -0.0015}, -3),
        ({"p0": -3.0, "m2": -0.0005}, None),
        ({"p0": -3.0, "m2": 0.1}, -3),
        ({"p0": -3.0, "m2": 0.1, "m3": 0.05}, -1),
        ({"p0": -3.0, "m2": 0.1, "m3": 0.05, "m1": 0.02}, None),
        ({"p0": 0.1, "m1": 0.2}, -2),
        ({"p0": 0.2, "m1": 0.1}, 1),
        ({"p0": 0.2, "m1": 0.2001}, None),
        ({"p0": 0.1, "m1": 0.2, "m2": 0.15}, None),
        ({"p0": 0.2, "m1": 0.1, "p1": 0.3}, 2),
        ({"p0": 0.2, "m1": 0.1, "p1": 0.3, "p2": 0.4}, 3),
        ({"p0": 0.2, "m1": 0.1, "p1": 0.2001}, 2),
        ({"p0": 0.2, "m1": 0.1, "p4": 0.3}, None),
        ({"p0": 0.2, "m1": 0.1, "p1": 0.3, "p2": 0.25}, None),
        ({"p0": None, "m2": None}, -4),
        ({"p0": None, "m2": None, "m4": None, "m5": None}, -6),
        ({"p0": None, "m2": None, "m4": None, "m6": None}, None),
        ({"m6": 0.4, "m5": 0.3, "p0": 0.1}, None),
    ],
)
def test_the_next_rate(gains, power):
    found = next_rate(1e-3, tried(**gains), COUNTS)
    assert found == (None if power is None else pytest.approx(1e-3 * FACTOR**power))


def test_the_chosen_rate_is_the_top_of_a_parabola_and_less_for_longer():
    places = {"m3": -3, "m2": -2, "m1": -1, "p0": 0}
    found = tried(**{name: 0.5 - 0.1 * (place + 1.3) ** 2 for name, place in places.items()})
    top = choose(found, 1.0, 0.0)
    assert top == pytest.approx(1e-3 * FACTOR**-1.3)
    assert choose(found, 10.0, -0.4) == pytest.approx(top * 10**-0.4)
    # The chosen rate lies within the tried range, and never above the best tried rate.
    assert choose(found, 1e9, -0.4) == pytest.approx(1e-3 * FACTOR**-3)
    above = tried(**{name: 0.5 - 0.1 * (place + 0.7) ** 2 for name, place in places.items()})
    assert choose(above, 1.0, -0.4) == pytest.approx(1e-3 * FACTOR**-1)
    # If the rate does not fall with the length, the top itself is chosen.
    assert choose(above, 9.0, 0.0) == pytest.approx(1e-3 * FACTOR**-0.7)
    assert choose(tried(p0=None, m1=None), 1.0) == pytest.approx(1e-3 * FACTOR**-2)
    assert choose(tried(p0=-0.1, m1=-0.05, m2=-0.06), 1.0) == pytest.approx(1e-3 * FACTOR**-2)


@pytest.mark.parametrize(
    ("gains", "chosen", "following"),
    [
        ({}, None, 0),
        ({"p0": 0.100}, 0, 1),
        ({"p0": 0.100, "p1": 0.099}, 1, 2),  # the lower one is ahead by less than an error
        ({"p0": 0.100, "p1": 0.090}, 0, None),
        ({"p0": 0.100, "p1": 0.110, "p2": 0.109}, 2, 3),
        ({"p0": 0.100, "p1": 0.110, "p2": 0.106}, 1, None),  # ahead of the known one, and behind the one below
        ({"p0": 0.002, "p1": -0.001}, 0, None),  # a higher one that harms is not taken, however unclear that is
        ({"p0": -0.001}, 0, 1),  # the known one stays if it does no clear harm
        ({"p0": -0.001, "p1": None}, 0, None),
        ({"p0": -0.003}, None, -1),
        ({"p0": None}, None, -1),
        ({"p0": None, "m1": -0.1}, None, -2),
        ({"p0": -0.1, "m1": -0.001}, -1, None),
        ({"p0": 0.100, "p4": 0.2}, 4, None),  # there are no rates above this one
    ],
)
def test_with_many_tokens_the_known_rate_stays_unless_it_harms_or_a_higher_one_is_as_good(gains, chosen, following):
    dice = np.random.default_rng(1)
    found = []
    for one in tried(**gains):
        noise = dice.normal(0, 0.1, 30)  # so the difference of two gains has an error of 0.0026
        found.append(replace(one, sums=tuple(np.asarray(one.sums) + noise)) if one.sums else one)

    def rate(power):
        return None if power is None else pytest.approx(1e-3 * FACTOR**power)

    assert rate_of_many(1e-3, found, COUNTS) == rate(chosen)
    assert next_rate_of_many(1e-3, found, COUNTS) == rate(following)


def test_a_single_document_has_no_error():
    assert paired((10,), (20.0,), (10.0,)) == (1.0, None)
