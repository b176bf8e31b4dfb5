"""The memory of training by parts, against what torch keeps for the backward pass and what AdamW holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from autodistill.distillation.losses.attention import TeacherBlock, attention_loss, watch
from autodistill.distillation.losses.hidden_states import alignment_loss, projection
from autodistill.distillation.training.optimizers.adamw import adamw
from autodistill.distillation.training.trained_scales import TrainedScales
from autodistill.estimates.training_memory import beside_bytes, training_memory
from autodistill.models.config import ARCHITECTURES, spec_from_config
from autodistill.models.layer_widths import model_class
from autodistill.models.loading import decoder_layers
from autodistill.models.whole.experts import EXPERTS
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Lora
from autodistill.strategy.strategy import Finishing
from autodistill.testing import tiny_config as config


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_keeps_what_torch_keeps(architecture: str, bf16: bool) -> None:
    # A number of tokens that is not a size of any matrix.
    described, tokens = config(architecture), 250
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described))
    model.float()
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, tuple[torch.UntypedStorage, torch.Size]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage.data_ptr(), (storage, tensor.shape))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        logits = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False).logits
    kept = {address: found for address, found in saved.items() if address not in owned}
    shown = sum(storage.nbytes() for storage, shape in kept.values() if len(shape) == 2 and tokens not in shape)
    estimate = training_memory(spec_from_config(described), tokens=tokens, bf16=bf16)
    assert estimate.shown_bytes == pytest.approx(shown, rel=1e-6)
    total = sum(storage.nbytes() for storage, _ in kept.values())
    assert estimate.activations_bytes == pytest.approx(total - shown, rel=0.1)
    assert estimate.logits_bytes == logits.nbytes
    assert estimate.weights_bytes == sum(parameter.nbytes for parameter in model.parameters())


WIDER: dict[str, dict[str, Any]] = {
    "width": {"hidden_size": 192},
    "queries": {"num_attention_heads": 4},
    "keys": {"num_key_value_heads": 2},
    "ffn": {"intermediate_size": 224},
}
"""What makes a layer wider by 64 units, one size at a time; queries by 128."""


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
def test_each_unit_of_a_layer_keeps_what_torch_keeps_for_it(architecture: str, bf16: bool) -> None:
    """In torch a few bytes of each head and layer are kept as well, which are less than half a byte a unit."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 160}
    tokens, grows = 250, WIDER
    if architecture == "gpt_neox":
        # Queries and keys are as wide as the layer.
        grows = {"ffn": WIDER["ffn"], "width": WIDER["width"]}
    else:
        sizes["head_dim"] = 64

    def of_a_layer(sizes: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """Return the bytes that a further layer keeps for a token: what torch keeps, and what is told."""
        found = []
        for layers in (2, 3):
            described = config(architecture, num_hidden_layers=layers, **sizes)
            made = transformers.AutoConfig.for_model(**described)
            model = transformers.AutoModelForCausalLM.from_config(made).float()
            kept = kept_for_backward(model, torch.zeros(1, tokens, dtype=torch.long), bf16=bf16)
            told = training_memory(spec_from_config(described), tokens=tokens, bf16=bf16).activations_bytes
            found.append([kept, told])
        return np.diff(found, axis=0)[0] / tokens

    plain = of_a_layer(sizes)
    for name, wider in grows.items():
        kept, told = (of_a_layer(sizes | wider) - plain) / (128 if name == "queries" else 64)
        assert told == round(kept), name


def kept_for_backward(model: Any, ids: torch.Tensor, *, bf16: bool, whole: bool = False, **options: Any) -> int:
    """Return the bytes that torch keeps of a pass over some tokens, without the model's parameters.

    Args:
        model: The model.
        ids: The tokens [1, tokens].
        bf16: Whether products are computed in bfloat16.
        whole: Whether matrices that do not grow with the tokens count too: copies of weights in another type.
        options: Further arguments of the model.
    """
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, tuple[torch.UntypedStorage, torch.Size]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved.setdefault(storage.data_ptr(), (storage, tensor.shape))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(ids, use_cache=False, **options)
    return sum(
        storage.nbytes()
        for address, (storage, shape) in saved.items()
        if address not in owned and (whole or len(shape) != 2 or ids.shape[1] in shape)
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all", "checkpointing"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(2, 2), (2, 6)])
def test_layers_with_a_recurrent_state_keep_what_torch_keeps(
    heads: tuple[int, int], bf16: bool, checkpointing: bool
) -> None:
    """Sizes that the figures were not fitted to. With checkpointing, the layer that keeps most counts."""
    tokens, kept, told = 256, [], []
    state = dict(zip(("linear_num_key_heads", "linear_num_value_heads"), heads, strict=True))
    state |= {"linear_key_head_dim": 32, "linear_value_head_dim": 20}
    one = ["full_attention", "linear_attention"]
    for kinds in (one, one + one[1:], one + one[:1]):
        described = config("qwen3_5_text", **state, num_hidden_layers=len(kinds), layer_types=kinds, head_dim=64)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described)).float()
        kept.append(kept_for_backward(model, torch.zeros(1, tokens, dtype=torch.long), bf16=bf16))
        spec = spec_from_config(described)
        told.append(training_memory(spec, tokens=tokens, bf16=bf16, checkpointing=checkpointing).activations_bytes)
    recurrent, attending = kept[1] - kept[0], kept[2] - kept[0]
    if checkpointing:
        assert told[1] - told[0] == told[2] - told[0] == 4 * 64 * tokens
        assert told[0] - 2 * 4 * 64 * tokens == pytest.approx(max(recurrent, attending), rel=0.04)
    else:
        assert told[1] - told[0] == pytest.approx(recurrent, rel=0.04)
        assert told[2] - told[0] == pytest.approx(attending, rel=0.04)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("by_layer", [0, 24])
