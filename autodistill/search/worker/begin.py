"""A student before its training: its first weights, and the codes that it keeps, computed once in a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from autodistill.data.dataset import load_split
from autodistill.distillation.student.build import build_student
from autodistill.distillation.student.pretrained import describe_tokens
from autodistill.distillation.student.repair import HeldMoments, Moments
from autodistill.distillation.teacher.importance import PartImportance
from autodistill.models.config import spec_from_config
from autodistill.models.loading import held, load_model
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import read_scales, stored_alike
from autodistill.quantization.packing import dequantize, pack, unpack_codes
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.search.planning.durations import CALIBRATION_TOKENS
from autodistill.search.solve.bench import Bench
from autodistill.search.solve.compensation import made_up
from autodistill.search.worker.messages import TrialSetting
from autodistill.strategy.strategy import Init, Strategy
from autodistill.utils.checksums import saved_once
from autodistill.utils.hashing import content_hash
from autodistill.utils.plain_dataclass import plain

_WEIGHED_TOKENS = 1024  # tokens that measure the importance of columns: more hardly change their order
_FILE = "codes.safetensors"


def initial_student(
    setting: TrialSetting, init: Init, seed: int, moments: Iterable[Moments] | None = None
) -> tuple[Any, tuple[int, ...]]:
    """Return the student before training, in float32 on the CPU, and the teacher layer for each of its layers.

    Args:
        setting, init, seed: What it is made from.
        moments: Moments of the teacher's parts, if they are known; see `cut_student`.
    """
    model, kept = build_student(
        setting.teacher,
        init,
        seed=seed,
        calibration=PartImportance.load(setting.calibration) if setting.calibration and init.selective else None,
        pretrained=setting.pretrained.get(init.model),
        moments=moments,
    )
    if setting.rendering(init):
        describe_tokens(model, setting.text(init))
    return model, kept


def student_of(setting: TrialSetting, strategy: Strategy, seed: int) -> tuple[Any, tuple[int, ...]]:
    """Return a student as `initial_student` does, for use with `on_codes`.

    If the student keeps codes, `on_codes` takes its weights from their file. So a cut is not repaired here for nothing.
    """
    init = replace(strategy.init, repair=False) if strategy.codes else strategy.init
    return initial_student(setting, init, seed)


def on_codes(setting: TrialSetting, strategy: Strategy, model: Any) -> Mapping[str, Scales] | None:
    """Put an untrained student on the codes that it keeps, if only its scales are trained.

    Args:
        setting: Setting of the trials.
        strategy: The student's strategy.
        model: A student of that shape, in float32. If its codes make up for rounding errors, all of its weights change.

    Returns:
        The scales of its codes, by name of the weight; None if they follow from the weights.
    """
    finishing = strategy.finishing
    if finishing is None or not strategy.scales_alone:
        return None
    if not strategy.codes:
        return _own_scales(setting, strategy)
    spec, parameters, found = spec_from_config(model.config.to_dict()), held(model), {}
    grids, parts = finishing.grids_of(spec.tensors), defaultdict[str, list[str]](list)
    with safe_open(codes_file(setting, strategy), framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118
            name, _, part = key.rpartition("/")
            parts[name].append(part)
        for tensor in spec.tensors:
            name = tensor.name
            arrays = {part: file.get_tensor(f"{name}/{part}") for part in parts[name]}
            if (grid := grids.get(name)) is None:
                values = arrays["data"]
            else:
                codes, found[name] = unpack_codes(arrays, grid, tensor.shape)
                values = dequantize(codes, found[name], grid)
            weight = parameters[name]
            weight.data = torch.from_numpy(values).to(weight.device).view(weight.shape)
    return found


def begun(setting: TrialSetting, strategy: Strategy, seed: int) -> tuple[Any, Mapping[str, Scales]]:
    """Return a student before training, on the trials' device, and the scales of the codes that it keeps."""
    model, _ = student_of(setting, strategy, seed)
    model = model.to(setting.device)
    if strategy.codes:
        return model, on_codes(setting, strategy, model) or {}
    # Scales of the teacher's own codes are stored next to the teacher.
    return model, ({} if strategy.init.whole else _own_scales(setting, strategy) or {})


