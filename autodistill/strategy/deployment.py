"""How a student is stored and served: a quantisation scheme, and the runtime that serves it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from autodistill.models.tensors import TensorSpec
from autodistill.quantization.formats import AS_GIVEN, CACHE_BYTES, get_format
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.utils.plain_dataclass import PlainDataclass, check, check_choice, left_out

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sets of layers that vLLM fuses into one matrix each. The layers of a set must therefore have one storage."""


@dataclass(frozen=True, kw_only=True)
class GivenFile(PlainDataclass):
    """A GGUF file that a user gave, and that is served and exported as it is.

    Attributes:
        sha256: The hash of its bytes.
        types: The bytes of its tensors of each of ggml's types, by the type's name in small letters.
        table: The type of its embedding table.
        table_bytes: The bytes of this table.
    """

    sha256: str
    types: tuple[tuple[str, int], ...] = field(metadata={"mapping": True})
    table: str
    table_bytes: int

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(size for _, size in self.types)


@dataclass(frozen=True, kw_only=True)
class Deployment(QuantizationScheme, PlainDataclass):
    """How a trained student is quantised and served.

    The fields of `QuantizationScheme` say how its weights are stored.

    Attributes:
        runtime: The runtime that serves it: "llama.cpp", "vllm", "transformers" or "onnxruntime".
        cache_type_k, cache_type_v: The types of the keys and the values in llama.cpp's cache, from `CACHE_BYTES`. In
            the other runtimes both have 16 bits.
        file: The file, if the format is "gguf-file": a file as it was given, which no space can name. `bits` are then
            the rounded mean of its weights.
    """

    runtime: str
    cache_type_k: str = left_out("f16")
    cache_type_v: str = left_out("f16")
    file: GivenFile | None = left_out(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            (self.file is not None) == (self.format == AS_GIVEN.name),
            f"{AS_GIVEN.name} is a file as it was given, which cannot be chosen: name it as --teacher or --candidate",
        )
        check(
            bool(serving(self)),
            f"nothing serves {self.name}: vLLM has kernels for 4 and 8 bits, and zero points with 4 alone, and "
            "transformers loads no mixture with zero points; leave -asym out of types",
        )
        check_choice(f"the runtime of {self.name}", self.runtime, serving(self))
        known = tuple(CACHE_BYTES) if self.runtime == "llama.cpp" else ("f16",)
        check_choice(f"cache_type_k in {self.runtime}", self.cache_type_k, known)
        check_choice(f"cache_type_v in {self.runtime}", self.cache_type_v, known)

    @property
    def container(self) -> str:
        """The container of the exported file: the format's own, or another one if the runtime does not read that."""
        return get_format(self.format).container_for(self.runtime)

    @property
    def cache_types(self) -> tuple[str, str]:
        """The types of the keys and the values in the cache."""
        return self.cache_type_k, self.cache_type_v

    @property
    def known_bytes(self) -> int:
        """Bytes of the tensors of a file as it was given; otherwise 0."""
        return 0 if self.file is None else self.file.bytes

    @property
    def server_arguments(self) -> tuple[str, ...]:
        """Arguments of llama.cpp's server for a cache of fewer than 16 bits, which a GGUF file does not record."""
        keys, values = self.cache_types
        if (keys, values) == ("f16", "f16"):
            return ()
        return ("--cache-type-k", keys, "--cache-type-v", values, "--flash-attn", "on")

    @property
    def name(self) -> str:
        """The scheme's name, with anything unusual about the cache or the container.

        A cache of fewer than 16 bits is named, as in "gguf-q4_0+kv-q8_0". If the container is not the format's own, it
        is named instead, as in "gguf-q4_0+onnx".
        """
        if self.container != super().container:
            return f"{super().name}+{self.container}"
        keys, values = self.cache_types
        if (keys, values) == ("f16", "f16"):
            return super().name
        cache = f"kv-{keys}" if keys == values else f"k-{keys}-v-{values}"
        return f"{super().name}+{cache}"

    def check_model(self, tensors: Iterable[TensorSpec]) -> None:
        """Refuse a model that cannot be quantised or served in this way.

        Raises:
            InputError: As `QuantizationScheme.check_model`, or vLLM would fuse layers that are stored differently.
        """
        if self.runtime != "vllm" or not self.by_name:
            super().check_model(tensors)
            return
        tensors = tuple(tensors)
        super().check_model(tensors)
        told = "keep all of them or none" if self.keep else "give them one type"
        storages = {tensor.name: self.storage(tensor) for tensor in tensors}
        for first, *others in FUSED:
            for name in storages:
                for other in others:
                    twin = name.replace(f".{first}.weight", f".{other}.weight")
                    check(
                        storages[name] == storages[twin],
                        f"vLLM computes {', '.join((first, *others))} as one: {told}",
                    )


def serving(scheme: QuantizationScheme) -> tuple[str, ...]:
    """Return the runtimes that serve a quantisation scheme, the usual one first.

    A runtime of a format serves all of its schemes, with two exceptions. vLLM has kernels for 4 and 8 bits only, and
    zero points for 4 bits only. transformers 5.24 loads no zero points if the scheme has several grids.
    """
    runtimes = get_format(scheme.format).runtimes
    if scheme.container != "compressed-tensors":
        return runtimes
    kernels = all(one.bits == 4 or (one.bits == 8 and one.symmetric) for one in scheme.grids)
    loaded = len(scheme.grids) == 1 or all(one.symmetric for one in scheme.grids)
    held = {"vllm": kernels, "transformers": loaded}
    return tuple(one for one in runtimes if held[one])


GRAPH, STORED_AS = "model.onnx", "autodistill_deployment"
"""The file of the graph in a folder exported for ONNX Runtime, and the key of the deployment in its config.json."""
IN_16_BITS = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
"""A deployment that can hold any student. A teacher is always scored under it, in addition to the student's own."""
