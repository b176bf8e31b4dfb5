"""Training on each signal and position: the first step's loss and gradient against float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM

from autodistill.distillation.student.build import build_student
from autodistill.distillation.teacher.target_sources import LiveTeacher, check_logprobs
from autodistill.errors import InputError, TrialFailedError
from autodistill.models.loading import decoder_layers, load_model
from autodistill.strategy.recipe import Distillation, Temperature
from autodistill.strategy.strategy import Init, Strategy
from autodistill.testing import save_tiny_teacher

INIT = Init(depth=0.5)
ALL = 256  # every token of the tiny data in one step


def _strategy(**recipe):
    return Strategy(
        init=INIT, distillation=Distillation(**({"divergence_weight": 1.0, "learning_rate": 1e-3} | recipe))
    )


def _first_step(workshop, strategy, **changes):
    trainer = workshop.trainer(strategy, **({"batch_tokens": ALL, "tokens": 4 * ALL} | changes))
    return trainer, next(trainer.train_stable(ALL))


@pytest.fixture(scope="module")
def logits(workshop):
    """Return float64 logits [tokens, vocab] of the teacher and of the untrained student, and the true tokens."""
    ids = torch.from_numpy(workshop.data.tokens.astype(np.int64))
    student, _ = build_student(workshop.teacher, INIT)
    models = AutoModelForCausalLM.from_pretrained(workshop.teacher, dtype=torch.float64), student.double()
    with torch.no_grad():
        teacher, student = (model(ids).logits[:, :-1].flatten(0, 1) for model in models)
    return teacher, student, ids[:, 1:].flatten()


def _kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(dim=1)


@pytest.mark.parametrize(("signal", "tolerance"), [("online", 2e-5), ("states", 1e-3)])
@pytest.mark.parametrize("standardise", [False, True])
def test_whole_rows(workshop, logits, signal, tolerance, standardise):
    """Reverse KL at temperature 3. Cached states have 11 bits, and a live teacher has float32's precision."""
    temperature = Temperature(start=3.0, end=3.0)
    recipe = {"signal": signal, "signal_tokens": 0, "divergence": "reverse_kl", "standardise": standardise}
    _, record = _first_step(workshop, _strategy(temperature=temperature, **recipe))

    def log_probabilities(rows):
        rows = rows / rows.std(dim=1, keepdim=True) if standardise else rows
        return functional.log_softmax(rows / 3, dim=1)

    log_p, log_q = (log_probabilities(rows) for rows in logits[:2])
    assert record.divergence == pytest.approx(9 * float(_kl(log_q, log_p).mean()), rel=tolerance)
    assert record.loss == record.divergence


def test_online_and_states_have_the_same_gradient(workshop):
    norms = [
        _first_step(workshop, _strategy(signal=signal, signal_tokens=0, divergence="jsd", mixture=0.3))[1].gradient_norm
        for signal in ("online", "states")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)