def _own_scales(setting: TrialSetting, strategy: Strategy) -> Mapping[str, Scales] | None:
    """Return the scales of the codes that a student's weights are already on, or None if they are on none.

    They are those of the whole teacher, or of the model that the student starts from, if that is a file of such codes.
    """
    init, finishing = strategy.init, strategy.finishing
    folder = setting.teacher if init.whole else setting.pretrained.get(init.model)
    return None if folder is None or finishing is None else read_scales(folder, finishing.scheme)


def scales_as(
    scales: Mapping[str, Scales], strategy: Strategy, spec: ModelSpec, scheme: QuantizationScheme
) -> Mapping[str, Scales]:
    """Return those scales of codes that are also valid in `scheme`, which may not be the scheme that they belong to."""
    if strategy.finishing is None:
        return {}
    return {name: scales[name] for name in stored_alike(scales, spec, strategy.finishing.scheme, scheme)}


def codes_file(
    setting: TrialSetting,
    strategy: Strategy,
    moments: HeldMoments | None = None,
    in_time: Callable[[], None] = lambda: None,
) -> Path:
    """Return the file of a student on its codes, packed as in its container. It is made first if it is missing.

    Args:
        setting, strategy: As in `on_codes`.
        moments: Moments of the teacher's parts, if others need them too.
        in_time: Called before each block is rounded; may raise.
    """
    assert strategy.finishing is not None
    assert setting.codes is not None
    key = content_hash([strategy.init.to_json(), plain(strategy.finishing.scheme)], 16)
    save = partial(_save, setting=setting, strategy=strategy, held=moments, in_time=in_time)
    return saved_once(setting.codes, key, _FILE, save)


def _moments(setting: TrialSetting, held: HeldMoments) -> list[Moments] | None:
    """Return the moments that repair cuts of the teacher, on the CPU; None if they are too large to hold."""
    assert setting.calibration is not None
    text, device = PartImportance.load(setting.calibration).text, setting.device
    load = partial(load_model, setting.teacher, torch.float32, device)
    found = held.of(load, setting.teacher_spec, text, device)
    return None if found is None else [{axis: part.cpu() for axis, part in one.items()} for one in found]


def _save(
    path: Path, *, setting: TrialSetting, strategy: Strategy, held: HeldMoments | None, in_time: Callable[[], None]
) -> None:
    """Compute the codes of a student, and write them with its other weights.

    If no device holds the teacher in float32, its own shape stays in main memory. Other students' repair is computed
    there too.
    """
    finishing, init = strategy.finishing, strategy.init
    assert finishing is not None
    held_here = setting.held_type == "float32"
    known = _moments(setting, held) if held and held_here and init.repair else None
    model, _ = initial_student(setting, init, 0, known)
    device = setting.device if held_here or not init.whole else "cpu"
    model = model.to(device)
    spec = spec_from_config(model.config.to_dict())
    grids = finishing.grids_of(spec.tensors)
    own = read_scales(setting.teacher, finishing.scheme) if init.whole else {}
    text = load_split(setting.data, "train", setting.rendering(init))
    in_file = {name: (grids[name], one) for name, one in own.items()}
    bench = Bench(model, spec, in_file, device, cut=not init.whole)
    bench.weigh(text.head(_WEIGHED_TOKENS))
    text = text.head(CALIBRATION_TOKENS)
    bf16 = setting.plan.bf16 and device == setting.device
    values, scales = made_up(bench, finishing.scheme, text, bf16=bf16, in_time=in_time)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for tensor in spec.tensors:
        name = tensor.name
        if (grid := grids.get(name)) is None:
            packed = {"data": bench.master(name).cpu().numpy()}
        elif name in values:
            packed = pack(values[name].cpu().numpy(), grid, scales[name])
        else:
            rows = bench.master(name).flatten(0, -2)
            packed = pack(rows.cpu().numpy(), grid, bench.scales(name, grid))
        arrays |= {f"{name}/{part}": np.ascontiguousarray(array) for part, array in packed.items()}
    save_file(arrays, path)
