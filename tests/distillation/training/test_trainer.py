"""Steps, schedules, checkpoints and failures of the trainer, equal to the last bit if it promises so."""

import copy
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open

from autodistill.distillation.losses.schedules import Interpolation
from autodistill.distillation.training import checkpoint
from autodistill.distillation.training import trainer as trainer_module
from autodistill.distillation.training.checkpoint import read_metadata
from autodistill.distillation.training.learning_rate import Decay, branch_point, end_of, stable_rate
from autodistill.distillation.training.optimizers import adamw as adamw_module
from autodistill.distillation.training.step_loss import StepLoss
from autodistill.errors import TrialFailedError
from autodistill.inference.torch_memory import StepOutOfMemory
from autodistill.quantization.grids import Q4_0, Q8_0
from autodistill.quantization.packing import deployed
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Lora, OnPolicy, Temperature
from autodistill.strategy.strategy import Init, Strategy
from tests.thinned import thinned

PLAIN = Strategy(distillation=Distillation(divergence_weight=0.5, learning_rate=1e-3))
ALIGNED = Strategy(
    distillation=Distillation(
        divergence_weight=0.5,
        learning_rate=1e-3,
        alignment=Alignment(layers="even", count=2, projection="low-rank", rank=8, weight=0.3),
    )
)
UNCERTAIN = replace(ALIGNED, distillation=replace(ALIGNED.distillation, positions="uncertain", uncertain_share=0.2))
BALANCED = replace(
    ALIGNED,
    distillation=replace(
        ALIGNED.distillation,
        alignment=replace(ALIGNED.distillation.alignment, balance=True),
        attention=Attention(kind="relations", relation_heads=4, balance=True),
    ),
)
LORA = Strategy(init=Init(depth=1.0), distillation=Distillation(learning_rate=1e-2, lora=Lora(rank=4, alpha=8.0)))
STEP = 64


def _weights(trainer):
    """Return every weight, including projections, and the optimiser's state."""
    parameters = [*trainer.model.named_parameters(), *trainer._projections.named_parameters(prefix="projection")]
    found = {name: parameter.detach().clone() for name, parameter in parameters}
    for name, parameter in parameters:
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = torch.as_tensor(value).clone()
    return found


def _same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def _grid(name):
    return Q8_0 if "embed" in name else Q4_0 if name.endswith("proj.weight") else None


def test_rates_by_hand():
    assert [stable_rate(2.0, tokens, 400) for tokens in (100, 200, 400, 800)] == [0.5, 1.0, 2.0, 2.0]
    assert stable_rate(2.0, 64, 0) == 2.0
    decay = Decay(100, 300)
    assert [decay.factor(tokens) for tokens in (100, 150, 200, 300)] == [1.0, 0.75, 0.5, 0.0]
    decay.shorten(200, 250)
    assert [decay.factor(tokens) for tokens in (200, 225, 250)] == [0.5, 0.25, 0.0]
    assert [branch_point(target, 0.25, 64) for target in (512, 640, 128, 64)] == [384, 512, 64, 0]
    # A decay may branch off from any step, and ends at a whole one. Its share is as near as these allow.
    for steps in range(1, 200):
        end = end_of(steps * 64, 0.2, 64)
        assert end % 64 == 0
        assert branch_point(end, 0.2, 64) == steps * 64
        assert abs((end - steps * 64) - 0.2 * end) <= 64


def test_the_schedule_is_a_function_of_absolute_tokens(workshop):
    trainer = workshop.trainer(PLAIN, warmup_tokens=128)
    records = [*trainer.train_stable(256), *trainer.train_decay(512)]
    assert [record.tokens for record in records] == [64 * step for step in range(1, 9)]
    assert trainer.step_tokens == 64
    factors = [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose([record.learning_rate for record in records], np.array(factors) * 1e-3, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_step_has_the_schedules_value_in_the_middle_of_its_tokens(workshop, steps):
    """So the means of linear schedules do not depend on the number of steps, and they end at the plan's last token."""
    recipe = replace(
        PLAIN.distillation,
        divergence_weight=0.2,
        final_divergence_weight=0.8,
        temperature=Temperature(shape="linear", start=5.0, end=1.0),
    )
    trainer = workshop.trainer(replace(PLAIN, distillation=recipe), tokens=steps * STEP)
    records = list(trainer.train_stable((steps + 2) * STEP))
    weights = [record.divergence_weight for record in records]
    assert weights[:steps] == pytest.approx([0.2 + 0.6 * (2 * step + 1) / (2 * steps) for step in range(steps)])
    assert np.mean(weights[:steps]) == pytest.approx(0.5)
    # The nearest stored ones of 3; 13/3, 3 and 5/3; 14/3, 4, 10/3, 8/3, 2 and 4/3. Beyond the plan, the end stays.
    snapped = {1: [3.0], 3: [4.0, 3.0, 1.5], 6: [5.0, 4.0, 3.0, 3.0, 2.0, 1.5]}[steps]
    assert [record.temperature for record in records] == [*snapped, 1.0, 1.0]
    assert weights[steps:] == [0.8, 0.8]


def test_terms_add_up(workshop):
    for record in workshop.trainer(ALIGNED).train_stable(128):
        logits = 0.5 * record.divergence + 0.5 * record.cross_entropy
        assert record.loss == pytest.approx(logits + 0.3 * record.alignment, rel=1e-6)
        assert min(record.divergence, record.cross_entropy, record.alignment, record.gradient_norm) > 0
        assert record.tokens_per_second > 0
    (record,) = workshop.trainer(PLAIN).train_stable(64)
    assert record.alignment == 0


def test_it_learns(workshop):
    records = list(workshop.trainer(PLAIN, tokens=2560).train_stable(2560))
    first, last = (np.mean([r.loss for r in part]) for part in (records[:4], records[-4:]))
    assert last < 0.75 * first


def test_a_step_is_adamws_with_memories_of_nine_tenths_and_nineteen_twentieths(workshop):
    """The reference is the published recurrence (arXiv:1711.05101) in float64, without decay, on clipped gradients."""
    trainer, gradients, rates = workshop.trainer(PLAIN, tokens=4 * STEP), [], []
    name, weight = next((n, w) for n, w in trainer.model.named_parameters() if n.endswith("q_proj.weight"))
    value = weight.detach().double().numpy().copy()
    group = next(group for group in trainer.optimizer.param_groups if any(w is weight for w in group["params"]))

    def note(*_):
        gradients.append(weight.grad.double().numpy().copy())
        rates.append(float(group["lr"]))

    trainer.optimizer.register_step_pre_hook(note)
    list(trainer.train_stable(4 * STEP))
    assert len(gradients) == 4, name
    mean = square = 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        value -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.95**step)) + 1e-8)
    np.testing.assert_allclose(weight.detach().double().numpy(), value, rtol=0, atol=1e-6)


