"""Teachers that are already quantised: recognised by their files or weights, and packed again without loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from autodistill.distillation.teacher.own_scales import lies_on
from autodistill.distillation.teacher.resolve import Teacher, materialize, resolve_teacher
from autodistill.distillation.teacher.stored_grids import StoredAs, of_gguf, stored_as, with_own
from autodistill.export.compressed_tensors import CompressedTensorsExporter
from autodistill.export.gguf import GgufExporter
from autodistill.export.student_reader import StudentFiles
from autodistill.export.verify import verify
from autodistill.inference.half_precision import held_as_deployed, load_held
from autodistill.models.config import spec_from_config
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import FORMATS
from autodistill.quantization.grids import Q4_0, Q4_1, Q8_0, Grid
from autodistill.quantization.learned_scales import SCALES_FILE, read_scales
from autodistill.quantization.packing import deployed, from_bf16_bits, to_bf16_bits
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.strategy.deployment import Deployment, serving
from autodistill.testing import save_tiny_teacher

SIMPLE = ("gguf-q4_0", "gguf-q4_1", "gguf-q5_0", "gguf-q5_1", "gguf-q8_0", "gguf-iq4_nl", "gguf-mxfp4")
INTEGERS = [
    (8, 32, True),
    (8, 64, False),
    (6, 32, False),
    (4, 32, True),
    (4, 64, False),
    (4, 0, True),
    (3, 32, True),
    (2, 0, False),
]


def _deployment(name: str, bits: int = 0, group_size: int = 0, symmetric: bool = True, **more: Any) -> Deployment:
    (grid, *others) = FORMATS[name].linears
    if not others and isinstance(grid, Grid):
        bits, group_size, symmetric = grid.bits, grid.group_size, grid.symmetric
    scheme = QuantizationScheme(format=name, bits=bits, group_size=group_size, symmetric=symmetric, **more)
    fields = {field: getattr(scheme, field) for field in ("format", "bits", "group_size", "symmetric", "keep", "types")}
    return Deployment(runtime=serving(scheme)[0], **fields)


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama with normal weights."""
    return save_tiny_teacher(tmp_path_factory.mktemp("normal") / "tiny", layers=2)


def _changed(source: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Copy a folder with other weights."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    weights = {name: change(name, tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _dequantized(source: Path, deployment: Deployment, out: Path) -> Path:
    """Copy a folder, with the weights that a runtime reads from it in a packing."""
    with StudentFiles(source, deployment) as files:
        return _changed(source, out, lambda name, _: torch.from_numpy(files.deployed(name).copy()))


def _found(ref: str, cache: Path) -> tuple[Teacher, StoredAs | None, ModelSpec]:
    resolved = resolve_teacher(ref)
    teacher = materialize(resolved, cache)
    spec = spec_from_config(json.loads((teacher.folder / "config.json").read_text()))
    return *stored_as(resolved, teacher, spec, cache), spec


def _check_blocks(path: Path, folder: Path, deployment: Deployment) -> None:
    """Check that an export of a folder would write the bytes of a GGUF file."""
    file = read_gguf(path)
    with StudentFiles(folder, deployment) as files:
        for tensor in file.tensors:
            name = str(file.family.from_gguf_name(tensor.name))
            assert files.pack(name)["data"].tobytes() == file.blocks(tensor).tobytes(), name


@pytest.mark.parametrize("name", SIMPLE)
def test_a_gguf_file_is_found_on_its_grid_and_packs_again_to_the_same_bytes(
    normal: Path, tmp_path: Path, name: str
) -> None:
    deployment = _deployment(name)
    made = GgufExporter().export(normal, deployment, tmp_path / "made")
    teacher, found, _ = _found(str(made.path), tmp_path / "cache")
    assert found is not None
    assert (found.deployment, found.exact) == (deployment, True)
    _check_blocks(made.path, teacher.folder, deployment)


@pytest.mark.parametrize(
    "name",
    [name if name in ("gguf-q4_1", "gguf-q8_0") else pytest.param(name, marks=pytest.mark.slow) for name in SIMPLE],
)
def test_a_folder_of_dequantized_weights_is_found_on_the_grid_and_packs_to_the_same_bytes(
    normal: Path, tmp_path: Path, name: str
) -> None:
    deployment = _deployment(name)
    source = _dequantized(normal, deployment, tmp_path / "source")
    teacher, found, _ = _found(str(source), tmp_path / "cache")
    assert found is not None
    assert (found.deployment, found.exact) == (deployment, True)
    _check_blocks(GgufExporter().export(normal, deployment, tmp_path / "made").path, teacher.folder, deployment)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [one if one in ((4, 32, True), (2, 0, False)) else pytest.param(*one, marks=pytest.mark.slow) for one in INTEGERS],
)
def test_a_folder_on_an_integer_grid_is_packed_without_loss_though_its_scales_do_not_follow_from_it(
    normal: Path, tmp_path: Path, bits: int, group: int, symmetric: bool
) -> None:
    deployment = _deployment("compressed-tensors", bits, group, symmetric)
    source = _dequantized(normal, deployment, tmp_path / "source")
    before = sorted(path.name for path in source.iterdir())
    teacher, found, _ = _found(str(source), tmp_path / "cache")
    assert found is not None
    # With 8 bits and zero points, the weights' bfloat16 may hide a scale.
    assert found.exact or (bits, symmetric) == (8, False)
    assert found.deployment is not None
    # A grid of fewer bits or of larger groups is also part of the larger grids.
    assert found.deployment.bits <= bits
    exporter = CompressedTensorsExporter()
    artifact = exporter.export(teacher.folder, found.deployment, tmp_path / "out")
    verify(exporter, artifact, teacher.folder, found.deployment)
    own = load_file(source / "model.safetensors")
    for name, values in exporter.unpack(artifact.path):
        if found.exact:
            assert np.array_equal(values, own[name].numpy()), name
    assert sorted(path.name for path in source.iterdir()) == before  # nothing is written to a user's folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normal_weights_lie_on_no_grid(normal: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = _changed(normal, tmp_path / "copy", lambda name, tensor: tensor.to(dtype))
    teacher, found, _ = _found(str(folder), tmp_path / "cache")
    assert (found, teacher.folder) == (None, folder)