def test_layers_of_a_gemma_4_keep_what_torch_keeps(by_layer: int, bf16: bool) -> None:
    """One more layer with a window, with full attention, or that reads another one's keys and has a wide FFN."""
    tokens, kept, told = 250, [], []
    windowed, full = "sliding_attention", "full_attention"
    for kinds, shared in (([windowed, full], 0), ([windowed] * 2 + [full], 0), ([windowed] + [full] * 2, 1)):
        own = {"global_head_dim": 40, "hidden_size_per_layer_input": by_layer, "vocab_size_per_layer_input": 256}
        own |= {"num_hidden_layers": len(kinds), "layer_types": kinds, "num_kv_shared_layers": shared}
        described = config("gemma4_text", **own, use_double_wide_mlp=True, sliding_window=4096)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described)).float()
        # Of a model without a further table, transformers cannot leave out tokens in layers that share keys.
        ids, options = torch.zeros(1, tokens, dtype=torch.long), {"output_hidden_states": not by_layer}
        kept.append(kept_for_backward(model, ids, bf16=bf16, **options))
        spec = spec_from_config(described)
        estimate = training_memory(spec, tokens=tokens, bf16=bf16)
        told.append(estimate.activations_bytes)
        assert estimate.weights_bytes == sum(parameter.nbytes for parameter in model.parameters()) + 4 * len(kinds)
        frozen = training_memory(spec, tokens=tokens, bf16=bf16, train_embeddings=False)
        tables = 256 * (64 + len(kinds) * by_layer)
        assert estimate.gradients_bytes - frozen.gradients_bytes == 4 * tables
    for some, expected in zip(told[1:], kept[1:], strict=True):
        assert some - told[0] == pytest.approx(expected - kept[0], rel=0.04)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_a_mixture_keeps_what_torch_keeps_of_each_token_s_experts(bf16: bool) -> None:
    tokens, kept, told = 250, [], []
    for layers in (2, 4):
        described = config("qwen3_moe", num_hidden_layers=layers, num_local_experts=6, moe_intermediate_size=80)
        made = transformers.AutoConfig.for_model(**described)
        model = transformers.AutoModelForCausalLM.from_config(made, experts_implementation=EXPERTS).float()
        ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
        kept.append(kept_for_backward(model, ids, bf16=bf16, whole=True))
        estimate = training_memory(spec_from_config(described), tokens=tokens, bf16=bf16)
        assert estimate.weights_bytes == sum(parameter.nbytes for parameter in model.parameters())
        told.append(estimate.activations_bytes + estimate.shown_bytes)
    assert told[1] - told[0] == pytest.approx(kept[1] - kept[0], rel=0.05)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_layers_keep_by_their_own_width(bf16: bool) -> None:
    tokens, kept, told = 250, [], []
    for widths in ((192, 64, 128), (192, 192, 192)):
        own = {str(layer): {"intermediate_size": width} for layer, width in enumerate(widths) if width < 192}
        described = config(num_hidden_layers=3) | ({"per_layer_config": own} if own else {})
        made = transformers.AutoConfig.for_model(**described)
        model = model_class(made)(made).float()
        owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        shapes: dict[int, tuple[int, torch.Size]] = {}

        def keep(tensor: torch.Tensor, shapes: dict[int, tuple[int, torch.Size]] = shapes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            shapes.setdefault(storage.data_ptr(), (storage.nbytes(), tensor.shape))
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        kept.append(sum(nbytes for place, (nbytes, _) in shapes.items() if place not in owned))
        spec = spec_from_config(described)
        estimate = training_memory(spec, tokens=tokens, bf16=bf16)
        assert estimate.weights_bytes == sum(parameter.nbytes for parameter in model.parameters())
        told.append(estimate.activations_bytes + estimate.shown_bytes)
        assert training_memory(spec, tokens=tokens, checkpointing=True).activations_bytes == 4 * tokens * (
            3 * 64 + 24 * 64 // 4 + 8 * (64 + 32) // 4 + 4 * 192
        )
    assert told[1] - told[0] == pytest.approx(kept[1] - kept[0], rel=1e-6)


def test_gradients_come_as_what_was_kept_goes_in_a_step_of_one_pass() -> None:
    spec = spec_from_config(config())
    one, several = (training_memory(spec, tokens=256, passes=passes) for passes in (1, 4))
    kept = one.activations_bytes + one.logits_bytes
    fixed = one.weights_bytes + one.optimizer_bytes + one.overhead_bytes
    assert one.total_bytes == fixed + max(kept, one.gradients_bytes)
    assert several.total_bytes == fixed + kept + one.gradients_bytes
    assert sum(one.parts.values()) == several.total_bytes
    on_grid = training_memory(spec, tokens=256, on_grid=True)
    matrices = sum(math.prod(tensor.shape) for tensor in spec.tensors if len(tensor.shape) == 2)
    tied = not any("lm_head" in tensor.name for tensor in spec.tensors)
    assert on_grid.shown_bytes == 4 * matrices - (0 if tied else 4 * spec.vocabulary * spec.width)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_what_a_student_writes_takes_its_keys_and_values_and_logits(bf16: bool) -> None:
    described, sequences, length = config(num_hidden_layers=3), 2, 20
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described)).eval()
    ids = torch.zeros(sequences, length - 8, dtype=torch.long)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        more = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        found = model.generate(ids, return_dict_in_generate=True, output_scores=True, **more)
    # The last token is written but not read.
    held = sum(one.nbytes for layer in found.past_key_values.layers for one in (layer.keys, layer.values))
    held = held // (length - 1) * length
    spec = spec_from_config(described)
    how = {"tokens": sequences * length, "bf16": bf16}
    estimate, silent = training_memory(spec, written=sequences, **how), training_memory(spec, **how)  # type: ignore[arg-type]
    layer = held // spec.layers
    assert found.scores[0].dtype == torch.float32
    assert estimate.writing_bytes == held + layer + 4 * found.scores[0].nbytes
    assert silent.writing_bytes == 0
    # Nothing is kept for a backward pass during this time, so only the larger of the two peaks counts.
    assert estimate.total_bytes == silent.total_bytes
    wide = training_memory(spec, tokens=1, written=10**6)
    held_now = wide.weights_bytes + wide.optimizer_bytes + wide.shown_bytes + wide.overhead_bytes
    assert wide.total_bytes == held_now + wide.writing_bytes