def test_two_targets_share_their_beginning_to_the_last_bit(workshop):
    """A run to 256 tokens and one to 512 are the same until the first of them decays."""
    near, far = workshop.trainer(ALIGNED), workshop.trainer(ALIGNED)
    list(near.train_stable(branch_point(256, 0.25, STEP)))
    records = far.train_stable(branch_point(512, 0.25, STEP))
    for _ in range(3):
        next(records)
    assert near.tokens == far.tokens == 192
    _same(_weights(near), _weights(far))


@pytest.mark.parametrize(
    ("strategy", "plan"),
    [
        (PLAIN, {"bf16": False}),
        (ALIGNED, {"bf16": True}),
        (BALANCED, {"checkpointing": True, "micro_batch": 1}),
        pytest.param(BALANCED, {"optimizer_state": "bfloat16"}, marks=pytest.mark.slow),
        (BALANCED, {"optimizer_state": "int8"}),
        # These combine two of the cases above.
        pytest.param(ALIGNED, {"optimizer_state": "int8"}, marks=pytest.mark.slow),
        pytest.param(BALANCED, {"bf16": False}, marks=pytest.mark.slow),
        pytest.param(BALANCED, {"bf16": True}, marks=pytest.mark.slow),
    ],
    ids=[
        *("plain", "projections-bf16", "balanced-parts", "balanced-bfloat16", "balanced-int8"),
        *("projections-int8", "balanced-plain", "balanced-bf16"),
    ],
)
def test_continues_to_the_last_bit(workshop, tmp_path, strategy, plan):
    whole, first = workshop.trainer(strategy, **plan), workshop.trainer(strategy, **plan)
    records = list(whole.train_stable(384))
    list(first.train_stable(192))
    first.save(tmp_path / "checkpoint")
    second = workshop.trainer(strategy, **plan)
    second.load(tmp_path / "checkpoint")
    assert second.tokens == int(read_metadata(tmp_path / "checkpoint")["tokens"]) == 192
    _same(_weights(second), _weights(first))
    rest = list(second.train_stable(384))
    assert [(r.tokens, r.loss, r.gradient_norm) for r in rest] == [
        (r.tokens, r.loss, r.gradient_norm) for r in records[3:]
    ]
    _same(_weights(second), _weights(whole))


def _gradients(trainer, grid=None, learned=False):
    """Return the gradients of the first step, before clipping, and its record."""
    kept = {}

    def keep(*arguments):
        kept.update({name: p.grad.clone() for name, p in trainer._trained()})
        kept.update({f"scale {index}": scale.grad.clone() for index, scale in enumerate(trainer._learned)})
        return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "clip", keep)
        (record,) = trainer.train_decay(64, grid, learned=learned) if grid else trainer.train_stable(64)
    return kept, record


@pytest.mark.parametrize(
    ("strategy", "grid", "learned"),
    thinned(
        (strategy, grid, learned)
        for strategy in (ALIGNED, UNCERTAIN, BALANCED)
        for grid, learned in ((None, False), (_grid, False), (_grid, True))
    ),
)
def test_sequences_one_by_one_add_up_to_the_step(workshop, strategy, grid, learned):
    whole, parts = workshop.trainer(strategy), workshop.trainer(strategy, micro_batch=1)
    (expected, one), (found, other) = _gradients(whole, grid, learned), _gradients(parts, grid, learned)
    assert learned == any(name.startswith("scale") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=5e-7)
    for term in ("loss", "divergence", "cross_entropy", "alignment"):
        assert getattr(other, term) == pytest.approx(getattr(one, term), rel=1e-5)
    assert (one.micro_batch, other.micro_batch) == (2, 1)


def test_choosing_uncertain_positions_puts_the_head_on_its_grid_once(workshop, monkeypatch):
    from autodistill.distillation.losses import token_selection as positions
    from autodistill.distillation.training import straight_through

    monkeypatch.setattr(positions, "_CPU_CHUNK_ROWS", 8)
    distillation = replace(PLAIN.distillation, positions="uncertain", uncertain_share=0.5, train_embeddings=True)
    trainer = workshop.trainer(replace(PLAIN, distillation=distillation))
    rounded = []
    values = straight_through.fitted_values
    monkeypatch.setattr(
        straight_through, "fitted_values", lambda weight, *rest: rounded.append(weight.shape) or values(weight, *rest)
    )
    _gradients(trainer, _grid)
    table = trainer.model.get_output_embeddings().weight.shape
    assert rounded.count(table) == 1


