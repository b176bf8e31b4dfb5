"""The logit loss and its gradient against float64 autograd on the distributions, and its memory."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autodistill.distillation.losses import logits as module
from autodistill.distillation.losses.divergence import divergence_of, forward_kl, reverse_kl
from autodistill.distillation.losses.logits import logit_loss
from autodistill.distillation.losses.schedules import GRID
from autodistill.distillation.losses.targets import FullTarget, SampledTarget, TopTarget, WrittenTarget
from tests.thinned import thinned

ROWS, VOCABULARY = 37, 101


def _case(k=8, temperature=1.0, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * scale).to(dtype)
    teacher = student.double() + torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    top = teacher.topk(k, dim=1)
    labels[:5] = top.indices[:5, -1]  # some true tokens are among the stored ones, but most are not
    log_p = functional.log_softmax(teacher / temperature, dim=1).gather(1, top.indices)
    return student, teacher, labels, TopTarget(ids=top.indices, log_p=log_p, temperature=temperature)


def _reference(student, teacher, labels, target, weight):
    """Return terms and gradient in float64, by autograd through the distribution over the k tokens and the rest."""
    student = student.double().detach().requires_grad_()
    t = target.temperature
    stored = torch.zeros(student.shape, dtype=torch.bool).scatter_(1, target.ids, True)

    def outcomes(logits):
        log = functional.log_softmax(logits / t, dim=1)
        kept = log.gather(1, target.ids)
        if target.ids.shape[1] == VOCABULARY:
            return kept
        return torch.cat([kept, torch.logsumexp(log.masked_fill(stored, -torch.inf), dim=1, keepdim=True)], dim=1)

    log_p, log_q = outcomes(teacher), outcomes(student)
    kl = t * t * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
    cross_entropy = functional.cross_entropy(student, labels)
    total = weight * kl + (1 - weight) * cross_entropy
    total.backward()
    return (total.item(), kl.item(), cross_entropy.item()), student.grad


def _check(case, weight, value_tolerance, gradient_tolerance):
    student, teacher, labels, target = case
    logits = student.clone().requires_grad_()
    loss = logit_loss(logits, labels, target, weight)
    loss.total.backward()
    (total, kl, cross_entropy), gradient = _reference(student, teacher, labels, target, weight)
    values = [float(term.detach()) for term in loss]
    expected = [total, kl if weight > 0 else 0.0, cross_entropy, weight > 0]
    np.testing.assert_allclose(values, expected, rtol=value_tolerance, atol=value_tolerance)
    error = (logits.grad.double() - gradient).abs()
    assert (error <= gradient_tolerance * (gradient.abs() + 1 / ROWS)).all(), error.max()
    return logits.grad


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_matches_float64_autograd(temperature, weight):
    _check(_case(temperature=temperature), weight, 1e-11, 1e-11)


@pytest.mark.parametrize("k", [1, 2, 64, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_any_number_of_stored_tokens(k, temperature):
    _check(_case(k=k, temperature=temperature), 0.6, 1e-9, 1e-9)


def test_with_every_token_stored_it_is_the_full_divergence():
    student, teacher, labels, target = _case(k=VOCABULARY, temperature=2.0)
    full = 4 * functional.kl_div(
        functional.log_softmax(student / 2, dim=1),
        functional.log_softmax(teacher / 2, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    assert float(logit_loss(student, labels, target, 1.0).divergence) == pytest.approx(float(full), rel=1e-12)


def test_with_fewer_it_is_a_lower_bound_of_it():
    values = [
        float(logit_loss(student, labels, target, 1.0).divergence)
        for student, _, labels, target in (_case(k=k) for k in (1, 8, 64, VOCABULARY))
    ]
    assert values == sorted(values)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_float32(temperature):
    _check(_case(temperature=temperature, dtype=torch.float32), 0.5, 2e-6, 2e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_bfloat16_logits_are_computed_on_in_float32(temperature):
    # Compared with float64 on the same rounded logits, only the rounding of the gradient to 8 bits remains.
    gradient = _check(_case(temperature=temperature, dtype=torch.bfloat16), 0.5, 2e-6, 2**-8)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_huge_logits_neither_overflow_nor_vanish(size, temperature):
    student, teacher, labels, target = _case(temperature=temperature)
    # The student is certain of a token that is not stored, so float32 cannot hold the probability of any stored token.
    student = (student * size).float()
    other = (~torch.zeros(student.shape, dtype=torch.bool).scatter_(1, target.ids, True)).int().argmax(dim=1)
    student.scatter_(1, other[:, None], 2 * student.abs().amax(dim=1, keepdim=True))
    _check((student, teacher, labels, target), 0.5, 2e-6, 2e-6)


def test_a_student_that_leaves_nothing_to_the_bucket_gets_a_finite_loss():
    student, _, labels, target = _case()
    student = student.float()
    student.scatter_(1, target.ids, 1e5)
    student.requires_grad_()
    loss = logit_loss(student, labels, target, 1.0)
    loss.total.backward()
    # float32 cannot represent the bucket's probability, but the loss shows that it is far too small.
    assert 0 < float(loss.divergence.detach()) < 1e3
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("heard", [0, 11, ROWS])
def test_of_rows_that_the_target_is_not_of_it_is_cross_entropy(weight, temperature, heard):
    student, teacher, labels, target = _case(temperature=temperature)
    logits, reference = (student.clone().requires_grad_() for _ in range(2))
    loss = logit_loss(logits, labels, target.take(slice(heard)), weight, heard=heard)
    loss.total.backward()
    functional.cross_entropy(reference, labels, reduction="sum").backward()
    surprise = functional.cross_entropy(student, labels, reduction="none")
    sums, gradient = (surprise[heard:].sum().item(), 0.0), reference.grad
    if heard:
        told = student[:heard], teacher[:heard], labels[:heard], target.take(slice(heard))
        (mean, kl, _), gradient[:heard] = _reference(*told, weight)
        sums, gradient[:heard] = (sums[0] + heard * mean, heard * kl if weight else 0.0), heard * gradient[:heard]
    assert float(loss.total.detach()) == pytest.approx(sums[0] / ROWS, rel=1e-11)
    assert float(loss.divergence) == pytest.approx(sums[1] / ROWS, rel=1e-11)
    assert float(loss.cross_entropy) == pytest.approx(surprise.mean().item(), rel=1e-11)
    torch.testing.assert_close(logits.grad, gradient / ROWS, rtol=1e-9, atol=1e-13)


def test_rows_in_parts_are_the_same_rows(monkeypatch):
    whole = _check(_case(), 0.5, 1e-11, 1e-11)
    for rows in (1, 5, 36):
        monkeypatch.setattr(module, "_CPU_CHUNK", rows * VOCABULARY)
        torch.testing.assert_close(_check(_case(), 0.5, 1e-11, 1e-11), whole, rtol=1e-14, atol=0)


def test_a_factor_on_the_loss_is_a_factor_on_the_gradient():
    student, _, labels, target = _case()
    gradients = []
    for factor in (1.0, -2.5):
        logits = student.clone().requires_grad_()
        (logit_loss(logits, labels, target, 0.5).total * factor).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[1], gradients[0] * -2.5)


def test_no_divergence_needs_no_teacher():
    student, _, labels, _ = _case()
    loss = logit_loss(student.clone(), labels, None, 0.0)
    assert float(loss.total) == pytest.approx(float(functional.cross_entropy(student, labels)))
    assert float(loss.divergence) == 0.0


def test_a_divergence_without_the_teachers_outputs_is_refused():
    student, _, labels, _ = _case()
    with pytest.raises(ValueError, match="teacher's outputs"):
        logit_loss(student, labels, None, 0.5)


class _PeakMemory(TorchDispatchMode):
    """Tracks the bytes of all live storages that operations created."""

    def __init__(self, given):
        super().__init__()
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self._live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._given:
                storage = tensor.untyped_storage()
                self._live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_beside_the_logits_there_is_nothing_of_their_size(dtype, temperature, monkeypatch):
    rows, vocabulary, k = 400, 500, 4
    monkeypatch.setattr(module, "_CPU_CHUNK", 4 * vocabulary)
    logits = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
    teacher = torch.randn(rows, vocabulary)
    top = teacher.topk(k, dim=1)
    log_p = functional.log_softmax(teacher / temperature, dim=1).gather(1, top.indices)
    target = TopTarget(ids=top.indices, log_p=log_p, temperature=temperature)
    labels = torch.zeros(rows, dtype=torch.int64)
    with _PeakMemory([logits, labels, target.ids, target.log_p]) as memory:
        logit_loss(logits, labels, target, 0.5).total.backward()
    assert memory.peak <= 6 * 4 * vocabulary * 4


def _kl(a, b):
    """Return the sum of a log(a / b) over each row's outcomes, written as in a textbook."""
    return (a * (a.log() - b.log())).sum(dim=1)