@pytest.mark.slow
def test_weights_that_were_rounded_since_are_told_apart_by_how_far_that_moved_them(
    normal: Path, tmp_path: Path
) -> None:
    def rounded(name: str, kind: torch.dtype) -> StoredAs | None:
        source = _dequantized(normal, _deployment(name), tmp_path / f"{name}-{kind}" / "source")
        copy = _changed(source, tmp_path / f"{name}-{kind}" / "copy", lambda _, tensor: tensor.to(kind))
        return _found(str(copy), tmp_path / f"{name}-{kind}" / "cache")[1]

    for name, kind in [(name, kind) for name in ("gguf-q4_0", "gguf-q8_0") for kind in (torch.bfloat16, torch.float16)]:
        found = rounded(name, kind)
        assert found is not None
        assert (found.deployment, found.exact) == (_deployment(name), False)
        assert "with hardly any loss" in found.note

    weights = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    for grid in (Q4_0, Q4_1, Q8_0):
        values = deployed(weights, grid)
        both = [from_bf16_bits(to_bf16_bits(one)) for one in (values, weights)]
        assert [lies_on(one, grid) for one in (values, weights, *both)] == [True, False, True, False]


def _with_blocks(path: Path, out: Path, change: Callable[[str, np.ndarray[Any, Any]], None]) -> Path:
    """Copy a GGUF file with other bytes in its blocks."""
    data = bytearray(path.read_bytes())
    for tensor in gguf.GGUFReader(path).tensors:
        blocks = np.frombuffer(bytes(tensor.data), np.uint8).copy().reshape(int(tensor.shape[-1]), -1)
        change(tensor.name, blocks)
        data[tensor.data_offset : tensor.data_offset + blocks.size] = blocks.tobytes()
    out.write_bytes(bytes(data))
    return out