def test_sampled_tokens(workshop, logits):
    """The expected value is the weighted sum over drawn tokens, with weights and log-probabilities in float64."""
    _, record = _first_step(workshop, _strategy(signal="sampled", signal_tokens=12))
    drawn = workshop.cache.sampled(range(8), 1.0, 12)
    log_p, log_q = (functional.log_softmax(rows, dim=1).gather(1, drawn.ids) for rows in logits[:2])
    weights = (drawn.weights > 0) / (12 * log_p.exp()).clamp(max=1)
    expected = (weights * log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
    assert record.divergence == pytest.approx(float(expected), rel=2e-3)
    full = _kl(*(functional.log_softmax(rows, dim=1) for rows in logits[:2]))
    # This estimates the mean over 248 rows. It is not a bound.
    assert record.divergence == pytest.approx(float(full.mean()), rel=0.2)


def test_what_was_told_with_the_text(workshop, logits):
    """Expected in float64: KL over the reported tokens and the rest where some are reported, and else cross-entropy."""
    bench = workshop.told(workshop.cache, 5)
    spared = np.random.default_rng(2).random(bench.data.tokens.shape) < 0.3
    bench.data.writer_logprobs.ids[spared] = -1
    _, record = _first_step(bench, _strategy(signal="written", signal_tokens=0, divergence_weight=0.7))
    teacher, student, labels = logits
    log_p, log_q = (functional.log_softmax(rows, dim=1) for rows in (teacher, student))
    top = torch.zeros(log_p.shape, dtype=torch.bool).scatter_(1, teacher.topk(5, dim=1).indices, True)
    rest = [log.masked_fill(top, -torch.inf).logsumexp(dim=1) for log in (log_p, log_q)]
    inside = (log_p.exp() * (log_p - log_q)).masked_fill(~top, 0.0).sum(dim=1)
    distance = inside + rest[0].exp() * (rest[0] - rest[1])
    # Position i predicts token i + 1, and the log-probabilities belong to that token.
    heard = torch.from_numpy(~spared[:, 1:].reshape(-1))
    surprise = functional.cross_entropy(student, labels, reduction="none")
    expected = torch.where(heard, 0.7 * distance + 0.3 * surprise, surprise)
    # The cache's log-probabilities have 11 bits.
    assert record.loss == pytest.approx(float(expected.mean()), rel=1e-3)
    assert record.divergence == pytest.approx(float(distance[heard].sum() / len(heard)), rel=1e-3)


def test_the_weight_follows_its_line(workshop):
    strategy = _strategy(divergence_weight=0.0, final_divergence_weight=0.8, learning_rate=1e-12)
    trainer = workshop.trainer(strategy, batch_tokens=ALL, tokens=4 * ALL)
    records = list(trainer.train_stable(4 * ALL))
    assert [record.divergence_weight for record in records] == pytest.approx([0.1, 0.3, 0.5, 0.7])
    for record in records:
        weight = record.divergence_weight
        assert record.loss == pytest.approx(weight * record.divergence + (1 - weight) * record.cross_entropy, rel=1e-6)


TAID = {"divergence": "taid", "mixture": 0.4, "signal": "online", "signal_tokens": 0}


def test_taids_target_moves_from_its_start_to_the_teacher(workshop, logits):
    trainer = workshop.trainer(_strategy(**TAID), batch_tokens=ALL, tokens=4 * ALL)
    records = list(trainer.train_stable(4 * ALL))
    log_p, log_q = (functional.log_softmax(rows, dim=1) for rows in logits[:2])
    log_m = functional.log_softmax(0.4 * log_p + 0.6 * log_q, dim=1)
    assert records[0].teacher_share == 0.4
    assert records[0].divergence == pytest.approx(float(_kl(log_m, log_q).mean()), rel=2e-5)
    # This is the paper's Algorithm 1 with its constants. The losses are those of earlier steps.
    share, momentum, last = 0.4, 0.0, None
    for step, record in enumerate(records):
        assert record.teacher_share == pytest.approx(share, rel=1e-12)
        if last is not None:
            momentum = 0.99 * momentum + 0.01 * (last - record.divergence) / (last + 1e-15)
            share += 5e-4 / (1 + math.exp(-momentum)) * (1 - share)
        share, last = min(1.0, max(0.4 + 0.6 * (step + 1) / 4, share)), record.divergence
    assert share == 1.0


def test_taids_pace_follows_the_tokens_that_the_teacher_is_heard_of_alone(workshop):
    """Every other step only has text.

    The paper's recurrence uses the other steps, by their mean over reported tokens.
    """
    bench = workshop.told(workshop.cache, 64)
    untold = np.ones(bench.data.tokens.shape, dtype=bool)
    trainer = bench.trainer(
        _strategy(divergence="taid", mixture=0.4, signal="written", signal_tokens=0), batch_tokens=32, tokens=10**6
    )
    order = [int(trainer._sequences(trainer._plan.batch_tokens)[0])]
    for step in range(1, 8):
        trainer.tokens = 32 * step
        order.append(int(trainer._sequences(trainer._plan.batch_tokens)[0]))
    trainer.tokens = 0
    untold[order[::2], ::3] = False  # a third of the other steps' tokens is reported
    bench.data.writer_logprobs.ids[untold] = -1
    records = list(trainer.train_stable(8 * 32))
    share, momentum, last = 0.4, 0.0, None
    for step, record in enumerate(records):
        assert record.teacher_share == pytest.approx(share, rel=1e-12)
        if step % 2 == 0:
            loss = record.divergence * 31 / (~untold[order[step], 1:]).sum()
            if last is not None:
                momentum = 0.99 * momentum + 0.01 * (last - loss) / (last + 1e-15)
                share += 5e-4 / (1 + math.exp(-momentum)) * (1 - share)
            last = loss
        else:
            assert record.divergence == 0
        share = max(0.4 + 0.6 * (step + 1) * 32 / 10**6, share)
    assert share > 0.4004  # faster than the lower bound


def test_taid_continues_from_a_checkpoint(workshop, tmp_path):
    whole, first = (workshop.trainer(_strategy(**TAID), tokens=10**6) for _ in range(2))
    records = list(whole.train_stable(384))
    list(first.train_stable(192))
    first.save(tmp_path / "checkpoint")
    with safe_open(tmp_path / "checkpoint", framework="pt") as file:
        assert "interpolation" in file.metadata()
    second = workshop.trainer(_strategy(**TAID), tokens=10**6)
    second.load(tmp_path / "checkpoint")
    rest = list(second.train_stable(384))
    assert [(r.teacher_share, r.loss) for r in rest] == [(r.teacher_share, r.loss) for r in records[3:]]


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_the_most_uncertain_positions(workshop, logits, share):
    strategy = _strategy(divergence_weight=0.5, positions="uncertain", uncertain_share=share, signal_tokens=64)
    _, record = _first_step(workshop, strategy)
    _, student, labels = logits
    log_q = functional.log_softmax(student, dim=1)
    entropy = -(log_q.exp() * log_q).sum(dim=1)
    each = entropy.view(8, 31).topk(math.ceil(share * 31), dim=1).indices
    chosen = (each + 31 * torch.arange(8)[:, None]).flatten()
    expected = functional.cross_entropy(student[chosen], labels[chosen])
    assert record.cross_entropy == pytest.approx(float(expected), rel=2e-5)


def test_answers(workshop, logits):
    """If the data mark answers, the loss counts only those. Without marks, every token counts."""
    answers = np.random.default_rng(3).random(workshop.data.tokens.shape) < 0.3
    marked = replace(workshop.data, answers=answers)
    strategy = _strategy(divergence_weight=0.5, positions="answers")
    _, record = _first_step(replace(workshop, data=marked), strategy)
    _, student, labels = logits
    # Position i predicts token i + 1. It counts if that token belongs to an answer.
    chosen = torch.from_numpy(answers[:, 1:].reshape(-1))
    expected = functional.cross_entropy(student[chosen], labels[chosen])
    assert record.cross_entropy == pytest.approx(float(expected), rel=2e-5)
    _, record = _first_step(workshop, strategy)
    assert record.cross_entropy == pytest.approx(float(functional.cross_entropy(student, labels)), rel=2e-5)


def test_a_single_answer_counts_whole(workshop, logits):
    """Means are over the tokens that are learned from, however few."""
    answers = np.zeros(workshop.data.tokens.shape, dtype=bool)
    answers[3, 8] = True
    marked = replace(workshop, data=replace(workshop.data, answers=answers))
    strategy = _strategy(divergence_weight=0.5, positions="answers", signal="online", signal_tokens=0)
    _, record = _first_step(marked, strategy)
    log_p, log_q = (functional.log_softmax(rows[3 * 31 + 7 : 3 * 31 + 8], dim=1) for rows in logits[:2])
    label = logits[2][3 * 31 + 7 : 3 * 31 + 8]
    assert record.cross_entropy == pytest.approx(float(functional.nll_loss(log_q, label)), rel=2e-5)
    assert record.divergence == pytest.approx(float(_kl(log_p, log_q).mean()), rel=2e-4)
    assert record.loss == pytest.approx(0.5 * record.cross_entropy + 0.5 * record.divergence, rel=1e-6)


def test_a_step_without_answers_moves_nothing(workshop):
    nothing = np.zeros(workshop.data.tokens.shape, dtype=bool)
    marked = replace(workshop.data, answers=nothing)
    trainer, record = _first_step(replace(workshop, data=marked), _strategy(positions="answers"))
    assert (record.loss, record.gradient_norm) == (0.0, 0.0)
    fresh, _ = build_student(workshop.teacher, INIT)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, dict(fresh.named_parameters())[name])


