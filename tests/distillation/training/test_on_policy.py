"""What a student writes: drawn from its own distribution, judged by the teacher, and equal for a seed or a resume."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from autodistill.data.dataset import TokenSet
from autodistill.distillation.student.check import check_rendering
from autodistill.distillation.training.on_policy import SEVERAL_PROCESSES, write_on
from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.strategy.recipe import Alignment, Distillation, Lora, OnPolicy
from autodistill.strategy.strategy import Finishing, Init, Strategy

PHASE = OnPolicy(share=0.5, length=12)
RECIPE = Distillation(signal="online", signal_tokens=0, learning_rate=1e-3, on_policy=PHASE)
STRATEGY = Strategy(init=Init(depth=0.5), distillation=RECIPE)
STEP = 64


def _text(tokens, **changes):  # type: ignore[no-untyped-def]
    return TokenSet(tokens=tokens, documents=np.zeros_like(tokens), **changes)


@pytest.fixture(scope="module")
def student(workshop):  # type: ignore[no-untyped-def]
    return load_model(workshop.teacher, torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_students_own_distribution(student, temperature) -> None:  # type: ignore[no-untyped-def]
    """The probability below a drawn token, plus a random part of its own, is uniform (chi-square, 20 cells).

    The probabilities come from the same model's whole passes without a cache, by a float64 softmax. At another
    temperature, the result is not uniform.
    """
    dice = np.random.default_rng(0)
    tokens = dice.integers(3, 300, (600, 9)).astype(np.int32)
    written = write_on(
        student, _text(tokens), range(600), OnPolicy(length=4, temperature=temperature), seed=0, batch=300
    )
    with torch.no_grad():
        logits = student(torch.from_numpy(written.data.tokens.astype(np.int64))).logits[:, 4:-1].double()
    drawn = torch.from_numpy(written.data.tokens[:, 5:].astype(np.int64))[..., None]
    pvalues = {}
    for assumed in (1.0, 0.5):
        p = torch.softmax(logits / assumed, dim=-1)
        own = p.gather(-1, drawn)
        below = torch.where(p < own, p, 0.0).sum(-1, keepdim=True)
        shares = (below + own * torch.from_numpy(dice.random(own.shape))).numpy().ravel()
        pvalues[assumed] = chisquare(np.histogram(shares, bins=20, range=(0, 1))[0]).pvalue
    assert pvalues[temperature] > 1e-3
    assert min(pvalues.values()) < 1e-9


def test_a_text_keeps_its_beginning_and_losses_of_the_text_leave_the_end_out(workshop, student) -> None:  # type: ignore[no-untyped-def]
    student.train()
    written = write_on(student, workshop.data, [3, 0, 7], PHASE, seed=1, batch=2)
    size = workshop.data.tokens.shape[1]
    assert student.training
    assert (written.data.tokens[:, : size - 12] == workshop.data.tokens[[3, 0, 7], : size - 12]).all()
    assert (written.own == (np.arange(size) >= size - 12)).all()
    assert (written.data.answers == ~written.own).all()
    assert (written.data.documents[written.own] == -1).all()
    again = write_on(student, workshop.data, [7], PHASE, seed=1, batch=1)
    assert (again.data.tokens[0] == written.data.tokens[2]).all()
    other = write_on(student, workshop.data, [7], PHASE, seed=2, batch=1)
    assert (other.data.tokens[0] != written.data.tokens[2]).any()


def test_the_last_answer_is_written_anew_up_to_the_token_that_ends_answers(student) -> None:  # type: ignore[no-untyped-def]
    """There are two records, each a prompt and an answer that token 2 ends, and padding.

    A model that says 2 only says 2.
    """

    class Ends(torch.nn.Module):
        def __init__(self, head: torch.nn.Module, token: int) -> None:
            super().__init__()
            self.weight, self._token = head.weight, token

        def forward(self, states):  # type: ignore[no-untyped-def]
            logits = torch.full((*states.shape[:-1], len(self.weight)), -50.0)
            logits[..., self._token] = 50.0
            return logits

    row = [10, 11, 20, 21, 2, 12, 13, 22, 23, 24, 2, 2]
    tokens = np.array([row, row], np.int32)
    answers = np.array([[0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]] * 2, dtype=bool)
    documents = np.array([[0] * 5 + [1] * 6 + [-1]] * 2, np.int32)
    data = TokenSet(tokens=tokens, documents=documents, answers=answers)
    head, found = student.lm_head, {}
    for token in (2, 30):
        student.lm_head = Ends(head, token)
        try:
            found[token] = write_on(student, data, [1], OnPolicy(length=3), seed=0, batch=1)
        finally:
            student.lm_head = head
    ended, unfinished = found[2], found[30]
    assert ended.data.tokens[0].tolist() == [*row[:7], *[2] * 5]
    assert np.flatnonzero(ended.own[0]).tolist() == [7]
    assert unfinished.data.tokens[0].tolist() == [*row[:7], *[30] * 5]
    assert np.flatnonzero(unfinished.own[0]).tolist() == [7, 8, 9]
    for written in (ended, unfinished):
        assert np.flatnonzero(written.data.answers[0]).tolist() == [2, 3, 4]
        assert written.data.documents[0].tolist() == [0] * 5 + [1] * 2 + [-1] * 5


@pytest.mark.parametrize(("divergence", "passes"), [("reverse_kl", 1), ("same", 1), ("reverse_kl", 2)])
def test_loss_and_gradient_are_those_of_an_independent_computation(  # type: ignore[no-untyped-def]
    workshop, monkeypatch, divergence, passes
) -> None:
    """The reference is autograd over whole distributions, by the formulas.

    Each token counts in one of the two losses, in whichever pass of a step it is read.
    """
    phase = replace(PHASE, divergence=divergence, share=1.0)
    recipe = replace(RECIPE, divergence_weight=0.3, on_policy=phase)
    sizes = {} if passes == 1 else {"micro_batch": 1}
    trainer = workshop.trainer(replace(STRATEGY, distillation=recipe), tokens=2 * STEP, decay=1.0, **sizes)
    caught = {}
    write = trainer._student_written
    monkeypatch.setattr(trainer, "_student_written", lambda indices: caught.setdefault("written", write(indices)))
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}

    def note() -> None:
        named = trainer.model.named_parameters()
        caught["gradients"] = {name: one.grad.clone() for name, one in named if one.requires_grad}

    monkeypatch.setattr(trainer.optimizer, "step", note)
    record = next(trainer.train_decay(2 * STEP))
    written = caught["written"]
    model, teacher = trainer.model, load_model(workshop.teacher, torch.float32)
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    ids, own = torch.from_numpy(written.data.tokens.astype(np.int64)), torch.from_numpy(written.own[:, 1:])
    with torch.no_grad():
        log_p = torch.log_softmax(teacher(ids).logits[:, :-1], dim=-1)
    log_q = torch.log_softmax(model(ids).logits[:, :-1], dim=-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    surprise = -log_q.gather(-1, ids[:, 1:, None])[..., 0]
    judged = (reverse if divergence == "reverse_kl" else forward)[own]
    loss = (0.3 * forward + 0.7 * surprise)[~own].sum() + judged.sum()
    loss /= own.numel()
    trained = [one for one in model.parameters() if one.requires_grad]
    wanted = dict(zip(caught["gradients"], torch.autograd.grad(loss, trained), strict=True))
    norm = torch.stack([one.square().sum() for one in wanted.values()]).sum().sqrt()
    assert record.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    assert record.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert record.on_policy == pytest.approx(float(judged.detach().mean()), rel=1e-4)
    assert record.divergence == pytest.approx(float(forward[~own].detach().mean()), rel=1e-4)
    assert record.cross_entropy == pytest.approx(float(surprise[~own].detach().mean()), rel=1e-5)
    clip = min(1.0, 1.0 / float(norm))
    for name, gradient in caught["gradients"].items():
        torch.testing.assert_close(gradient, clip * wanted[name], rtol=1e-3, atol=1e-6)


def test_the_phase_is_the_last_share_of_the_decay_and_of_nothing_else(workshop) -> None:  # type: ignore[no-untyped-def]
    trainer = workshop.trainer(STRATEGY, tokens=10 * STEP)
    records = [*trainer.train_stable(6 * STEP), *trainer.train_decay(10 * STEP)]
    assert [record.on_policy > 0 for record in records] == [False] * 8 + [True] * 2
    plain = workshop.trainer(replace(STRATEGY, distillation=replace(RECIPE, on_policy=None)), tokens=10 * STEP)
    before = [*plain.train_stable(6 * STEP), *plain.train_decay(10 * STEP)]
    assert [one.loss for one in records[:8]] == [one.loss for one in before[:8]]
    assert records[8].loss != before[8].loss
    # If a decay ends sooner, at least one step is left.
    shortened = workshop.trainer(STRATEGY, tokens=10 * STEP)
    list(shortened.train_stable(6 * STEP))
    records = list(shortened.train_decay(10 * STEP, sooner=lambda record, end: 8 * STEP))
    assert [record.on_policy > 0 for record in records] == [False, True]


def test_a_resumed_training_writes_and_learns_the_same(workshop, tmp_path) -> None:  # type: ignore[no-untyped-def]
    plain = Strategy(init=STRATEGY.init, distillation=replace(RECIPE, on_policy=None))
    assert plain.stable_id == STRATEGY.stable_id
    assert plain.id != STRATEGY.id
    through = workshop.trainer(STRATEGY, tokens=8 * STEP)
    list(through.train_stable(4 * STEP))
    through.save(tmp_path / "checkpoint")
    records = list(through.train_decay(8 * STEP))
    resumed = workshop.trainer(STRATEGY, tokens=8 * STEP)
    resumed.load(tmp_path / "checkpoint")
    again = list(resumed.train_decay(8 * STEP))
    assert [one.loss for one in again] == [one.loss for one in records]
    # After a decay, the stable part resumes from its checkpoint without the phase.
    resumed.load(tmp_path / "checkpoint")
    assert next(resumed.train_stable(8 * STEP)).on_policy == 0
    another = workshop.trainer(STRATEGY, seed=1, tokens=8 * STEP)
    list(another.train_stable(4 * STEP))
    assert [one.on_policy for one in another.train_decay(8 * STEP)] != [one.on_policy for one in records]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_how_many_sequences_are_written_at_once_changes_nothing(workshop, micro_batch) -> None:  # type: ignore[no-untyped-def]
    losses = []
    for size in (4, micro_batch):
        trainer = workshop.trainer(STRATEGY, tokens=2 * 128, batch_tokens=128, micro_batch=size, decay=1.0)
        losses.append([one.loss for one in trainer.train_decay(256)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["grid", "learned", "lora", "lora on a grid", "scales alone", "aligned", "uncertain"])
def test_it_works_beside_what_else_a_strategy_may_have(workshop, kind) -> None:  # type: ignore[no-untyped-def]
    recipe, finishing = RECIPE, None
    if "lora" in kind:
        recipe = replace(recipe, lora=Lora(rank=4, alpha=8.0))
    if kind in ("grid", "learned", "lora on a grid", "scales alone"):
        scales = {"learned": "learned", "scales alone": "alone"}.get(kind, "absmax")
        finishing = Finishing(format="gguf-q4_0", bits=4, group_size=32, scales=scales)
    if kind == "aligned":
        recipe = replace(recipe, alignment=Alignment(layers="even", count=2))
    if kind == "uncertain":
        recipe = replace(recipe, positions="uncertain", uncertain_share=0.25)
    strategy = Strategy(init=Init(depth=1.0), distillation=recipe, finishing=finishing)
    trainer = workshop.trainer(strategy, tokens=4 * STEP)
    list(trainer.train_stable(2 * STEP))
    records = list(trainer.finish(4 * STEP, spec_from_config(trainer.model.config.to_dict())))
    assert [record.on_policy > 0 for record in records] == [False, True]
    assert all(np.isfinite(record.loss) for record in records)


def test_processes_side_by_side_are_told_what_was_written(workshop) -> None:  # type: ignore[no-untyped-def]
    finishing = Finishing(format="gguf-q4_0", bits=4, group_size=32, scales="alone")
    strategy = Strategy(init=Init(depth=1.0), distillation=RECIPE, finishing=finishing)
    losses = []
    for processes in (1, 2):
        trainer = workshop.trainer(
            strategy, tokens=512, batch_tokens=128, micro_batch=2, decay=1.0, side_by_side=processes
        )
        try:
            losses.append([one.loss for one in trainer.train_decay(256)])
        finally:
            trainer.close()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "signal", [{"signal": "top-k"}, {"signal": "states", "signal_tokens": 0}, {"signal": "written", "signal_tokens": 0}]
)
def test_where_the_teacher_is_not_live_it_is_refused(signal) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        InputError, match=f"needs the teacher next to the student.*signal {signal['signal']} is of the text"
    ):
        Distillation(**signal, on_policy=PHASE)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"share": 0.0}, "share is of the decay's steps"),
        ({"share": 1.5}, "share is of the decay's steps"),
        ({"length": 0}, "at least 1 token"),
        ({"temperature": 0.0}, "temperature must lie"),
        ({"divergence": "forward_kl"}, "it can be reverse_kl, same"),
    ],
)
def test_values_out_of_bounds_are_refused(fields, said) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=said):
        OnPolicy(**fields)


def test_several_processes_are_refused(workshop) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=r"in one process.*--gpus-per-trial 1"):
        workshop.trainer(STRATEGY, sharding=object())
    assert "leave on_policy out" in SEVERAL_PROCESSES


def test_a_student_of_another_chat_template_is_refused() -> None:
    init = Init(source="pretrained", model="other", depth=1.0)
    strategy = Strategy(init=init, distillation=RECIPE)
    check_rendering(strategy, [])
    with pytest.raises(
        InputError, match=r"other reads prompts in its own chat template: leave distillation.on_policy out"
    ):
        check_rendering(strategy, ["other"])
