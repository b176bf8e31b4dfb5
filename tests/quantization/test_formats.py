"""The type and the bytes of each stored tensor, against packed bytes, llama.cpp and sums by hand."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from autodistill import plugins
from autodistill.errors import InputError
from autodistill.models.config import resized, spec_from_config
from autodistill.models.families import get_family
from autodistill.models.tensors import Role, TensorSpec, takes_more_bits
from autodistill.quantization.formats import FORMATS, all_formats, get_format, tensor_bytes, weights_bytes
from autodistill.quantization.grids import Grid
from autodistill.quantization.packing import pack
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.testing import tiny_config

PACKINGS = [
    QuantizationScheme(format=held.name, bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric)
    if isinstance(grid, Grid)
    else QuantizationScheme(format=held.name, bits=16, group_size=0)
    for held in FORMATS.values()
    for grid in held.linears
]


@pytest.mark.parametrize("scheme", PACKINGS, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("role", list(Role))
def test_bytes_counted_are_bytes_packed(scheme, role):
    for rows, groups in ((1, 1), (3, 2), (4, 3)):
        shape = (rows, 128 * groups) if role not in (Role.NORM, Role.BIAS) else (128 * groups,)
        storage = scheme.storage(TensorSpec(name="t", role=role, shape=shape))
        weights = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        expected = sum(array.nbytes for array in pack(weights, storage).values())
        found = tensor_bytes(TensorSpec(name="t", role=role, shape=shape), storage)
        assert (found, type(found)) == (expected, int)


def _packing(name, bits, group_size, **more):
    return QuantizationScheme(format=name, bits=bits, group_size=group_size, **more)


def test_a_models_bytes_are_those_of_its_tensors():
    tensors = [
        TensorSpec(name="embed", role=Role.EMBEDDING, shape=(100, 64)),
        TensorSpec(name="layers.0.up", role=Role.LINEAR, shape=(128, 64)),
        TensorSpec(name="layers.1.up.weight", role=Role.LINEAR, shape=(128, 64)),
        TensorSpec(name="norm", role=Role.NORM, shape=(64,)),
    ]
    # Bytes of a block of 32: 34 at 8 bits, 18 at 4 bits (20 with a minimum). Norms take 4 bytes each.
    assert weights_bytes(tensors, _packing("gguf-q4_0", 4, 32)) == 200 * 34 + 512 * 18 + 64 * 4
    assert weights_bytes(tensors, _packing("gguf-q4_1", 4, 32, symmetric=False)) == 200 * 34 + 512 * 20 + 64 * 4
    assert weights_bytes(tensors, _packing("gguf-q5_0", 5, 32)) == 200 * 34 + 512 * 22 + 64 * 4
    assert weights_bytes(tensors, _packing("gguf-q5_1", 5, 32, symmetric=False)) == 200 * 34 + 512 * 24 + 64 * 4
    assert weights_bytes(tensors, _packing("gguf-q8_0", 8, 32)) == 200 * 34 + 512 * 34 + 64 * 4
    assert weights_bytes(tensors, _packing("gguf-f16", 16, 0)) == (6400 + 16384) * 2 + 64 * 4
    assert weights_bytes(tensors, _packing("gguf-bf16", 16, 0)) == (6400 + 16384) * 2 + 64 * 4
    assert weights_bytes(tensors, _packing("huggingface", 16, 0)) == (6400 + 16384 + 64) * 2
    int4 = weights_bytes(tensors, _packing("compressed-tensors", 4, 64))
    assert int4 == 6400 * 2 + 16384 // 2 + 256 * 2 + 2 * 16 + 64 * 2
    # A row of 64 codes of 3 bits takes 6 words and one scale. 128 zero points of 3 bits take 12 words.
    int3 = weights_bytes(tensors, _packing("compressed-tensors", 3, 0, symmetric=False))
    assert int3 == 6400 * 2 + 2 * (128 * (6 * 4 + 2) + 12 * 4 + 16) + 64 * 2
    kept = _packing("gguf-q4_0", 4, 32, keep=("embeddings", "layers.1"))
    assert weights_bytes(tensors, kept) == 6400 * 2 + 256 * 18 + 8192 * 2 + 64 * 4


def test_each_tensor_has_its_storage():
    def held(name, role, bits, group_size, shape=(64, 64), tensor="t.weight", **more):
        storage = _packing(name, bits, group_size, **more).storage(TensorSpec(name=tensor, role=role, shape=shape))
        return storage.name if isinstance(storage, Grid) else storage

    assert held("gguf-q4_0", Role.LINEAR, 4, 32) == "gguf-q4_0"
    assert held("gguf-q4_0", Role.EMBEDDING, 4, 32) == "gguf-q8_0"
    assert held("gguf-q4_0", Role.HEAD, 4, 32) == "gguf-q8_0"
    assert held("gguf-q4_0", Role.NORM, 4, 32, (64,)) == "f32"
    assert held("gguf-f16", Role.LINEAR, 16, 0) == "f16"
    assert held("gguf-f16", Role.BIAS, 16, 0, (64,)) == "f32"
    assert held("compressed-tensors", Role.LINEAR, 4, 64) == "compressed-tensors-int4-g64"
    assert held("compressed-tensors", Role.LINEAR, 3, 0, symmetric=False) == "compressed-tensors-int3-row-asym"
    assert held("compressed-tensors", Role.EMBEDDING, 8, 32) == "bf16"
    assert held("huggingface", Role.NORM, 16, 0, (64,)) == "bf16"
    query = {"tensor": "model.layers.1.self_attn.q_proj.weight", "role": Role.LINEAR}
    for keep in ("attention", "layers.1", "q_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj"):
        assert held("gguf-q4_0", bits=4, group_size=32, keep=(keep,), **query) == "f16"
        assert held("compressed-tensors", bits=4, group_size=32, keep=(keep,), **query) == "bf16"
    # Neither layer 11 nor a "layers.1" of something else is layer 1.
    other = {"tensor": "model.layers.11.self_attn.q_proj.weight", "role": Role.LINEAR}
    assert held("gguf-q4_0", bits=4, group_size=32, keep=("layers.1", "head", "proj"), **other) == "gguf-q4_0"
    assert held("gguf-q4_0", Role.HEAD, 4, 32, keep=("head",)) == "f16"
    assert held("gguf-q4_0", Role.EMBEDDING, 4, 32, keep=("head",)) == "gguf-q8_0"
    assert held("gguf-q4_0", Role.EMBEDDING, 4, 32, keep=("embeddings",)) == "f16"


def test_formats_of_plug_ins_exporters_come_after_those_of_this_project(monkeypatch):
    exporter = SimpleNamespace(formats=(replace(FORMATS["huggingface"], name="tarball", container="tar"),))
    monkeypatch.setattr(plugins, "foreign_names", lambda area: ["tar"])
    monkeypatch.setattr(plugins, "load", lambda area, name: {("exporters", "tar"): exporter}[area, name])
    assert [*all_formats()] == [*FORMATS, "tarball"]
    monkeypatch.setattr(plugins, "foreign_names", lambda area: ["tar", "zip"])
    monkeypatch.setattr(plugins, "load", lambda area, name: exporter)
    with pytest.raises(InputError, match="exporter 'zip' gives its format 'tarball' the container 'tar'"):
        all_formats()


K_QUANTS = {
    # Bits, group, symmetric; and for 256 weights the bytes of a super-block, and of the type that llama.cpp uses if
    # super-blocks do not divide rows.
    "gguf-q6_k": (6, 16, True, 210, 8 * 34),
    "gguf-q5_k": (5, 32, False, 176, 8 * 24),
    "gguf-q4_k": (4, 32, False, 144, 8 * 22),
    "gguf-q3_k": (3, 16, True, 110, 8 * 18),
    "gguf-q2_k": (2, 16, False, 84, 8 * 18),
}


@pytest.mark.parametrize("name", K_QUANTS)
def test_super_blocks_hold_rows_that_they_divide_and_other_grids_the_rest(name):
    bits, group_size, symmetric, block, other = K_QUANTS[name]
    scheme = _packing(name, bits, group_size, symmetric=symmetric)
    up = TensorSpec(name="layers.0.up.weight", role=Role.LINEAR, shape=(1536, 576))
    down = TensorSpec(name="layers.0.down.weight", role=Role.LINEAR, shape=(576, 1536))
    table = TensorSpec(name="embed.weight", role=Role.EMBEDDING, shape=(1000, 576))
    wide = TensorSpec(name="lm_head.weight", role=Role.HEAD, shape=(1000, 768))
    assert weights_bytes([down], scheme) == 576 * 6 * block
    assert weights_bytes([up], scheme) == 1536 * 576 // 256 * other
    assert weights_bytes([table], scheme) == 1000 * 18 * 34
    assert weights_bytes([wide], scheme) == 1000 * 3 * 210
    scheme.check_model([up, down, table])
    with pytest.raises(InputError, match=f"rows in {name} are of whole blocks of 256 .* choose that format"):
        scheme.check_model([up, table])
    odd = TensorSpec(name="layers.0.down.weight", role=Role.LINEAR, shape=(576, 1520))
    said = f"has rows of 1520 weights, which the blocks of 256 of {name}, nor the groups of 32 that stand in for them"
    with pytest.raises(InputError, match=said):
        scheme.storage(odd)
    with pytest.raises(InputError, match="keep leaves no linear layer on the grid"):
        _packing(name, bits, group_size, symmetric=symmetric, keep=("down",)).check_model([up, down, table])
    with pytest.raises(InputError, match=f"{name} cannot hold {bits} bits in groups of 64"):
        _packing(name, bits, 64, symmetric=symmetric)


MIXTURES = {"gguf-q4_k_m": 4, "gguf-q5_k_m": 5}
# `python -m benchmarks.engine.mixture_types` writes this file.
QUANTISED = json.loads((Path(__file__).parent / "llama_cpp_mixtures.json").read_text())["cases"]


def _mixture(name, **more):
    return _packing(name, MIXTURES[name], 32, symmetric=False, **more)


def _named(case):
    tied = "tied" if case["tied"] else "untied"
    sizes = [f"{case[size]}" for size in ("layers", "width", "ffn")]
    return "-".join([case["format"], case["architecture"], *sizes, tied])


def _described(case):
    sizes = {"num_hidden_layers": case["layers"], "hidden_size": case["width"], "intermediate_size": case["ffn"]}
    more = {"head_dim": case["width"] // 4, "tie_word_embeddings": case["tied"]}
    return spec_from_config(tiny_config(case["architecture"], **sizes, **more))


def _stored(spec, scheme):
    """Return ggml's name for the type of each matrix, by GGUF names."""
    family = get_family(spec.architecture)
    matrices = [tensor for tensor in spec.tensors if len(tensor.shape) == 2]
    kinds = {family.gguf_name(tensor.name).removesuffix(".weight"): scheme.storage(tensor) for tensor in matrices}
    return {name: kind.name.removeprefix("gguf-").upper() for name, kind in kinds.items()}