# p is the teacher and q the student. Each function follows the definition in its paper.
DEFINITIONS = {
    ("forward_kl", 0.0): lambda p, q: _kl(p, q),
    ("reverse_kl", 0.0): lambda p, q: _kl(q, p),
    **{
        ("jsd", beta): lambda p, q, b=beta: b * _kl(p, b * p + (1 - b) * q) + (1 - b) * _kl(q, b * p + (1 - b) * q)
        for beta in (0.1, 0.5, 0.9)
    },
    **{("skew_forward_kl", a): lambda p, q, a=a: _kl(p, a * p + (1 - a) * q) for a in (0.1, 0.7)},
    **{("skew_reverse_kl", a): lambda p, q, a=a: _kl(q, (1 - a) * p + a * q) for a in (0.1, 0.7)},
    **{
        ("taid", t): lambda p, q, t=t: _kl(functional.softmax((1 - t) * q.detach().log() + t * p.log(), dim=1), q)
        for t in (0.4, 0.99)
    },
}


@pytest.mark.parametrize(("name", "mixture"), DEFINITIONS)
@pytest.mark.parametrize("weight", [0.4, 1.0])
@pytest.mark.parametrize("chunk", thinned([5, 10**6]))
def test_what_was_told_of_some_places_and_text_alone_in_others(monkeypatch, name, mixture, weight, chunk):
    """Rows with reported tokens follow the paper's definition.

    All other tokens are one outcome. Other rows have cross-entropy.
    """
    monkeypatch.setattr(module, "_CPU_CHUNK", chunk * VOCABULARY)
    student, teacher, labels, top = _case(k=6)
    counts = np.random.default_rng(5).integers(0, 7, ROWS)
    counts[:7] = range(7)
    # The likeliest token of a row may have id 0. The test swaps it with a row's likeliest token.
    places = torch.arange(VOCABULARY)
    places[[0, int(top.ids[3, 0])]] = places[[int(top.ids[3, 0]), 0]]
    student, teacher, labels = student[:, places], teacher[:, places], places[labels]
    top = replace(top, ids=places[top.ids])
    assert top.ids[3, 0] == 0
    ids, log_p = top.ids.clone(), top.log_p.clone()
    for row, count in enumerate(counts):
        ids[row, count:], log_p[row, count:] = -1, 0.0
    target = WrittenTarget(ids=ids, log_p=log_p)
    logits, reference = (student.clone().requires_grad_() for _ in range(2))
    loss = logit_loss(logits, labels, target, weight, divergence_of(name, mixture))
    loss.total.backward()
    terms, distances = [], []
    for row, count in enumerate(counts):
        cross_entropy = functional.cross_entropy(reference[row], labels[row])
        if count == 0:
            terms.append(cross_entropy)
            continue
        p, q = (functional.softmax(rows[row], dim=0) for rows in (teacher, reference))
        told = torch.zeros(VOCABULARY, dtype=torch.bool)
        told[top.ids[row, :count]] = True
        p, q = (torch.cat([one[told], one[~told].sum()[None]])[None] for one in (p, q))
        distance = DEFINITIONS[name, mixture](p, q)[0]
        distances.append(float(distance.detach()))
        terms.append(weight * distance + (1 - weight) * cross_entropy)
    expected = torch.stack(terms).mean()
    expected.backward()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-11)
    assert float(loss.divergence) == pytest.approx(sum(distances) / ROWS, rel=1e-10)
    torch.testing.assert_close(logits.grad, reference.grad, rtol=1e-9, atol=1e-12)


