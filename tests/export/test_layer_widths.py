"""Students whose layers differ in FFN width: as "deci" in llama.cpp, and padded in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autodistill.advisor.describe import describe
from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.distillation.teacher.stored_grids import stored_as
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold
from autodistill.estimates.serving_memory import memory
from autodistill.evaluation.base import Measurement, Subject
from autodistill.evaluation.evaluate import deployed_weights, evaluate
from autodistill.export.base import Expected, load_exporter
from autodistill.export.student_reader import StudentFiles
from autodistill.export.verify import prove, verify
from autodistill.hardware.budget import Budget
from autodistill.models.config import resized, spec_from_config, uniform
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.gguf_to_transformers import convert
from autodistill.models.loading import load_model
from autodistill.quantization.formats import FORMATS, weights_bytes
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import write_scales
from autodistill.quantization.packing import deployed
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.testing import save_tiny_teacher, tiny_config
from tests.thinned import thinned

WIDTHS = (64, 128, 32)
F16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
MIXED = replace(Q4_0, types=(("embeddings", "q5_0"), ("layers.1.mlp.down_proj", "q8_0"), ("layers.2.mlp", "q4_1")))
INT4 = Deployment(runtime="transformers", format="compressed-tensors", bits=4, group_size=32)
SEQUENCES = np.random.default_rng(0).integers(3, 300, (3, 70))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_biases(folder: Path) -> None:
    """Give every matrix of every layer a bias."""
    weights = load_file(folder / "model.safetensors")
    drawn = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        bias = torch.randn(len(weights[name]), generator=drawn) * 0.1
        weights[name.replace(".weight", ".bias")] = bias
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, attention_bias=True, mlp_bias=True)


def simulated(student: Path, deployment: Deployment) -> Expected:
    """Return a packed student's choices and losses, computed layer by layer."""
    model = load_model(student, torch.float32)
    spec = spec_from_config(model.config.to_dict())
    with torch.inference_mode(), deployed_weights(model, spec, deployment):
        logits = model(torch.from_numpy(SEQUENCES)).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(logits.mT, torch.from_numpy(SEQUENCES[:, 1:]), reduction="none")
    return Expected(SEQUENCES, logits.argmax(-1).numpy(), nll.numpy(), nll.numpy())


def run(student: Path, deployment: Deployment, out: Path) -> Path:
    """Export a student and check that its weights and choices are the simulated ones. Return the export."""
    exporter = load_exporter(FORMATS[deployment.format].container)
    artifact = exporter.export(student, deployment, out)
    verify(exporter, artifact, student, deployment)
    check = prove(exporter, artifact.path, deployment, simulated(student, deployment), 1, student)
    assert check.agreement >= 0.9
    assert check.excess == pytest.approx(0, abs=0.02)
    assert check.text
    return artifact.path


@pytest.mark.parametrize(
    ("architecture", "tied", "changes"),
    [
        ("llama", True, {}),
        ("mistral", False, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        (
            "llama",
            False,
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("llama", True, {"biases": True}),
    ],
)
def test_llama_cpp_computes_each_layer_with_its_own_width(
    tmp_path: Path, architecture: str, tied: bool, changes: dict[str, Any]
) -> None:
    student = save_tiny_teacher(tmp_path / "student", architecture=architecture, layers=3, ffn=WIDTHS, tied=tied)
    if changes.pop("biases", False):
        add_biases(student)
    edit_config(student, **changes)
    path = run(student, F16, tmp_path / "out")
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["general.architecture"] == "deci"
    assert keys["deci.feed_forward_length"] == list(WIDTHS)
    assert (keys["deci.block_count"], keys["deci.attention.head_count"], keys["deci.attention.head_count_kv"]) == (
        *(3, 4),
        2,
    )
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    assert [shapes[f"blk.{layer}.ffn_down.weight"] for layer in range(3)] == [[width, 64] for width in WIDTHS]


@pytest.mark.parametrize(
    "deployment",
    [pytest.param(Q4_0, marks=pytest.mark.slow), MIXED, replace(Q4_0, cache_type_k="q8_0", cache_type_v="q8_0")],
)
def test_types_by_tensor_and_by_cache_go_with_it(tmp_path: Path, deployment: Deployment) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=3, width=128, ffn=WIDTHS)
    run(student, deployment, tmp_path / "out")


def test_a_deci_file_is_read_as_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=3, ffn=WIDTHS)
    path = run(student, F16, tmp_path / "out")
    file = read_gguf(path)
    spec = spec_from_config(file.config())
    assert spec.ffn_widths == WIDTHS
    told = describe(str(path))
    assert (told.spec.tensors, told.weights_bytes) == (spec.tensors, weights_bytes(spec.tensors, F16))
    convert(file, tmp_path / "again")
    found, expected = load_model(tmp_path / "again", torch.float32), load_model(student, torch.float32)
    for name, weight in expected.named_parameters():
        stored = weight.half().float() if weight.ndim == 2 else weight
        torch.testing.assert_close(found.get_parameter(name), stored, rtol=0, atol=0)


