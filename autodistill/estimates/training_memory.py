"""Predicted memory of training a described model, by parts, at the moment of the largest use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from autodistill.estimates.activations import is_further_table, kv_bytes
from autodistill.estimates.serving_memory import TRAINING_PROCESS_BYTES
from autodistill.models.config import uniform
from autodistill.models.families import WHOLE_FAMILIES, names_of
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role, TensorSpec, tensors_ending, tensors_of
from autodistill.quantization.grids import Grid
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Lora


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """Memory of training by parts, in bytes.

    Attributes:
        weights_bytes: Master weights in float32. If only the scales of weights are trained, their codes and scales.
        gradients_bytes, optimizer_bytes: For the trained weights, one float32 number each, and AdamW's two moments.
        shown_bytes: The weights with which products compute, if these are not the masters: rounded to bfloat16, or on a
            grid.
        activations_bytes: What the forward pass keeps for the backward pass.
        logits_bytes: Logits. The gradient of the loss takes their place.
        alignment_bytes: What alignments add: projections with their gradients and optimiser states, aligned states, the
            factors of attention matrices, and the teacher's layer.
        writing_bytes: Keys and values, and logits, of the text that a student writes itself, between steps.
        overhead_bytes: All other memory of the process.
        passes: Forward and backward passes of a step.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    shown_bytes: int
    activations_bytes: int
    logits_bytes: int
    alignment_bytes: int
    overhead_bytes: int
    writing_bytes: int = 0
    passes: int = 1

    @property
    def parts(self) -> dict[str, int]:
        """Return the parts by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name.endswith("_bytes")}

    @property
    def total_bytes(self) -> int:
        """The memory at the moment of the largest use.

        In a step of several passes, all gradients are held together with what the last pass keeps. In a step of one
        pass, gradients appear as kept activations are freed, so the larger of the two counts. While a student writes,
        nothing else is held except its shown weights.
        """
        kept = self.shown_bytes + self.activations_bytes + self.logits_bytes + self.alignment_bytes
        held = kept + self.gradients_bytes if self.passes > 1 else max(kept, self.gradients_bytes)
        held = max(held, self.shown_bytes + self.writing_bytes) if self.writing_bytes else held
        return self.weights_bytes + self.optimizer_bytes + held + self.overhead_bytes


class _SavedBytes(NamedTuple):
    """Bytes that a layer keeps for a token, for each unit of its width, of its queries, of its keys, and of its FFN."""

    width: int
    queries: int
    keys: int
    ffn: int


# By transformers' `model_type`: in float32, and under bfloat16 autocast.
_SAVED_BYTES = {
    "llama": (_SavedBytes(24, 8, 8, 16), _SavedBytes(26, 4, 4, 8)),
    # Also the norms of queries and keys.
    **dict.fromkeys(("qwen3", "qwen3_moe"), (_SavedBytes(24, 16, 16, 16), _SavedBytes(26, 10, 10, 8))),
    # Also these, and the input and the normalised value of two norms before the residual.
    "gemma3_text": (_SavedBytes(40, 16, 16, 16), _SavedBytes(42, 12, 12, 8)),
    # LayerNorm keeps one input for both; fused projections with rotated copies; no gate.
    "gpt_neox": (_SavedBytes(12, 14, 14, 8), _SavedBytes(8, 7, 7, 4)),
    # Also the gates of the heads.
    "qwen3_5_text": (_SavedBytes(24, 32, 16, 16), _SavedBytes(28, 18, 12, 8)),
    # As Gemma 3, and the norm of values.
    "gemma4_text": (_SavedBytes(40, 16, 20, 16), _SavedBytes(42, 10, 18, 8)),
}
_BY_LAYER_BYTES = ((24, 12), (18, 10))
"""Bytes that a layer of Gemma 4 also keeps if there is a further table, in float32, and under bfloat16 autocast: for
each unit of its part of the table's row, and for each unit of its width."""
_CAPPED = ("gemma4_text",)
"""Families whose logits are capped, which keeps them a second time."""


class _StateBytes(NamedTuple):
    """Bytes that a layer with a recurrent state keeps for a token, by what they grow with.

    They were fitted to what transformers' gated delta rule in torch keeps, for 22 random sizes; none was off by more
    than 2%. A kernel keeps less.

    Attributes:
        mixed: Queries, keys and values together.
        keys: The keys, repeated for each head of values.
        values: The values.
        chunk: The tokens of a chunk, in each head of values.
    """

    mixed: float
    keys: float
    values: float
    chunk: float


