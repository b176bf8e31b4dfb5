"""Low-rank changes against float64: what is computed, trained, merged, rounded and resumed."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from autodistill.distillation.training.fake_quantize import FakeQuantized, quantized_training
from autodistill.distillation.training.lora import Adapter, check_lora
from autodistill.errors import InputError
from autodistill.estimates.training_memory import training_memory
from autodistill.models.config import spec_from_config
from autodistill.quantization.grids import Q4_0
from autodistill.quantization.rounding import deploy_tensor
from autodistill.strategy.recipe import Distillation, Lora
from autodistill.strategy.strategy import Init, Strategy

LORA = Lora(rank=4, alpha=8.0)
WHOLE = Init(depth=1.0)


def strategy(lora=LORA, **changes):
    return Strategy(init=WHOLE, distillation=Distillation(learning_rate=1e-2, lora=lora, **changes))


def _moved(seed=0):
    """Return a weight [24, 32] and an adapter that is no longer the identity."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 32, generator=generator)
    adapter = Adapter(weight, LORA, seed)
    with torch.no_grad():
        adapter.up.normal_(generator=generator)
    return weight, adapter


def test_a_change_begins_as_a_linear_layer_of_torch_does_and_as_no_change():
    adapter, layer = Adapter(torch.empty(24, 4096), LORA, seed=0), torch.nn.Linear(4096, LORA.rank)
    # The largest of 16,384 even draws lies within 0.1% of their bound.
    torch.testing.assert_close(adapter.down.abs().max(), layer.weight.abs().max(), rtol=1e-3, atol=0)
    assert not adapter.up.any()


def test_change_and_gradients_are_those_of_the_merged_weight_in_float64():
    weight, adapter = _moved()
    inputs, outer = torch.randn(5, 32), torch.randn(5, 24)
    ((functional.linear(inputs, weight) + adapter(inputs)) * outer).sum().backward()
    down, up = (p.detach().double().requires_grad_() for p in (adapter.down, adapter.up))
    exact = weight.double() + 8.0 / 4 * up @ down
    (functional.linear(inputs.double(), exact) * outer.double()).sum().backward()
    torch.testing.assert_close(adapter.merged(weight), exact.float())
    torch.testing.assert_close(adapter.down.grad, down.grad.float())
    torch.testing.assert_close(adapter.up.grad, up.grad.float())


def test_only_changes_are_trained_and_have_states(workshop):
    trainer = workshop.trainer(strategy())
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    list(trainer.train_stable(256))
    assert all(p.grad is None and not p.requires_grad for p in trainer.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    spec = spec_from_config(trainer.model.config.to_dict())
    # Each of 6 layers has queries and output [64, 64], keys and values [32, 64], and three matrices [128, 64].
    count = 6 * 4 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (128 + 64))
    states = [value for state in trainer.optimizer.state.values() for key, value in state.items() if key != "step"]
    estimate = training_memory(spec, tokens=64, lora=LORA, train_embeddings=False)
    assert sum(value.nbytes for value in states) == estimate.optimizer_bytes == 8 * count
    assert estimate.gradients_bytes == 4 * count
    assert estimate.weights_bytes == 4 * (spec.parameters + count)


