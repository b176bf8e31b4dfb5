"""A student before it is trained: the weights that it begins with, and the codes that it keeps, found once in a run."""

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
from torch import Tensor

from autodistill.data.dataset import load_split
from autodistill.distillation.student.build import build_student
from autodistill.distillation.student.pretrained import describe_tokens
from autodistill.distillation.student.repair import HeldMoments
from autodistill.distillation.teacher.importance import PartImportance
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
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

_WEIGHED_TOKENS = 1024  # of it, by which columns count: their order hardly depends on more
_FILE = "codes.safetensors"


def initial_student(
    setting: TrialSetting, init: Init, seed: int, moments: Iterable[Tensor] | None = None
) -> tuple[Any, tuple[int, ...]]:
    """The student before training, in float32 on the CPU, and the teacher layer that each of its layers stands for.

    Args:
        setting, init, seed: What it is made of.
        moments: Of the teacher's FFNs, where they are known; see `cut_student`.
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
    """Return what `initial_student` does, for a student that `on_codes` is told of before it is used.

    Its weights then come from the file of its codes, so that a cut is not repaired for nothing.
    """
    init = replace(strategy.init, repair=False) if strategy.codes else strategy.init
    return initial_student(setting, init, seed)


def on_codes(setting: TrialSetting, strategy: Strategy, model: Any) -> Mapping[str, Scales] | None:
    """Put a student that has not been trained on the codes that it keeps, where its scales alone are trained.

    Args:
        setting: Of the trials.
        strategy: The student's.
        model: A student of that shape, in float32; where codes make up for errors all of its weights change.

    Returns:
        The scales that its codes have, by name of the weight; None where these follow from the weights.
    """
    finishing = strategy.finishing
    if finishing is None or not strategy.scales_alone:
        return None
    if not strategy.codes:
        return _own_scales(setting, strategy)
    spec, parameters, found = spec_from_config(model.config.to_dict()), dict(model.named_parameters()), {}
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
            parameters[name].data = torch.from_numpy(values).to(parameters[name].device)
    return found


def begun(setting: TrialSetting, strategy: Strategy, seed: int) -> tuple[Any, Mapping[str, Scales]]:
    """Return a student as it is before training, on the trials' device, and the scales of the codes that it keeps."""
    model, _ = student_of(setting, strategy, seed)
    model = model.to(setting.device)
    if strategy.codes:
        return model, on_codes(setting, strategy, model) or {}
    # Scales of the teacher's own codes stand beside the teacher.
    return model, ({} if strategy.init.whole else _own_scales(setting, strategy) or {})


def _own_scales(setting: TrialSetting, strategy: Strategy) -> Mapping[str, Scales] | None:
    """Return the scales of the codes that a student's weights lie on already: the whole teacher's, or those of a model
    that it begins as, where that is a file of such codes. None where it is neither.
    """
    init, finishing = strategy.init, strategy.finishing
    folder = setting.teacher if init.whole else setting.pretrained.get(init.model)
    return None if folder is None or finishing is None else read_scales(folder, finishing.scheme)


def scales_as(
    scales: Mapping[str, Scales], strategy: Strategy, spec: ModelSpec, scheme: QuantizationScheme
) -> Mapping[str, Scales]:
    """Return the scales of codes that hold in a scheme, which may not be the one that these were found for."""
    if strategy.finishing is None:
        return {}
    return {name: scales[name] for name in stored_alike(scales, spec, strategy.finishing.scheme, scheme)}


def codes_file(
    setting: TrialSetting,
    strategy: Strategy,
    held: HeldMoments | None = None,
    in_time: Callable[[], None] = lambda: None,
) -> Path:
    """Return the file of a student on its codes, as its container packs them; they are found if it is not there.

    Args:
        setting, strategy: As of `on_codes`.
        held: Of the teacher's FFNs, where others need them too.
        in_time: Called before each block is rounded; may raise.
    """
    assert strategy.finishing is not None
    assert setting.codes is not None
    key = content_hash([strategy.init.to_json(), plain(strategy.finishing.scheme)], 16)
    save = partial(_save, setting=setting, strategy=strategy, held=held, in_time=in_time)
    return saved_once(setting.codes, key, _FILE, save)


def _moments(setting: TrialSetting, held: HeldMoments) -> list[Tensor] | None:
    """Return what cuts of the teacher are repaired by, on the CPU; None where they are too many to be held."""
    assert setting.calibration is not None
    text, device = PartImportance.load(setting.calibration).text, setting.device
    load = partial(load_model, setting.teacher, torch.float32, device)
    found = held.of(load, setting.teacher_spec, text, device)
    return None if found is None else [one.cpu() for one in found]


def _save(
    path: Path, *, setting: TrialSetting, strategy: Strategy, held: HeldMoments | None, in_time: Callable[[], None]
) -> None:
    """Find the codes of a student and write them, and its other weights."""
    finishing, init = strategy.finishing, strategy.init
    assert finishing is not None
    model, _ = initial_student(setting, init, 0, _moments(setting, held) if held and init.repair else None)
    model = model.to(setting.device)
    spec = spec_from_config(model.config.to_dict())
    grids = finishing.grids_of(spec.tensors)
    own = read_scales(setting.teacher, finishing.scheme) if init.whole else {}
    text = load_split(setting.data, "train", setting.rendering(init))
    known = {name: (grids[name], one) for name, one in own.items()}
    bench = Bench(model, spec, known, setting.device, cut=not init.whole)
    bench.weigh(text.head(_WEIGHED_TOKENS))
    text = text.head(CALIBRATION_TOKENS)
    values, scales = made_up(bench, finishing.scheme, text, bf16=setting.plan.bf16, in_time=in_time)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for tensor in spec.tensors:
        name = tensor.name
        if (grid := grids.get(name)) is None:
            packed = {"data": bench.master(name).cpu().numpy()}
        elif name in values:
            packed = pack(values[name].cpu().numpy(), grid, scales[name])
        else:
            packed = pack(bench.master(name).cpu().numpy(), grid, bench.scales(name, grid))
        arrays |= {f"{name}/{part}": np.ascontiguousarray(array) for part, array in packed.items()}
    save_file(arrays, path)