def _by_llama_cpp(case):
    found = {}
    for name, types in case["types"].items():
        if name in ("token_embd", "output"):
            found[name] = types
            continue
        for layer in range(case["layers"]):
            found[f"blk.{layer}.{name}"] = types if isinstance(types, str) else types[layer]
    return found


@pytest.mark.parametrize("case", QUANTISED, ids=_named)
def test_a_mixture_stores_each_matrix_as_llama_cpps_quantizer(case):
    spec, scheme = _described(case), _mixture(case["format"])
    assert _stored(spec, scheme) == _by_llama_cpp(case)
    # Bytes are counted by kind of tensor, and a student numbers its own layers.
    deeper = resized(spec, [layer for layer in range(case["layers"]) for _ in range(2)])
    for counted in (spec, deeper):
        each = [tensor_bytes(tensor, scheme.storage(tensor)) for tensor in counted.tensors]
        assert weights_bytes(counted.tensors, scheme) == weights_bytes([*counted.tensors], scheme) == sum(each)
    kept = resized(deeper, range(1, 2 * case["layers"], 2))
    assert tuple(kept.tensors) == tuple(spec.tensors)


def test_a_mixture_keeps_parts_and_is_no_format_of_models_without_super_blocks():
    sizes = {"architecture": "llama", "layers": 3, "width": 256, "ffn": 256, "tied": True}
    stored = {
        tensor.name: _mixture("gguf-q4_k_m", keep=("layers.2", "attention")).storage(tensor)
        for tensor in _described(sizes).tensors
    }
    kept = {name for name, storage in stored.items() if storage == "f16"}
    assert kept == {name for name in stored if "norm" not in name and (".layers.2." in name or ".self_attn." in name)}
    assert stored["model.embed_tokens.weight"].name == "gguf-q6_k"
    assert stored["model.layers.0.mlp.down_proj.weight"].name == "gguf-q4_k"
    _mixture("gguf-q5_k_m").check_model(_described(sizes | {"width": 192}).tensors)
    said = "all would be stored as gguf-q5_1 or gguf-q8_0, so choose one of these"
    with pytest.raises(InputError, match=said):
        _mixture("gguf-q5_k_m").check_model(_described(sizes | {"width": 192, "ffn": 192}).tensors)


