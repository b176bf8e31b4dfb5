"""Folders of compressed-tensors, against its package and transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.export.compressed_tensors import CompressedTensorsExporter, check_package
from autodistill.export.huggingface import load_in_transformers
from autodistill.export.proof import simulate
from autodistill.export.verify import prove, verify
from autodistill.models.config import spec_from_config
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.testing import save_tiny_teacher, tiny_config
from tests.thinned import thinned


def deployment(
    bits: int,
    group_size: int,
    symmetric: bool = True,
    keep: tuple[str, ...] = (),
    types: dict[str, str] | None = None,
    of: str = "transformers",
) -> Deployment:
    return Deployment(
        runtime=of,
        format="compressed-tensors",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        keep=keep,
        types=tuple((types or {}).items()),
    )


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of an exported folder, unpacked by the compressed-tensors package."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.utils import match_name

    stored = load_file(folder / "model.safetensors")
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    targets = {target: group["weights"]["num_bits"] for group in groups for target in group["targets"]}
    weights = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_packed"):
            prefix = name.removesuffix("_packed")
            scale, shape = stored[f"{prefix}_scale"], torch.Size(stored[f"{prefix}_shape"].tolist())
            module = prefix.removesuffix(".weight")
            (bits,) = (found for target, found in targets.items() if target == "Linear" or match_name(module, target))
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


# All bit widths, groups and whole rows, and a matrix that stays in 16 bits.
MIXED = {
    "down_proj": "int2-g32",
    "layers.0.mlp.up_proj": "int6-g128",
    "layers.1": "int8-row",
    "layers.1.self_attn.o_proj": "bf16",
    "q_proj": "int3-g64",
}


@pytest.mark.parametrize(
    ("architecture", "tied", "held"),
    thinned(
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
            ("llama", True, deployment(4, 32, types={"down_proj": "int8-g64", "layers.1.self_attn": "int8-row"})),
            ("qwen2", False, deployment(4, 64, types=MIXED)),
            ("qwen3", True, deployment(3, 32, types=MIXED)),
        ]
    ),
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
    elif not held.types:
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


@pytest.mark.parametrize("tied", [True, False])
def test_zero_points_in_a_mixture_are_unpacked_by_the_package(tmp_path: Path, tied: bool) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", width=128, layers=3, tied=tied)
    mixed = deployment(4, 32, False, types={"down_proj": "int8-g64", "layers.1.self_attn": "int4-row-asym"}, of="vllm")
    exporter, tokens = CompressedTensorsExporter(), np.arange(3, 123).reshape(3, 40)
    artifact = exporter.export(teacher, mixed, tmp_path / "out")
    assert verify(exporter, artifact, teacher, mixed).tensors == len(dequantized(artifact.path))
    check = prove(exporter, artifact.path, mixed, simulate(teacher, mixed, tokens, 1), 1, teacher)
    assert (check.agreement, check.same_written) == (1.0, 64)
    assert check.excess == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="transformers"):
        replace(mixed, runtime="transformers")
    with pytest.raises(InputError, match="nothing serves compressed-tensors-int3"):
        deployment(3, 32, types={"down_proj": "int8-g64-asym"})


def test_types_by_tensor_are_groups_whose_targets_name_their_layers(tmp_path: Path) -> None:
    """The package finds a module's scheme in its config, never by the module's class."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_targets

    teacher = save_tiny_teacher(tmp_path / "teacher", width=128, layers=12)
    held = deployment(4, 32, types={"down_proj": "int8-g64", "layers.1": "int3-g32", "layers.11": "bf16"})
    out = CompressedTensorsExporter().export(teacher, held, tmp_path / "out").path
    stated = json.loads((out / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate({name: one for name, one in stated.items() if name != "dequantize"})
    schemes = {target: group.weights for group in read.config_groups.values() for target in group.targets}
    assert len(read.config_groups) == 3
    assert len(schemes) < 20  # types that are the same in every layer are given only once
    for name, module in AutoModelForCausalLM.from_pretrained(teacher).named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        targets = match_targets(name, module, list(schemes))
        if name == "lm_head" or ".11." in name:
            assert name in read.ignore
            assert not targets
            continue
        (scheme,) = (schemes[target] for target in targets)
        wanted = (3, 32) if ".1." in name else (8, 64) if "down_proj" in name else (4, 32)
        assert (scheme.num_bits, scheme.group_size) == wanted


def test_types_that_cannot_be_are_refused(tmp_path: Path) -> None:
    tensors = spec_from_config(tiny_config("llama")).tensors
    with pytest.raises(InputError, match=r"a type can be bf16, int8-g32, .*int2-row-asym"):
        deployment(4, 32, types={"down_proj": "q4_0"})
    with pytest.raises(InputError, match=r"embed_tokens.* holds tables in 16 bits: name linear layers"):
        deployment(4, 32, types={"embeddings": "int8-g32"}).check_model(tensors)
    with pytest.raises(InputError, match="no matrix of this model is called so"):
        deployment(4, 32, types={"experts": "int8-g32"}).check_model(tensors)
    with pytest.raises(InputError, match=r"rows of .* weights, which the groups of 128"):
        deployment(4, 32, types={"down_proj": "int8-g128"}).check_model(tensors)
    # vLLM fuses some layers, and has kernels only for some types.
    served = replace(deployment(4, 32, types={"q_proj": "int8-g32"}), runtime="vllm")
    with pytest.raises(InputError, match=r"vLLM computes q_proj, k_proj, v_proj as one: give them one type"):
        served.check_model(tensors)
    replace(served, types=(("down_proj", "int8-g32"), ("self_attn", "int8-row"))).check_model(tensors)
    with pytest.raises(InputError, match=r"transformers"):
        replace(served, types=(("down_proj", "int3-g32"),))


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
    """Both packages compute these bits from the same integers. Before 0.18, they gave other values for 3 and 6 bits."""
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