@pytest.mark.parametrize(
    ("attention", "grid"),
    thinned(
        (attention, grid)
        for attention in (None, Attention(), Attention(kind="relations", relation_heads=4))
        for grid in (None, _grid)
    ),
)
def test_checkpointing_changes_no_gradient(workshop, grid, attention):
    strategy = replace(ALIGNED, distillation=replace(ALIGNED.distillation, attention=attention))
    expected, _ = _gradients(workshop.trainer(strategy), grid)
    trainer = workshop.trainer(strategy, checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    found, _ = _gradients(trainer, grid)
    _same(found, expected)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: you")]
)
def test_out_of_memory_halves_the_micro_batch_and_the_step_is_the_same(workshop, error):
    small, large = workshop.trainer(PLAIN, micro_batch=1), workshop.trainer(PLAIN, micro_batch=2)
    loss = large._loss.of
    large._loss.of = lambda indices, *rest: loss(indices, *rest) if len(indices) == 1 else _raise(error)
    expected = [(record.loss, record.gradient_norm, 1) for record in small.train_stable(192)]
    assert [(record.loss, record.gradient_norm, record.micro_batch) for record in large.train_stable(192)] == expected
    _same(_weights(large), _weights(small))


@pytest.mark.parametrize("recipe", [UNCERTAIN, BALANCED], ids=["uncertain", "balanced"])
def test_steps_are_the_same_however_many_sequences_are_read_at_once(workshop, recipe):
    """The records have unequal lengths, and one is all prompt."""
    answers = np.random.default_rng(5).random(workshop.data.tokens.shape) < 0.4
    documents = workshop.data.documents.copy()
    for place in range(len(documents)):
        answers[place, 32 - 3 * place :], documents[place, 32 - 3 * place :] = False, -1
    answers[3] = False
    bench = replace(workshop, data=replace(workshop.data, answers=answers, documents=documents))
    whole, parts = (bench.trainer(recipe, micro_batch=count, batch_tokens=128) for count in (4, 1))
    for one, other in zip(whole.train_stable(512), parts.train_stable(512), strict=True):
        for term in ("loss", "divergence", "cross_entropy", "alignment", "attention", "gradient_norm"):
            assert getattr(other, term) == pytest.approx(getattr(one, term), rel=2e-4), term


def test_a_balanced_loss_has_the_size_of_the_logit_loss_of_the_step_before(workshop):
    first, second = workshop.trainer(BALANCED).train_stable(128)
    logits = [0.5 * record.divergence + 0.5 * record.cross_entropy for record in (first, second)]
    parts = [(0.3, first.alignment, second.alignment), (1.0, first.attention, second.attention)]
    # The first step knows its own sizes from a pass without gradients.
    assert first.loss == pytest.approx(logits[0] * 2.3, rel=1e-5)
    assert second.loss == pytest.approx(logits[1] + sum(w * logits[0] / a * b for w, a, b in parts), rel=1e-5)


@pytest.mark.parametrize("sequences", [1, 2])
def test_out_of_memory_with_a_single_sequence_ends_the_trial(workshop, sequences):
    trainer = workshop.trainer(PLAIN, batch_tokens=32 * sequences, micro_batch=4)
    trainer._loss.of = lambda *arguments: _raise(MemoryError())
    with pytest.raises(MemoryError):
        next(trainer.train_stable(64))


@pytest.mark.parametrize(("at_once", "fewer"), [(8, 2), (3, 1), (2, 1)])
def test_out_of_memory_in_one_of_several_processes_says_with_how_many_all_begin_again(workshop, at_once, fewer):
    """Each of two processes has four of the eight sequences."""
    trainer = workshop.trainer(PLAIN, batch_tokens=256, micro_batch=at_once, sharding=_Second())
    trainer._loss.of = lambda *arguments: _raise(MemoryError())
    with pytest.raises(StepOutOfMemory) as caught:
        next(trainer.train_stable(256))
    assert caught.value.micro_batch == fewer
    alone = workshop.trainer(PLAIN, batch_tokens=64, micro_batch=at_once, sharding=_Second())
    alone._loss.of = trainer._loss.of
    with pytest.raises(MemoryError):
        next(alone.train_stable(64))


class _Second:
    """The second of two processes, as far as a failed pass needs it."""

    rank, count = 1, 2

    def shard(self, model):
        """Leave the weights whole."""

    def share(self, indices):
        return indices[1::2]


def _raise(error):
    raise error


@pytest.mark.parametrize("strategy", [ALIGNED, LORA], ids=["all weights", "low-rank changes"])
def test_bfloat16_states_take_half_and_descend_as_adamw_does(workshop, strategy):
    exact, half = workshop.trainer(strategy), workshop.trainer(strategy, optimizer_state="bfloat16")
    trained = {name: p.detach().clone() for name, p in exact._trained()}
    losses = [[step.loss for step in trainer.train_stable(512)] for trainer in (exact, half)]
    # Rounding changes a step by 1.1% (optimizers/test_adamw_bf16.py), and the first step not at all.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[1][0] == losses[0][0]
    ends = [dict(trainer._trained()) for trainer in (exact, half)]
    moved = sum(float((ends[0][name] - start).detach().square().sum()) for name, start in trained.items())
    apart = sum(float((ends[0][name] - ends[1][name]).detach().square().sum()) for name in trained)
    assert apart < 0.011**2 * moved
    sizes = []
    for trainer in (exact, half):
        states = [trainer.optimizer.state[p] for _, p in trainer._trained()]
        sizes.append(sum(value.nbytes for state in states for key, value in state.items() if key != "step"))
    assert sizes[0] == 2 * sizes[1] == 8 * sum(start.numel() for start in trained.values())