def test_more_layers_never_have_fewer_of_more_bits():
    """Comparing models by size relies on this: a model with fewer layers takes no more bytes."""
    counts = [sum(takes_more_bits(layer, layers) for layer in range(layers)) for layers in range(1, 1025)]
    assert all(after - before in (0, 1) for before, after in pairwise(counts))


def test_names_tell_packings_apart():
    names = [scheme.name for scheme in PACKINGS]
    assert len(set(names)) == len(names) == 57
    assert {"gguf-q4_0", "compressed-tensors-int4-g64", "compressed-tensors-int2-row-asym"} <= set(names)
    kept = _packing("gguf-q4_0", 4, 32, keep=("layers.0", "attention", "layers.0"))
    assert kept.name == "gguf-q4_0+attention+layers.0"
    assert kept == _packing("gguf-q4_0", 4, 32, keep=("attention", "layers.0"))


def test_what_is_kept_is_held_to_the_model():
    tensors = [
        TensorSpec(name="model.embed_tokens.weight", role=Role.EMBEDDING, shape=(100, 64)),
        TensorSpec(name="model.layers.0.self_attn.q_proj.weight", role=Role.LINEAR, shape=(64, 64)),
        TensorSpec(name="model.layers.0.mlp.up_proj.weight", role=Role.LINEAR, shape=(64, 64)),
        TensorSpec(name="model.norm.weight", role=Role.NORM, shape=(64,)),
    ]
    for keep in (("attention",), ("embeddings", "up_proj"), ("layers.0",)):
        _packing("gguf-q4_0", 4, 32, keep=keep).check_model(tensors)
    for keep in ("head", "layers.1", "norm"):
        with pytest.raises(InputError, match=f"keep names {keep}, but no weight"):
            _packing("gguf-q4_0", 4, 32, keep=(keep,)).check_model(tensors)
    with pytest.raises(InputError, match="keep names embeddings, but no weight of this model that compressed-tensors"):
        _packing("compressed-tensors", 4, 32, keep=("embeddings",)).check_model(tensors)
    with pytest.raises(InputError, match="keep leaves no weight on the grid"):
        _packing("compressed-tensors", 4, 32, keep=("layers.0",)).check_model(tensors)
    with pytest.raises(InputError, match="huggingface holds all weights in 16 bits: leave keep out"):
        _packing("huggingface", 16, 0, keep=("attention",))
    with pytest.raises(InputError, match=r"keep holds 'layers\.\*'"):
        _packing("gguf-q4_0", 4, 32, keep=("layers.*",))