def test_a_layer_without_an_ffn_is_refused(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=3, ffn=WIDTHS)
    file = read_gguf(run(student, F16, tmp_path / "out"))
    for widths in ([64, 0, 32], [64, 128], [64, 128, True]):
        changed = replace(file, metadata=file.metadata | {"deci.feed_forward_length": widths})
        with pytest.raises(InputError, match="feed_forward_length above 0 for each of its 3 layers"):
            changed.config()
    heads = replace(file, metadata=file.metadata | {"deci.attention.head_count": [4, 0, 4]})
    with pytest.raises(InputError, match="one size for all layers"):
        heads.config()


# Zeros of every kind of grid in a Llama, and the other families in 4 bits.
@pytest.mark.parametrize(
    ("architecture", "deployment"),
    thinned(
        [
            ("llama", IN_16_BITS),
            ("llama", INT4),
            ("llama", replace(INT4, symmetric=False)),
            ("llama", replace(INT4, bits=8, group_size=0)),
            ("gemma3_text", INT4),
            ("gpt_neox", INT4),
        ]
    ),
)
def test_a_padded_folder_is_stock_and_computes_the_same(
    tmp_path: Path, architecture: str, deployment: Deployment
) -> None:
    student = save_tiny_teacher(tmp_path / "student", architecture=architecture, layers=3, ffn=WIDTHS)
    folder = run(student, deployment, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert "per_layer_config" not in config
    assert config["intermediate_size"] == 128
    spec = spec_from_config(json.loads((student / "config.json").read_text()))
    with StudentFiles(student, deployment) as files:
        assert files.spec == uniform(spec)
        for tensor in spec.tensors:
            padded = files.deployed(tensor.name)
            inner = tuple(map(slice, tensor.shape))
            weights = load_file(student / "model.safetensors")[tensor.name.replace("lm_head", "embed_out")].numpy()
            np.testing.assert_array_equal(padded[inner], deployed(weights, deployment.storage(tensor)))
            padded[inner] = 0
            assert not padded.any()
    size = (folder / "model.safetensors").stat().st_size
    predicted = weights_bytes(uniform(spec).tensors, deployment)
    assert predicted <= size <= predicted + 16_000  # header and zero points


def test_learned_scales_are_those_of_the_student(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=3, ffn=WIDTHS)
    weights = {name: tensor.numpy() for name, tensor in load_file(student / "model.safetensors").items()}
    for deployment in (INT4, replace(INT4, symmetric=False), replace(INT4, group_size=0)):
        scales = {}
        for layer, width in enumerate(WIDTHS):
            for part, rows, columns in (("up_proj", width, 64), ("down_proj", 64, width)):
                shape = rows, columns // (deployment.group_size or columns)
                drawn = np.random.default_rng(layer).uniform(0.01, 0.03, shape).astype(np.float32)
                offsets = None if deployment.symmetric else np.full(shape, 1, np.float32)
                rounded = torch.from_numpy(drawn).bfloat16().float().numpy()
                scales[f"model.layers.{layer}.mlp.{part}.weight"] = Scales(rounded, offsets)
        write_scales(student, deployment, scales)
        folder = tmp_path / deployment.name
        artifact = load_exporter("compressed-tensors").export(student, deployment, folder)
        verify(load_exporter("compressed-tensors"), artifact, student, deployment)
        found = dict(load_exporter("compressed-tensors").unpack(folder))
        spec = spec_from_config(json.loads((student / "config.json").read_text()))
        for tensor in (one for one in spec.tensors if one.name in scales):
            inner, values = tuple(map(slice, tensor.shape)), found[tensor.name]
            expected = deployed(weights[tensor.name], deployment.storage(tensor), scales[tensor.name])
            np.testing.assert_array_equal(values[inner], expected)
            assert np.count_nonzero(values) == np.count_nonzero(expected)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3_text", "gpt_neox"])
def test_other_graphs_of_llama_cpp_are_refused_in_one_line(tmp_path: Path, architecture: str) -> None:
    student = save_tiny_teacher(tmp_path / "student", architecture=architecture, layers=3, ffn=WIDTHS, tied=False)
    differing = spec_from_config(json.loads((student / "config.json").read_text()))
    said = cannot_hold(differing, F16)
    assert said.startswith(
        f"GGUF cannot hold this {architecture}: llama.cpp computes {architecture} with one FFN width"
    )
    assert "32 to 128 neurons" in said
    assert (
        cannot_hold(uniform(differing), F16) == cannot_hold(differing, IN_16_BITS) == cannot_hold(differing, INT4) == ""
    )
    with pytest.raises(InputError, match="one FFN width in all layers"):
        load_exporter("gguf").export(student, F16, tmp_path / "out")


def test_a_width_that_blocks_do_not_divide_is_refused() -> None:
    spec = resized(spec_from_config(tiny_config(num_hidden_layers=3)), ffn_widths=(64, 80, 192))
    assert "layers.1.mlp.down_proj.weight has rows of 80 weights" in cannot_hold(spec, Q4_0)
    assert cannot_hold(spec, F16) == cannot_hold(spec, IN_16_BITS) == ""


def test_a_format_of_a_plug_in_holds_them_only_if_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = resized(spec_from_config(tiny_config(num_hidden_layers=3)), ffn_widths=(64, 128, 192))
    monkeypatch.setattr(
        "autodistill.quantization.formats.FORMATS",
        FORMATS | {"huggingface": replace(FORMATS["huggingface"], layer_widths="one")},
    )
    assert "holds models of one FFN width in all layers, and these have 64 to 192" in cannot_hold(spec, IN_16_BITS)


def test_memory_is_of_what_is_held() -> None:
    spec = spec_from_config(tiny_config(num_hidden_layers=3))
    differing = resized(spec, ffn_widths=(64, 128, 192))
    assert spec.ffn_width == 192
    for deployment in (IN_16_BITS, INT4):
        wide, narrow = (memory(one, deployment, context=256, batch=1) for one in (spec, differing))
        assert wide == narrow
    wide, narrow = (memory(one, Q4_0, context=256, batch=1) for one in (spec, differing))
    less = 3 * spec.width * (192 - 64 + 192 - 128) * 18 // 32
    assert wide.weights_bytes - narrow.weights_bytes == less
    assert replace(narrow, weights_bytes=wide.weights_bytes) == wide


def test_stock_transformers_loads_what_is_exported(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=3, ffn=WIDTHS)
    folder = run(student, IN_16_BITS, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(folder).config.intermediate_size == 128


class Saving:
    """An evaluator that has the packed student written to disk, as for a user's command."""

    name, needs = "saving", "student"
    measures: ClassVar = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        assert subject.student is not None
        subject.student.save(self.folder)
        return ()

    def supports(self, deployment: Deployment) -> bool:
        return True


def test_what_a_command_is_given_is_a_stock_folder(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=3, ffn=WIDTHS)
    model = load_model(student, torch.float32)
    tokens = SEQUENCES.astype(np.int32)
    evaluate(
        model,
        Subject(
            spec=spec_from_config(model.config.to_dict()),
            deployment=Q4_0,
            budget=Budget(memory_bytes=10**9, context=128),
        ),
        TokenSet(tokens=tokens, documents=np.zeros_like(tokens)),
        None,
        evaluators=[Saving(tmp_path / "saved")],
        tokenizer=student,
    )
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(torch.from_numpy(SEQUENCES)).logits.argmax(-1)
    np.testing.assert_array_equal(found.numpy()[:, :-1], simulated(student, Q4_0).top1)


def test_the_own_codes_of_a_deci_teacher_are_kept(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=3, ffn=WIDTHS)
    path = run(student, MIXED, tmp_path / "out")
    found = resolve_teacher(str(path))
    teacher, own = stored_as(found, materialize(found, tmp_path), spec_from_config(found.config), tmp_path)
    assert own is not None
    assert own.deployment is not None
    with StudentFiles(teacher.folder, own.deployment) as files:
        assert files.spec.ffn_widths == WIDTHS
        stored = dict(load_exporter("gguf").unpack(path))
        assert stored.keys() == files.specs.keys()
        for name, values in stored.items():
            np.testing.assert_array_equal(files.deployed(name), values, err_msg=name)