@pytest.mark.parametrize(("layers", "trained"), [("attention", {"q", "k", "v", "o"}), ("ffn", {"gate", "up", "down"})])
def test_which_layers(workshop, layers, trained):
    trainer = workshop.trainer(strategy(replace(LORA, layers=layers), train_embeddings=True))
    names = {name for name, _ in trainer._trained()}
    adapted = {name.split(".")[-3].removesuffix("_proj") for name in names if name.startswith("adapter.")}
    assert adapted == trained
    assert names - {name for name in names if name.startswith("adapter.")} == {"student.model.embed_tokens.weight"}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_merged_student_is_w_plus_alpha_over_r_b_a(workshop, bf16):
    trainer = workshop.trainer(strategy(), bf16=bf16)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    list(trainer.train_stable(384))
    # The final change, at the end of the decay, is read just before the merge.
    kept, merge = {}, trainer._adapters.merge

    def keep(model):
        kept.update({name: (a.up.detach().double(), a.down.detach().double()) for name, a in adapters.items()})
        ids = torch.from_numpy(workshop.data.tokens[:2].astype("int64"))
        with torch.no_grad(), trainer._adapters.added(trainer.model):
            kept["logits"] = trainer.model(ids).logits
        merge(model)

    adapters = trainer._adapters.by_name
    trainer._adapters.merge = keep
    list(trainer.train_decay(512))
    logits = kept.pop("logits")
    for name, (up, down) in kept.items():
        exact = frozen[name].double() + 2.0 * up @ down
        torch.testing.assert_close(dict(trainer.model.named_parameters())[name].double(), exact, rtol=1e-6, atol=1e-6)
        assert float(up.abs().max()) > 0
    assert {name for name, p in trainer.model.named_parameters() if not torch.equal(p, frozen[name])} == set(kept)
    ids = torch.from_numpy(workshop.data.tokens[:2].astype("int64"))
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "plan",
    [
        {},
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
        pytest.param({"checkpointing": True, "micro_batch": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_continues_to_the_last_bit(workshop, tmp_path, plan):
    whole, first = (workshop.trainer(strategy(), **plan) for _ in range(2))
    list(whole.train_stable(256))
    list(whole.train_decay(512))
    list(first.train_stable(128))
    first.save(tmp_path / "checkpoint")
    second = workshop.trainer(strategy(), **plan)
    second.load(tmp_path / "checkpoint")
    list(second.train_stable(256))
    list(second.train_decay(512))
    for (name, one), other in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("learned", [False, True])
def test_on_a_grid_the_merged_weight_is_rounded_and_the_change_has_its_gradient(learned):
    weight, adapter = _moved()
    master = torch.nn.Parameter(weight, requires_grad=False)
    shown = FakeQuantized(master, Q4_0, learned=learned, change=adapter.merged)
    values = shown()
    if not learned:
        assert torch.equal(values, deploy_tensor(adapter.merged(weight), Q4_0))
    outer = torch.randn(24, 32)
    (values * outer).sum().backward()
    merged = adapter.merged(weight).detach().requires_grad_()
    plain = FakeQuantized(torch.nn.Parameter(merged.detach()), Q4_0, learned=learned)
    (plain() * outer).sum().backward()
    # The expected gradients follow by the chain rule from the merged weight's own gradient.
    gradient = plain.master.grad.double()
    torch.testing.assert_close(adapter.up.grad, (2.0 * gradient @ adapter.down.detach().double().T).float())
    torch.testing.assert_close(adapter.down.grad, (2.0 * adapter.up.detach().double().T @ gradient).float())
    assert master.grad is None
    if learned:
        torch.testing.assert_close(shown.scale.grad, plain.scale.grad)
    # The same step in two passes, each with half of the gradient.
    expected = [adapter.up.grad, adapter.down.grad, shown.scale.grad if learned else None]
    adapter.up.grad = adapter.down.grad = None
    if learned:
        shown.scale.grad = None
    with shown.one_step():
        for _ in range(2):
            with torch.no_grad():
                shown()
            (shown() * (outer / 2)).sum().backward()
    found = [adapter.up.grad, adapter.down.grad, shown.scale.grad if learned else None]
    torch.testing.assert_close(found[: 2 + learned], expected[: 2 + learned])
    assert master.grad is None


@pytest.mark.parametrize("learned", [False, True])
def test_what_a_decay_on_a_grid_saw_last_is_what_is_packed(workshop, learned):
    trainer = workshop.trainer(strategy())
    grids = {name: Q4_0 for name, _ in trainer.model.named_parameters() if name.endswith("proj.weight")}
    list(trainer.train_stable(384))
    ids = torch.from_numpy(workshop.data.tokens[:2].astype("int64"))
    seen, merge = {}, trainer._adapters.merge

    def keep(model):
        adapted = {name: adapter.merged for name, adapter in trainer._adapters.by_name.items()}
        if not learned:
            with torch.no_grad(), quantized_training(trainer.model, grids.get, changes=adapted):
                seen["logits"] = trainer.model(ids).logits
        merge(model)

    trainer._adapters.merge = keep
    list(trainer.train_decay(512, grids.get, learned=learned))
    assert set(trainer.scales) == (set(grids) if learned else set())
    if not learned:
        for name, parameter in trainer.model.named_parameters():
            if name in grids:
                parameter.data = deploy_tensor(parameter.data, Q4_0)
        with torch.no_grad():
            assert torch.equal(trainer.model(ids).logits, seen["logits"])


def test_what_cannot_hold_is_refused(workshop):
    spec = spec_from_config(workshop.trainer(strategy()).model.config.to_dict())
    with pytest.raises(InputError, match=r"lora\.rank 32 does not reduce model\.layers\.0\.self_attn\.k_proj\.weight"):
        check_lora(Lora(rank=32), spec)
    check_lora(Lora(rank=32, layers="ffn"), spec)
    scratch = Init(source="scratch", depth=0.5)
    with pytest.raises(InputError, match="lora changes weights only a little"):
        Strategy(init=scratch, distillation=Distillation(lora=LORA, train_embeddings=True))


@pytest.mark.parametrize("layers", ["all", "attention"])
def test_torch_keeps_no_more_than_the_estimate_says(workshop, layers):
    lora = replace(LORA, layers=layers)
    trainer, saved = workshop.trainer(strategy(lora)), {}
    owned = {p.untyped_storage().data_ptr() for m in (trainer.model, trainer._adapters) for p in m.parameters()}

    def keep(tensor):
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    trainer.model.train()
    with (
        trainer._adapters.added(trainer.model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        trainer.model(torch.zeros(8, 32, dtype=torch.long), use_cache=False)
    kept = sum(storage.nbytes() for address, storage in saved.items() if address not in owned)
    spec = spec_from_config(trainer.model.config.to_dict())
    estimate = training_memory(spec, tokens=256, lora=lora, train_embeddings=False)
    assert 0.6 * estimate.activations_bytes < kept <= 1.05 * estimate.activations_bytes