_STATE_BYTES = (_StateBytes(11, 42, 12.3, 21.9), _StateBytes(4.1, 36.9, 13.9, 14.6))  # in float32, and in bfloat16
_STATES = 8  # bytes of each number of a state that a chunk keeps
_CHUNK = 64  # tokens


def adapted_tensors(spec: ModelSpec, lora: Lora) -> tuple[TensorSpec, ...]:
    """Return the weights for which low-rank changes are trained, in the order of the model's tensors."""
    family = names_of(spec.architecture)
    chosen = {"attention": (False,), "ffn": (True,), "all": (False, True)}[lora.layers]
    return tuple(
        tensor
        for tensor in spec.tensors
        if tensor.role is Role.LINEAR and family.takes_low_rank(tensor.name) and family.in_ffn(tensor.name) in chosen
    )


def training_memory(
    spec: ModelSpec,
    *,
    tokens: int,
    train_embeddings: bool = True,
    checkpointing: bool = False,
    optimizer_state: OptimizerState = "float32",
    teacher: ModelSpec | None = None,
    alignment: Alignment | None = None,
    attention: Attention | None = None,
    lora: Lora | None = None,
    bf16: bool = False,
    on_grid: bool = False,
    scales_of: QuantizationScheme | None = None,
    passes: int = 1,
    written: int = 0,
) -> TrainingEstimate:
    """Predict the memory that a trial's training takes: float32 weights and AdamW.

    In float32, each layer keeps for each token: the input, the normalised value and the scaled value of both norms (6
    widths); queries, keys and values as attention takes them, and its output; and gate, its activation, up and product
    of the FFN. This was read off the tensors that transformers' modules save for the backward pass. Under bfloat16
    autocast the norms keep the same, and each product keeps its input and its weight, rounded again. `_SAVED_BYTES`
    holds what differs by family.

    Args:
        spec: The student.
        tokens: Tokens of one forward and backward pass.
        train_embeddings: Whether the embedding table, and so a tied head, is trained.
        checkpointing: Whether only each layer's input is kept, and one layer at a time is computed again.
        optimizer_state: Type of AdamW's two moments, of 4, 2 or 1 byte each. "int8" has a float32 scale for each block
            of 256.
        teacher: The teacher, if there is an alignment.
        alignment, attention: What is aligned to the teacher.
        lora: Low-rank changes that are trained instead of the weights. Their inner results are kept, and so are the
            tensors from which the frozen weights' gradients would have been computed.
        bf16: Whether products are computed in bfloat16.
        on_grid: Whether the weights of products and the table are shown on a grid at the end of training.
        scales_of: The storage of weights if only their scales and minima are trained, or None if weights are trained.
        passes: Forward and backward passes of an optimiser step.
        written: Number of sequences, within `tokens`, that the student writes at once; 0 if it writes nothing.
    """
    teacher = teacher or spec
    ffns = _kept_by_ffns(spec, bf16=bf16)
    tables = spec.vocabulary * spec.width + _further_table(spec)
    frozen = 0 if train_embeddings else tables
    trained = spec.parameters - frozen
    adapters = ranks = 0
    if lora is not None:
        shapes = [tensor.shape for tensor in adapted_tensors(spec, lora)]
        adapters, ranks = lora.rank * sum(map(sum, shapes)), lora.rank * len(shapes)
        trained = adapters + tables - frozen
    inner = (2 if bf16 else 4) * ranks // spec.layers
    layers = [one + inner for one in _kept_by_layers(spec, bf16=bf16)]
    kept = 4 * spec.layers * spec.width + max(layers) + max(ffns) if checkpointing else sum(layers) + sum(ffns)
    looked_up = train_embeddings and scales_of is None
    shown = _shown_bytes(spec, checkpointing=checkpointing, bf16=bf16, on_grid=on_grid, looked_up=looked_up)
    weights = 4 * (spec.parameters + adapters)
    if scales_of is not None:
        coded, scales = _coded(spec, scales_of)
        trained = spec.parameters - coded + scales
        # A byte for each code, and the initial scales and minima. Until then, the weights lie there as they are.
        weights = max(coded + 4 * (trained + scales), weights - shown)
    return TrainingEstimate(
        weights_bytes=weights,
        gradients_bytes=4 * trained,
        optimizer_bytes=_moments_bytes(trained, optimizer_state),
        shown_bytes=shown,
        activations_bytes=tokens * kept,
        logits_bytes=(2 if bf16 else 4) * tokens * spec.vocabulary * (2 if spec.architecture in _CAPPED else 1),
        alignment_bytes=(_states_bytes(spec, teacher, alignment, tokens) if alignment else 0)
        + (_attention_bytes(spec, teacher, attention, tokens) if attention else 0),
        overhead_bytes=TRAINING_PROCESS_BYTES,
        writing_bytes=_writing_bytes(spec, tokens, written, bf16=bf16) if written else 0,
        passes=passes,
    )


