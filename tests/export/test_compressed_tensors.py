"""compressed-tensors folders against the compressed-tensors package and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from autodistill.errors import MissingDependencyError, VerificationError
from autodistill.export.compressed_tensors import CompressedTensorsExporter, check_package
from autodistill.export.huggingface import load_in_transformers
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.testing import save_tiny_teacher


def deployment(bits: int, group_size: int, symmetric: bool = True, keep: tuple[str, ...] = ()) -> Deployment:
    return Deployment(
        runtime="transformers",
        format="compressed-tensors",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        keep=keep,
    )


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
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
            if f"{prefix}_zero_point" in stored:
                zero_points = unpack_from_int32(
                    stored[f"{prefix}_zero_point"], bits, torch.Size([shape[0], scale.shape[1]]), packed_dim=0
                )
                codes -= zero_points.to(torch.bfloat16).repeat_interleave(shape[1] // scale.shape[1], dim=1)
            weights[prefix] = codes * scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)
        elif not name.endswith((".weight_scale", ".weight_shape", ".weight_zero_point")):
            weights[name] = tensor
    return weights


@pytest.mark.parametrize(
    ("architecture", "tied", "held"),
    [
        ("llama", True, deployment(4, 32)),
        ("llama", False, deployment(8, 64)),
        ("qwen2", False, deployment(4, 128, symmetric=False)),
        ("qwen2", True, deployment(8, 0)),
        ("llama", True, deployment(8, 32, symmetric=False)),
        ("llama", True, deployment(2, 0, symmetric=False)),
        ("llama", False, deployment(3, 64)),
        ("llama", True, deployment(6, 128, symmetric=False)),
        ("llama", True, deployment(4, 64, keep=("attention", "layers.1.mlp.down_proj"))),
        ("qwen2", False, deployment(3, 0, symmetric=False, keep=("layers.0",))),
    ],
    ids=str,
)
def test_transformers_loads_it_with_the_logits_of_the_dequantized_model(
    tmp_path: Path, architecture: str, tied: bool, held: Deployment
) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, tied=tied, width=128, layers=3)
    out = CompressedTensorsExporter().export(teacher, held, tmp_path / "out").path
    packed = [name for name in load_file(out / "model.safetensors") if name.endswith("weight_packed")]
    kept = sum(part in name for name in packed for part in ("self_attn", "layers.1.mlp.down_proj"))
    if held.keep == ("attention", "layers.1.mlp.down_proj"):
        assert (len(packed), kept) == (3 * 3 - 1, 0)
    else:
        assert len(packed) == 7 * (3 - len(held.keep))
    weights = dequantized(out)
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
    served = dict(load_in_transformers(out).named_parameters())
    for name, values in weights.items():
        np.testing.assert_array_equal(served[name].detach().numpy(), values.float().numpy(), err_msg=name)
    found = dict(CompressedTensorsExporter().unpack(out))
    assert set(found) == set(weights)
    for name, values in found.items():
        np.testing.assert_array_equal(values, weights[name].float().numpy(), err_msg=name)


def test_the_folder_holds_all_that_serving_needs(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=2)
    artifact = CompressedTensorsExporter().export(teacher, deployment(4, 32), tmp_path / "out")
    names = {file.name for file in artifact.path.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert not any(name.startswith(".") for name in names)
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quantization_status"] == "compressed"
    stored = load_file(artifact.path / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    assert artifact.size_bytes == (artifact.path / "model.safetensors").stat().st_size


def test_a_lost_scale_is_noticed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    teacher = save_tiny_teacher(tmp_path / "teacher", layers=1)
    out = CompressedTensorsExporter().export(teacher, deployment(4, 32), tmp_path / "out").path
    stored = load_file(out / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(stored, out / "model.safetensors")
    with pytest.raises(VerificationError, match=r"mlp\.up_proj"):
        list(CompressedTensorsExporter().unpack(out))


@pytest.mark.parametrize(("bits", "allowed"), [(8, True), (6, False), (4, True), (3, False), (2, True)])
def test_widths_that_do_not_fill_words_need_a_package_that_packs_them_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, allowed: bool
) -> None:
    """Both packages were asked for these bits of the same integers: of 3 and 6 they gave others before 0.18."""
    asked = deployment(bits, 32)
    check_package(asked)  # with the one that is installed
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.17.0")
    if allowed:
        check_package(asked)
        return
    said = rf"int{bits}-g32 is packed as compressed-tensors 0\.18 .*0\.17\.0 is installed: pip install"
    with pytest.raises(MissingDependencyError, match=said):
        check_package(asked)
    with pytest.raises(MissingDependencyError, match=said):
        CompressedTensorsExporter().export(save_tiny_teacher(tmp_path / "student"), asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_package(IN_16_BITS)