def _full(temperature, standardized=False, dtype=torch.float64, width=12):
    """Return a teacher given by states and a head, and a student that is near it."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCABULARY, width, generator=generator, dtype=torch.float64)
    student = (states @ head.T + torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    target = FullTarget(states=states, head=head, temperature=temperature, standardized=standardized)
    return student, states @ head.T, labels, target


def _full_reference(student, teacher, labels, definition, temperature, weight, standardized):
    student = student.double().detach().requires_grad_()

    def probabilities(logits):
        if standardized:
            logits = (logits - logits.mean(dim=1, keepdim=True)) / logits.std(dim=1, keepdim=True)
        return functional.softmax(logits / temperature, dim=1)

    distance = temperature**2 * definition(probabilities(teacher), probabilities(student)).mean()
    total = weight * distance + (1 - weight) * functional.cross_entropy(student, labels)
    total.backward()
    return total.item(), distance.item(), student.grad


@pytest.mark.parametrize(("name", "mixture"), DEFINITIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_every_divergence_of_all_tokens(name, mixture, temperature, standardized, weight):
    student, teacher, labels, target = _full(temperature, standardized)
    expected = _full_reference(student, teacher, labels, DEFINITIONS[name, mixture], temperature, weight, standardized)
    logits = student.clone().requires_grad_()
    loss = logit_loss(logits, labels, target, weight, divergence_of(name, mixture))
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(expected[0], rel=1e-10)
    assert float(loss.divergence) == pytest.approx(expected[1], rel=1e-10)
    torch.testing.assert_close(logits.grad, expected[2], rtol=1e-8, atol=1e-13)
    # A row's gradient has no component along the common shift of its logits.
    torch.testing.assert_close(logits.grad.sum(dim=1), torch.zeros(ROWS, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "mixture"), DEFINITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_divergence_in_the_types_of_training(name, mixture, dtype):
    student, teacher, labels, target = _full(1.0, dtype=dtype)
    expected = _full_reference(student, teacher, labels, DEFINITIONS[name, mixture], 1.0, 1.0, False)
    logits = student.clone().requires_grad_()
    loss = logit_loss(logits, labels, target, 1.0, divergence_of(name, mixture))
    loss.total.backward()
    assert float(loss.divergence) == pytest.approx(expected[1], rel=1e-5)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(logits.grad.double(), expected[2], rtol=rounding, atol=1e-5 / ROWS)


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_jsd_is_the_published_generalized_one(beta):
    """The reference is TRL's GKD: means over tokens of beta KL(teacher, m) + (1 - beta) KL(student, m), by `kl_div`."""
    student, teacher, labels, target = _full(1.0)
    log_q, log_p = functional.log_softmax(student, dim=1), functional.log_softmax(teacher, dim=1)
    log_m = torch.logsumexp(torch.stack([log_q + np.log(1 - beta), log_p + np.log(beta)]), dim=0)
    to_teacher = functional.kl_div(log_m, log_p, reduction="none", log_target=True)
    to_student = functional.kl_div(log_m, log_q, reduction="none", log_target=True)
    published = (beta * to_teacher + (1 - beta) * to_student).sum() / ROWS
    found = logit_loss(student, labels, target, 1.0, divergence_of("jsd", beta)).divergence
    assert float(found) == pytest.approx(float(published), rel=1e-12)


