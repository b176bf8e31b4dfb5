"""Every named strategy trains a tiny student on the cache that it needs, through its decay and grid, and learns."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from autodistill.distillation.student.check import check_strategy, student_spec
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.importance import measure_importance
from autodistill.distillation.teacher.output_cache import TeacherCache
from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.quantization.grids import Grid
from autodistill.search.setup.teacher_phase import cache_settings
from autodistill.strategy.named import load_strategy, packaged_file
from autodistill.strategy.space import load_space

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "search_spaces" / "strategies").glob("*.yaml"))
# Between them they have every kind of signal and of alignment. Low-rank changes and grids of integers are trained in
# tests/distillation/training, in test_lora.py and test_fake_quantize.py.
FEW = ("full_recipe", "on_policy", "written")
STEP = 64


def bench_of(workshop, name, folder, device="cpu"):
    """Return a named strategy in a form that fits the tiny student, and a workshop with what it is trained on.

    Returns:
        The strategy, the workshop, the file of the importance that it starts from or None, and a function that returns
        the grids of its finishing by name, or None.
    """
    strategy = load_strategy(name)
    spec = spec_from_config(json.loads((workshop.teacher / "config.json").read_text()))
    alignment, layers = strategy.distillation.alignment, student_spec(strategy, spec).layers
    if alignment is not None and alignment.count > layers:
        # Made for models with more layers than the tiny one has.
        recipe = dataclasses.replace(strategy.distillation, alignment=dataclasses.replace(alignment, count=layers))
        strategy = dataclasses.replace(strategy, distillation=recipe)
    check_strategy(strategy, spec)
    space = dataclasses.replace(load_space("declared"), dimensions=(), baselines={name: strategy})
    calibration = None
    if strategy.init.selective:
        calibration = folder / "calibration.safetensors"
        measure_importance(load_model(workshop.teacher, torch.float32), workshop.data, device).save(calibration)
    settings = cache_settings(space, spec, bf16=False, calibration=calibration)
    cache = None
    if not settings.empty:
        made = ensure_cache(
            lambda: load_model(workshop.teacher, torch.float32),
            teacher_fingerprint="t",
            data_fingerprint="d",
            data=workshop.data,
            vocabulary=spec.vocabulary,
            width=spec.width,
            settings=settings,
            root=folder,
            limit_bytes=10**8,
            device=device,
        )
        cache = TeacherCache(made)
    storage_of = None
    if strategy.finishing is not None:
        storages = {t.name: strategy.finishing.storage(t) for t in student_spec(strategy, spec).tensors}
        storage_of = {tensor: storage for tensor, storage in storages.items() if isinstance(storage, Grid)}.get
    bench = dataclasses.replace(workshop, cache=cache)
    if name == "written":
        bench = bench.told(workshop.cache)
        # Every other position has only text.
        bench.data.writer_logprobs.ids[:, ::2] = -1
    return strategy, bench, calibration, storage_of


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_it_trains(workshop, tmp_path, name):
    strategy, bench, calibration, storage_of = bench_of(workshop, name, tmp_path)
    trainer = bench.trainer(strategy, calibration=calibration, tokens=40 * STEP)
    records = [*trainer.train_stable(32 * STEP), *trainer.train_decay(40 * STEP, storage_of)]
    # Cross-entropies are comparable. TAID's target moves, and a temperature scales its divergence.
    first, last = (np.mean([record.cross_entropy for record in part]) for part in (records[:8], records[-8:]))
    assert np.isfinite([record.loss for record in records]).all()
    assert last < first


def test_a_name_that_nothing_has_is_refused_with_what_may_have_been_meant() -> None:
    with pytest.raises(InputError, match=r"no strategy 'kd': give a name or a \.yaml file; did you mean gkd\?$"):
        packaged_file("strategies", "kd")
    with pytest.raises(InputError, match=r"no space 'x': give a name or a \.yaml file; known: declared, default$"):
        packaged_file("spaces", "x")
