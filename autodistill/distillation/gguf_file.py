"""A teacher's GGUF file, read: header, tensors, and what they are called and shaped in transformers.

The layout is that of the GGUF specification, versions 2 and 3, little-endian. Reading the header takes a fraction of a
second even for a large vocabulary, and finds a truncated file without touching its tensors.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError

# GGUF's names, which are also transformers' `model_type`. llama.cpp's converter writes Mistral models as "llama".
ARCHITECTURES = ("llama", "qwen2", "qwen3")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Cursor:
    """Reads little-endian values one after the other; a read beyond the end raises `struct.error`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def text(self) -> str:
        (length,) = self.numbers("Q")
        if self.position + length > len(self.data):
            raise struct.error("text beyond the end of the file")
        self.position += length
        return self.data[self.position - length : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        """The next value of a type: a number, a text or a list."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind, count = *self.numbers("I"), *self.numbers("Q")
            if kind in _SCALARS and count <= len(self.data):
                return list(self.numbers(_SCALARS[kind], count))
            if kind == _STRING:
                return [self.text() for _ in range(count)]
        if kind not in _SCALARS:  # an array within an array among them, which no writer makes
            raise struct.error(f"unknown value type {kind}")
        return self.numbers(_SCALARS[kind])[0]


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor as the file holds it.

    Attributes:
        name: Under GGUF's name, like "blk.0.attn_q.weight".
        shape: Rows first, as torch has it.
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
        metadata: Its keys and values; floats are float32 widened to Python's.
        tensors: In the file's order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture."""
        return str(self.metadata.get("general.architecture"))

    def config(self) -> dict[str, Any]:
        """transformers' configuration of the model in this file, without defaults.

        Raises:
            InputError: An unsupported architecture, or a property that transformers' model would not reproduce.
        """
        self._check_supported()
        width, heads = self._size("embedding_length"), self._size("attention.head_count")
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        if "token_embd.weight" not in shapes:
            raise InputError(f"{self.path} has no embedding table: give a GGUF file of a whole language model")
        config = {
            "model_type": self.architecture,
            "num_hidden_layers": self._size("block_count"),
            "hidden_size": width,
            "intermediate_size": self._size("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "head_dim": self._size("attention.key_length", self._size("rope.dimension_count", width // heads)),
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": self._key("attention.layer_norm_rms_epsilon"),
            "rope_parameters": {"rope_theta": self._key("rope.freq_base", 10000.0), "rope_type": "default"},
            "vocab_size": shapes["token_embd.weight"][0],
            "tie_word_embeddings": "output.weight" not in shapes,
        }
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            config[f"{name}_token_id"] = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return {key: value for key, value in config.items() if value is not None}

    def values(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        """The tensor in transformers' layout, float32 [shape].

        Raises:
            InputError: A block format that the gguf package cannot read.
        """
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType(tensor.type)
        data = np.memmap(self.path, mode="r", dtype=np.uint8, offset=tensor.offset, shape=(tensor.size,))
        try:
            values = quants.dequantize(data.reshape(*tensor.shape[:-1], -1), kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path} holds {kind.name} blocks, which cannot be read: take another file"
            ) from error
        found = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(?:weight|bias)", tensor.name)
        if found and self.architecture == "llama":
            heads = self._size("attention.head_count")
            values = _unpermute(values, heads if found[1] == "q" else self._size("attention.head_count_kv", heads))
        return np.ascontiguousarray(values, dtype=np.float32)

    def tokenizer_metadata(self) -> dict[str, Any]:
        """The scalar `tokenizer.ggml.*` keys without that prefix: a GGUF export of a student passes them on."""
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
            raise InputError(
                f"{self.path} has {self.architecture}.{name} {value!r}: one size for all layers is supported"
            )
        return value

    def _check_supported(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise InputError(
                f"{self.path} holds the architecture {self.architecture}; supported are {', '.join(ARCHITECTURES)}"
            )
        scaling = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none" or any(tensor.name == "rope_freqs.weight" for tensor in self.tensors):
            raise InputError(f"{self.path} scales its rotary embedding: give the model's Hugging Face folder instead")
        if self.metadata.get(f"{self.architecture}.expert_count", 0):
            raise InputError(f"{self.path} is a mixture of experts, which is not supported: give a dense model")


def read_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file, and checks that all its tensors lie within the file.

    Raises:
        InputError: Unreadable, not GGUF, of another version, or truncated.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise InputError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
            return _read_header(path, data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError, OverflowError, ValueError) as error:
        # An empty file cannot be mapped, which is a ValueError.
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
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    entries = []
    for _ in range(tensor_count):
        name = cursor.text()
        shape = tuple(reversed(cursor.numbers("Q", cursor.numbers("I")[0])))
        entries.append((name, shape, *cursor.numbers("I"), *cursor.numbers("Q")))
    alignment = max(1, int(metadata.get("general.alignment", 32)))
    start = -(-cursor.position // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in entries:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        size = int(np.prod(shape, dtype=object)) // block * block_bytes
        if start + offset + size > len(data):
            raise struct.error(f"tensor {name} ends beyond the file")
        tensors.append(GgufTensor(name=name, shape=shape, type=kind, offset=start + offset, size=size))
    return GgufFile(path=path, metadata=metadata, tensors=tuple(tensors))


def transformers_name(name: str) -> str | None:
    """The parameter of transformers' llama-like models that a GGUF tensor holds, or None if there is none."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found is None or found[2] not in _BLOCK:
        return None
    return f"model.layers.{found[1]}.{_BLOCK[found[2]]}.{suffix}"


def _unpermute(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undoes the row order of llama.cpp's Q and K.

    Within a head, llama.cpp rotates neighbouring rows together, (0, 1), (2, 3), ...; transformers rotates row i with
    row i + half. So the pair index and the index within the pair change places.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
