"""Other 4-bit tools, called as a user would call them: the weights that each leaves for a model, and their bytes.

Each arm runs the published tool on the CPU, with the same calibration text, and reads back what it wrote. The tools
need packages that this project does not need. `missing` names them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from autodistill.data.tokenization import load_tokenizer
from autodistill.export.base import load_exporter
from autodistill.models.loading import load_model

BLOCK = 32
"""Weights that share a scale, as in Q4_0."""
Weights = dict[str, Any]


class Arm(NamedTuple):
    """A tool.

    Attributes:
        modules: Modules without which it does not run.
        package: The package that has them, by its name in pip.
        make: Takes the model's folder, an empty folder and the calibration tokens, int [sequences, tokens]. Returns
            weights by their transformers names, and the bytes of everything that it stores.
    """

    modules: tuple[str, ...]
    package: str
    make: Callable[[Path, Path, torch.Tensor], tuple[Weights, int]]


def missing(arm: Arm) -> str:
    """Return what must be installed for an arm, or "" if it is complete."""
    absent = [one for one in arm.modules if importlib.util.find_spec(one) is None]
    return f"not installed: {arm.package}" if absent else ""


def by_builder(folder: Path, out: Path, tokens: torch.Tensor) -> tuple[Weights, int]:
    """Run onnxruntime-genai's own builder in int4.

    It needs no text, and joins queries, keys and values in one matrix.
    """
    import onnx
    from onnx import numpy_helper

    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(out)]
    subprocess.run([*command, "-p", "int4", "-e", "cpu", "-c", str(out)], check=True, capture_output=True)
    stored = {one.name: numpy_helper.to_array(one) for one in onnx.load(out / "model.onnx").graph.initializer}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rows = [size * config["num_attention_heads"], *[size * config["num_key_value_heads"]] * 2]
    found: Weights = {}
    for name, codes in stored.items():
        if not name.endswith(".weight_Q4"):
            continue
        plain = name.removesuffix(".MatMul.weight_Q4")
        steps = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1, BLOCK).astype(np.float32)
        zeros = stored.get(name.replace("_Q4", "_zero_points"))
        centers: Any = 8.0
        if zeros is not None:
            centers = np.stack([zeros & 15, zeros >> 4], -1).reshape(len(codes), -1)[:, : steps.shape[1], None]
        scales = stored[name.replace("_Q4", "_scales")].astype(np.float32).reshape(len(codes), -1, 1)
        matrix = ((steps - centers) * scales).reshape(len(codes), -1)
        if plain.endswith("attn.qkv_proj"):
            parts = np.split(matrix, np.cumsum(rows)[:-1])
            for part, one in zip("qkv", parts, strict=True):
                found[f"{plain.replace('.attn.', '.self_attn.').removesuffix('qkv_proj')}{part}_proj.weight"] = one
        else:
            found[f"{plain.replace('.attn.', '.self_attn.')}.weight"] = matrix
    # If both are tied, the head's codes are also the table's.
    if "lm_head.weight" in found and config.get("tie_word_embeddings"):
        found["model.embed_tokens.weight"] = found.pop("lm_head.weight")
    return found, sum(one.nbytes for one in stored.values())


def by_autoround(
    folder: Path, out: Path, tokens: torch.Tensor, form: str = "q4_0", steps: int = 50
) -> tuple[Weights, int]:
    """Run AutoRound, by default its light recipe (50 steps a block) for Q4_0.

    It is written as a GGUF file and read back from there.

    Args:
        folder, out, tokens: As for every arm.
        form: The type of the file, by AutoRound's name.
        steps: Steps of tuning for each block. It recommends none for files of GGUF.
    """
    from auto_round import AutoRound
    from auto_round.export.export_to_gguf import export as writing

    usual = writing.get_conversion

    def any_tokenizer(*given: Any, **named: Any) -> Any:
        # Its converter knows tokenizers from a list, which lacks that of the small model. No text is read here.
        found = usual(*given, **named)
        sys.modules["conversion.base"].TextModel.get_vocab_base_pre = lambda *_: "gpt-2"  # type: ignore[attr-defined]
        return found

    writing.get_conversion = any_tokenizer
    made = AutoRound(
        str(folder),
        scheme=f"gguf:{form}",
        iters=steps,
        dataset=_text(folder, out, tokens),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=min(8, len(tokens)),
        device_map="cpu",
        enable_torch_compile=False,  # compiling takes longer than it saves with a small model
    )
    made.quantize_and_save(str(out / "made"), format=f"gguf:{form}")
    (path,) = (out / "made").rglob("*.gguf")
    return dict(load_exporter("gguf").unpack(path)), _gguf_bytes(path)


def by_olive(folder: Path, out: Path, tokens: torch.Tensor) -> tuple[Weights, int]:
    """Run Olive's GPTQ in 4 bits with zero points, its default, in blocks of 32. Tables stay in 16 bits."""
    from olive.common.quant.nn import QuantEmbedding, QuantLinear
    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.pytorch import gptq, quant_utils

    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    usual = quant_utils.get_calibration_dataset  # it would download its own data
    quant_utils.get_calibration_dataset = lambda *_, **__: rows
    try:
        one = create_pass_from_dict(gptq.Gptq, {"group_size": BLOCK}, disable_search=True)
        model = one.run(HfModelHandler(str(folder)), str(out / "made")).load_model()
    finally:
        quant_utils.get_calibration_dataset = usual
    found: Weights = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            packed = (module.qweight, module.scales, getattr(module, "qzeros", None))
            found[f"{name}.weight"] = module.unpack_and_dequantize(*packed).float().numpy()
    return found, _in_blocks(folder, found, zeros=True)


