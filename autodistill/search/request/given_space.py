"""The space of a request: loaded by name, changed by options, and limited by the budget."""

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
from autodistill.search.request.references import absolute_file, check_there, with_models
from autodistill.search.request.request import (
    DEFAULT_SPACE,
    SearchRequest,
)
from autodistill.strategy.deployment import serving
from autodistill.strategy.named import is_file, load_strategy
from autodistill.strategy.space import Space, load_space, space_reference
from autodistill.strategy.strategy import Strategy
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import replacing
from autodistill.utils.plain_dataclass import check_choice

_LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True, kw_only=True)
class GivenSpace:
    """The space as named by the user, before a budget limits it.

    Attributes:
        reference: Reference of the space.
        strategy: Reference of the single strategy that is distilled, or None.
        baselines: References of the baselines that replace the space's own, or None.
        served_by: The runtime of all students, or None if none was named.
        kv_type: The type of all caches in llama.cpp, or None if none was named.
        space: The space with all of these applied.
    """

    reference: str
    strategy: str | None
    baselines: tuple[str, ...] | None
    served_by: str | None
    kv_type: str | None
    space: Space


def given_space(request: SearchRequest, known: Mapping[str, Any], cache: Path) -> GivenSpace:
    """Load the space that is asked for, or that of the resumed run, or the default one."""
    asked = None if request.space is None else space_reference(request.space, cache)
    reference = absolute_file(first_of(asked, known.get("space"), DEFAULT_SPACE))
    strategy = strategy_reference(request.strategy, cache)
    named = request.baseline or known.get("baselines")
    baselines = None if named is None else tuple(map(absolute_file, named))
    served_by = _as_begun("--runtime", request.runtime, known, "served_by")
    kv_type = _as_begun("--kv-type", request.kv_type, known, "kv_type")
    if request.recorded_space and "space_definition" in known:
        space = replace(Space.stored(known["space_definition"]), narrowed_from=known.get("space_hash"))
    else:
        _check_files(request, known, reference, strategy, baselines)
        space = load_space(reference)
        if baselines is not None:
            space = against(space, baselines)
        if strategy is not None:
            space = single(space, strategy)
        space = _cached(_served_by(space, served_by), kv_type)
        if not known or "folder" in known:  # earlier versions stored models as they were given
            space = with_models(space, known.get("folder", ""))
    return GivenSpace(
        reference=reference,
        strategy=strategy,
        baselines=baselines,
        served_by=served_by,
        kv_type=kv_type,
        space=space,
    )


def under_budget(
    space: Space, spec: ModelSpec, budget: Budget, known: Mapping[str, Any], kv_type: str | None
) -> tuple[tuple[Construction, ...], Space]:
    """Return the constructions and the space to search within this budget. A resumed run keeps its own.

    Raises:
        NothingFitsError: The space is solved, and nothing in it fits.
    """
    if known.get("constructions"):
        constructions = tuple(map(Construction.from_json, known["constructions"]))
        return constructions, replace(Space.stored(known["space_definition"]), narrowed_from=space.hash)
    if known:
        # Runs of earlier versions may keep deployments that their device does not serve.
        return (), space if space.hash == known.get("space_hash") else on_its_device(space, budget)
    if space.solved:
        constructions = plain_constructions(spec, space, budget, kv_type)
        return constructions, with_constructions(space, constructions, first_prior(spec, batch_tokens=SEQUENCE_LENGTH))
    return (), on_its_device(space, budget)


def first_of(*given: str | Path | None) -> str:
    """Return the first value that is not None: asked, before, or default. An empty text counts and is refused later."""
    return str(next(one for one in given if one is not None))


def strategy_reference(strategy: str | Path | Strategy | None, cache: Path) -> str | None:
    """Return the name or file of a strategy. An object is stored as a file, so that its run can be resumed."""
    if not isinstance(strategy, Strategy):
        return None if strategy is None else absolute_file(strategy)
    path = cache / "strategies" / f"{strategy.id}.yaml"
    if not path.exists():
        make_folder(path.parent)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(strategy.to_json()), encoding="utf-8")
    return absolute_file(path)


def _check_files(
    request: SearchRequest,
    known: Mapping[str, Any],
    space: str,
    strategy: str | None,
    baselines: Sequence[str] | None,
) -> None:
    """Refuse files of a resumed run that were moved away, unless the request says where they are."""
    files = [("space", space, "--space")] if request.space is None else []
    files += [("strategy", strategy, "STRATEGY")] if strategy and strategy == known.get("strategy") else []
    files += [("baseline", one, "--baseline") for one in baselines or () if not request.baseline]
    for what, reference, option in files:
        if is_file(reference):
            check_there(reference, what, option)


def _served_by(space: Space, runtime: str | None) -> Space:
    """Return the space with one runtime for all students, if asked for, without the deployments it cannot serve."""
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
    """Return the space with one cache type for all students in llama.cpp, if asked for."""
    if kind is None:
        return space
    check_choice("--kv-type", kind, tuple(CACHE_BYTES))
    if not any(one.runtime == _LLAMA_CPP for one in space.deployments):
        raise InputError(
            f"--kv-type applies to llama.cpp, which no deployment of the space {space.name} uses: leave it out"
        )
    for one in space.deployments if space.solved and not space.types_solved else ():
        if one.cache_types not in (("f16", "f16"), (kind, kind)):
            raise InputError(f"--kv-type {kind} and the deployment {one.name} contradict each other: leave one out")
    held = (
        replace(one, cache_type_k=kind, cache_type_v=kind) if one.runtime == _LLAMA_CPP else one
        for one in space.deployments
    )
    return replace(space, deployments=tuple(dict.fromkeys(held)))


def _as_begun(option: str, asked: str | None, known: Mapping[str, Any], name: str) -> str | None:
    """Return an option's value. A resumed run keeps its own, and another value is refused.

    Args:
        option: Name of the option on the command line.
        asked: Its value.
        known: The content of `search.json` of a resumed run, empty for a new run.
        name: The key of the setting in `search.json`.
    """
    before: str | None = known.get(name)
    if known and asked not in (None, before):
        raise InputError(f"the run began without {option} {asked}: leave it out, or begin a new run")
    return asked or before


def against(space: Space, references: Sequence[str]) -> Space:
    """Return the space with other baselines, each named after its file.

    Raises:
        InputError: A strategy does not exist, or two have the same name.
    """
    named = {Path(reference).stem: load_strategy(reference) for reference in references}
    if len(named) < len(references):
        raise InputError(f"each --baseline needs a name of its own, not {', '.join(references)}: rename a file")
    return replace(space, baselines=named)


def single(space: Space, reference: str) -> Space:
    """Return a space with a single strategy and the deployments of the given space."""
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
