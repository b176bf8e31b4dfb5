"""Load strategies by name or from a YAML file, and find the files that ship in `search_spaces/`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from autodistill.errors import InputError
from autodistill.strategy.divergence import get_divergence
from autodistill.strategy.domains import near
from autodistill.strategy.recipe import Alignment, Distillation
from autodistill.strategy.strategy import Init, Strategy
from autodistill.utils.plain_dataclass import check
from autodistill.utils.yaml_files import read_yaml

_ONE = {"spaces": "space", "strategies": "strategy"}
_DIVERGENCE_FIELDS = ("divergence", "mixture", "temperature", "standardise", "signal", "signal_tokens")


def load_strategy(ref: str | Path) -> Strategy:
    """Load a strategy by its name in `search_spaces/strategies/`, or from a YAML file.

    Raises:
        InputError: No such strategy or file, YAML that is not plain data, a broken rule, an unknown divergence, a
            setting without effect, or no `init.depth`.
    """
    data = read_yaml(find_file(ref, "strategies"))
    try:
        strategy = Strategy.from_json(data)
        check_effect(strategy)
        get_divergence(strategy.distillation.divergence)
        check(
            "depth" in data.get("init", {}),
            "init.depth is not given: write `init: {depth: 1.0}` to keep all of the teacher's layers, or the share of "
            f"them to keep (Python's default is {Init().depth:g})",
        )
        return strategy
    except InputError as error:
        raise InputError(f"strategy {ref}: {error}") from None


def packaged_files(what: str) -> dict[str, Path]:
    """Return the package's YAML files for "spaces" or "strategies", by name."""
    folder = {"spaces": ".", "strategies": "strategies"}[what]
    home = Path(str(files("autodistill.search_spaces"))) / folder
    return {path.stem: path for path in sorted(home.glob("*.yaml"))}


def packaged_file(what: str, name: str) -> Path:
    """Return one YAML file of the package.

    Raises:
        InputError: There is no such file.
    """
    known = packaged_files(what)
    if name not in known:
        raise InputError(f"there is no {_ONE[what]} {name!r}: give a name or a .yaml file; {near(name, known)}")
    return known[name]


def is_file(ref: str | Path) -> bool:
    """Return whether a reference to a space or strategy is a path, and not the name of a packaged file."""
    return isinstance(ref, Path) or ref.endswith((".yaml", ".yml")) or "/" in ref or "\\" in ref


def find_file(ref: str | Path, what: str) -> Path:
    """Return the YAML file for the name of a packaged file, or for a path.

    Args:
        ref: A name, or a path.
        what: "spaces" or "strategies".

    Raises:
        InputError: There is no such file.
    """
    if is_file(ref):
        check(not Path(ref).is_dir(), f"{ref} is a folder: give a YAML file in it")
        check(Path(ref).is_file(), f"there is no {_ONE[what]} file {ref}")
        return Path(ref)
    return packaged_file(what, str(ref))


def check_effect(strategy: Strategy) -> None:
    """Refuse a user's strategy with settings that have no effect.

    A space is not checked for them, since it may propose such values at the ends of its dimensions.

    Args:
        strategy: The strategy. Fields with their default value are never refused.

    Raises:
        InputError: A setting has no effect. The message names the fields and what they would need.
    """
    init, recipe, plain = strategy.init, strategy.distillation, Distillation()
    if init.depth == 1 and init.layers != Init().layers:
        raise InputError(
            f"init.layers {init.layers} chooses among the layers, and with init.depth 1 all are kept: leave "
            "init.layers out, or lower init.depth"
        )
    idle = [f"distillation.{name}" for name in _DIVERGENCE_FIELDS if getattr(recipe, name) != getattr(plain, name)]
    if idle and not recipe.weighs_teacher:
        raise InputError(
            f"{', '.join(idle)} say how the teacher's outputs are followed, and with distillation.divergence_weight 0 "
            "they are not: leave them out, or give divergence_weight or final_divergence_weight a value above 0"
        )
    alignment = recipe.alignment
    if alignment and alignment.projection == "none" and alignment.projection_rate != Alignment().projection_rate:
        raise InputError(
            "distillation.alignment.projection_rate applies to a projection's weights, and projection none has none: "
            "leave it out, or choose a projection"
        )
