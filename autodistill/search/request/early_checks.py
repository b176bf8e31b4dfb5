"""Checks of a request on its own: unknown names and impossible numbers."""

from __future__ import annotations

from pathlib import Path

from autodistill.data.documents import check_data_reference
from autodistill.distillation.teacher.resolve import locate
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import check_runtime
from autodistill.evaluators.tasks.lm_eval import PREFIX
from autodistill.hardware.budget import Budget, memory_on
from autodistill.hardware.catalog import devices
from autodistill.hardware.device import LOCAL
from autodistill.hardware.lookup import find_device
from autodistill.options import parsed
from autodistill.quantization.formats import CACHE_BYTES
from autodistill.runs.run_folder import RunFolder
from autodistill.search.algorithms.names import check_sampler
from autodistill.search.request.metrics import requested_metrics
from autodistill.search.request.request import RUNNERS, SearchRequest, joined
from autodistill.utils.input_files import check_file
from autodistill.utils.plain_dataclass import check_choice

# Larger values are typing errors: 1000 times the longest trainings so far, and steps larger than any so far.
_MOST = {"trials": 10**6, "tokens": 10**16, "confirm": 10**6, "step_tokens": 10**9}
_SHORTEST = 8  # tokens of a sequence: fewer give a model too little to predict from


def check_early(request: SearchRequest) -> None:
    """Refuse errors in a request that show without reading models, data or earlier runs, and without torch.

    `check_request` refuses all of them too. Callers run this check before they import the engines of a search: the
    imports take seconds, and a typing error should be reported at once.

    Raises:
        InputError: The request has an error. The message is one line.
    """
    check_numbers(request)
    for one in request.apart():
        _check_names(one)
    if not request.several:
        check_name(request)


def check_name(request: SearchRequest) -> None:
    """Refuse a taken name for a new run, or the name of a resumed run that does not exist here.

    With a storage, a resumed run may exist there instead.

    Raises:
        InputError: The name is not plain, a new run's name is taken, or no run of this name exists.
    """
    if request.name is None:
        if request.resume:
            raise InputError("--resume goes on with a run: name it with --name")
        return
    run = RunFolder(Path(request.runs), request.name)
    if not request.resume:
        run.check_free()
    elif request.storage is None:
        RunFolder.open(Path(request.runs), request.name)


def check_numbers(request: SearchRequest) -> None:
    """Refuse impossible numbers, and contradicting options for how trials run.

    Raises:
        InputError: The message is one line.
    """
    for name, most in _MOST.items():
        value = getattr(request, name)
        if value is not None and not 1 <= value <= most:
            bound = "at least 1" if value < 1 else f"at most {most:,}"
            raise InputError(f"--{name.replace('_', '-')} must be {bound}, not {value}")
    length = parsed(request.sequence_length)
    if length is not None and length < _SHORTEST:
        raise InputError(f"--sequence-length must be at least {_SHORTEST} tokens, not {length}")
    if request.runner not in RUNNERS:
        raise InputError(f"there is no runner {request.runner!r}; the runners are {', '.join(RUNNERS)}")
    if request.ray_address is not None and request.runner == "inline":
        raise InputError("--ray-address names a Ray cluster, which --runner inline does not use: leave one of them out")
    if request.dashboard and request.runner == "inline":
        raise InputError("--dashboard shows Ray, which --runner inline does not use: leave one of them out")
    if request.dashboard and request.ray_address is not None:
        raise InputError("--ray-address names a cluster, which has a dashboard of its own: leave out --dashboard")


def _check_names(request: SearchRequest) -> None:
    if request.sampler is not None:
        check_sampler(request.sampler)
    if request.kv_type is not None:
        check_choice("--kv-type", request.kv_type, tuple(CACHE_BYTES))
    if request.runtime is not None:
        check_runtime(request.runtime)
    if request.device is not None and request.device.strip().lower() != LOCAL:
        found = find_device(request.device, devices(*map(Path, request.devices or ())))
        memory_on(found, None if isinstance(request.budget, Budget) else parsed(request.budget))
    if isinstance(request.teacher, str | Path):
        locate(str(request.teacher))
    for path in request.candidate or ():
        check_file(Path(path))
    if isinstance(request.data, str | Path):
        check_data_reference(str(request.data))
    # A resumed run may have its own metric, and only lm-eval can find its tasks, so both are checked later.
    if not request.resume and PREFIX not in f"{request.metric},{joined(request.objectives)}":
        requested_metrics(request, {})
