"""How a student is stored and served: a quantisation scheme, and the runtime that serves it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autodistill.models.tensors import TensorSpec
from autodistill.quantization.formats import CACHE_BYTES, get_format
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.utils.plain_dataclass import PlainDataclass, check, check_choice, left_out

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sets of layers that vLLM fuses to one matrix each, which has one storage."""


@dataclass(frozen=True, kw_only=True)
class Deployment(QuantizationScheme, PlainDataclass):
    """How a trained student is quantised and served.

    The fields of `QuantizationScheme` say how its weights are stored.

    Attributes:
        runtime: The runtime that serves it: "llama.cpp", "vllm", "transformers" or "onnxruntime".
        cache_type_k, cache_type_v: What llama.cpp holds the keys and the values of its cache in, of `CACHE_BYTES`; the
            others hold 16 bits.
    """

    runtime: str
    cache_type_k: str = left_out("f16")
    cache_type_v: str = left_out("f16")

    def __post_init__(self) -> None:
        super().__post_init__()
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
        """What it is written as: the format's own container, or another one where the runtime does not read that."""
        return get_format(self.format).container_for(self.runtime)

    @property
    def cache_types(self) -> tuple[str, str]:
        """What keys and values are held in."""
        return self.cache_type_k, self.cache_type_v

    @property
    def server_arguments(self) -> tuple[str, ...]:
        """Arguments of llama.cpp's server for a cache of fewer than 16 bits, of which a GGUF file says nothing."""
        keys, values = self.cache_types
        if (keys, values) == ("f16", "f16"):
            return ()
        return ("--cache-type-k", keys, "--cache-type-v", values, "--flash-attn", "on")

    @property
    def name(self) -> str:
        """The scheme's name, and a cache of fewer than 16 bits, as in "gguf-q4_0+kv-q8_0"; or the container
        where it is not the format's own, as in "gguf-q4_0+onnx".
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
            InputError: As `QuantizationScheme.check_model`; or vLLM would fuse layers that are stored in several ways.
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

    Every runtime holds the whole format, but vLLM has kernels for 4 and 8 bits only, and zero points for 4 bits only;
    and transformers 5.24 loads no zero points where there are several grids.
    """
    runtimes = get_format(scheme.format).runtimes
    if scheme.container != "compressed-tensors":
        return runtimes
    kernels = all(one.bits == 4 or (one.bits == 8 and one.symmetric) for one in scheme.grids)
    loaded = len(scheme.grids) == 1 or all(one.symmetric for one in scheme.grids)
    held = {"vllm": kernels, "transformers": loaded}
    return tuple(one for one in runtimes if held[one])


GRAPH, STORED_AS = "model.onnx", "autodistill_deployment"
"""The graph in an exported folder of ONNX Runtime, and the key of its config.json that has the deployment."""
IN_16_BITS = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
"""What holds any student, and what a teacher is always scored under beside the student's own."""
