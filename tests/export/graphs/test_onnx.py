"""ONNX graphs compute what transformers does, with the codes that a student was evaluated with."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.export.gguf import GgufExporter
from autodistill.export.graphs.onnx import DATA, GRAPH, OnnxExporter, OnnxHalfExporter
from autodistill.export.verify import verify
from autodistill.models.loading import load_model
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.testing import save_tiny_teacher
from tests.thinned import thinned

# Every test process collects this file, and one needs these packages, which take two seconds.
if TYPE_CHECKING:
    import onnx
    import onnxruntime

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt_neox")
KINDS = {
    **{kind: (bits, 32, True) for kind, bits in (("q4_0", 4), ("q5_0", 5), ("q8_0", 8), ("iq4_nl", 4), ("mxfp4", 4))},
    **{kind: (bits, 32, False) for kind, bits in (("q4_1", 4), ("q5_1", 5), ("q4_k", 4), ("q5_k", 5))},
    "q2_k": (2, 16, False),
    "q3_k": (3, 16, True),
    "q6_k": (6, 16, True),
    "f16": (16, 0, True),
}
TOKENS = np.random.default_rng(0).integers(3, 300, (2, 40))


def gguf(kind: str, **more: Any) -> Deployment:
    bits, group, symmetric = KINDS[kind]
    fields = {"bits": bits, "group_size": group, "symmetric": symmetric, **more}
    return Deployment(runtime="llama.cpp", format=f"gguf-{kind}", **fields)


def odd(folder: Path, family: str, **changes: Any) -> Path:
    """Save a student with 3 heads and 1 key head that do not fill its width of 96; 300 entries are not whole blocks."""
    sizes: dict[str, Any] = {"layers": 3, "width": 96, "heads": 3, "kv_heads": 1, "ffn": 160, "seed": 1}
    if family not in ("gpt_neox", "llama", "gemma3_text"):
        sizes["head_dim"] = 64
    return save_tiny_teacher(folder, architecture=family, **(sizes | changes))


def graph(folder: Path) -> onnx.ModelProto:
    """Return an exported graph without its data."""
    return importlib.import_module("onnx").load(folder / GRAPH, load_external_data=False)


def session(folder: Path, exact: bool) -> onnxruntime.InferenceSession:
    """Return a session of an exported graph.

    To be exact, all products are in float32, as products of 4-bit codes always are.
    """
    model = graph(folder)
    for attribute in (one for node in model.graph.node for one in node.attribute) if exact else ():
        if attribute.name == "accuracy_level":
            attribute.i = 1
    path = folder / "session.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        return importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    finally:
        path.unlink()


class Reader:
    """Feeds tokens with the cache that the graph returned, as any runtime of such a graph does."""

    def __init__(self, folder: Path, *, exact: bool = True) -> None:
        self.session, self.cache, self.mask = session(folder, exact), {}, None

    def read(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        here = np.ones(tokens.shape, np.int64) if mask is None else mask
        self.mask = here if self.mask is None else np.concatenate([self.mask, here], axis=1)
        for one in self.session.get_inputs() if not self.cache else ():
            if one.name.startswith("past"):
                dtype = np.float16 if "16" in one.type else np.float32
                self.cache[one.name] = np.zeros((len(tokens), one.shape[1], 0, one.shape[3]), dtype)
        places = (self.mask.cumsum(axis=1) - 1).clip(0)[:, -tokens.shape[1] :]
        given = {"input_ids": tokens, "attention_mask": self.mask, "position_ids": places, **self.cache}
        names = [one.name for one in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(None, given), strict=True))
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in self.cache}
        return found["logits"].astype(np.float32)


def logits(student: Path, weights: dict[str, np.ndarray], tokens: np.ndarray = TOKENS, **more: Any) -> np.ndarray:
    """Return transformers' logits with these weights."""
    model = load_model(student, torch.float32)
    model.load_state_dict({name: torch.from_numpy(np.array(one)) for name, one in weights.items()}, strict=False)
    with torch.inference_mode():
        return model(torch.from_numpy(tokens), **more).logits.numpy()