def _kept(run: Callable[[], object]) -> dict[int, int]:
    """Return the bytes, by address, of the storages that autograd keeps of `run`."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return {address: storage.nbytes() for address, storage in saved.items()}


@pytest.mark.parametrize("kind", ["linear", "low-rank", "mlp"])
def test_alignment_keeps_what_torch_keeps(kind: str) -> None:
    tokens, student, teacher = 256, spec_from_config(config(hidden_size=128)), spec_from_config(config())
    alignment = Alignment(layers="even", count=2, projection=kind, rank=24 if kind == "low-rank" else 0)
    projections = [projection(alignment, 128, teacher.width, seed) for seed in (0, 1)]
    weights = {p.data_ptr(): p.nbytes for project in projections for p in project.parameters()}
    target = torch.zeros(tokens, teacher.width, dtype=torch.float16)
    states = [torch.randn(tokens, 128).requires_grad_() for _ in projections]

    def run() -> list[torch.Tensor]:
        pairs = zip(projections, states, strict=True)
        return [alignment_loss(project(rows), target) for project, rows in pairs]

    kept = sum(nbytes for address, nbytes in _kept(run).items() if address not in weights)
    estimate = training_memory(student, tokens=tokens, teacher=teacher, alignment=alignment)
    # Weight, gradient and two moments of each projection.
    assert estimate.alignment_bytes == pytest.approx(kept + 4 * sum(weights.values()), rel=0.05)
    assert training_memory(student, tokens=tokens).alignment_bytes == 0
    everywhere = training_memory(
        student, tokens=tokens, teacher=teacher, alignment=replace(alignment, layers="all", count=1)
    )
    assert everywhere.alignment_bytes == student.layers / 2 * estimate.alignment_bytes


@pytest.mark.parametrize("attention", [Attention(), Attention(kind="relations", relation_heads=8)])
def test_attention_keeps_its_sides_their_gradients_and_a_layer(attention: Attention) -> None:
    tokens, described = 256, config()
    spec = spec_from_config(described)
    make = transformers.AutoConfig.for_model
    model, teacher = (transformers.AutoModelForCausalLM.from_config(make(**described)) for _ in range(2))
    with watch(model, attention) as ours:
        model.model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    block = TeacherBlock(teacher, 1)
    target = block.heads(torch.randn(1, tokens, spec.width), attention)
    gradients = sum(_kept(lambda: attention_loss(ours, target)).values())
    sides = {
        side.untyped_storage().data_ptr(): side.untyped_storage().nbytes()
        for heads in (*ours, *target)
        for side in (heads.left, heads.right)
    }
    layer = sum(p.nbytes for p in decoder_layers(block._model)[0].parameters())
    estimate = training_memory(spec, tokens=tokens, teacher=spec, attention=attention)
    assert estimate.alignment_bytes == pytest.approx(gradients + sum(sides.values()) + layer, rel=0.01)


def test_adamw_takes_sixteen_bytes_a_weight_and_four_where_frozen() -> None:
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    spec = spec_from_config(config(**sizes, head_dim=64, intermediate_size=1536, vocab_size=49152))
    table = 49152 * 576

    def held(train_embeddings: bool) -> int:
        estimate = training_memory(spec, tokens=1024, train_embeddings=train_embeddings)
        return estimate.weights_bytes + estimate.gradients_bytes + estimate.optimizer_bytes

    assert held(True) == 16 * spec.parameters
    assert held(False) == 16 * spec.parameters - 12 * table


@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
def test_moments_take_what_the_optimizers_hold(state: Any) -> None:
    """Compare with the tensors that each AdamW holds for weights in the shapes of a model, except its step counts."""
    spec = spec_from_config(config(hidden_size=256, intermediate_size=512))
    weights = [torch.nn.Parameter(torch.randn(tensor.shape)) for tensor in spec.tensors if len(tensor.shape) == 2]
    optimizer = adamw([{"params": weights}], state)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    held = 0
    for weight in weights:
        moments = {name: part for name, part in optimizer.state[weight].items() if torch.is_tensor(part)}
        # All weights share bitsandbytes' table of 8-bit values.
        held += sum(part.nbytes for name, part in moments.items() if part.numel() > 1 and "qmap" not in name)
    trained = sum(weight.numel() for weight in weights)
    left_out = spec.parameters - trained
    estimate = training_memory(spec, tokens=64, optimizer_state=state)
    per_value = {"float32": 8.0, "bfloat16": 4.0, "int8": 2 + 8 / 256}[state]
    assert estimate.optimizer_bytes == pytest.approx(held + per_value * left_out, rel=1e-3)


def test_a_checkpointed_model_keeps_what_torch_keeps() -> None:
    """Outside the layers, each layer's input is kept.

    Inside, one layer at a time has what all layers have without checkpointing.
    """
    described, tokens = config(num_hidden_layers=4), 250
    spec = spec_from_config(described)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described)).float()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs: list[int] = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0].nbytes))
    model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    whole, kept = (training_memory(spec, tokens=tokens, checkpointing=on).activations_bytes for on in (False, True))
    assert inputs == [4 * spec.width * tokens] * 4
    assert kept == sum(inputs) + whole / 4


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("attention", "q_proj k_proj v_proj o_proj"),
        ("ffn", "gate_proj up_proj down_proj"),
        ("all", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ],
)
def test_low_rank_changes_are_those_of_the_matrices_that_are_named(layers: str, names: str) -> None:
    described = config(num_hidden_layers=3)
    spec, rank = spec_from_config(described), 4
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described))
    adapted = [m.weight for name, m in model.named_modules() if name.rpartition(".")[2] in names.split()]
    assert len(adapted) == 3 * len(names.split())
    changes = sum(rank * sum(weight.shape) for weight in adapted)
    changed = training_memory(spec, tokens=64, lora=Lora(rank=rank, layers=layers), train_embeddings=False)
    assert changed.weights_bytes == 4 * (spec.parameters + changes)
    assert changed.gradients_bytes == 4 * changes
    assert changed.optimizer_bytes == 8 * changes
    table = spec.vocabulary * spec.width
    with_table = training_memory(spec, tokens=64, lora=Lora(rank=rank, layers=layers))
    assert with_table.gradients_bytes == 4 * (changes + table)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shown_are_the_matrices_of_one_layer_or_of_all_and_the_table(bf16: bool, checkpointing: bool) -> None:
    spec = spec_from_config(config(num_hidden_layers=4))
    matrices = sum(math.prod(t.shape) for t in spec.tensors if len(t.shape) == 2 and ".layers." in t.name)
    table, size = spec.vocabulary * spec.width, 2 if bf16 else 4
    shares = {"bf16": bf16, "checkpointing": checkpointing, "tokens": 64}
    shown = size * (matrices // (4 if checkpointing else 1) + table)
    assert training_memory(spec, **shares).shown_bytes == (shown if bf16 else 0)
    on_grid = training_memory(spec, **shares, on_grid=True)
    # A table that is trained is looked up in float32.
    assert on_grid.shown_bytes == shown + (4 * table if bf16 else 0)
    frozen = training_memory(spec, **shares, on_grid=True, train_embeddings=False)
    assert frozen.shown_bytes == shown


@pytest.mark.parametrize("format_name", ["gguf-q4_0", "gguf-q4_1"])
def test_scales_that_are_trained_alone_take_the_place_of_the_weights(format_name: str) -> None:
    """Training holds codes, first scales and trained scales. Before that, the weights are in memory."""
    described = config()
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described)).float()
    spec = spec_from_config(described)
    finishing = Finishing(
        format=format_name, bits=4, group_size=32, symmetric=format_name == "gguf-q4_0", scales="alone"
    )
    storages = {tensor.name: finishing.storage(tensor) for tensor in spec.tensors}
    held = TrainedScales(model, storages.get).by_name.values()
    lasting = sum(buffer.nbytes for weight in held for buffer in weight.buffers())
    trained = sum(one.nbytes for part in (model, *held) for one in part.parameters())
    shown = training_memory(spec, tokens=64, scales_of=finishing, on_grid=True)
    assert shown.weights_bytes == lasting + trained
    assert shown.gradients_bytes == trained
    plain = training_memory(spec, tokens=64, scales_of=finishing)
    assert plain.weights_bytes == 4 * spec.parameters > shown.weights_bytes


def test_what_lies_of_the_teacher_beside_a_student() -> None:
    teacher = spec_from_config(config())
    head = teacher.vocabulary * teacher.width
    recipes = {
        signal: Distillation(signal=signal, signal_tokens=0 if signal in ("online", "states", "written") else 12)
        for signal in ("online", "states", "top-k", "sampled")
    }

    def beside(*signals: str, bf16: bool = False) -> int:
        return beside_bytes([recipes[signal] for signal in signals], teacher, bf16=bf16, held_bytes=12345)

    assert beside("top-k", "sampled") == beside() == 0
    assert (beside("states", "top-k"), beside("states", bf16=True)) == (4 * head, 2 * head)
    assert (beside("online", "states"), beside("online", bf16=True)) == (12345, 2 * teacher.parameters)
    # A signal without weight needs nothing.
    nothing = Distillation(signal="online", signal_tokens=0, divergence_weight=0.0)
    assert beside_bytes([nothing], teacher, bf16=False, held_bytes=12345) == 0
