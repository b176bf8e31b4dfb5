"""The space of a request: as it was named, with what the options change of it, and under the budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import CACHE_BYTES
from autodistill.search.construction.construction import Construction, with_constructions
from autodistill.search.construction.plain import plain_constructions
from autodistill.search.construction.recipe import first_prior
from autodistill.search.request.feasibility import on_its_device
from autodistill.search.request.request import (
    DEFAULT_SPACE,
    SearchRequest,
)
from autodistill.strategy.deployment import serving
from autodistill.strategy.named import load_strategy
from autodistill.strategy.space import Space, load_space, space_reference
from autodistill.strategy.strategy import Strategy
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import replacing
from autodistill.utils.plain_dataclass import check_choice

_LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True, kw_only=True)
class GivenSpace:
    """What is searched, as it was named and before any budget.

    Attributes:
        reference: Of the space.
        strategy: Of the one strategy that is distilled, or None.
        baselines: Of those that stand in the place of the space's own, or None.
        served_by: The runtime of all students, where one was named.
        kv_type: Of all caches in llama.cpp, where one was named.
        space: With all of these.
    """

    reference: str
    strategy: str | None
    baselines: tuple[str, ...] | None
    served_by: str | None
    kv_type: str | None
    space: Space


def given_space(request: SearchRequest, known: Mapping[str, Any], cache: Path) -> GivenSpace:
    """Load the space that is asked for, or was searched before, or the default one."""
    asked = None if request.space is None else space_reference(request.space, cache)
    reference = first_of(asked, known.get("space"), DEFAULT_SPACE)
    strategy = strategy_reference(request.strategy, cache)
    space = load_space(reference)
    baselines = tuple(map(str, request.baseline)) if request.baseline else _named(known.get("baselines"))
    if baselines is not None:
        space = against(space, baselines)
    if strategy is not None:
        space = single(space, strategy)
    served_by = _as_begun("--runtime", request.runtime, known, "served_by")
    kv_type = _as_begun("--kv-type", request.kv_type, known, "kv_type")
    return GivenSpace(
        reference=reference,
        strategy=strategy,
        baselines=baselines,
        served_by=served_by,
        kv_type=kv_type,
        space=_cached(_served_by(space, served_by), kv_type),
    )


def under_budget(
    space: Space, spec: ModelSpec, budget: Budget, known: Mapping[str, Any], kv_type: str | None
) -> tuple[tuple[Construction, ...], Space]:
    """The constructions and the space that this budget is searched with, on resuming those of before.

    Raises:
        NothingFitsError: Of a solved space nothing fits.
    """
    if known.get("constructions"):
        constructions = tuple(map(Construction.from_json, known["constructions"]))
        return constructions, replace(Space.stored(known["space_definition"]), narrowed_from=space.hash)
    if known:
        # Runs of earlier versions have deployments that their device does not serve.
        return (), space if space.hash == known.get("space_hash") else on_its_device(space, budget)
    if space.solved:
        constructions = plain_constructions(spec, space, budget, kv_type)
        return constructions, with_constructions(space, constructions, first_prior(spec, batch_tokens=SEQUENCE_LENGTH))
    return (), on_its_device(space, budget)


def first_of(*given: str | Path | None) -> str:
    """Return what is asked, or was before, or is the default; an empty text is asked too, and refused for what it
    is.
    """
    return str(next(one for one in given if one is not None))


def strategy_reference(strategy: str | Path | Strategy | None, cache: Path) -> str | None:
    """The name or file of a strategy; one that is given as an object is kept as a file, so that its run can go on."""
    if not isinstance(strategy, Strategy):
        return None if strategy is None else str(strategy)
    path = cache / "strategies" / f"{strategy.id}.yaml"
    if not path.exists():
        make_folder(path.parent)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(strategy.to_json()), encoding="utf-8")
    return str(path)


def _served_by(space: Space, runtime: str | None) -> Space:
    """The space whose students one runtime serves, where that is asked for; what it cannot serve is left out."""
    if runtime is None:
        return space
    if space.solved and space.types_solved and runtime != _LLAMA_CPP:
        raise InputError(
            f"--runtime {runtime}: the space {space.name} solves types for llama.cpp; give --space declared, or one "
            "that lists its deployments"
        )
    usual: dict[str, Any] = {} if runtime == _LLAMA_CPP else {"cache_type_k": "f16", "cache_type_v": "f16"}
    found = [replace(one, runtime=runtime, **usual) for one in space.deployments if runtime in serving(one)]
    if not found:
        named = ", ".join(one.name for one in space.deployments)
        raise InputError(f"--runtime {runtime} serves no deployment of the space {space.name}, which has {named}")
    return replace(space, deployments=tuple(dict.fromkeys(found)))


def _cached(space: Space, kind: str | None) -> Space:
    """The space whose students llama.cpp serves with a cache of one type, where that is asked for."""
    if kind is None:
        return space
    check_choice("--kv-type", kind, tuple(CACHE_BYTES))
    if not any(one.runtime == _LLAMA_CPP for one in space.deployments):
        raise InputError(f"--kv-type is llama.cpp's, in which the space {space.name} deploys nothing: leave it out")
    for one in space.deployments if space.solved and not space.types_solved else ():
        if one.cache_types not in (("f16", "f16"), (kind, kind)):
            raise InputError(f"--kv-type {kind} and the deployment {one.name} contradict each other: leave one out")
    held = (
        replace(one, cache_type_k=kind, cache_type_v=kind) if one.runtime == _LLAMA_CPP else one
        for one in space.deployments
    )
    return replace(space, deployments=tuple(dict.fromkeys(held)))


def _as_begun(option: str, asked: str | None, known: Mapping[str, Any], name: str) -> str | None:
    """Return what is asked for, on resuming as before.

    Args:
        option: Of the command line.
        asked: Its value.
        known: `search.json` of the run that goes on; empty of a new one.
        name: Of what it says there.
    """
    before: str | None = known.get(name)
    if known and asked not in (None, before):
        raise InputError(f"the run began without {option} {asked}: leave it out, or begin a new run")
    return asked or before


def against(space: Space, references: Sequence[str]) -> Space:
    """The space with other baselines, each by the name of its file.

    Raises:
        InputError: No such strategy, or two of one name.
    """
    named = {Path(reference).stem: load_strategy(reference) for reference in references}
    if len(named) < len(references):
        raise InputError(f"each --baseline needs a name of its own, not {', '.join(references)}: rename a file")
    return replace(space, baselines=named)


def single(space: Space, reference: str) -> Space:
    """The space that holds one strategy alone, under the deployments of another space."""
    strategy = load_strategy(reference)
    return replace(
        space,
        name=Path(reference).stem,
        dimensions=(),
        starts={},
        solved=False,
        restrictions=(),
        types_solved=False,
        baselines={Path(reference).stem: strategy},
    )


def _named(stored: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if stored is None else tuple(stored)
