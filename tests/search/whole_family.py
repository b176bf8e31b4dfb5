"""What tests of families that are trained whole share: a search, what its outcome must show, and a step on the grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from gguf import GGUFReader

from autodistill.advisor.describe import describe
from autodistill.distillation.training.fake_quantize import quantized_training
from autodistill.hardware.budget import Budget
from autodistill.models.config import config_of, spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Grid
from autodistill.runs.run_folder import RunFolder
from autodistill.search.remake import remake
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.strategy.deployment import Deployment
from autodistill.testing import tiny_text

Q8_0 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)


def written_inputs(folder: Path, teacher: Path, strategies: Mapping[str, Any]) -> tuple[Path, Path, Path]:
    """Write a text, strategies by name, and spaces that keep a teacher whole or cut it.

    Returns:
        The teacher, the text, and a folder for the cache.
    """
    for name, strategy in strategies.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(strategy))
    gguf = {"runtime": "llama.cpp", "format": "gguf-q4_0", "bits": 4, "group_size": 32}
    space = {"name": "one", "dimensions": {"init.depth": {"choices": [1.0]}}, "deployments": [gguf]}
    (folder / "one.yaml").write_text(yaml.safe_dump(space))
    cut = space | {"name": "cut", "dimensions": {"init.depth": {"choices": [0.5, 1.0]}}}
    (folder / "cut.yaml").write_text(yaml.safe_dump(cut))
    return teacher, tiny_text(folder / "text", documents=30, sentences=24), folder / "cache"


def request(inputs: tuple[Path, Path, Path], out: Path, **changes: Any) -> SearchRequest:
    """Return a search of one strategy, `qat.yaml` next to the text, with 2,048 tokens."""
    teacher, text, cache = inputs
    fields: dict[str, Any] = {
        "budget": Budget(memory_bytes=16 * 10**9, context=256),
        "strategy": str(text.parent / "qat.yaml"),
        "space": str(text.parent / "one.yaml"),
        "teacher": str(teacher),
        "data": str(text),
        "tokens": 2048,
        "sequence_length": 128,
        "runner": "inline",
        "runs": out,
        "name": "run",
        "cache": cache,
    }
    return SearchRequest(**(fields | changes))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a search has left.

    Attributes:
        teacher: The teacher's shape.
        student: Folder of the student's weights in float32.
        file: The exported GGUF file.
        stored: The tensors of that file, as the gguf package reads them, by name.
        described: The shape that the file's header says.
    """

    teacher: ModelSpec
    student: Path
    file: Path
    stored: Mapping[str, Any]
    described: ModelSpec


def trained(inputs: tuple[Path, Path, Path], out: Path, **changes: Any) -> Trained:
    """Run a search, and check its best row, what llama.cpp chose, the file's header, and that the row is made again."""
    outcome = search(request(inputs, out, **changes))
    row = outcome.finish.best
    assert row is not None
    teacher = spec_from_config(read_config(inputs[0]))
    assert row.shape == config_of(teacher)
    assert outcome.finish.checks["gguf"].agreement > 0.9
    assert abs(outcome.finish.checks["gguf"].excess) < 0.02
    run = RunFolder(out, "run")
    untrained = [one for one in run.events.rows() if one.strategy is None and one.deployment == row.deployment]
    assert row.accuracy > untrained[0].accuracy + 0.1
    (student,) = (one.parent for one in run.path.glob("checkpoints/**/config.json") if "stages" not in one.parts)
    assert remake(run, row, inputs[2]).verdict == "identical"
    file = outcome.finish.paths["gguf"]
    described = describe(str(file))
    assert replace(described.spec, tensors=()) == replace(teacher, tensors=())
    assert described.format_name == "gguf-q4_0"
    stored = {one.name: one for one in GGUFReader(file).tensors}
    return Trained(teacher=teacher, student=student, file=file, stored=stored, described=described.spec)


def check_step_on_grid(
    ours: Any, rounded: Any, grids: Mapping[str, Grid], tokens: torch.Tensor, *, clips: bool
) -> torch.Tensor:
    """Check logits and gradients on the grid against transformers' model of the rounded weights.

    Args:
        ours: The model that is trained.
        rounded: transformers' own, whose weights are rounded already.
        grids: The grids, by name of the weight.
        tokens: int64 [sequences, tokens].
        clips: Whether weights lie beyond the last code of a grid. They get no gradient.

    Returns:
        The logits.
    """
    with quantized_training(ours, grids.get):
        found = ours(input_ids=tokens, labels=tokens, use_cache=False)
        expected = rounded(input_ids=tokens, labels=tokens, use_cache=False)
        torch.testing.assert_close(found.logits, expected.logits)
        found.loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in rounded.named_parameters()}
    for name, parameter in ours.named_parameters():
        clipped = (parameter.grad == 0) & clips
        assert clipped.float().mean() < 0.1
        torch.testing.assert_close(parameter.grad, gradients[name].masked_fill(clipped, 0), rtol=1e-4, atol=1e-6)
    return expected.logits
