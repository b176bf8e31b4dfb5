"""Types by tensor: the type of each matrix, what is refused, and plain data of other schemes, which stay the same."""

from __future__ import annotations

import random
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.tensors import Role
from autodistill.quantization.formats import FORMATS, INTEGER_TYPES, TYPES
from autodistill.quantization.scheme import QuantizationScheme, scheme_by_tensor
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Finishing
from autodistill.testing import tiny_config

Q4_0: dict[str, Any] = {"format": "gguf-q4_0", "bits": 4, "group_size": 32}
SPEC = spec_from_config(tiny_config(hidden_size=256, head_dim=64, intermediate_size=512))
MATRICES = {tensor.name: tensor for tensor in SPEC.tensors if tensor.role in (Role.LINEAR, Role.EMBEDDING, Role.HEAD)}


def types_of(scheme: QuantizationScheme) -> dict[str, str]:
    names = {storage: kind for kind, storage in TYPES.items()}
    return {name: names[scheme.storage(tensor)] for name, tensor in MATRICES.items()}


def test_the_part_of_most_names_decides() -> None:
    types = {"attention": "q5_0", "self_attn.v_proj": "q6_k", "layers.1.self_attn.v_proj": "q8_0", "embeddings": "q5_1"}
    found = types_of(QuantizationScheme(**Q4_0, types=tuple(types.items())))
    assert found["model.embed_tokens.weight"] == "q5_1"
    assert found["model.layers.0.self_attn.q_proj.weight"] == "q5_0"
    assert found["model.layers.0.self_attn.v_proj.weight"] == "q6_k"
    assert found["model.layers.1.self_attn.v_proj.weight"] == "q8_0"
    assert found["model.layers.1.mlp.up_proj.weight"] == "q4_0"


def test_two_parts_that_contradict_each_other_are_refused() -> None:
    scheme = QuantizationScheme(**Q4_0, types=(("layers.0", "q8_0"), ("mlp.up_proj", "q5_0")))
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.up_proj\.weight two types, by layers\.0 and by mlp\.up_proj"
    ):
        scheme.check_model(SPEC.tensors)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"types": (("up_proj", "q7_0"),)}, r"up_proj as 'q7_0'; a type can be f16, q8_0, .*q2_k"),
        ({"types": (("Up proj", "q8_0"),)}, r"types has 'Up proj'"),
        ({"types": (("up_proj", "q8_0"), ("up_proj", "q5_0"))}, "twice"),
        ({"types": (("up_proj", "q8_0"),), "keep": ("head",)}, "keep and types"),
        (
            {"format": "compressed-tensors", "types": (("up_proj", "q8_0"),)},
            r"a type can be bf16, int8-g32, .*int2-row",
        ),
        (
            {"format": "huggingface", "bits": 16, "group_size": 0, "types": (("up_proj", "q8_0"),)},
            "types can be set in GGUF and compressed-tensors only, and huggingface has one type for all",
        ),
    ],
)
def test_bad_types_are_refused_in_a_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as failure:
        QuantizationScheme(**Q4_0 | changes)
    assert "\n" not in str(failure.value)


def test_parts_that_a_model_lacks_and_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="types names head, but no matrix"):
        QuantizationScheme(**Q4_0, types=(("head", "q8_0"),)).check_model(SPEC.tensors)
    narrow = spec_from_config(tiny_config(hidden_size=64, intermediate_size=96))
    with pytest.raises(InputError, match=r"down_proj.weight has rows of 96 weights, which the blocks of 256"):
        QuantizationScheme(**Q4_0, types=(("down_proj", "q4_k"),)).check_model(narrow.tensors)


def test_plain_data_of_packings_without_types_are_as_they_were() -> None:
    plain = Deployment(runtime="llama.cpp", **Q4_0)
    assert set(plain.to_json()) == {"format", "bits", "group_size", "symmetric", "keep", "runtime"}
    assert "types" not in Finishing(**Q4_0).to_json()
    mixed = Deployment(runtime="llama.cpp", **Q4_0, types=(("embeddings", "q5_0"),), cache_type_k="q8_0")
    data = mixed.to_json()
    assert (data["types"], data["cache_type_k"], "cache_type_v" in data) == ({"embeddings": "q5_0"}, "q8_0", False)
    assert Deployment.from_json(data) == mixed
    with pytest.raises(InputError, match="types must be a mapping"):
        Deployment.from_json(data | {"types": ["embeddings"]})
    with pytest.raises(InputError, match=r"deployment.types must be of type str, not 4"):
        Deployment.from_json(data | {"types": {"embeddings": 4}})


def test_names_tell_types_and_caches() -> None:
    def name(**more: Any) -> str:
        return Deployment(runtime="llama.cpp", **Q4_0, **more).name

    assert name(types=(("embeddings", "q5_0"),)) == "gguf-q4_0+embeddings-q5_0"
    assert name(cache_type_k="q8_0", cache_type_v="q8_0") == "gguf-q4_0+kv-q8_0"
    assert name(cache_type_k="q8_0", cache_type_v="q4_0") == "gguf-q4_0+k-q8_0-v-q4_0"
    many = tuple((f"layers.{layer}", "q8_0") for layer in range(3))
    assert name(types=many).startswith("gguf-q4_0+types-")
    assert name(types=many) != name(types=(*many[:2], ("layers.2", "q5_0")))
    with pytest.raises(InputError, match=r"cache_type_k in llama\.cpp"):
        name(cache_type_k="q5_0")
    with pytest.raises(InputError, match="cache_type_v in transformers"):
        Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0, cache_type_v="q8_0")


@pytest.mark.parametrize("seed", range(8))
def test_a_scheme_by_tensor_stores_each_as_asked(seed: int) -> None:
    dice = random.Random(seed)
    kinds = [kind for kind in TYPES if dice.random() < 0.4] or ["q8_0"]
    asked = {name: dice.choice(kinds) for name in MATRICES}
    scheme = scheme_by_tensor({MATRICES[name]: kind for name, kind in asked.items()})
    assert types_of(scheme) == asked
    scheme.check_model(SPEC.tensors)


@pytest.mark.parametrize("seed", range(4))
def test_a_scheme_of_compressed_tensors_stores_each_as_asked(seed: int) -> None:
    dice = random.Random(seed)
    linears = {name for name, tensor in MATRICES.items() if tensor.role is Role.LINEAR}
    asked = {name: dice.choice(list(INTEGER_TYPES)) if name in linears else "bf16" for name in MATRICES}
    scheme = scheme_by_tensor({MATRICES[name]: kind for name, kind in asked.items()}, "compressed-tensors")
    assert {name: scheme.storage(tensor) for name, tensor in MATRICES.items()} == {
        name: INTEGER_TYPES[kind] for name, kind in asked.items()
    }
    scheme.check_model(SPEC.tensors)
    with pytest.raises(InputError, match="choose huggingface"):
        scheme_by_tensor(dict.fromkeys(MATRICES.values(), "bf16"), "compressed-tensors")


def test_what_all_layers_have_alike_is_said_once() -> None:
    asked = {name: "q8_0" if "embed" in name or "down_proj" in name else "q4_1" for name in MATRICES}
    scheme = scheme_by_tensor({MATRICES[name]: kind for name, kind in asked.items()})
    assert (scheme.format, scheme.types) == ("gguf-q4_1", (("mlp.down_proj", "q8_0"),))


def test_every_type_has_a_format_of_its_name() -> None:
    assert {f"gguf-{kind}" for kind in TYPES} <= set(FORMATS)