def _further_table(spec: ModelSpec) -> int:
    """Return the number of weights of a table of tokens beside the embedding table."""
    return sum(math.prod(one.shape) for one in tensors_of(spec.tensors, Role.EMBEDDING) if is_further_table(one, spec))


def _ffn_widths(spec: ModelSpec) -> Sequence[int]:
    """Return the neurons of each layer's FFN, also in models that are never cut."""
    if spec.architecture not in WHOLE_FAMILIES:
        return spec.ffn_by_layer
    return [tensor.shape[0] for tensor in tensors_ending(spec.tensors, ".mlp.gate_proj.weight")]


def _saved_bytes(spec: ModelSpec, *, bf16: bool) -> _SavedBytes:
    return _SAVED_BYTES.get(spec.architecture, _SAVED_BYTES["llama"])[bf16]


def _kept_by_ffns(spec: ModelSpec, *, bf16: bool) -> list[int]:
    """Return the bytes that each layer's FFN keeps for a token for the backward pass.

    A mixture keeps as much for each expert of the token, which also reads and writes a row of the width of its own. And
    it keeps the router's output for each expert.
    """
    ffn = _saved_bytes(spec, bf16=bf16).ffn
    if not spec.experts:
        return [ffn * width for width in _ffn_widths(spec)]
    taken = ffn * spec.ffn_width + (4 if bf16 else 8) * spec.width
    return [spec.active_experts * taken + 4 * spec.experts] * spec.layers


def _kept_by_layers(spec: ModelSpec, *, bf16: bool) -> list[int]:
    """Return the bytes that each layer keeps for a token for the backward pass, without those of its FFN."""
    width, queries, keys, _ = _saved_bytes(spec, bf16=bf16)
    usual = width * spec.width + spec.head_dim * (queries * spec.heads + keys * spec.kv_heads)
    if spec.architecture == "gemma4_text":
        return _kept_of_gemma4(spec, bf16=bf16)
    if not spec.recurrent:
        return [usual] * spec.layers
    own = dict(spec.fields)
    heads, key, value = (own[f"linear_{name}"] for name in ("num_value_heads", "key_head_dim", "value_head_dim"))
    of = _STATE_BYTES[bf16]
    mixed = 2 * own["linear_num_key_heads"] * key + heads * value
    state = of.mixed * mixed + heads * (of.keys * key + of.values * value + of.chunk * _CHUNK)
    state += _STATES * heads * key * value / _CHUNK
    return [usual if keys else width * spec.width + int(state) for keys in spec.kv_widths]


def _kept_of_gemma4(spec: ModelSpec, *, bf16: bool) -> list[int]:
    """Return the bytes that each layer keeps for a token as `_kept_by_layers`; layers have heads of several sizes."""
    of, (row, scaled) = _saved_bytes(spec, bf16=bf16), _BY_LAYER_BYTES[bf16]
    queries = [tensor.shape[0] for tensor in tensors_ending(spec.tensors, ".self_attn.q_proj.weight")]
    keys = spec.kv_widths or (spec.kv_heads * spec.head_dim,) * spec.layers
    by_layer = dict(spec.fields)["hidden_size_per_layer_input"]
    same = of.width * spec.width + (scaled * spec.width + row * by_layer if by_layer else 0)
    return [same + of.queries * own + of.keys * theirs for own, theirs in zip(queries, keys, strict=True)]


def _writing_bytes(spec: ModelSpec, tokens: int, sequences: int, *, bf16: bool) -> int:
    """Return the memory for writing the ends of sequences that have `tokens` tokens together.

    It holds the keys and values of all tokens. Those of one layer count twice, because each token makes them longer by
    a copy. It also holds four float32 arrays of the last token of each sequence: the logits, the logits divided by the
    temperature, these minus the noise, and the noise. Under autocast keys stay in float32, in which they are rotated by
    their position.
    """
    cached = kv_bytes(spec, spec.layers + 1, tokens, ("f16", "f16"))
    return (3 if bf16 else 4) * cached // 2 + 4 * 4 * sequences * spec.vocabulary


