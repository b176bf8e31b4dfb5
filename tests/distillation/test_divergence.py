"""The logit loss and its gradient against float64 autograd on the dense distributions, and its memory."""

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autodistill.distillation import divergence
from autodistill.distillation.divergence import SparseTarget, logit_loss
from autodistill.distillation.temperature import GRID

ROWS, VOCABULARY = 37, 101


def _case(k=8, temperature=1.0, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * scale).to(dtype)
    teacher = student.double() + torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    top = teacher.topk(k, dim=1)
    labels[:5] = top.indices[:5, -1]  # some true tokens among the stored ones, most of them not
    target = SparseTarget(top.indices, top.values, torch.logsumexp(teacher / temperature, dim=1), temperature)
    return student, teacher, labels, target


def _reference(student, teacher, labels, target, weight):
    """Terms and gradient in float64, by autograd through the distribution over the k tokens and the rest."""
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
    expected = [total, kl if weight > 0 else 0.0, cross_entropy]
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
    # Against float64 on the same rounded logits only the gradient's own rounding to 8 bits remains.
    gradient = _check(_case(temperature=temperature, dtype=torch.bfloat16), 0.5, 2e-6, 2**-8)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_huge_logits_neither_overflow_nor_vanish(size, temperature):
    student, teacher, labels, target = _case(temperature=temperature)
    # The student is certain of a token that is not stored, so every stored one's probability is below float32.
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
    # What the bucket's probability is, float32 cannot say; that it is far too small, the loss does.
    assert 0 < float(loss.divergence.detach()) < 1e3
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_logits_stay_as_they_are(dtype, weight):
    student, _, labels, target = _case(dtype=dtype)
    logits = student.clone().requires_grad_()
    logit_loss(logits, labels, target, weight).total.backward()
    assert torch.equal(logits.detach(), student)


def test_rows_in_parts_are_the_same_rows(monkeypatch):
    whole = _check(_case(), 0.5, 1e-11, 1e-11)
    for rows in (1, 5, 36):
        monkeypatch.setattr(divergence, "_CPU_CHUNK", rows * VOCABULARY)
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
    loss = logit_loss(student, labels, None, 0.0)
    assert float(loss.total) == pytest.approx(float(functional.cross_entropy(student, labels)))
    assert float(loss.divergence) == 0.0


def test_a_divergence_without_the_teachers_outputs_is_refused():
    student, _, labels, _ = _case()
    with pytest.raises(ValueError, match="teacher's outputs"):
        logit_loss(student, labels, None, 0.5)


class _PeakMemory(TorchDispatchMode):
    """Follows the bytes of all storages that operations made and that still live."""

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
def test_beside_the_logits_there_is_one_tensor_of_their_size(dtype, temperature, monkeypatch):
    rows, vocabulary, k = 400, 500, 4
    monkeypatch.setattr(divergence, "_CPU_CHUNK", 4 * vocabulary)
    logits = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
    teacher = torch.randn(rows, vocabulary)
    top = teacher.topk(k, dim=1)
    target = SparseTarget(top.indices, top.values, torch.logsumexp(teacher / temperature, dim=1), temperature)
    labels = torch.zeros(rows, dtype=torch.int64)
    with _PeakMemory([logits, labels, *target[:3]]) as memory:
        logit_loss(logits, labels, target, 0.5).total.backward()
    one = rows * vocabulary * logits.element_size()
    assert one <= memory.peak <= one + 6 * 4 * vocabulary * 4