@pytest.mark.parametrize(("name", "mixture"), DEFINITIONS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("k", [1, 8, VOCABULARY - 1])
def test_every_divergence_of_the_likeliest_and_the_rest(name, mixture, temperature, k):
    student, teacher, labels, target = _case(k=k, temperature=temperature)
    stored = torch.zeros(student.shape, dtype=torch.bool).scatter_(1, target.ids, True)

    def outcomes(logits):
        p = functional.softmax(logits / temperature, dim=1)
        return torch.cat([p.gather(1, target.ids), p.masked_fill(stored, 0).sum(dim=1, keepdim=True)], dim=1)

    reference = student.clone().requires_grad_()
    distance = temperature**2 * DEFINITIONS[name, mixture](outcomes(teacher), outcomes(reference)).mean()
    distance.backward()
    logits = student.clone().requires_grad_()
    loss = logit_loss(logits, labels, target, 1.0, divergence_of(name, mixture))
    loss.total.backward()
    assert float(loss.divergence) == pytest.approx(float(distance.detach()), rel=1e-8)
    torch.testing.assert_close(logits.grad, reference.grad, rtol=1e-6, atol=1e-10)
    if name != "taid":
        # Merging outcomes can only reduce an f-divergence. TAID's target is different then.
        full = temperature**2 * DEFINITIONS[name, mixture](
            *(functional.softmax(x / temperature, dim=1) for x in (teacher, student))
        )
        assert float(loss.divergence) <= float(full.mean()) * (1 + 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_kl_of_sampled_tokens(temperature):
    """Expected: value and gradient of the sum of w p (log p - log q) over drawn tokens, by autograd.

    Padding is ignored.
    """
    student, teacher, labels, top = _case(k=6, temperature=temperature)
    weights = torch.rand(ROWS, 6, dtype=torch.float64) * 3 + 1
    weights[::2, 4:] = 0
    ids = torch.where(weights > 0, top.ids, 0)
    log_p = functional.log_softmax(teacher / temperature, dim=1).gather(1, ids)
    target = SampledTarget(ids=ids, log_p=log_p, weights=weights, temperature=temperature)
    reference = student.clone().requires_grad_()
    log_q = functional.log_softmax(reference / temperature, dim=1).gather(1, ids)
    distance = temperature**2 * (weights * log_p.exp() * (log_p - log_q)).sum(dim=1).mean()
    distance.backward()
    logits = student.clone().requires_grad_()
    loss = logit_loss(logits, labels, target, 1.0, forward_kl)
    loss.total.backward()
    assert float(loss.divergence) == pytest.approx(float(distance.detach()), rel=1e-11)
    torch.testing.assert_close(logits.grad, reference.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["top", "full"])
def test_chosen_rows_are_those_rows_alone(kind):
    student, _, labels, target = _case() if kind == "top" else _full(1.0)
    chosen = torch.tensor([3, 7, 30])
    found = logit_loss(student[chosen], labels[chosen], target.take(chosen), 1.0).divergence
    alone = [
        logit_loss(student[row : row + 1], labels[row : row + 1], target.take(torch.tensor([row])), 1.0).divergence
        for row in chosen.tolist()
    ]
    assert float(found) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-12)


def test_no_rows_give_no_loss():
    student, _, labels, target = _case()
    none = torch.zeros(0, dtype=torch.int64)
    logits = student[none].requires_grad_()
    loss = logit_loss(logits, labels[none], target.take(none), 0.5)
    loss.total.backward()
    assert [float(term.detach()) for term in loss] == [0.0, 0.0, 0.0, 0.0]
    assert logits.grad.shape == (0, VOCABULARY)


def test_all_tokens_take_no_more_memory_than_some_rows(monkeypatch):
    rows, vocabulary, width, step = 512, 500, 16, 8
    monkeypatch.setattr(module, "_CPU_CHUNK", step * vocabulary)
    logits = torch.randn(rows, vocabulary).requires_grad_()
    target = FullTarget(states=torch.randn(rows, width), head=torch.randn(vocabulary, width), temperature=2.0)
    labels = torch.zeros(rows, dtype=torch.int64)
    with _PeakMemory([logits, labels, target.states, target.head]) as memory:
        logit_loss(logits, labels, target, 0.5, divergence_of("jsd", 0.5)).total.backward()
    row = vocabulary * 4
    # The 128 rows are the teacher's logits. The nine tensors have a few rows each.
    assert memory.peak <= 128 * row + 9 * step * row


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trls_generalized_jsd(beta, temperature):
    """TRL's own function is the reference, without the factor T^2. Its ends are forward and reverse KL."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher, labels, target = _full(temperature)
    logits, reference = (student.clone().requires_grad_() for _ in range(2))
    divergence = {0.0: forward_kl, 1.0: reverse_kl}.get(beta) or divergence_of("jsd", beta)
    loss = logit_loss(logits, labels, target, 1.0, divergence)
    loss.total.backward()
    theirs = GKDTrainer.generalized_jsd_loss(
        reference, teacher, beta=beta, temperature=temperature, num_items_in_batch=ROWS
    )
    expected = temperature**2 * theirs
    expected.backward()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(logits.grad, reference.grad, rtol=1e-6, atol=1e-9)


def test_rows_are_read_in_order_and_each_once():
    parts = [(part.start, part.stop, outputs) for part, outputs in module._parts(None, 3, 10, 3)]
    assert parts == [(3, 6, None), (6, 9, None), (9, 10, None)]


@pytest.mark.parametrize("step", [2, 50, 128, 200, 1000])
def test_the_teachers_logits_are_computed_by_blocks_that_are_written_over(step):
    """A last block of fewer rows is a part of the same memory, whose size torch would warn of if it did not fit."""
    generator = torch.Generator().manual_seed(0)
    states, head = (torch.randn(size, 5, generator=generator, dtype=torch.float64) for size in (259, 11))
    target = FullTarget(states=states, head=head, temperature=1.0).renamed(2, 7)
    expected = (states.numpy() @ head.numpy().T)[:, [0, 1, 7, 3, 4, 5, 6, 2, 8, 9, 10]]
    end = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part, outputs in target.parts(step):
            assert part.start == end
            assert part.stop == min(end + step, 259) or part.stop % step == 0 or step > 128
            np.testing.assert_allclose(outputs.logits.numpy(), expected[part], rtol=1e-12, atol=1e-12)
            end = part.stop
    assert end == 259
