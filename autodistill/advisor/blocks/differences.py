"""Times of blocks, as differences of the times of small models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from autodistill.advisor.blocks.small_models import COARSE, REFERENCE, Model, SmallModel, divides
from autodistill.estimates.block_times import (
    ATTENTION,
    FFN_IN,
    FFN_OUT,
    HEAD,
    PARTS,
    Pass,
    Time,
    Width,
    part_of,
    part_weights,
)
from autodistill.models.families import get_family

_SAME: tuple[Model, ...] = (("reference",), ("again", "first"), ("again", "second"))


def blocks_of(times: Mapping[Model, float], small: Mapping[Model, SmallModel], beyond: int) -> dict[Model, float]:
    """Return the seconds of each block, from the times of the small models in one round.

    Args:
        times: Seconds of a pass through each small model.
        small: The small models.
        beyond: Tokens of context that the "far" timings have in addition to the others.
    """
    reference = small["reference",].spec
    layers = reference.layers
    here = float(np.mean([seconds for model, seconds in times.items() if model in _SAME]))
    fewer = small["half of the layers",].spec.layers
    layer = (here - times["half of the layers",]) / (layers - fewer)
    width = small["half of the FFN",].spec.ffn_width
    ffn = (here - times["half of the FFN",]) / layers * reference.ffn_width / (reference.ffn_width - width)
    entries = small["part of the vocabulary",].spec.vocabulary
    head = (here - times["part of the vocabulary",]) * reference.vocabulary / (reference.vocabulary - entries)
    weights = part_weights(reference)
    share = weights[FFN_IN] / (weights[FFN_IN] + weights[FFN_OUT])
    whole = {ATTENTION: layer - ffn, FFN_IN: share * ffn, FFN_OUT: (1 - share) * ffn, HEAD: head}
    found: dict[Model, float] = {("constant",): here - layers * layer - head}
    found |= {(part, REFERENCE): seconds for part, seconds in whole.items()}
    found |= {("cache", "f16"): 0.0, ("each", "f16"): _each(times, ("reference",), layers, beyond)}
    changes = _changes(times, here)
    for model, one in small.items():
        if model[0] in PARTS:
            part, kind = model
            changed = _changed(one, part, kind) / weights[part]
            found[model] = whole[part] + changes[model] / (1 if part == HEAD else layers) / changed
        elif model[0] == "cache":
            found[model] = (times[model] - here) / layers
            found["each", model[1]] = _each(times, model, layers, beyond)
    return found


def _changes(times: Mapping[Model, float], here: float) -> dict[Model, float]:
    """Return how much each part in each type changes the time.

    The changes are fitted by least squares to the times of the single parts and of all parts together.
    """
    found = {model: seconds - here for model, seconds in times.items() if model[0] in PARTS}
    for _, kind in [model for model in times if model[0] == "all"]:
        parts = [model for model in found if model[1] == kind]
        rest = times["all", kind] - here - sum(found[model] for model in parts)
        found |= {model: found[model] + rest / (len(parts) + 1) for model in parts}
    return found


def _each(times: Mapping[Model, float], model: Model, layers: int, beyond: int) -> float:
    """Return the seconds that each further token of context costs a layer. It is 0 for prompts, which have no "far"."""
    far = (*model, "far")
    return (times[far] - times[model]) / layers / beyond if far in times and beyond > 0 else 0.0


def _changed(one: SmallModel, part: str, kind: str) -> int:
    """Return how many weights of a part, in a layer or the head, have a type. Its blocks may not divide all rows."""
    family, found = get_family(one.spec.architecture), 0
    for tensor in one.spec.tensors:
        place = family.layer_part(tensor.name)
        own = part_of(one.spec, tensor.name, tensor.role) == part and (place is None or place[0] == 0)
        found += math.prod(tensor.shape) if own and divides(kind, tensor.shape[1]) else 0
    return found


def pass_of(turns: Sequence[Mapping[Model, float]], tokens: int, slow: float) -> Pass:
    """Return the times of blocks over all rounds: their medians, and their spread.

    Args:
        turns: Seconds of each block in each round.
        tokens: Tokens before the timed token, or of the prompt.
        slow: Ratio of the 95th percentile to the median.
    """
    times = {
        block: Time(seconds=float(np.median(seconds)), spread=(max(seconds) - min(seconds)) / 2)
        for block in turns[0]
        for seconds in [[turn[block] for turn in turns]]
    }

    def of(part: str) -> dict[str, Time]:
        return {block[1]: time for block, time in times.items() if block[0] == part}

    return Pass(
        tokens=tokens,
        constant=times["constant",],
        parts={part: of(part) for part in PARTS},
        cache=of("cache"),
        each=of("each"),
        slow=max(1.0, slow),
    )


def widths_of(
    small: Mapping[Model, SmallModel], decode: Sequence[Mapping[Model, float]], prompt: Sequence[Mapping[Model, float]]
) -> tuple[Width, ...]:
    """Return how much longer FFNs of odd widths take than a line through a narrower and a wider one predicts.

    Args:
        small: The small models.
        decode, prompt: Seconds of a pass through each model in each round.
    """
    found = []
    for _, width, kind in (model for model in small if model[0] == "width" and int(model[1]) % COARSE):
        beyond = [[_beyond(one, int(width), kind) for one in turns] for turns in (decode, prompt)]
        spreads = [(max(one) - min(one)) / 2 for one in beyond]
        found.append(
            Width(
                neurons=int(width),
                kind=kind,
                decode=float(np.median(beyond[0])),
                decode_spread=spreads[0],
                prompt=float(np.median(beyond[1])),
                prompt_spread=spreads[1],
            )
        )
    return tuple(found)


def _beyond(times: Mapping[Model, float], width: int, kind: str) -> float:
    """Return how far a width's time is above the line between two coarse widths, as a share of its FFN's time on it."""
    low = width // COARSE * COARSE
    narrow, wide = (times["width", str(one), kind] for one in (low, low + COARSE))
    slope = (wide - narrow) / COARSE
    return (times["width", str(width), kind] - narrow - slope * (width - low)) / (slope * width)
