"""Scores against transformers' own loss and logits."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from autodistill.errors import InputError
from autodistill.inference import scoring
from autodistill.inference.outputs import TeacherReference
from autodistill.inference.scoring import choices, score, score_teacher


@pytest.fixture(scope="module")
def model(workshop):
    return AutoModelForCausalLM.from_pretrained(workshop.teacher, dtype=torch.float32).eval()


@pytest.mark.parametrize("rows", [128, 7])
def test_against_transformers(workshop, model, monkeypatch, rows):
    monkeypatch.setattr(scoring, "_CHUNK_ROWS", rows)
    scores, top1 = score(model, workshop.data)
    ids = torch.from_numpy(workshop.data.tokens.astype(np.int64))
    with torch.no_grad():
        out = model(ids, labels=ids)
        logits = out.logits[:, :-1].double()
    assert scores.nll.mean() == pytest.approx(float(out.loss), rel=1e-6)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    np.testing.assert_allclose(scores.nll, expected.numpy(), rtol=1e-5, atol=1e-5)
    chosen = logits.argmax(-1)
    np.testing.assert_array_equal(top1, chosen.flatten().numpy())
    np.testing.assert_array_equal(scores.correct, (chosen == ids[:, 1:]).flatten().numpy())
    assert (scores.nll.dtype, top1.dtype) == (np.float64, np.int32)


def test_only_answers_are_scored_where_the_data_say_which_they_are(workshop, model):
    answers = np.random.default_rng(0).random(workshop.data.tokens.shape) < 0.2
    answers[3] = False  # a sequence without any answer
    data = replace(workshop.data, answers=answers)
    whole, whole_top1 = score(model, workshop.data)
    scores, top1 = score(model, data)
    counted = answers[:, 1:].ravel()
    assert len(top1) == data.predicted == counted.sum()
    np.testing.assert_allclose(scores.nll, whole.nll[counted], rtol=1e-5)
    np.testing.assert_array_equal(top1, whole_top1[counted])
    np.testing.assert_array_equal(scores.correct, whole.correct[counted])
    np.testing.assert_array_equal(scores.documents, whole.documents[counted])
    ids = torch.from_numpy(workshop.data.tokens.astype(np.int64))
    with torch.no_grad():
        loss = model(ids, labels=ids.masked_fill(~torch.from_numpy(answers), -100)).loss  # transformers' own mask
    assert scores.nll.mean() == pytest.approx(float(loss), rel=1e-5)
    # The runtime is compared with the simulation at every position.
    assert choices(model, data)[0].shape == choices(model, workshop.data)[0].shape


def test_answers_of_any_number_are_compared_with_the_teachers_in_their_places(workshop, model, monkeypatch):
    """Each pass reads one sequence, so it must know how many tokens those before it have counted."""
    answers = np.random.default_rng(1).random(workshop.data.tokens.shape) < np.linspace(0.1, 0.9, 8)[:, None]
    data = replace(workshop.data.head(8 * workshop.data.tokens.shape[1]), answers=answers[:8])
    _, reference = score_teacher(model, data)
    monkeypatch.setattr(scoring, "pass_tokens", lambda model, device: data.tokens.shape[1])
    apart, _ = score(model, data, reference)
    assert apart.agrees.all()
    np.testing.assert_allclose(apart.divergence, 0, atol=1e-5)


def test_documents_are_those_of_the_predicted_tokens(workshop, model):
    scores, _ = score(model, workshop.data)
    length = workshop.data.tokens.shape[1]
    # Token number i of all tokens belongs to document i // 48. The first token of each sequence is not predicted.
    expected = [i // 48 for i in range(workshop.data.tokens.size) if i % length]
    np.testing.assert_array_equal(scores.documents, expected)
    assert scores.documents.dtype == np.int32


def test_agreement(workshop, model):
    itself, reference = score_teacher(model, workshop.data)
    assert itself.agrees.all()
    again, _ = score(model, workshop.data, reference)
    assert itself.teacher_correct is None
    np.testing.assert_array_equal(again.teacher_correct, itself.correct)
    assert again.agrees.all()
    other = reference.top1.copy()
    other[[3, 100]] += 1
    differing, _ = score(model, workshop.data, replace(reference, top1=other))
    np.testing.assert_array_equal(differing.correct, itself.correct)
    np.testing.assert_array_equal(np.flatnonzero(~differing.agrees), [3, 100])
    np.testing.assert_array_equal(differing.correct, itself.correct)


def test_a_sequences_scores_do_not_depend_on_its_neighbors(workshop, model):
    alone, _ = score(model, workshop.data.head(1))
    together, _ = score(model, workshop.data)
    np.testing.assert_array_equal(together.nll[: len(alone.nll)], alone.nll)


def test_a_model_in_training_is_scored_as_it_would_be_used(workshop, model):
    expected, _ = score(model, workshop.data)
    model.train()
    actual, _ = score(model, workshop.data)
    assert not model.training
    np.testing.assert_array_equal(actual.nll, expected.nll)


def test_choices_and_losses(workshop, model):
    tokens, nll, leads = choices(model, workshop.data)
    ids = torch.from_numpy(workshop.data.tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    losses = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    np.testing.assert_allclose(nll, losses, atol=1e-5)
    ordered = logits.sort(-1).values
    np.testing.assert_allclose(leads, ordered[..., -1] - ordered[..., -2], atol=1e-5)
    assert (tokens.dtype, nll.dtype, leads.dtype) == (np.int32, np.float32, np.float32)


def noisy(model, scale):
    other = copy.deepcopy(model)
    dice = torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=dice), alpha=scale)
    return other


@pytest.mark.parametrize("kept", [16, 300])
def test_divergence_is_torchs_over_the_same_outcomes(workshop, model, monkeypatch, kept):
    monkeypatch.setattr(scoring, "REFERENCE_TOKENS", kept)
    monkeypatch.setattr(scoring, "_CHUNK_ROWS", 7)
    student = noisy(model, 0.02)
    _, reference = score_teacher(model, workshop.data)
    scores, _ = score(student, workshop.data, reference)
    ids = torch.from_numpy(workshop.data.tokens.astype(np.int64))
    with torch.no_grad():
        rows = [one(ids).logits[:, :-1].double().flatten(0, 1).softmax(-1) for one in (model, student)]
    likeliest = rows[0].topk(kept).indices
    merged = []
    for row in rows:
        seen = row.gather(1, likeliest)
        merged.append(seen if kept == 300 else torch.cat([seen, 1 - seen.sum(1, keepdim=True)], dim=1))
    divergence = torch.nn.functional.kl_div(merged[1].log(), merged[0], reduction="none").sum(1).numpy()
    np.testing.assert_allclose(scores.divergence, divergence, rtol=1e-3, atol=1e-6)
    whole = torch.nn.functional.kl_div(rows[1].log(), rows[0], reduction="none").sum(1).numpy()
    assert (scores.divergence <= whole + 1e-6).all()  # merged outcomes never diverge more
    assert scores.outcomes == (300 if kept == 300 else 17)
    np.testing.assert_allclose(scores.confidence, rows[1].max(1).values.numpy(), rtol=1e-5)


def test_a_teacher_does_not_diverge_from_itself(workshop, model):
    itself, reference = score_teacher(model, workshop.data)
    assert not itself.divergence.any()
    np.testing.assert_allclose(score(model, workshop.data, reference)[0].divergence, 0, atol=1e-6)


def test_what_is_kept_of_a_teacher_is_read_back(workshop, model, tmp_path):
    _, reference = score_teacher(model, workshop.data)
    reference.save(tmp_path / "reference.npz")
    again = TeacherReference.load(tmp_path / "reference.npz").head(40)
    for name in ("top1", "tokens", "log_probs"):
        np.testing.assert_array_equal(getattr(again, name), getattr(reference, name)[:40])


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_teacher_without_finite_likelihoods_is_refused(workshop, model, factor):
    """Earlier, a search used such scores and ended with a traceback from a later computation."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight *= factor
    with pytest.raises(InputError, match="are no finite numbers: its weights are damaged, or too large for float32"):
        score_teacher(broken, workshop.data)