def test_eight_bit_states_take_a_quarter_and_descend_as_adamw_does(workshop):
    exact, rounded = workshop.trainer(PLAIN), workshop.trainer(PLAIN, optimizer_state="int8")
    start = _weights(exact)
    list(exact.train_stable(512))
    list(rounded.train_stable(512))
    found, expected = _weights(rounded), _weights(exact)
    moved = sum(float((expected[name] - start[name]).square().sum()) for name in start)
    apart = sum(float((expected[name] - found[name]).square().sum()) for name in start)
    assert apart < 0.05 * moved
    moments = {name: found[f"{name}.state1"] for name in start if f"{name}.state1" in found}
    eight_bit = {name for name, moment in moments.items() if moment.dtype == torch.uint8}
    assert {name for name in moments if start[name].numel() >= 4096} == eight_bit
    assert all(moments[name].nbytes * 4 == start[name].nbytes for name in eight_bit)


def test_a_decay_leaves_what_was_saved_before_it(workshop, tmp_path):
    whole, branched = workshop.trainer(PLAIN), workshop.trainer(PLAIN)
    list(whole.train_stable(256))
    list(branched.train_stable(128))
    branched.save(tmp_path / "checkpoint")
    list(branched.train_decay(192, _grid))
    continued = workshop.trainer(PLAIN)
    continued.load(tmp_path / "checkpoint")
    list(continued.train_stable(256))
    _same(_weights(continued), _weights(whole))


def test_a_checkpoint_before_the_first_step(workshop, tmp_path):
    workshop.trainer(PLAIN).save(tmp_path / "checkpoint")
    loaded, fresh = workshop.trainer(PLAIN), workshop.trainer(PLAIN)
    loaded.load(tmp_path / "checkpoint")
    list(loaded.train_stable(128))
    list(fresh.train_stable(128))
    _same(_weights(loaded), _weights(fresh))


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(workshop, tmp_path):
    trainer = workshop.trainer(ALIGNED)
    list(trainer.train_stable(64))
    trainer.save(tmp_path / "checkpoint")
    with safe_open(tmp_path / "checkpoint", framework="pt") as file:
        names = list(file.keys())
    trained = [name for name, p in trainer.model.named_parameters() if name != "model.embed_tokens.weight"]
    owners = [f"student.{name}" for name in trained] + [f"projection.{i}.{j}.weight" for i in (0, 1) for j in (0, 1)]
    expected = {f"{key}.{owner}" for key in ("weight", "exp_avg", "exp_avg_sq", "step") for owner in owners}
    assert set(names) == expected


@pytest.mark.parametrize("other", [{"strategy": ALIGNED}, {"seed": 1}])
def test_a_checkpoint_of_something_else_is_refused(workshop, tmp_path, other):
    workshop.trainer(PLAIN).save(tmp_path / "checkpoint")
    with pytest.raises(TrialFailedError, match="other stages or of another seed") as caught:
        workshop.trainer(**({"strategy": PLAIN} | other)).load(tmp_path / "checkpoint")
    assert caught.value.cause == "error"


STATES = ("float32", "bfloat16", "int8")


@pytest.mark.parametrize("written", STATES)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_checkpoint_with_other_optimizer_states_is_refused(workshop, tmp_path, written, steps):
    trainer = workshop.trainer(PLAIN, optimizer_state=written)
    list(trainer.train_stable(steps * STEP))
    trainer.save(tmp_path / "checkpoint")
    for other in STATES:
        going_on = workshop.trainer(PLAIN, optimizer_state=other)
        if other == written:
            going_on.load(tmp_path / "checkpoint")
            continue
        with pytest.raises(TrialFailedError, match=f"states in {written}, and does not go on with {other}") as caught:
            going_on.load(tmp_path / "checkpoint")
        assert caught.value.cause == "error"


def test_an_older_checkpoint_says_nothing_of_its_states(workshop, tmp_path):
    trainer = workshop.trainer(PLAIN)
    list(trainer.train_stable(STEP))
    write = trainer.checkpoint()
    del write.keywords["metadata"]["optimizer_state"]
    write(tmp_path / "checkpoint")
    again = workshop.trainer(PLAIN)
    again.load(tmp_path / "checkpoint")
    _same(_weights(again), _weights(trainer))


def test_finishing_does_not_make_it_another_checkpoint(workshop, tmp_path):
    from autodistill.strategy.strategy import Finishing

    workshop.trainer(PLAIN).save(tmp_path / "checkpoint")
    finished = Strategy(distillation=PLAIN.distillation, finishing=Finishing(format="gguf-q4_0", bits=4, group_size=32))
    workshop.trainer(finished).load(tmp_path / "checkpoint")


