"""Reader of a teacher's GGUF file: header and tensors, with transformers' names and shapes.

The layout is that of the GGUF specification, versions 2 and 3, little-endian. Reading the header takes a fraction of a
second even for a large vocabulary, and finds a truncated file without touching its tensors.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError
from autodistill.models.families import GGUF_BY_LAYER, GGUF_FAMILIES, WHOLE_FAMILIES, Family, get_family
from autodistill.models.llama_cpp_graphs import FULL, LAYERS_OF_27B, SLIDING, row_order
from autodistill.models.tensors import Role
from autodistill.utils.input_files import check_file

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS = 4  # most dimensions of a ggml tensor
_MIXTURES = {"llama": "mixtral"}  # a graph that also computes experts, and transformers' name of a model with them

_WHOLE = {family.gguf: name for name, family in WHOLE_FAMILIES.items()}


class _Cursor:
    """Reader of successive little-endian values; a read beyond the end raises `struct.error`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        size = struct.calcsize(layout)
        if self.position + size > len(self.data):
            raise struct.error("numbers beyond the end of the file")
        self.position += size
        return struct.unpack_from(layout, self.data, self.position - size)

    def text(self) -> str:
        (length,) = self.numbers("Q")
        if self.position + length > len(self.data):
            raise struct.error("text beyond the end of the file")
        self.position += length
        return self.data[self.position - length : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return the next value of a type: a number, a text or a list."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = *self.numbers("I"), *self.numbers("Q")
            if kind in _SCALARS and count <= len(self.data):
                return list(self.numbers(_SCALARS[kind], count))
            if kind == _STRING and 8 * count <= len(self.data) - self.position:
                return [self.text() for _ in range(count)]
        if kind not in _SCALARS:  # includes arrays within arrays, which no writer makes
            raise struct.error(f"unknown value type {kind}")
        return self.numbers(_SCALARS[kind])[0]


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor as it is stored in the file.

    Attributes:
        name: GGUF's name, like "blk.0.attn_q.weight".
        shape: Rows first, as in torch.
        type: ggml's number of the block format.
        offset, size: Bytes from the start of the file, and number of bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: The file.
        metadata: Keys and values of the header; floats are float32 widened to Python's.
        tensors: Tensors in the file's order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def family(self) -> Family:
        """The model family of this file."""
        return get_family(GGUF_FAMILIES[self.architecture])

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture."""
        return str(self.metadata.get("general.architecture"))

    @property
    def context_length(self) -> int:
        """Context length in tokens that the model was made for."""
        return self._size("context_length")

    def config(self) -> dict[str, Any]:
        """Return the transformers config of the model in this file, without defaults.

        Raises:
            InputError: The architecture is not supported, or transformers' model would not reproduce a property.
        """
        self._check_supported()
        config = self.outline()
        config.setdefault("rope_parameters", self._rotary(self._number("rope.freq_base", 10000.0)))
        if self.architecture != "gptneox":
            config["rms_norm_eps"] = self._number("attention.layer_norm_rms_epsilon")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            config[f"{name}_token_id"] = self._token(f"tokenizer.ggml.{key}_token_id", config["vocab_size"])
        return {key: value for key, value in config.items() if value is not None}

    def end_tokens(self) -> list[int]:
        """Return the tokens at which llama.cpp ends a text because the file says so, without repetition.

        Raises:
            InputError: One of them is not in the vocabulary.
        """
        tokens = self.outline()["vocab_size"]
        found = (self._token(f"tokenizer.ggml.{key}_token_id", tokens) for key in ("eos", "eot", "eom"))
        return list(dict.fromkeys(one for one in found if one is not None))

    def outline(self) -> dict[str, Any]:
        """Return the part of the config that sizes depend on.

        This also works for mixtures of experts, for families that are trained whole, and for any rotary embedding.

        Raises:
            InputError: The architecture is unknown, a size is missing, or there is no embedding table.
        """
        name = self.architecture
        mixed = name not in GGUF_FAMILIES or self.metadata.get(f"{name}.expert_count", 0)
        known = {**_MIXTURES, **_WHOLE} if mixed else GGUF_FAMILIES
        if name not in known:
            what = f"{name} with experts" if name in GGUF_FAMILIES else name
            every = ", ".join(dict.fromkeys((*GGUF_FAMILIES, *_MIXTURES, *_WHOLE)))
            raise InputError(f"{self.path} holds the architecture {what}; known are {every}")
        width, heads = self._size("embedding_length"), self._size("attention.head_count")
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        if "token_embd.weight" not in shapes:
            raise InputError(f"{self.path} has no embedding table: give a GGUF file of a whole language model")
        if self._size("block_count") > len(self.tensors):
            raise InputError(
                f"{self.path} is damaged: it has {len(self.tensors)} tensors of {self._size('block_count')} layers: "
                "get the file again"
            )
        head_dim = self._size("attention.key_length", self._size("rope.dimension_count", width // heads))
        config: dict[str, Any] = {
            "model_type": known[name],
            "num_hidden_layers": self._size("block_count"),
            "hidden_size": width,
            **self._ffn(),
            "num_attention_heads": heads,
            "max_position_embeddings": self.context_length,
            "vocab_size": shapes["token_embd.weight"][0],
            "tie_word_embeddings": "output.weight" not in shapes,
        }
        if name == "gptneox":
            return config | self._neox(width // heads)
        if name == "gemma4":
            return config | self._gemma4(shapes)
        config |= {"num_key_value_heads": self._size("attention.head_count_kv", heads), "head_dim": head_dim}
        if name == "qwen35":
            return config | self._qwen35()
        if mixed:
            config |= {
                "num_local_experts": self._size("expert_count"),
                "num_experts_per_tok": self._size("expert_used_count"),
                "moe_intermediate_size": self._size("expert_feed_forward_length", config["intermediate_size"]),
                "norm_topk_prob": True,  # as llama.cpp computes both
            }
        if name == "gemma3":
            config |= self._gemma(width // heads if config["num_hidden_layers"] == LAYERS_OF_27B else head_dim)
        return config

    def _ffn(self) -> dict[str, Any]:
        """Return the fields of the FFN's width; in a graph with sizes of each layer's own it may be a list."""
        widths, layers = self._key("feed_forward_length"), self._size("block_count")
        if self.architecture == "gemma4":
            return {}  # `_gemma4` returns it
        if not isinstance(widths, list) or self.architecture not in GGUF_BY_LAYER.values():
            return {"intermediate_size": self._size("feed_forward_length")}
        if len(widths) != layers or any(type(width) is not int or width < 1 for width in widths):
            raise InputError(
                f"{self.path} must have {self.architecture}.feed_forward_length above 0 for each of its {layers} "
                "layers: a layer without an FFN is not supported"
            )
        own = {str(layer): {"intermediate_size": width} for layer, width in enumerate(widths) if width < max(widths)}
        return {"intermediate_size": max(widths), **({"per_layer_config": own} if own else {})}

    def _rotary(self, theta: float) -> dict[str, Any]:
        found = {"rope_theta": theta, "rope_type": "default"}
        if self._key("rope.scaling.type", "none") == "linear":
            found |= {"rope_type": "linear", "factor": self._number("rope.scaling.factor")}
        return found

    def _neox(self, head_dim: int) -> dict[str, Any]:
        rotary = self._rotary(self._number("rope.freq_base", 10000.0))
        return {
            "layer_norm_eps": self._number("attention.layer_norm_epsilon"),
            "use_parallel_residual": self._key("use_parallel_residual"),
            "rope_parameters": rotary
            | {"partial_rotary_factor": self._size("rope.dimension_count", head_dim) / head_dim},
        }

    def _qwen35(self) -> dict[str, Any]:
        """Return the fields of the layers' kinds and of their recurrent states."""
        heads = self._size("ssm.time_step_rank")
        return {
            "full_attention_interval": self._size("full_attention_interval", 4),
            "linear_num_key_heads": self._size("ssm.group_count"),
            "linear_num_value_heads": heads,
            "linear_key_head_dim": self._size("ssm.state_size"),
            "linear_value_head_dim": self._size("ssm.inner_size") // heads,
            "linear_conv_kernel_dim": self._size("ssm.conv_kernel"),
        }

    def _gemma4(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return the fields of the layers' kinds, and of all that differs between layers.

        Args:
            shapes: Shapes of the file's tensors.
        """
        kinds = [SLIDING if one else FULL for one in self._by_layer("attention.sliding_window_pattern")]
        ffn, keys = self._by_layer("feed_forward_length"), self._by_layer("attention.head_count_kv")
        layers, shared = len(kinds), self._count("attention.shared_kv_layers")
        first = max(0, layers - shared)
        head_dim = self._size("attention.key_length")
        table = shapes.get("per_layer_token_embd.weight", (1,))
        if any(own not in (ffn[0], 2 * ffn[0]) for own in ffn) or len({*ffn[:first]} | {min(ffn)}) > 1:
            raise InputError(f"{self.path} has FFNs of widths that no Gemma 4 of transformers has: not supported")
        return {
            "layer_types": kinds,
            "sliding_window": self._size("attention.sliding_window"),
            "head_dim": self._size("attention.key_length_swa", head_dim),
            "num_key_value_heads": next(
                (own for own, kind in zip(keys, kinds, strict=True) if kind == SLIDING), keys[0]
            ),
            "per_layer_config": {
                str(layer): {"head_dim": head_dim, "num_key_value_heads": keys[layer]}
                for layer, kind in enumerate(kinds)
                if kind == FULL
            },
            "intermediate_size": ffn[0],
            "use_double_wide_mlp": max(ffn) > ffn[0],
            "attention_k_eq_v": any(f"blk.{layer}.attn_v.weight" not in shapes for layer in range(first)),
            "num_kv_shared_layers": shared,
            "hidden_size_per_layer_input": self._count("embedding_length_per_layer_input"),
            "vocab_size_per_layer_input": table[0],
        }

    def _gemma(self, scaled_by: int) -> dict[str, Any]:
        layers = self._size("block_count")
        window = self._size("attention.sliding_window") if self._key("attention.sliding_window", 0) else 0
        period = self._size("attention.sliding_window_pattern", 6) if window else 1
        local = {"rope_theta": self._number("rope.freq_base_swa", 10000.0), "rope_type": "default"}
        return {
            "query_pre_attn_scalar": scaled_by,
            # transformers requires a window even if no layer uses one.
            "sliding_window": window or self._size("context_length"),
            "layer_types": [SLIDING if (layer + 1) % period else FULL for layer in range(layers)],
            "rope_parameters": {FULL: self._rotary(self._number("rope.freq_base", 10000.0)), SLIDING: local},
            "final_logit_softcapping": self._number("final_logit_softcapping")
            if "gemma3.final_logit_softcapping" in self.metadata
            else None,
        }

    def main_type(self) -> str:
        """ggml's name of the type that holds most bytes, like "Q4_1" or "F16"."""
        from gguf import GGMLQuantizationType

        sizes: Counter[int] = Counter()
        for tensor in self.tensors:
            sizes[tensor.type] += tensor.size
        return GGMLQuantizationType(sizes.most_common(1)[0][0]).name

    def quantized(self) -> str | None:
        """The block format that holds most bytes, or None if most bytes are floating-point numbers."""
        kind = self.main_type()
        return None if kind in ("F16", "BF16", "F32", "F64") else kind

    def values(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        """Return a tensor in the layout of transformers, float32 [shape].

        Raises:
            InputError: The gguf package cannot read the block format, or weights are not finite.
        """
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType(tensor.type)
        try:
            values = quants.dequantize(self.blocks(tensor), kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path} holds {kind.name} blocks, which cannot be read: take another file"
            ) from error
        if not np.isfinite(values).all():
            raise InputError(
                f"{self.path} is damaged: {tensor.name} has weights that are no numbers: get the file again"
            )
        if tensor.name.endswith("_norm.weight") and self.family.norm_role is Role.NORM_ABOVE_ONE:
            values = values - np.float32(1)
        return np.ascontiguousarray(values, dtype=np.float32)

    def check_tokenizer(self) -> None:
        """Refuse invalid lists of tokens or merges, and more tokens than the embedding table has rows.

        Raises:
            InputError: The message says what is wrong.
        """
        prefix = "tokenizer.ggml."
        lists = {name: self.metadata.get(prefix + name, []) for name in ("tokens", "merges", "token_type", "scores")}
        for name, found in lists.items():
            kinds = {"token_type": int, "scores": float}.get(name, str)
            if not isinstance(found, list) or not all(type(one) is kinds for one in found):
                raise InputError(
                    f"{self.path} has {prefix}{name} of another kind than a tokenizer's: get the file again"
                )
        tokens, rows = len(lists["tokens"]), {one.name: one.shape for one in self.tensors}["token_embd.weight"][0]
        if not 0 < tokens <= rows:
            raise InputError(
                f"{self.path} has {tokens:,} tokens, and an embedding table of {rows:,} rows: take a file in which "
                "both are from one model"
            )
        for name in ("token_type", "scores"):
            if len(lists[name]) not in (0, tokens):
                raise InputError(
                    f"{self.path} has {len(lists[name]):,} {prefix}{name} of {tokens:,} tokens: take another file"
                )
        for name in ("model", "pre"):
            if not isinstance(self.metadata.get(prefix + name, ""), str):
                raise InputError(f"{self.path} has no text as {prefix}{name}: take another file")

    def blocks(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor, with its rows in the order of transformers: uint8 [rows, bytes of a row]."""
        data = np.memmap(self.path, mode="r", dtype=np.uint8, offset=tensor.offset, shape=(tensor.size,))
        rows = data.reshape(tensor.shape[0], -1)
        heads = self._size("attention.head_count")
        order = row_order(self.architecture, tensor.name, heads, self._size("attention.head_count_kv", heads))
        return rows if order is None else order.to_transformers(rows)

    def tokenizer_metadata(self) -> dict[str, Any]:
        """Return the scalar `tokenizer.ggml.*` keys without that prefix; the GGUF export of a student keeps them."""
        prefix = "tokenizer.ggml."
        items = ((key.removeprefix(prefix), value) for key, value in self.metadata.items() if key.startswith(prefix))
        return {key: value for key, value in items if not isinstance(value, list)}

    def _key(self, name: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise InputError(f"{self.path} lacks the key {self.architecture}.{name}: take a complete GGUF file")
        return value

    def _size(self, name: str, default: int | None = None) -> int:
        value = self._key(name, default)
        if type(value) is not int or value < 1:
            shown = repr(value)[:60] if isinstance(value, int | float | str) else f"a {type(value).__name__}"
            raise InputError(
                f"{self.path} has {self.architecture}.{name} {shown}: one size for all layers is supported"
            )
        return value

    def _count(self, name: str) -> int:
        """Return a size that may be 0, which it is if it is missing."""
        return self._size(name) if self._key(name, 0) != 0 else 0

    def _by_layer(self, name: str) -> list[int]:
        """Return a size of each layer; a file may give one for all."""
        value, layers = self._key(name), self._size("block_count")
        found = value if isinstance(value, list) else [value] * layers
        if len(found) != layers or any(type(one) not in (int, bool) or one < 0 for one in found):
            raise InputError(f"{self.path} must have {self.architecture}.{name} for each of its {layers} layers")
        return found

    def _number(self, name: str, default: float | None = None) -> float:
        value = self._key(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            shown = repr(value)[:60] if isinstance(value, int | float | str) else f"a {type(value).__name__}"
            raise InputError(f"{self.path} has {self.architecture}.{name} {shown}, which must be a number above 0")
        return float(value)

    def _token(self, name: str, tokens: int) -> int | None:
        value = self.metadata.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < tokens):
            raise InputError(f"{self.path} has a {name} that is none of its {tokens:,} tokens: take another file")
        return value

    def _check_supported(self) -> None:
        if self.architecture not in GGUF_FAMILIES:
            raise InputError(
                f"{self.path} holds the architecture {self.architecture}; supported are {', '.join(GGUF_FAMILIES)}"
            )
        scaling = self._key("rope.scaling.type", "none")
        if scaling not in ("none", "linear") or any(tensor.name == "rope_freqs.weight" for tensor in self.tensors):
            raise InputError(f"{self.path} scales its rotary embedding: give the model's Hugging Face folder instead")
        if self.metadata.get(f"{self.architecture}.expert_count", 0):
            raise InputError(f"{self.path} is a mixture of experts, which is not supported: give a dense model")


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and check that all its tensors lie within the file.

    Raises:
        InputError: The file is unreadable, not GGUF, of another version, or truncated.
    """
    check_file(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise InputError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
            return _read_header(path, data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
        # mmap raises ValueError for an empty file.
        raise InputError(f"{path} is truncated or damaged ({error}): get the file again") from error


def _read_header(path: Path, data: mmap.mmap) -> GgufFile:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor = _Cursor(data)
    cursor.position = 4
    (version,) = cursor.numbers("I")
    if version not in (2, 3):
        raise InputError(f"{path} is version {version} of GGUF; versions 2 and 3, little-endian, can be read")
    tensor_count, key_count = cursor.numbers("Q", 2)
    metadata = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata:
            raise struct.error(f"the key {key[:60]} is there twice")
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    entries = []
    for _ in range(tensor_count):
        name = cursor.text()
        (dimensions,) = cursor.numbers("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise struct.error(f"the tensor {name[:60]} has {dimensions} dimensions")
        shape = tuple(reversed(cursor.numbers("Q", dimensions)))
        entries.append((name, shape, *cursor.numbers("I"), *cursor.numbers("Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise struct.error("general.alignment is no number of bytes")
    start = -(-cursor.position // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in entries:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if 0 in shape or shape[-1] % block:
            raise struct.error(f"the tensor {name[:60]} has rows of {shape[-1]} weights in blocks of {block}")
        size = math.prod(shape) // block * block_bytes
        if start + offset + size > len(data):
            raise struct.error(f"tensor {name[:60]} ends beyond the file")
        if offset % alignment:
            raise struct.error(f"the tensor {name[:60]} does not begin at a multiple of {alignment} bytes")
        tensors.append(GgufTensor(name=name, shape=shape, type=kind, offset=start + offset, size=size))
    _check_apart(tensors)
    return GgufFile(path=path, metadata=metadata, tensors=tuple(tensors))


def _check_apart(tensors: Iterable[GgufTensor]) -> None:
    """Refuse two tensors that have the same name or share bytes."""
    names, end, before = set(), 0, ""
    for tensor in sorted(tensors, key=lambda one: one.offset):
        if tensor.name in names:
            raise struct.error(f"the tensor {tensor.name[:60]} is there twice")
        if tensor.offset < end:
            raise struct.error(f"the tensors {before[:60]} and {tensor.name[:60]} overlap")
        names.add(tensor.name)
        end, before = tensor.offset + tensor.size, tensor.name