def test_impossible_choices_are_refused_with_the_possible_ones():
    with pytest.raises(InputError, match="no format 'q4'; the formats are gguf-f16, gguf-bf16, gguf-q8_0"):
        get_format("q4")
    q4_0 = "it holds 4 bits in groups of 32, symmetric"
    with pytest.raises(InputError, match=f"cannot hold 4 bits in groups of 64, symmetric; {q4_0}$"):
        _packing("gguf-q4_0", 4, 64)
    with pytest.raises(InputError, match=f"cannot hold 4 bits in groups of 32, asymmetric; {q4_0}$"):
        _packing("gguf-q4_0", 4, 32, symmetric=False)
    with pytest.raises(InputError, match="huggingface cannot hold 8 bits in groups of 32, symmetric; it holds 16 bits"):
        _packing("huggingface", 8, 32)
    held = "8, 6, 4, 3 or 2 bits in groups of 32, 64 or 128 or in whole rows, symmetric or asymmetric"
    with pytest.raises(InputError, match=f"cannot hold 5 bits in whole rows, symmetric; it holds {held}"):
        _packing("compressed-tensors", 5, 0)


def test_a_tensor_that_the_groups_do_not_divide_is_refused_by_name():
    tensor = TensorSpec(name="layers.0.down.weight", role=Role.LINEAR, shape=(64, 96))
    for group_size in (32, 0):
        _packing("compressed-tensors", 4, group_size).storage(tensor)
    with pytest.raises(InputError, match=r"layers.0.down.weight has rows of 96 weights, which the groups of 64"):
        _packing("compressed-tensors", 4, 64).storage(tensor)
    with pytest.raises(InputError, match="is no matrix"):
        _packing("gguf-q8_0", 8, 32).storage(TensorSpec(name="conv", role=Role.LINEAR, shape=(4, 4, 32)))