# In 16 bits two families are enough: one with norms that 1 is added to, and one with biases.
@pytest.mark.parametrize(
    ("deployment", "family"),
    [
        *((gguf("q4_0"), family) for family in FAMILIES),
        *(
            pytest.param(IN_16_BITS, family, marks=() if family in ("gemma3_text", "gpt_neox") else pytest.mark.slow)
            for family in FAMILIES
        ),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_prompts_and_single_tokens_of_every_family(tmp_path: Path, family: str, deployment: Deployment) -> None:
    """The texts exceed the sliding window of 16, and more of the prompt is read after tokens were written."""
    student = odd(tmp_path / "student", family, tied=family not in ("gpt_neox", "qwen2"))
    artifact = OnnxExporter().export(student, deployment, tmp_path / "out")
    verify(OnnxExporter(), artifact, student, deployment)
    reader = Reader(artifact.path)
    parts = np.split(TOKENS, [25, 26, 27], axis=1)
    found = np.concatenate([reader.read(part) for part in parts], axis=1)
    expected = logits(student, dict(OnnxExporter().unpack(artifact.path)))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    said = OnnxExporter().first_difference(artifact.path, TOKENS[0, :8], student, deployment)
    assert said == "over 8 tokens, the keys and values of all 3 layers are as evaluated"


# Here q5_0 has codes of 8 bits without offsets, as q8_0 has.
@pytest.mark.parametrize(
    "kind",
    [pytest.param("q5_0", marks=pytest.mark.slow), *thinned(kind for kind in KINDS if kind != "q5_0")],
)
def test_every_type_of_gguf_is_held_code_for_code(tmp_path: Path, kind: str) -> None:
    """The weights are those that the gguf package reads from a GGUF file of the same student."""
    student = save_tiny_teacher(tmp_path / "student", layers=1, width=256, ffn=256, seed=1)
    artifact = OnnxExporter().export(student, gguf(kind), tmp_path / "onnx")
    found = dict(OnnxExporter().unpack(artifact.path))
    file = GGUFReader(GgufExporter().export(student, gguf(kind), tmp_path / "gguf").path)
    names = {"token_embd": "embed_tokens", "blk.0.ffn_down": "layers.0.mlp.down_proj", "output_norm": "norm"}
    for tensor in file.tensors:
        if (stem := tensor.name.removesuffix(".weight")) in names:
            values = dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(
                found[f"model.{names[stem]}.weight"], values.reshape(found[f"model.{names[stem]}.weight"].shape)
            )
    expected = logits(student, found)
    np.testing.assert_allclose(Reader(artifact.path).read(TOKENS), expected, atol=2e-5 * np.abs(expected).max())


def test_a_mixture_of_types_and_layers_of_their_own_width(tmp_path: Path) -> None:
    types = (("embeddings", "q5_0"), ("layers.1.mlp.down_proj", "q8_0"), ("layers.2.mlp", "q4_1"))
    deployment = gguf("q4_0", types=types)
    student = save_tiny_teacher(tmp_path / "student", layers=3, ffn=(64, 128, 32), seed=1)
    artifact = OnnxExporter().export(student, deployment, tmp_path / "out")
    verify(OnnxExporter(), artifact, student, deployment)
    expected = logits(student, dict(OnnxExporter().unpack(artifact.path)))
    np.testing.assert_allclose(Reader(artifact.path).read(TOKENS), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_in_float16_it_differs_by_what_float16_rounds(tmp_path: Path, family: str) -> None:
    student = odd(tmp_path / "student", family, tied=family != "gpt_neox")
    for deployment in (gguf("q8_0"), gguf("q4_1")):
        artifact = OnnxHalfExporter().export(student, deployment, tmp_path / deployment.name)
        verify(OnnxHalfExporter(), artifact, student, deployment)
        reader = Reader(artifact.path)
        assert {one.type for one in reader.session.get_inputs()} == {"tensor(int64)", "tensor(float16)"}
        expected = logits(student, dict(OnnxHalfExporter().unpack(artifact.path)))
        np.testing.assert_allclose(reader.read(TOKENS), expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_side_changes_nothing(tmp_path: Path, side: str) -> None:
    student = odd(tmp_path / "student", "gemma3_text")
    artifact = OnnxExporter().export(student, gguf("q8_0"), tmp_path / "out")
    alone = Reader(artifact.path).read(TOKENS[:1, :20])
    there, pad = np.ones((2, 20), np.int64), np.zeros((2, 4), np.int64)
    order = (pad, there) if side == "left" else (there, pad)
    tokens = np.concatenate([TOKENS[:, :20] if part is there else pad for part in order], axis=1)
    found = Reader(artifact.path).read(tokens, np.concatenate(order, axis=1))
    assert np.isfinite(found).all()
    own = found[:1, 4:] if side == "left" else found[:1, :20]
    np.testing.assert_allclose(own, alone, atol=1e-4)


def test_its_weights_take_no_more_bytes_than_those_of_a_gguf_file(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=2, width=256, ffn=512, tied=False)
    for kind in ("q4_0", "q4_1", "q8_0"):
        folder = OnnxExporter().export(student, gguf(kind), tmp_path / kind).path
        tensors = GGUFReader(GgufExporter().export(student, gguf(kind), tmp_path / f"{kind}-gguf").path).tensors
        aligned = 3 * 64 * len(tensors)
        assert (folder / DATA).stat().st_size <= sum(one.n_bytes for one in tensors) + aligned


def test_products_by_codes_of_4_bits_are_in_float32_and_those_of_8_nearly_so(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=1, seed=1)
    folder = OnnxExporter().export(student, gguf("q4_0"), tmp_path / "out").path
    importlib.import_module("onnx").checker.check_model(folder / GRAPH)
    model = graph(folder)
    products = [
        {one.name: one.i for one in node.attribute} for node in model.graph.node if node.op_type == "MatMulNBits"
    ]
    # The head is the 8-bit table.
    assert {(one["bits"], one["accuracy_level"], one["block_size"]) for one in products} == {(4, 1, 32), (8, 4, 32)}
    as_it_is, exact = (Reader(folder, exact=exact).read(TOKENS) for exact in (False, True))
    np.testing.assert_allclose(as_it_is, exact, atol=0.01 * np.abs(exact).max())


def test_genai_reads_ends_sizes_and_sampling(tmp_path: Path) -> None:
    student = odd(tmp_path / "student", "qwen3")
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2], "bos_token_id": 0}
    (student / "generation_config.json").write_text(json.dumps(settings))
    folder = OnnxExporter().export(student, gguf("q4_0"), tmp_path / "out").path
    config = json.loads((folder / "genai_config.json").read_text())
    assert (config["model"]["type"], config["model"]["eos_token_id"], config["model"]["bos_token_id"]) == (
        "qwen3",
        [1, 2],
        0,
    )
    assert (config["search"]["temperature"], config["search"]["top_k"], config["search"]["do_sample"]) == (
        0.6,
        20,
        True,
    )
    decoder = config["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"]) == (64, 1, 3)
    inputs = {one.name for one in session(folder, True).get_inputs()}
    named = decoder["inputs"]
    assert inputs == {
        *(named[name] for name in ("input_ids", "attention_mask", "position_ids")),
        *(named[name] % layer for name in ("past_key_names", "past_value_names") for layer in range(3)),
    }
    assert (folder / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_genai_writes_what_transformers_writes(tmp_path: Path, family: str) -> None:
    import importlib

    genai = importlib.import_module("onnxruntime_genai")
    student = odd(tmp_path / "student", family, tied=family != "gpt_neox")
    artifact = OnnxExporter().export(student, gguf("q4_0"), tmp_path / "out")
    ran = OnnxExporter().run(artifact.path, TOKENS[:1], 1, student, gguf("q4_0"))
    model = genai.Model(str(artifact.path))
    asked = genai.GeneratorParams(model)
    asked.set_search_options(max_length=72, min_length=72, do_sample=False)
    generator = genai.Generator(model, asked)
    generator.append_tokens(TOKENS[:1, :8].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert tuple(generator.get_sequence(0)[8:]) == ran.written


def test_what_it_cannot_hold_is_named_with_what_can(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=1)
    int4 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=32)
    with pytest.raises(
        InputError, match=r"cannot hold model\.layers\.0\.self_attn\.q_proj\.weight as compressed-t.*: ex"
    ):
        OnnxExporter().export(student, int4, tmp_path / "out")
    config = json.loads((student / "config.json").read_text())
    for change, said in (
        ({"hidden_act": "tanh"}, "the activation 'tanh' is none of"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' depends on"),
    ):
        (student / "config.json").write_text(json.dumps(config | change))
        assert said in OnnxExporter().refuses(student, gguf("q4_0"))
    assert not any((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_without_the_packages_the_command_that_installs_them_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=1)
    monkeypatch.setattr("autodistill.export.graphs.onnx.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"onnx and onnxruntime.*pip install 'autodistill-search\[onnx\]'"):
        OnnxExporter().refuses(student, gguf("q4_0"))


def test_a_graph_that_points_elsewhere_or_is_none_is_refused(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=1)
    folder = OnnxExporter().export(student, gguf("q4_0"), tmp_path / "out").path
    model = graph(folder)
    stored = next(one for one in model.graph.initializer if one.name.endswith("q_proj.weight.codes"))
    next(one for one in stored.external_data if one.key == "location").value = "../secret"
    (folder / GRAPH).write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError, match=r"q_proj\.weight\.codes is not in model\.onnx\.data"):
        dict(OnnxExporter().unpack(folder))
    (folder / GRAPH).write_bytes(b"no graph")
    with pytest.raises(VerificationError, match="cannot be read"):
        dict(OnnxExporter().unpack(folder))
    with pytest.raises(VerificationError, match=r"onnx could not run .*model\.onnx \(exit status 1\): "):
        OnnxExporter().run(folder, TOKENS, 1, student, gguf("q4_0"))