@pytest.mark.parametrize("name", ["gguf-q4_0", "gguf-q4_1"])
def test_codes_that_no_rule_would_choose_are_kept_by_the_files_own_scales(
    normal: Path, tmp_path: Path, name: str
) -> None:
    deployment = _deployment(name)
    made = GgufExporter().export(normal, deployment, tmp_path / "made").path
    width = 20 if name == "gguf-q4_1" else 18

    def narrow(tensor: str, blocks: np.ndarray[Any, Any]) -> None:
        # llama.cpp's search with an importance matrix may leave such blocks, with no code at the ends of the range.
        if tensor.startswith("blk.") and tensor.endswith(("ffn_up.weight", "attn_q.weight")):
            codes = blocks.reshape(-1, width)[:, width - 16 :]
            low, high = (codes & 15).clip(3, 11), (codes >> 4).clip(3, 11)
            codes[:] = low | (high << 4)

    source = _with_blocks(made, tmp_path / "narrow.gguf", narrow)
    teacher, found, spec = _found(str(source), tmp_path / "cache")
    assert found is not None
    assert (found.deployment, found.exact) == (deployment, True)
    scales = read_scales(teacher.folder, deployment)
    assert {name.split(".")[-2] for name in scales} == {"up_proj", "q_proj"}
    _check_blocks(source, teacher.folder, deployment)
    # The result is kept, and is found again after the folder is made anew.
    assert _found(str(source), tmp_path / "cache")[:2] == (teacher, found)
    (teacher.folder / SCALES_FILE).unlink()
    _found(str(source), tmp_path / "cache")
    assert (teacher.folder / SCALES_FILE).is_file()
    # Weights held in 16 bits have the same codes, and therefore the same values.
    held = load_held(teacher.folder, "bfloat16")
    layer = held.model.layers[0].mlp.up_proj
    storages = {tensor.name: deployment.storage(tensor) for tensor in spec.tensors}
    with StudentFiles(teacher.folder, deployment) as files, held_as_deployed(held, storages, scales):
        values = torch.from_numpy(files.deployed("model.layers.0.mlp.up_proj.weight"))
        assert torch.equal(layer.shown(layer.weight, slice(None)), values)


def test_a_mixture_is_a_deployment_where_a_format_has_it_and_said_where_none_has(normal: Path, tmp_path: Path) -> None:
    kept = _deployment("gguf-q4_0", keep=("attention",))
    made = GgufExporter().export(normal, kept, tmp_path / "kept")
    _, found, spec = _found(str(made.path), tmp_path / "cache")
    assert found is not None
    assert (found.deployment, found.exact) == (kept, True)

    file = read_gguf(GgufExporter().export(normal, _deployment("gguf-q4_1"), tmp_path / "mixed").path)
    (table,) = (tensor for tensor in file.tensors if tensor.name == "token_embd.weight")
    others = tuple(tensor for tensor in file.tensors if tensor is not table)
    of_five = type(table)(**{**vars(table), "type": int(Kind.Q5_0)})
    mixed = of_gguf(type(file)(path=file.path, metadata=file.metadata, tensors=(*others, of_five)), spec)
    assert mixed is not None
    assert mixed.types == "its matrices lie on Q4_1, its table on Q5_0"
    assert mixed.deployment == _deployment("gguf-q4_1", types=(("embeddings", "q5_0"),))

    of_others = type(table)(**{**vars(table), "type": int(Kind.IQ4_XS)})
    unknown = of_gguf(type(file)(path=file.path, metadata=file.metadata, tensors=(*others, of_others)), spec)
    assert unknown is not None
    assert unknown.deployment is None
    assert unknown.types == "its matrices lie on Q4_1, its table on IQ4_XS"
    assert unknown.note.startswith(
        f"the teacher is pre-quantised: {unknown.types}, and no format here can give each tensor these types"
    )


def test_its_own_deployment_is_added_once() -> None:
    own, other = _deployment("gguf-q4_1"), _deployment("gguf-q4_0")
    assert with_own(own, (other,)) == (other, own)
    assert with_own(own, (own, other)) == (own, other)
    assert with_own(own, ()) == (own,)
    # If all deployments have the same cache, its own deployment gets that cache too.
    smaller = replace(other, cache_type_k="q8_0", cache_type_v="q8_0")
    assert with_own(own, (smaller,)) == (smaller, replace(own, cache_type_k="q8_0", cache_type_v="q8_0"))
    assert with_own(own, (smaller, other)) == (smaller, other, own)


def test_a_mixture_of_k_quants_is_kept_by_its_own_scales_which_a_search_would_not_find_again(tmp_path: Path) -> None:
    source = save_tiny_teacher(tmp_path / "tiny", layers=4, width=256, ffn=256)
    deployment = _deployment("gguf-q4_k_m")
    made = GgufExporter().export(source, deployment, tmp_path / "made").path
    teacher, found, _ = _found(str(made), tmp_path / "cache")
    assert found is not None
    assert (found.deployment, found.exact) == (deployment, True)
    assert found.types == "its matrices lie on Q4_K and Q6_K, its table on Q6_K"
    # A group with scale 0 reads all codes as one weight, so the test compares values and not bytes.
    file = read_gguf(made)
    with StudentFiles(teacher.folder, deployment) as files:
        for tensor in file.tensors:
            name = str(file.family.from_gguf_name(tensor.name))
            assert np.array_equal(files.deployed(name), file.values(tensor)), name
