"""What does each of several devices hold of a divided model, and does it compute the same?

    python -m benchmarks.hardware.divided

Small models of random weights run over two and three processes of this machine (gloo), and in one. The program measures
the largest difference of their logits, and compares the bytes of the first process's weights with the prediction. Then
it computes what each of 1, 2 and 4 GPUs holds of a model of 3.4B weights, and of training it, next to the figures of
the guide.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from autodistill.advisor.describe import shape
from autodistill.advisor.estimate import training_parts
from autodistill.advisor.gpu_parts import running_parts
from autodistill.estimates.divided import part_bytes
from autodistill.inference.half_precision import load_held
from autodistill.inference.tensor_parallel import leave, load_teacher
from autodistill.models.config import spec_from_config
from autodistill.testing import save_tiny_teacher
from autodistill.units import format_bytes
from benchmarks.common import report
from benchmarks.common.program import parse, parser_of

WIDE: dict[str, Any] = {"layers": 2, "width": 192, "heads": 6, "ffn": 384, "head_dim": 32, "vocabulary": 301}
CASES = (("llama", 2, 2), ("qwen3", 2, 2), ("llama", 3, 3))
"""Architecture, key-value heads and processes."""
GUIDE = {"layers": 26, "width": 3200, "heads": 32, "ffn": 8640, "vocab": 32000}
"""OpenLLaMA-3B's shape."""
CONTEXT, TOKENS = 2048, 1024


def measured(architecture: str, kv_heads: int, processes: int) -> dict[str, Any]:
    """Measure one model, divided and whole: logits, and bytes of weights."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_teacher(Path(folder), architecture=architecture, kv_heads=kv_heads, **WIDE)
        divided, whole = (
            load_teacher(Path(folder), "bfloat16", processes=processes),
            load_held(Path(folder), "bfloat16"),
        )
        ids = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found, expected = (model(input_ids=ids, use_cache=False).logits for model in (divided, whole))
        held = sum(one.numel() * one.element_size() for one in divided.parameters())
        spec = spec_from_config(whole.config.to_dict())
        leave(divided)
    return {
        "model": f"{architecture}, 6 heads, {kv_heads} for keys and values",
        "processes": processes,
        "difference": float((found - expected).abs().max()),
        "largest": float(expected.abs().max()),
        "held": held,
        "predicted": part_bytes(spec, processes, lambda tensor: 2 if len(tensor.shape) == 2 else 4),
    }


def main() -> None:
    """Measure, predict, and write the report."""
    arguments = parse(parser_of(__doc__))
    found = [measured(*case) for case in (CASES[:1] if arguments.smoke else CASES)]
    report.note("measured", found)
    rows = [
        (
            one["model"],
            one["processes"],
            f"{one['difference']:.1e} of {one['largest']:.1f}",
            f"{one['held']:,}",
            f"{100 * (one['predicted'] / one['held'] - 1):+.1f}%",
        )
        for one in found
    ]
    spec = shape(GUIDE, tied=False).spec
    cards = []
    for gpus in (1, 2, 4):
        running = running_parts(spec, gpus, context=CONTEXT, batch=1)["each"]
        training = training_parts(spec, TOKENS, gpus)
        report.note(f"predicted, {gpus} GPUs", {"running": running, "training": training})
        parts = (running["weights_bytes"], running["total_bytes"], training["checkpointing"]["total_bytes"])
        cards.append((gpus, *map(format_bytes, parts)))
    sections = [
        "Models of random weights, matrices held in bfloat16 and computed with in float32; processes meet over gloo.",
        report.table(("model", "processes", "logits differ by", "bytes of the first process", "predicted"), rows),
        f"## A model of {spec.parameters / 1e9:.2f}B weights on several GPUs, predicted\n\nRun in 16 bits at one "
        f"stream of {CONTEXT} tokens; trained by AdamW in float32 with checkpointing, {TOKENS} tokens a pass (FSDP2). "
        "The guide says 14 GB on one card and 7.2 GB on each of four, but not in which type, nor at which context.",
        report.table(("GPUs", "weights of each", "each, running", "each, training"), cards),
    ]
    print(report.write("divided", "A model divided over several devices", sections))


if __name__ == "__main__":
    main()