def save_and_die(workshop, path):
    """End this process in the middle of writing a checkpoint of other tokens."""

    def dies(tensors, torn, metadata):
        save_file(tensors, torn, metadata=metadata)
        data = Path(torn).read_bytes()
        Path(torn).write_bytes(data[: len(data) // 2])
        os._exit(9)

    save_file, checkpoint.save_file = checkpoint.save_file, dies
    trainer = workshop.trainer(PLAIN, cache=object())
    trainer.tokens = 640
    trainer.save(path)


def test_killed_while_saving_the_earlier_checkpoint_stands(workshop, tmp_path):
    path = tmp_path / "checkpoint"
    trainer = workshop.trainer(PLAIN)
    list(trainer.train_stable(64))
    trainer.save(path)
    content = path.read_bytes()
    killed = get_context("fork").Process(target=save_and_die, args=(workshop, path))
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    assert len(list(tmp_path.iterdir())) == 2, "the torn file stands beside it"
    assert path.read_bytes() == content
    again = workshop.trainer(PLAIN)
    again.load(path)
    _same(_weights(again), _weights(trainer))
    again.save(path)
    assert [found.name for found in tmp_path.iterdir()] == ["checkpoint"]


def test_gradients_are_clipped_together(workshop, tmp_path):
    trainer = workshop.trainer(ALIGNED)
    (record,) = trainer.train_stable(64)
    assert record.gradient_norm > 1
    # AdamW's first moment after one step is a tenth of the gradient that it got.
    squares = [(v.double() * 10).square().sum() for k, v in _weights(trainer).items() if k.endswith("exp_avg")]
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("part", [0.99, 1.01])
def test_only_gradients_above_the_limit_are_scaled(workshop, monkeypatch, part):
    (record,) = workshop.trainer(ALIGNED).train_stable(64)
    monkeypatch.setattr(adamw_module, "MOST_NORM", part * record.gradient_norm)
    trainer = workshop.trainer(ALIGNED)
    list(trainer.train_stable(64))
    squares = [(v.double() * 10).square().sum() for k, v in _weights(trainer).items() if k.endswith("exp_avg")]
    expected = min(part, 1) * record.gradient_norm
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(expected, rel=1e-5)


class Poisoned:
    """A cache that returns NaN in these steps, counted from 0."""

    def __init__(self, cache, steps):
        self._cache, self._steps, self._step = cache, steps, -1

    def top(self, indices, temperature, count):
        self._step += 1
        target = self._cache.top(indices, temperature, count)
        return replace(target, log_p=target.log_p * float("nan")) if self._step in self._steps else target


def test_one_spoilt_step_changes_nothing_and_two_good_ones_follow(workshop):
    trainer = workshop.trainer(PLAIN, cache=Poisoned(workshop.cache, {1, 2, 4}))
    steps = trainer.train_stable(384)
    next(steps)
    before = _weights(trainer)
    for tokens in (128, 192):
        record = next(steps)
        assert record.tokens == tokens
        assert not np.isfinite(record.loss)
        _same(_weights(trainer), before)
    assert [np.isfinite(record.loss) for record in steps] == [True, False, True]
    assert all(value.isfinite().all() for value in _weights(trainer).values())


def test_three_spoilt_steps_in_a_row_end_the_trial(workshop):
    trainer = workshop.trainer(PLAIN, cache=Poisoned(workshop.cache, {1, 2, 3}))
    seen = []
    with pytest.raises(TrialFailedError, match="not finite in 3 steps in a row") as caught:
        seen.extend(record.tokens for record in trainer.train_stable(512))
    assert caught.value.cause == "nan"
    assert trainer.tokens == 256


@pytest.mark.parametrize("strategy", [PLAIN, ALIGNED], ids=["plain", "aligned"])
def test_a_step_of_sequences_without_an_answer_changes_nothing(workshop, strategy):
    """All answers of these questions are cut off, for example.

    No token counts, and a mean over none is not a number.
    """
    answers = np.zeros(workshop.data.tokens.shape, dtype=bool)
    order = np.random.default_rng((0, 0)).permutation(len(answers))
    answers[order[2:4], 5:9] = True  # in the second step's sequences
    trainer = replace(workshop, data=replace(workshop.data, answers=answers)).trainer(strategy)
    before = _weights(trainer)
    steps = trainer.train_stable(256)
    first = next(steps)
    assert (first.loss, first.divergence, first.alignment, first.gradient_norm) == (0, 0, 0, 0)
    _same(_weights(trainer), before)
    assert next(steps).loss > 0
    learnt = _weights(trainer)
    assert any(not torch.equal(learnt[name], value) for name, value in before.items())
    assert [record.loss for record in steps] == [0, 0]
    _same(_weights(trainer), learnt)


def test_a_pass_of_nothing_has_no_loss_and_no_gradient(workshop):
    """Other processes have passes that count at the same time, and their gradients are averaged with this one's."""
    trainer = workshop.trainer(PLAIN)
    loss = trainer._loss.zero_loss([0, 1])
    loss.backward()
    assert loss.item() == 0
    gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


def test_a_step_in_which_nothing_counts_does_not_stand_between_two_spoilt_ones(workshop):
    answers = np.ones(workshop.data.tokens.shape, dtype=bool)
    order = np.random.default_rng((0, 0)).permutation(len(answers))
    answers[order[4:6]] = False  # in the third step
    data = replace(workshop.data, answers=answers)
    trainer = replace(workshop, data=data).trainer(PLAIN, cache=Poisoned(workshop.cache, {0, 1, 2}))
    with pytest.raises(TrialFailedError, match="not finite in 3 steps in a row"):
        list(trainer.train_stable(512))
    assert trainer.tokens == 256


@pytest.mark.parametrize(("spoilt", "ends"), [({1, 2, 3}, True), ({1, 3, 4}, False)], ids=["in a row", "two of them"])
@pytest.mark.parametrize("until", [128, 192])
def test_three_in_a_row_are_counted_over_a_checkpoint(workshop, tmp_path, spoilt, ends, until):
    first = workshop.trainer(PLAIN, cache=Poisoned(workshop.cache, spoilt))
    list(first.train_stable(until))
    first.save(tmp_path / "checkpoint")
    rest = {step - until // STEP for step in spoilt}
    second = workshop.trainer(PLAIN, cache=Poisoned(workshop.cache, rest))
    second.load(tmp_path / "checkpoint")
    with pytest.raises(TrialFailedError, match="in 3 steps in a row") if ends else nullcontext():
        list(second.train_stable(384))
    assert second.tokens == (256 if ends else 384)


def test_what_was_spoilt_in_a_decay_is_no_part_of_the_stable_training(workshop, tmp_path):
    trainer = workshop.trainer(PLAIN, cache=Poisoned(workshop.cache, {2, 3, 4}))
    list(trainer.train_stable(128))
    trainer.save(tmp_path / "checkpoint")
    list(trainer.train_decay(256))
    trainer.load(tmp_path / "checkpoint")
    assert [np.isfinite(record.loss) for record in trainer.train_stable(256)] == [False, True]


@pytest.mark.parametrize("bf16", [False, True])
def test_decay_on_a_grid_trains_float32_masters(workshop, bf16):
    trainer = workshop.trainer(PLAIN, bf16=bf16)
    list(trainer.train_stable(128))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    shown = {}

    def look(name):
        def hook(module, arguments):
            shown[name] = module.weight.detach().clone()

        return hook

    records = trainer.train_decay(256, _grid)
    next(records)
    handles = [
        module.register_forward_pre_hook(look(f"{name}.weight"))
        for name, module in trainer.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    masters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    next(records)
    for handle in handles:
        handle.remove()
    assert len(shown) == 4 * 7
    for name, weight in shown.items():
        expected = torch.from_numpy(deployed(masters[name].numpy(), Q4_0))
        # In bfloat16 training, a product gets them as autocast would cast them.
        assert torch.equal(weight, expected.bfloat16() if bf16 else expected)
        assert weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
    records.close()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        if name != "model.embed_tokens.weight":
            assert not torch.equal(parameter, before[name])
            if _grid(name):
                assert not np.array_equal(parameter.detach().numpy(), deployed(parameter.detach().numpy(), Q4_0))
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


@pytest.mark.parametrize("quantized", [False, True])
def test_a_frozen_head_computes_what_autocast_would(workshop, quantized, monkeypatch):
    """In bfloat16, a frozen head is cast once. Losses and gradients equal those of casting it in every step."""

    def run():
        trainer = workshop.trainer(PLAIN, bf16=True)
        records = list(trainer.train_stable(64)) + list(trainer.train_decay(256, _grid if quantized else None))
        return _weights(trainer), [record.loss for record in records]

    fast = run()
    monkeypatch.setattr(StepLoss, "hold_head", lambda self, storage_of: None)
    slow = run()
    _same(fast[0], slow[0])
    assert fast[1] == slow[1]


@pytest.mark.parametrize("parts", [1, 2], ids=["one pass", "two passes"])
def test_kept_logits_of_uncertain_positions_train_as_logits_made_again(workshop, monkeypatch, parts):
    """It uses bfloat16 and a frozen tied head, with and without a grid.

    The two ways differ only by how products are rounded.
    """
    from autodistill.distillation.losses import token_selection as positions

    recipe = replace(PLAIN.distillation, positions="uncertain", uncertain_share=0.4)
    strategy = Strategy(distillation=recipe)
    known, kept = positions._KnownLogits.apply, []
    monkeypatch.setattr(positions._KnownLogits, "apply", lambda *given: kept.append(given[1]) or known(*given))

    def first(grid):
        return _gradients(workshop.trainer(strategy, bf16=True, micro_batch=2 // parts), grid)

    for grid in (None, _grid):
        kept.clear()
        (found, record), heads = first(grid), list(kept)
        assert len(heads) == parts
        table = workshop.trainer(strategy).model.get_output_embeddings().weight.detach()
        shown = table if grid is None else torch.from_numpy(deployed(table.numpy(), Q8_0))
        assert all(torch.equal(head, shown.bfloat16()) for head in heads)
        kept.clear()
        with monkeypatch.context() as patch:
            patch.setattr(positions, "_KEPT_BYTES", 0)
            expected, again = first(grid)
        assert not kept
        for term in ("loss", "divergence", "cross_entropy"):
            assert getattr(record, term) == pytest.approx(getattr(again, term), rel=1e-3)
        assert found.keys() == expected.keys()
        apart = sum(float((found[name] - gradient).square().sum()) for name, gradient in expected.items())
        size = sum(float(gradient.square().sum()) for gradient in expected.values())
        assert size > 0
        assert apart <= 1e-4 * size


def test_the_table_is_frozen_unless_it_is_trained(workshop):
    frozen = workshop.trainer(PLAIN)
    table = frozen.model.model.embed_tokens.weight.detach().clone()
    list(frozen.train_stable(64))
    list(frozen.train_decay(192, _grid))
    assert torch.equal(frozen.model.model.embed_tokens.weight, table)
    assert frozen.model.lm_head.weight is frozen.model.model.embed_tokens.weight
    recipe = Distillation(divergence_weight=0.5, learning_rate=1e-3, train_embeddings=True)
    trained = workshop.trainer(Strategy(distillation=recipe), bf16=True)
    list(trained.train_stable(64))
    assert not torch.equal(trained.model.model.embed_tokens.weight, table)


class Recorder:
    """Records the sequences that each step asks for."""

    def __init__(self, cache):
        self._cache, self.steps = cache, []

    def top(self, indices, temperature, count):
        self.steps.append(list(indices))
        return self._cache.top(indices, temperature, count)


def _order(workshop, seed, steps=8):
    recorder = Recorder(workshop.cache)
    list(workshop.trainer(PLAIN, seed=seed, cache=recorder).train_stable(steps * STEP))
    return recorder.steps


def test_each_pass_over_the_data_has_its_own_order_by_the_seed(workshop):
    steps = _order(workshop, 0)
    flat = [index for step in steps for index in step]
    first, second = flat[:8], flat[8:]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert _order(workshop, 0) == steps
    assert _order(workshop, 1, 4) != steps[:4]


def test_a_step_may_cross_into_the_next_pass(workshop):
    recorder = Recorder(workshop.cache)
    trainer = workshop.trainer(PLAIN, cache=recorder, batch_tokens=96, tokens=960)
    list(trainer.train_stable(6 * 96))
    flat = [index for step in recorder.steps for index in step]
    assert sorted(flat[:8]) == sorted(flat[8:16]) == list(range(8))


def test_a_strategy_without_divergence_reads_no_targets(workshop):
    strategy = Strategy(distillation=Distillation(divergence_weight=0.0))
    (record,) = workshop.trainer(strategy, cache=object()).train_stable(64)
    assert record.divergence == 0
    assert record.loss == record.cross_entropy


def test_hooks_are_gone_after_a_step(workshop):
    trainer = workshop.trainer(ALIGNED)
    list(trainer.train_stable(64))
    assert not any(module._forward_hooks for module in trainer.model.modules())
    copy.deepcopy(trainer.model)


def test_the_models_state_is_that_of_training_in_any_order_of_trainers(workshop):
    """No global random state is used: a trainer next to another one trains as if it were alone."""
    alone = workshop.trainer(ALIGNED)
    list(alone.train_stable(128))
    torch.manual_seed(123)
    first, second = workshop.trainer(ALIGNED), workshop.trainer(PLAIN)
    for _ in zip(first.train_stable(128), second.train_stable(128), strict=True):
        torch.rand(3)
    _same(_weights(first), _weights(alone))


def test_of_several_processes_the_first_alone_has_a_checkpoint_to_write(workshop, tmp_path, monkeypatch):
    trainer, kept = workshop.trainer(PLAIN), []
    gathered = trainer_module.gathered

    def noted(*given, keep):
        kept.append(keep)
        return gathered(*given, keep=keep)

    monkeypatch.setattr(trainer_module, "gathered", noted)
    for rank, processes in ((0, 2), (1, 2), (2, 3)):
        trainer._sharding = SimpleNamespace(rank=rank, count=processes)
        write = trainer.checkpoint({"note": "of mine"})
        assert (write is not None) == (rank == 0)
        if write is not None:
            write(tmp_path / "checkpoint")
    assert kept == [True, False, False]
    metadata = read_metadata(tmp_path / "checkpoint")
    assert (metadata["processes"], metadata["note"], metadata["tokens"]) == ("2", "of mine", "0")


@pytest.mark.parametrize("fails", [False, True])
def test_all_processes_wait_until_a_checkpoint_is_written_or_is_not(workshop, tmp_path, fails):
    trainer, waits = workshop.trainer(PLAIN), []
    for rank in (0, 1):
        trainer._sharding = SimpleNamespace(rank=rank, count=2, wait=lambda rank=rank: waits.append(rank))
        path = tmp_path / ("missing/checkpoint" if fails else "checkpoint")
        with pytest.raises(SafetensorError) if fails and rank == 0 else nullcontext():
            trainer.save(path)
        assert waits == [0, 1][: rank + 1]
        assert path.exists() != fails


def test_what_every_process_holds_whole_is_what_is_added_to_the_model(workshop):
    assert workshop.trainer(PLAIN)._held_whole() == []
    for strategy in (ALIGNED, LORA):
        trainer = workshop.trainer(strategy)
        model = {id(parameter) for parameter in trainer.model.parameters()}
        added = [p for group in trainer.optimizer.param_groups for p in group["params"] if id(p) not in model]
        assert added
        assert {id(parameter) for parameter in trainer._held_whole()} == {id(parameter) for parameter in added}


def test_a_student_writes_in_the_last_share_of_a_decays_steps(workshop):
    recipe = replace(PLAIN.distillation, signal="online", signal_tokens=0, on_policy=OnPolicy(share=0.5, length=12))
    trainer = workshop.trainer(replace(PLAIN, distillation=recipe))
    assert [record.on_policy > 0 for record in trainer.train_stable(64)] == [False]
    assert [record.on_policy > 0 for record in trainer.train_decay(320)] == [False, False, True, True]


def test_rates_of_larger_batches_are_the_strategys_times_a_factor(workshop, monkeypatch):
    made = partial(trainer_module.Trainer, rate_factor=1.5)
    monkeypatch.setattr(sys.modules[type(workshop).__module__], "Trainer", made)
    records = list(workshop.trainer(PLAIN, warmup_tokens=128).train_stable(192))
    assert [record.learning_rate for record in records] == pytest.approx([0.75e-3, 1.5e-3, 1.5e-3])


def test_speed_is_a_steps_tokens_over_the_seconds_that_it_took(workshop, monkeypatch):
    """A clock that each reading sets a quarter of a second forward; the step reads it at its beginning and end."""
    trainer, readings = workshop.trainer(PLAIN), []

    def clock():
        readings.append(100 + len(readings) / 4)
        return readings[-1]

    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=clock))
    (record,) = trainer.train_stable(64)
    assert record.tokens_per_second == 64 / (readings[-1] - readings[0])
    assert readings[-1] - readings[0] == 0.25
    assert trainer.writing_seconds() == 0
    assert len(readings) == 2


def test_writing_is_measured_before_the_phase_and_leaves_the_training_as_it_was(workshop, monkeypatch):
    recipe = replace(PLAIN.distillation, signal="online", signal_tokens=0, on_policy=OnPolicy(share=0.5, length=12))
    trainer, moments, written = workshop.trainer(replace(PLAIN, distillation=recipe)), iter([7.0, 9.5]), []
    write = trainer_module.write_on

    def noted(model, data, indices, *rest, **more):
        written.extend(indices)
        return write(model, data, indices, *rest, **more)

    monkeypatch.setattr(trainer_module, "write_on", noted)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
        assert trainer.writing_seconds() == 2.5
    # A step's sequences were written: 64 tokens in sequences of 32.
    assert written == trainer._sequences(64)
    assert [record.on_policy for record in trainer.train_stable(128)] == [0, 0]
    assert len(written) == 2


def test_a_decay_may_end_sooner_while_more_than_one_step_is_left(workshop):
    asked = []
    records = list(workshop.trainer(PLAIN).train_decay(256, sooner=lambda one, end: asked.append(one.tokens) or end))
    assert asked == [64, 128]
    assert [record.learning_rate for record in records] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    # The step that is left begins at three quarters of the rate.
    records = list(workshop.trainer(PLAIN).train_decay(256, sooner=lambda one, end: 0))
    assert [(record.tokens, record.learning_rate) for record in records] == [(64, 1e-3), (128, pytest.approx(0.75e-3))]


@pytest.mark.parametrize(
    ("after", "end", "begins"),
    [(0.0, 256, 0), (0.12, 256, 0), (0.5, 256, 128), (0.7, 256, 192), (0.99, 256, 192), (0.99, 128, 64)],
)
def test_weights_go_on_the_grid_after_a_share_of_the_steps_and_for_one_at_least(
    workshop, monkeypatch, after, end, begins
):
    trainer, begun = workshop.trainer(PLAIN), []
    put = trainer_module.quantized_training

    def noted(*given, **more):
        begun.append(trainer.tokens)
        return put(*given, **more)

    monkeypatch.setattr(trainer_module, "quantized_training", noted)
    list(trainer.train_decay(256, _grid, on_grid_after=after, sooner=lambda one, planned: end))
    assert begun == [begins]
    assert trainer.tokens == end


def test_learned_scales_have_rates_by_their_levels_and_leave_the_optimizer_after_the_decay(workshop):
    """Q4_0 has 7 levels on its longer side, and Q8_0 of the table 127."""
    trainer = workshop.trainer(replace(PLAIN, distillation=replace(PLAIN.distillation, train_embeddings=True)))
    count = len(trainer.optimizer.param_groups)
    steps = trainer.train_decay(128, _grid, learned=True)
    record = next(steps)
    added = trainer.optimizer.param_groups[count:]
    assert sorted(group["factor"] for group in added) == [1 / 127, 1 / 7]
    assert [group["lr"] for group in added] == [record.learning_rate * group["factor"] for group in added]
    scales = {id(scale) for group in added for scale in group["params"]}
    assert {id(scale) for scale in trainer._held_whole()} == scales
    assert scales <= {id(parameter) for parameter in trainer.optimizer.state}
    list(steps)
    assert len(trainer.optimizer.param_groups) == count
    assert not scales & {id(parameter) for parameter in trainer.optimizer.state}
    assert trainer._held_whole() == []


def test_a_step_moves_trained_weights_and_projections(workshop):
    plain, aligned = workshop.trainer(PLAIN), workshop.trainer(ALIGNED)
    trained = [one for one in plain.model.parameters() if one.requires_grad]
    assert plain.moved == sum(one.numel() for one in trained)
    # Two projections of rank 8 between widths of 64.
    assert aligned.moved - plain.moved == 2 * 8 * (64 + 64)


def test_the_loss_of_a_single_learned_token_is_that_token_s(workshop):
    answers = np.zeros(workshop.data.tokens.shape, dtype=bool)
    sequence = np.random.default_rng((0, 0)).permutation(len(answers))[1]
    answers[sequence, 9] = True
    data = replace(workshop.data, answers=answers)
    strategy = replace(PLAIN, distillation=replace(PLAIN.distillation, divergence_weight=0.0))
    trainer = replace(workshop, data=data).trainer(strategy)
    ids = torch.from_numpy(data.tokens[[sequence]].astype(np.int64))
    with torch.no_grad():
        expected = -trainer.model(ids).logits[0, 8].double().log_softmax(-1)[ids[0, 9]]
    (record,) = trainer.train_stable(64)
    assert record.loss == pytest.approx(float(expected), rel=1e-5)
    assert record.cross_entropy == record.loss


def test_a_target_that_moves_is_at_least_on_a_line_to_the_teacher(workshop):
    """The first step has the start value, and the second one that of the line after an eighth of the plan."""
    recipe = replace(PLAIN.distillation, divergence="taid", mixture=0.4, signal="states", signal_tokens=0)
    records = list(workshop.trainer(replace(PLAIN, distillation=recipe)).train_stable(512))
    shares = [record.teacher_share for record in records]
    assert shares[:2] == [0.4, pytest.approx(0.4 + 0.6 / 8)]
    assert all(share >= 0.4 + 0.6 * step / 8 for step, share in enumerate(shares))
    assert shares == sorted(shares)
    assert max(shares) < 1
    # The third one is the second one moved by what the loss fell, as the paper's algorithm says.
    fall = (records[0].divergence - records[1].divergence) / records[0].divergence
    moved = Interpolation(share=shares[1], loss=1.0).after(1.0 - fall, 0.4, 0.0).share
    assert shares[2] == pytest.approx(max(moved, 0.4 + 0.6 * 2 / 8))
