"""A GGUF file that a user gave, as a row of a search: its deployment, which serves and exports the file as it is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

from autodistill.distillation.teacher.resolve import Teacher
from autodistill.distillation.teacher.stored_grids import of_gguf
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import check_evaluated_cache, memory
from autodistill.hardware.budget import Budget, on_gpu
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.gguf_to_transformers import ORIGINAL
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import AS_GIVEN
from autodistill.strategy.deployment import Deployment, GivenFile

_TABLE = "token_embd.weight"
_SMALLER = "q8_0"


def as_given(model: Teacher, spec: ModelSpec, budget: Budget, cache_type: str | None = None) -> Deployment | None:
    """Return the deployment of the GGUF file that a model was made from, or None if it was made from something else.

    The cache has 16 bits. If the file then breaks the budget, and an 8-bit cache makes it fit, the cache has 8 bits.

    Args:
        model: The model, in the folder that `materialize` made.
        spec: Its shape.
        budget: The limits.
        cache_type: The only type of keys and values that is allowed, or None.
    """
    if model.original is None:
        return None
    found = _deployment(model.folder / ORIGINAL, model.original)
    if cache_type is not None:
        return replace(found, cache_type_k=cache_type, cache_type_v=cache_type)
    smaller = replace(found, cache_type_k=_SMALLER, cache_type_v=_SMALLER)
    return found if _fits(spec, found, budget) or not _fits(spec, smaller, budget) else smaller


def codes_of(folder: Path, spec: ModelSpec) -> Deployment | None:
    """Return the deployment that packs the codes of a folder's file again, for other containers; None if none can."""
    found = of_gguf(read_gguf(folder / ORIGINAL), spec)
    return found.deployment if found else None


def _deployment(path: Path, sha256: str) -> Deployment:
    from gguf import GGMLQuantizationType

    file, types = read_gguf(path), Counter[str]()
    names = {tensor.name: GGMLQuantizationType(tensor.type).name.lower() for tensor in file.tensors}
    for tensor in file.tensors:
        types[names[tensor.name]] += tensor.size
    given = GivenFile(
        sha256=sha256,
        types=tuple(sorted(types.items())),
        table=names[_TABLE],
        table_bytes=next(tensor.size for tensor in file.tensors if tensor.name == _TABLE),
    )
    bits = 8 * given.bytes / sum(math.prod(tensor.shape) for tensor in file.tensors)
    return Deployment(
        runtime=AS_GIVEN.runtimes[0], format=AS_GIVEN.name, bits=min(16, round(bits)), group_size=0, file=given
    )


def _fits(spec: ModelSpec, deployment: Deployment, budget: Budget) -> bool:
    try:
        check_evaluated_cache(spec, deployment.runtime, deployment.cache_types)
    except InputError:
        return False
    need = memory(spec, deployment, context=budget.context, batch=budget.batch, on_gpu=on_gpu(budget))
    return need.total_bytes <= budget.memory_bytes