def by_modelopt(folder: Path, out: Path, tokens: torch.Tensor) -> tuple[Weights, int]:
    """Run Model Optimizer's AWQ in 4 bits (`INT4_AWQ_CFG`), in blocks of 32. Tables stay in 16 bits."""
    import copy

    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    _in_blocks_of(config, BLOCK)
    model: Any = load_model(folder, torch.float32).eval()

    def read(model: Any) -> None:
        """Read the calibration text."""
        for row in tokens:
            model(row[None])

    model = mtq.quantize(model, config, read)
    found: Weights = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not getattr(module.weight_quantizer, "is_enabled", False):
            continue
        # The product of scaled inputs and an inversely scaled matrix is the same as that of one matrix.
        weight, factors = module.weight_quantizer(module.weight), module.input_quantizer.pre_quant_scale
        found[f"{name}.weight"] = (weight if factors is None else weight * factors).detach().float().numpy()
    columns = 2 * sum(one.shape[1] for one in found.values())
    return found, _in_blocks(folder, found, zeros=False) + columns


def _in_blocks_of(config: Any, size: int) -> None:
    """Set the size of all blocks in a config, at any depth."""
    if isinstance(config, Mapping):
        sizes = config.get("block_sizes")
        if sizes is not None:
            sizes[-1] = size
    for one in config.values() if isinstance(config, Mapping) else config if isinstance(config, list) else ():
        _in_blocks_of(one, size)


def _in_blocks(folder: Path, found: Mapping[str, Any], *, zeros: bool) -> int:
    """Return a model's bytes: 4 bits and a 16-bit scale per block for the matrices found, 16 bits for all else."""
    total = 0
    for name, weight in load_model(folder, torch.float32).named_parameters():
        blocks = weight.numel() // BLOCK
        packed = weight.numel() // 2 + 2 * blocks + (blocks // 2 if zeros else 0)
        total += packed if name in found else 2 * weight.numel()
    return total


def _text(folder: Path, out: Path, tokens: torch.Tensor) -> str:
    """Write the calibration text into a file in AutoRound's format, and return its path."""
    tokenizer, path = load_tokenizer(folder), out / "calibration.json"
    path.write_text(json.dumps([{"text": tokenizer.decode(row.tolist())} for row in tokens]), encoding="utf-8")
    return str(path)


def _gguf_bytes(path: Path) -> int:
    import gguf

    return sum(int(one.n_bytes) for one in gguf.GGUFReader(path).tensors)


ARMS: Mapping[str, Arm] = {
    "onnxruntime-genai's builder: int4": Arm(("onnxruntime_genai", "onnx"), "onnxruntime-genai", by_builder),
    "AutoRound: gguf-q4_0": Arm(("auto_round",), "auto-round", by_autoround),
    "AutoRound, no tuning: gguf-q4_0": Arm(("auto_round",), "auto-round", partial(by_autoround, steps=0)),
    "Olive: GPTQ int4, blocks of 32": Arm(("olive",), "olive-ai", by_olive),
    "Model Optimizer: AWQ int4, blocks of 32": Arm(("modelopt",), "nvidia-modelopt", by_modelopt),
}
logging.getLogger("olive").setLevel(logging.WARNING)
