"""What other tools make from a teacher in a given processor time, with the recipes of their documents."""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.nn.modules.loss import _Loss
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodistill.data.dataset import TokenSet

# The rows have 576 weights, which the tools' own 128 does not divide.
GROUP = 64
# Sequences. AWQ's search of scales takes about 20 s of a core for each; 64 did not end within 40 minutes.
CALIBRATION, FOR_AWQ = 64, 8
_WARMUP = 0.05  # share of the processor time


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model as its tool runs it in torch, and the size of its weights.

    Attributes:
        model: Causal language model in float32 that computes with its quantised weights.
        size: Bytes of the weights in the file or folder that is served.
        tokens: Tokens that it was trained on.
    """

    model: Any
    size: int
    tokens: int = 0


def modelopt(
    teacher: Path, train: TokenSet, seconds: float, *, preset: str, loss: str = "", rate: float = 1e-5
) -> Made:
    """Quantise a teacher's weights to 4 bits with NVIDIA Model Optimizer, then possibly train it as its guide says.

    Args:
        teacher: Folder of transformers.
        train: Training data.
        seconds: Processor time of all threads, everything included.
        preset: Name of its configuration; its groups become `GROUP`.
        loss: "" for none, "teacher" (its QAD), or "both" with a quarter for the teacher and the rest for the labels.
        rate: Peak learning rate; warm-up and cosine as in its example.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    settings = copy.deepcopy(getattr(mtq, preset))
    for entry in settings["quant_cfg"]:
        if "block_sizes" in entry.get("cfg", {}):
            entry["cfg"]["block_sizes"][-1] = GROUP
    read = train.tokens[:FOR_AWQ]
    model = mtq.quantize(_load(teacher), settings, lambda model: _read(model, read) if "AWQ" in preset else None)
    tokens = 0
    if loss:
        model, tokens = _modelopt_trained(model, teacher, train, seconds, loss, rate)
    with tempfile.TemporaryDirectory() as folder:
        export_hf_checkpoint(copy.deepcopy(model).to(torch.bfloat16), export_dir=folder)
        size = _size(Path(folder))
    return Made(model=model, size=size, tokens=tokens)


def _modelopt_trained(
    model: Any, teacher: Path, train: TokenSet, seconds: float, loss: str, rate: float
) -> tuple[Any, int]:
    import modelopt.torch.distill as mtd

    balancer = mtd.StaticLossBalancer(kd_loss_weight=0.25) if loss == "both" else None
    criterion = _OfLogits(mtd.LogitsDistillationLoss(reduction="none"))
    settings = {"teacher_model": _load(teacher), "criterion": criterion, "loss_balancer": balancer}
    taught = mtd.convert(model, mode=[("kd_loss", settings)])

    def both(ids: torch.Tensor) -> torch.Tensor:
        found = taught(input_ids=ids, labels=ids).loss
        told = {"student_loss": found} if loss == "both" else {}
        return taught.compute_kd_loss(loss_reduction_fn=lambda values: values[:, :-1].mean(), **told)

    tokens = _train(taught, train, seconds, rate, both)
    return mtd.export(taught), tokens


class _OfLogits(_Loss):
    """Adapts a loss of logits to the outputs of transformers' models."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self._of = loss

    def forward(self, student: Any, taught: Any) -> torch.Tensor:
        """Return the loss of the student's logits."""
        return self._of(student.logits, taught.logits)


def olive(teacher: Path, train: TokenSet, seconds: float, *, kind: str, whole: bool = False) -> Made:
    """Quantise a teacher's weights to 4 bits with a pass of Microsoft Olive. It has no training.

    Args:
        teacher, train, seconds: As for `modelopt`; it ends by itself.
        kind: The pass, "Rtn" or "Gptq".
        whole: Whether the embeddings, here also the head, are quantised too.
    """
    from olive import run
    from olive.model import HfModelHandler

    step: dict[str, Any] = {"type": kind, "bits": 4, "group_size": GROUP, "sym": False}
    if whole:
        step |= {"embeds": True, "lm_head": True}
    with tempfile.TemporaryDirectory() as folder:
        if kind == "Gptq":
            step["data_config"] = _olive_data(Path(folder), teacher, train)
        output = Path(folder) / "output"
        run(
            {
                "input_model": {"type": "HfModel", "model_path": str(teacher)},
                "passes": {"pass": step},
                "systems": {"local": {"type": "LocalSystem", "accelerators": [{"device": "cpu"}]}},
                "target": "local",
                "output_dir": str(output),
                "cache_dir": str(Path(folder) / "cache"),
            }
        )
        made = next(output.rglob("*.safetensors")).parent
        return Made(model=HfModelHandler(model_path=str(made)).load_model(), size=_size(made))


def _olive_data(folder: Path, teacher: Path, train: TokenSet) -> Any:
    from olive.data.template import huggingface_data_config_template

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    lines = [json.dumps({"text": tokenizer.decode(row)}) for row in train.tokens[:CALIBRATION]]
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return huggingface_data_config_template(
        model_name=str(teacher),
        task="text-generation",
        load_dataset_config={"data_name": "json", "data_files": [str(path)], "split": "train"},
        pre_process_data_config={
            "text_cols": ["text"],
            "strategy": "join",
            "max_seq_len": train.tokens.shape[1],
            "max_samples": CALIBRATION,
            "add_special_tokens": False,
        },
        dataloader_config={"batch_size": 1},
    )


def as_it_is(teacher: Path, train: TokenSet, seconds: float) -> Made:
    """Return the teacher in 16 bits."""
    model = _load(teacher)
    return Made(model=model, size=2 * sum(one.numel() for one in model.parameters()))


def _load(teacher: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)


def _read(model: Any, tokens: Any) -> None:
    for row in tokens:
        model(input_ids=_ids(row))


def _ids(row: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(row, dtype=np.int64))[None]


def _size(folder: Path) -> int:
    """Return the bytes of the weights in a folder.

    32-bit numbers count as 16 bits: the tools keep them from the teacher.
    """
    size = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - no mapping
        size += sum(one.numel() * (2 if one.dtype == torch.float32 else one.element_size()) for one in tensors)
    return size


def _train(
    model: Any, train: TokenSet, seconds: float, rate: float, loss: Callable[[torch.Tensor], torch.Tensor]
) -> int:
    """Train in steps of one sequence until the processor time is over. Its share sets the rate. Return the tokens."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    model.train()
    began, tokens = time.process_time(), 0
    for row in _forever(train.tokens):
        passed = (time.process_time() - began) / max(seconds - began, 1e-9)
        if passed >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * _share(passed)
        loss(_ids(row)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += len(row)
    return tokens


def _share(passed: float) -> float:
    """Return the share of the peak rate: it rises within the first twentieth, then falls by half a cosine."""
    if passed < _WARMUP:
        return passed / _WARMUP
    return 0.5 * (1 + math.cos(math.pi * (passed - _WARMUP) / (1 - _WARMUP)))


def _forever(rows: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from rows
