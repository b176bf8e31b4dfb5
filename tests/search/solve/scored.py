"""A tiny teacher whose types and cuts are scored, for tests of what a solver finds with these scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.teacher.importance import PartImportance, measure_importance
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.search.solve.bench import Bench, Sample
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import Options
from autodistill.search.solve.shapes import Shapes
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json

LENGTH = 64


class Setting(NamedTuple):
    """The teacher's folder, a folder for files, the calibration text, and all scores."""

    teacher: Path
    folder: Path
    bench: Bench
    sample: Sample
    calibration: PartImportance
    options: Options
    library: Library
    shapes: Shapes


def scored(folder: Path, budget: Budget, *, documents: int, tokens: int, **sizes: Any) -> Setting:
    """Make a teacher of these sizes, and score its types and cuts on so many tokens of a text of so many documents."""
    teacher = save_tiny_teacher(folder / "teacher", seed=3, **sizes)
    source = resolve_data(str(tiny_text(folder, documents=documents)))
    train = load_split(prepare(source, teacher, tokenizer_fingerprint(teacher), LENGTH, folder).folder, "train")
    spec = spec_from_config(read_json(teacher / "config.json"))
    options = Options(spec=spec, budget=budget)
    bench = Bench(load_model(teacher, torch.float32), spec, {})
    sample = bench.sample("calibration", train.head(tokens))
    calibration = measure_importance(load_model(teacher, torch.float32), train)
    library = Library(folder / "library.json", bench, options, sample, lambda _: None)
    library.build()
    shapes = Shapes(folder / "shapes.json", bench, sample, calibration)
    shapes.build()
    return Setting(teacher, folder, bench, sample, calibration, options, library, shapes)
