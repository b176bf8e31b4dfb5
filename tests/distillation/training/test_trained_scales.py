"""Training only scales: values as in the packed bytes, gradients in closed form, and codes that stay the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autodistill.distillation.training import trained_scales
from autodistill.distillation.training.straight_through import _revived
from autodistill.distillation.training.trained_scales import RATE, ScaledCodes
from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.quantization.formats import get_format
from autodistill.quantization.grids import IQ4_NL, MXFP4, Q4_0, Q4_1, Q4_K, Q5_0, Q6_K, Q8_0, Grid
from autodistill.quantization.group_scales import Steps
from autodistill.quantization.loops import compiled, loops
from autodistill.quantization.packing import deployed, pack, quantize, unpack
from autodistill.strategy.recipe import Distillation, Lora
from autodistill.strategy.strategy import Finishing, Init, Strategy

INTEGERS = get_format("compressed-tensors").linears
ZEROS = next(grid for grid in INTEGERS if not grid.symmetric)
GRIDS = (Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q6_K, IQ4_NL, MXFP4, INTEGERS[0], ZEROS)
by_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
FINISHING = Finishing(format="gguf-q4_1", bits=4, group_size=32, symmetric=False, scales="alone")
ALONE = Strategy(
    init=Init(depth=1.0), distillation=Distillation(learning_rate=1e-3, divergence_weight=0.5), finishing=FINISHING
)


def _weight(grid, seed=0):
    columns = 2 * (grid.block_size or grid.group_size or 64)
    return torch.randn(6, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def _moved(grid, seed=1):
    """Return a weight on a grid whose scales and minima have been trained a little, and the original weight."""
    weight = _weight(grid)
    shown = ScaledCodes(torch.nn.Parameter(weight.clone()), grid)
    draw = torch.Generator().manual_seed(seed)
    for parameter in shown.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)
    return weight, shown


@by_grid
def test_begins_as_the_runtime_has_it_rounded(grid):
    weight = _weight(grid)
    shown = ScaledCodes(torch.nn.Parameter(weight.clone()), grid)
    expected = deployed(weight.numpy(), grid)
    np.testing.assert_array_equal(shown().detach().numpy(), expected)
    np.testing.assert_array_equal(
        shown(dtype=torch.bfloat16).detach().float(), torch.tensor(expected).bfloat16().float()
    )
    np.testing.assert_array_equal(shown.rows(torch.tensor([4, 1, 4])).detach().numpy(), expected[[4, 1, 4]])


@by_grid
def test_what_was_trained_is_what_a_file_gives_back(grid):
    """The codes are the first ones. Bytes packed from values and scales return every value."""
    weight, shown = _moved(grid)
    values = shown().detach().numpy().copy()
    codes, _ = quantize(weight.numpy(), grid)
    master = shown._master[0]
    assert master.numel() == 0
    stored = shown.settle()
    np.testing.assert_array_equal(master.detach().numpy(), values)
    again, _ = quantize(values, grid, stored)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(unpack(pack(values, grid, stored), grid, values.shape), values)
    if grid.scale_dtype != "e8m0":
        assert not np.array_equal(values, deployed(weight.numpy(), grid))


@pytest.mark.parametrize("grid", [Q4_0, Q4_1, IQ4_NL, ZEROS], ids=lambda grid: grid.name)
def test_gradients_are_those_of_codes_times_scales(grid):
    """A scale s is trained as a share of its first value.

    Its gradient is the group's sum of gradient times code, times s.
    """
    weight, shown = _moved(grid)
    codes, first = quantize(weight.numpy(), grid)
    incoming = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    (shown() * incoming).sum().backward()
    size = grid.group(weight.shape[1])
    groups = incoming.double().numpy().reshape(len(weight), -1, size)
    whole = codes.reshape(groups.shape).astype(np.float64)
    if grid.offset == "zero_point":
        whole -= first.offsets[..., None]
    expected = (groups * whole).sum(-1) * first.scales
    np.testing.assert_allclose(shown.scale.grad.numpy(), expected, rtol=1e-4, atol=1e-6)
    if grid.offset == "minimum":
        moves = groups.sum(-1) * first.scales * (grid.levels / 2)
        np.testing.assert_allclose(shown.minimum.grad.numpy(), moves, rtol=1e-4, atol=1e-6)
    else:
        assert shown.minimum is None


@pytest.mark.parametrize("grid", [Q4_0, Q4_1, Q4_K, ZEROS], ids=lambda grid: grid.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_loops_are_the_single_operations(grid, dtype, monkeypatch):
    """Values are equal to the last bit, in one thread or several.

    Sums of gradients may have any order and differ by rounding.
    """
    assert loops("rounding") is not None
    monkeypatch.setattr(compiled, "_LEAST_PART", 64)
    found = []
    for switched_off in (False, True):
        if switched_off:
            monkeypatch.setattr(trained_scales, "loops", lambda *_: None)
        _, shown = _moved(grid)
        values = shown(dtype=dtype)
        incoming = torch.randn(values.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        values.backward(incoming)
        found.append((values.detach(), [one.grad for one in shown.parameters() if one.requires_grad]))
    (values, gradients), (plain, expected) = found
    assert torch.equal(values, plain)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_rows_have_the_same_gradients():
    _, shown = _moved(Q4_1)
    ids = torch.tensor([2, 5, 2])
    shown()[ids].square().sum().backward()
    expected = [shown.scale.grad.clone(), shown.minimum.grad.clone()]
    shown.zero_grad()
    shown.rows(ids).square().sum().backward()
    torch.testing.assert_close([shown.scale.grad, shown.minimum.grad], expected)


def _grids(trainer, strategy):
    spec = spec_from_config(trainer.model.config.to_dict())
    storages = {tensor.name: strategy.finishing.storage(tensor) for tensor in spec.tensors}
    return spec, {name: storage for name, storage in storages.items() if isinstance(storage, Grid)}


@pytest.mark.parametrize(
    "plan",
    [{"bf16": False}, pytest.param({"bf16": True}, marks=pytest.mark.slow), {"checkpointing": True, "micro_batch": 1}],
    ids=str,
)
def test_training_moves_scales_and_norms_and_no_code(workshop, plan):
    plain = workshop.trainer(replace(ALONE, finishing=None))
    before = {name: weight.detach().clone() for name, weight in plain.model.named_parameters()}
    trainer = workshop.trainer(ALONE, **plan)
    spec, grids = _grids(trainer, ALONE)
    records = [*trainer.train_stable(192), *trainer.finish(320, spec)]
    assert [record.tokens for record in records] == [64 * step for step in range(1, 6)]
    after = dict(trainer.model.named_parameters())
    assert set(trainer.scales) == set(grids)
    assert grids
    for name, weight in after.items():
        assert weight.shape == before[name].shape
        if name in grids:
            codes, _ = quantize(before[name].numpy(), grids[name])
            again, _ = quantize(weight.detach().numpy(), grids[name], trainer.scales[name])
            np.testing.assert_array_equal(again, codes)
        assert not torch.equal(weight, before[name])
    # A step of AdamW moves a number by about the learning rate.
    first = {name: quantize(before[name].numpy(), grid)[1].scales for name, grid in grids.items()}
    shares = [trainer.scales[name].scales[scales > 0] / scales[scales > 0] for name, scales in first.items()]
    moved = max(float(np.abs(share - 1).max()) for share in shares)
    assert 1e-3 * RATE < moved < 6 * 1e-3 * RATE


def test_a_student_learns_by_its_scales_alone(workshop):
    trainer = workshop.trainer(ALONE, tokens=2560)
    records = list(trainer.train_stable(2560))
    first, last = (np.mean([record.loss for record in part]) for part in (records[:4], records[-4:]))
    assert last < 0.9 * first


def test_continues_to_the_last_bit(workshop, tmp_path):
    whole, first = workshop.trainer(ALONE), workshop.trainer(ALONE)
    list(whole.train_stable(384))
    list(first.train_stable(192))
    first.save(tmp_path / "checkpoint")
    second = workshop.trainer(ALONE)
    second.load(tmp_path / "checkpoint")
    list(second.train_stable(384))
    spec, _ = _grids(whole, ALONE)
    for trainer in (whole, second):
        list(trainer.finish(512, spec))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert (tmp_path / "checkpoint").stat().st_size < 4 * sum(p.numel() for p in whole.model.parameters())


def test_the_same_model_is_trained_again(workshop):
    """A test of rates does so, even after a training that failed."""
    trainer = workshop.trainer(ALONE)
    flags = [
        parameter.requires_grad for parameter in workshop.trainer(replace(ALONE, finishing=None)).model.parameters()
    ]
    list(trainer.train_stable(64))
    trainer.settle()
    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == flags
    assert all(torch.isfinite(parameter).all() and parameter.numel() for parameter in trainer.model.parameters())
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


def test_stages_before_the_end_are_shared_only_by_students_of_one_grid():
    plain = replace(ALONE, finishing=replace(FINISHING, scales="absmax"))
    other = replace(ALONE, finishing=Finishing(format="gguf-q4_0", bits=4, group_size=32, scales="alone"))
    assert len({ALONE.stable_id, plain.stable_id, other.stable_id}) == 3
    assert plain.stable_id == replace(ALONE, finishing=None).stable_id


def test_contradictions_are_refused():
    with pytest.raises(InputError, match="lora"):
        replace(ALONE, distillation=Distillation(lora=Lora(rank=4)))
    with pytest.raises(InputError, match="from scratch"):
        replace(ALONE, init=Init(source="scratch"))
    with pytest.raises(InputError, match=r"finishing\.start"):
        replace(FINISHING, start=0.5)


@by_grid
def test_a_share_of_the_way_lies_on_the_grid_between_both_ends(grid):
    """Share 0 gives the beginning and share 1 the end, bit for bit.

    In between, scales are the mean, rounded as in a file.
    """
    weight, trained = _moved(grid)
    ends = trained.stored()

    def at(share):
        shown = ScaledCodes(torch.nn.Parameter(weight.clone()), grid)
        begins = shown.stored()
        shown.move(ends, share)
        values = shown().detach().numpy().copy()
        return values, shown.settle(), begins

    values, stored, begins = at(0.0)
    np.testing.assert_array_equal(values, deployed(weight.numpy(), grid))
    np.testing.assert_array_equal(stored.scales, begins.scales)
    np.testing.assert_array_equal(at(1.0)[0], trained().detach().numpy())
    values, stored, begins = at(0.5)
    np.testing.assert_array_equal(unpack(pack(values, grid, stored), grid, values.shape), values)
    mean = (begins.scales.astype(np.float64) + ends.scales) / 2
    # A scale of a super-block is one of 64 multiples. Other scales have ten bits or more.
    np.testing.assert_allclose(
        stored.scales, mean, rtol=1e-2, atol=np.abs(mean).max() / (50 if grid.block_size else 500)
    )
    if grid.scale_dtype != "e8m0":
        assert not np.array_equal(values, at(0.0)[0])
        assert not np.array_equal(values, at(1.0)[0])


def test_a_scale_that_is_stored_as_0_divides_by_itself_or_by_the_least_one():
    least = 2.0**-24
    scale = torch.tensor([-0.5, -1e-9, 0.0, 1e-9, 0.5, 3.0])
    stored = torch.tensor([0.0] * 5 + [2.0])[:, None]
    for grid, expected in (
        (Q6_K, [-0.5, -least, least, least, 0.5, 7.0]),
        (Q4_K, [least, least, least, least, 0.5, 7.0]),
    ):
        steps = Steps(torch.full((6, 1), 7.0), False, stored, None, None, None, "half_even")
        assert _revived(steps, scale, grid)[:, 0].tolist() == pytest.approx(expected, rel=1e-7)