def test_a_live_teacher_is_loaded_once_and_only_if_asked(workshop, monkeypatch):
    from autodistill.distillation.teacher import target_sources

    loads = []
    load = target_sources.load_held
    monkeypatch.setattr(target_sources, "load_held", lambda *arguments: loads.append(1) or load(*arguments))
    teacher = LiveTeacher(workshop.teacher)
    assert loads == []
    ids = torch.from_numpy(workshop.data.tokens[:2].astype(np.int64))
    for _ in range(2):
        assert teacher.final(ids).shape == (62, 64)
        assert teacher.head.shape == (300, 64)
    assert loads == [1]
    assert not teacher.head.requires_grad


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("qwen3", False), ("gpt_neox", False)])
def test_a_head_that_is_read_alone_is_the_models(tmp_path, monkeypatch, architecture, tied):
    from autodistill.distillation.teacher import target_sources

    folder = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, tied=tied)
    expected = load_model(folder, torch.float32).get_output_embeddings().weight
    for name in ("load_held", "load_model"):
        monkeypatch.setattr(target_sources, name, lambda *rest: pytest.fail("all of the teacher was loaded"))
    head = LiveTeacher(folder).head
    assert head.dtype == torch.float32
    assert torch.equal(head, expected)


def test_bfloat16_is_close(workshop):
    exact, rounded = (
        _first_step(workshop, _strategy(signal="states", signal_tokens=0), bf16=bf16)[1].divergence
        for bf16 in (False, True)
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.05)