def _shown_bytes(spec: ModelSpec, *, checkpointing: bool, bf16: bool, on_grid: bool, looked_up: bool) -> int:
    """Return the memory of the weights with which products compute, if these are not the masters.

    Args:
        spec: The student.
        checkpointing: Whether one layer after another shows its weights, so the widest one counts. The loss shows a
            head's.
        bf16, on_grid: As for `training_memory`.
        looked_up: Whether the table is trained. If so, it lies on the grid as a whole and is looked up in float32. For
            a frozen table, only the rows that are looked up are put on the grid.
    """
    table = spec.vocabulary * spec.width
    held = uniform(spec) if checkpointing and spec.ffn_widths else spec
    linear = sum(math.prod(tensor.shape) for tensor in held.tensors if tensor.role is Role.LINEAR) // (
        spec.layers if checkpointing else 1
    )
    shown = (2 if bf16 else 4 if on_grid else 0) * (linear + table)
    if on_grid and looked_up:
        # A further table is no product's weight, so it lies there in float32 alone.
        shown += 4 * _further_table(spec) + (4 * table if bf16 else 0)
    return shown


def _coded(spec: ModelSpec, scheme: QuantizationScheme) -> tuple[int, int]:
    """Return the number of weights on a grid, and the number of their scales and minima."""
    coded = scales = 0
    for tensor in spec.tensors:
        if isinstance(grid := scheme.storage(tensor), Grid):
            size = math.prod(tensor.shape)
            coded += size
            scales += size // grid.group(tensor.shape[-1]) * (2 if grid.offset == "minimum" else 1)
    return coded, scales


def beside_bytes(recipes: Iterable[Distillation], teacher: ModelSpec, *, bf16: bool, held_bytes: int) -> int:
    """Return the memory of the teacher during a student's training: all of it, its head, or nothing.

    Args:
        recipes: The recipes; the one that needs the most counts.
        teacher: Shape of the teacher.
        bf16: Whether products are computed in bfloat16, and the teacher's weights are held in it.
        held_bytes: Memory of the teacher's weights otherwise.
    """
    signals = {one.signal for one in recipes if one.reads_teacher}
    if "online" in signals:
        return 2 * teacher.parameters if bf16 else held_bytes
    return (2 if bf16 else 4) * teacher.vocabulary * teacher.width if "states" in signals else 0


def _moments_bytes(trained: int, optimizer_state: OptimizerState) -> int:
    values = {"float32": 8, "bfloat16": 4, "int8": 2}[optimizer_state] * trained
    return values + (2 * 4 * trained // 256 if optimizer_state == "int8" else 0)


def _states_bytes(spec: ModelSpec, teacher: ModelSpec, alignment: Alignment, tokens: int) -> int:
    """Return the memory of each aligned layer: its states, what the projection keeps, projections and differences."""
    layers = spec.layers if alignment.layers == "all" else alignment.count
    # The channels between the projection's two maps, and how many times they are kept.
    inner, times = {"low-rank": (alignment.rank, 1), "mlp": (2 * teacher.width, 2)}.get(alignment.projection, (0, 0))
    weights = inner * (spec.width + teacher.width)
    if alignment.projection == "linear":
        weights = spec.width * teacher.width
    return layers * (16 * weights + 4 * tokens * (spec.width + times * inner + 2 * teacher.width))


def _attention_bytes(spec: ModelSpec, teacher: ModelSpec, attention: Attention, tokens: int) -> int:
    """Return the memory of attention alignment: the factors of the matrices, their gradients, and the layer."""
    queries, keys, theirs, their_keys = (
        heads * one.head_dim for one in (spec, teacher) for heads in (one.heads, one.kv_heads)
    )
    if attention.kind == "maps":
        # A key's gradient is kept for each of the query heads that share the key.
        sides, gradients, target = queries + keys, 2 * queries, theirs + their_keys
    else:
        sides, target = queries + 2 * keys, theirs + 2 * their_keys
        gradients = 2 * sides
    layer = sum(math.prod(tensor.shape) for tensor in teacher.tensors if ".layers.0." in tensor.name)
    return 4 * layer + 4 * tokens * (sides + gradients + target)


OptimizerState = Literal["float32", "bfloat16", "int8"]
