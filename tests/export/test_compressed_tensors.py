"""compressed-tensors folders against the compressed-tensors package and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from autodistill.errors import VerificationError
from autodistill.export.compressed_tensors import CompressedTensorsExporter
from autodistill.strategy import Deployment
from autodistill.testing import save_tiny_teacher


def deployment(bits: int, group_size: int) -> Deployment:
    return Deployment(runtime="vllm", format="compressed-tensors", bits=bits, group_size=group_size)


def dequantised(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of an exported folder, unpacked by the compressed-tensors package."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    stored = load_file(folder / "model.safetensors")
    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"][
        "weights"
    ]["num_bits"]
    weights = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_packed"):
            prefix = name.removesuffix("_packed")
            scale, shape = stored[f"{prefix}_scale"], torch.Size(stored[f"{prefix}_shape"].tolist())
            codes = unpack_from_int32(tensor, bits, shape).to(torch.bfloat16)
            weights[prefix] = codes * scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)
        elif not name.endswith((".weight_scale", ".weight_shape")):
            weights[name] = tensor
    return weights


@pytest.mark.parametrize(
    ("architecture", "tied", "bits", "group_size"),
    [("llama", True, 4, 32), ("llama", False, 8, 64), ("qwen2", False, 4, 64), ("qwen2", True, 8, 32)],
)
def test_transformers_loads_it_with_the_logits_of_the_dequantised_model(
    tmp_path: Path, architecture: str, tied: bool, bits: int, group_size: int
) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, tied=tied)
    out = CompressedTensorsExporter().export(teacher, deployment(bits, group_size), tmp_path / "out").path
    weights = dequantised(out)
    reference = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
    lacking = reference.load_state_dict(weights, strict=False)
    assert not lacking.unexpected_keys
    assert set(lacking.missing_keys) == ({"lm_head.weight"} if tied else set())
    tokens = torch.arange(3, 43)[None]
    loaded, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        np.testing.assert_array_equal(loaded(tokens).logits.float().numpy(), reference(tokens).logits.float().numpy())
    if tied:
        assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    found = dict(CompressedTensorsExporter().unpack(out))
    assert set(found) == set(weights)
    for name, values in found.items():
        np.testing.assert_array_equal(values, weights[name].float().numpy(), err_msg=name)


def test_the_folder_holds_all_that_serving_needs(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=2)
    artefact = CompressedTensorsExporter().export(teacher, deployment(4, 32), tmp_path / "out")
    names = {file.name for file in artefact.path.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert not any(name.startswith(".") for name in names)
    config = json.loads((artefact.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quantization_status"] == "compressed"
    stored = load_file(artefact.path / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    assert artefact.size_bytes == (artefact.path / "model.safetensors").stat().st_size


def test_a_lost_scale_is_noticed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    teacher = save_tiny_teacher(tmp_path / "teacher", layers=1)
    out = CompressedTensorsExporter().export(teacher, deployment(4, 32), tmp_path / "out").path
    stored = load_file(out / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(stored, out / "model.safetensors")
    with pytest.raises(VerificationError, match=r"mlp\.up_proj"):
        list(CompressedTensorsExporter().unpack(out))