def test_nan_in_the_teachers_outputs_ends_the_trial(workshop):
    class Spoilt:
        def final(self, indices):
            return workshop.cache.final(indices) * float("nan")

    trainer = workshop.trainer(_strategy(signal="states", signal_tokens=0), cache=Spoilt())
    with pytest.raises(TrialFailedError, match="not finite"):
        list(trainer.train_stable(512))


def test_a_step_without_answers_is_no_good_step_between_two_spoilt_ones(workshop):
    class Spoilt:
        def final(self, indices):
            return workshop.cache.final(indices) * float("nan")

    strategy = _strategy(signal="states", signal_tokens=0)
    answers = np.ones(workshop.data.tokens.shape, dtype=bool)
    bench = replace(workshop, data=replace(workshop.data, answers=answers))
    trainer = bench.trainer(strategy, cache=Spoilt(), batch_tokens=32)
    trainer.tokens = 64
    answers[trainer._sequences(trainer._plan.batch_tokens)] = False
    trainer.tokens = 0
    seen = []
    with pytest.raises(TrialFailedError, match="not finite in 3 steps in a row"):
        seen.extend(record.loss for record in trainer.train_stable(512))
    assert np.isnan(seen[:2]).all()
    assert seen[2:] == [0.0]


def test_what_learns_from_told_probabilities_is_refused_where_none_are_told():
    written = Distillation(signal="written", signal_tokens=0)
    others = [Distillation(), Distillation(signal="states", signal_tokens=0), replace(written, divergence_weight=0.0)]
    check_logprobs(others, reported=False)
    check_logprobs([*others, written], reported=True)
    with pytest.raises(InputError, match=r'the signal "written" needs answers with their writer\'s log-probabilities'):
        check_logprobs([*others, written], reported=False)


def test_a_pass_of_a_live_teacher_leaves_no_hook_and_is_used_again(workshop):
    teacher = LiveTeacher(workshop.teacher)
    ids = torch.from_numpy(workshop.data.tokens[:2].astype(np.int64))
    read = teacher.read(ids, (0, 1))
    assert not any(layer._forward_hooks for layer in decoder_layers(teacher._model))
    with torch.no_grad():
        states = teacher._model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        np.testing.assert_allclose(read[layer], states[layer + 1][:, :-1].flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert teacher.read(ids.clone(), (1,)) is read
    assert teacher.read(ids, (0, 2)) is not read
    assert teacher.read(ids.flip(1), (0, 2)) is not teacher.read(ids, (0, 2))
