"""Earlier runs that a search learns from: found, and refused where they measured something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.evaluators.tasks.command import NAME as COMMAND
from autodistill.runs.run_folder import RunFolder
from autodistill.search.campaign.warm_start import _KNOWN_BY
from autodistill.strategy.space import Space


def parse_runs(text: str) -> tuple[str, ...]:
    """Return the names of runs, parted by commas.

    Raises:
        InputError: None, or one twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"--warm-start takes names of runs separated by commas, each once, not {text!r}")
    return names


def check_space(out: Path, runs: Sequence[str], space: Space) -> None:
    """Refuse runs that are not there, or whose space is another, so that their points mean other strategies.

    Baselines and starts may differ: they are points like others, or lie outside of the space and say nothing of it.

    Raises:
        InputError: Names the run, and what of its space differs.
    """
    mine = space.to_json()
    for name in runs:
        stored = RunFolder.open(out, name).asked(
            "space_hash", "space_definition.deployments", "space_definition.dimensions"
        )
        if stored["space_hash"] == space.hash:
            continue  # though the run did without choices that could not fit there
        theirs = stored["space_definition"]
        parts = ["deployments"] if mine["deployments"] != theirs["deployments"] else []
        here, there = mine["dimensions"], theirs["dimensions"]
        parts += [path for path in {**here, **there} if here.get(path) != there.get(path)]
        if parts:
            raise InputError(
                f"the run {name!r} cannot warm-start this search: its space is another one, in {', '.join(parts)}; "
                "search the same --space, or leave it out"
            )


def check_fingerprints(out: Path, runs: Sequence[str], fingerprints: Mapping[str, str]) -> None:
    """Refuse runs of another teacher or other data, whose values say nothing here.

    Args:
        out, runs: The folder of the runs, and names.
        fingerprints: Of "teacher" and "data".

    Raises:
        InputError: Names the run, and which of the two differs.
    """
    for name in runs:
        stored = RunFolder.open(out, name).asked(*(f"{part}.{field}" for part in fingerprints for field in _KNOWN_BY))
        for part, now in fingerprints.items():
            if stored[part]["fingerprint"] != now:
                raise InputError(
                    f"the run {name!r} cannot warm-start this search: its {part} is another one "
                    f"({stored[part]['reference']}, {stored[part]['fingerprint']}, here {now}); leave it out"
                )


def check_asked(out: Path, runs: Sequence[str], asked: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse runs whose figures of the same name were measured on other questions, or by another command.

    Args:
        out, runs: The folder of the runs, and names.
        asked: What this search measures, as `search.json` has it.
        names: Of what it is judged by.

    Raises:
        InputError: Names the run, and what differs.
    """
    for name in runs:
        theirs = RunFolder.open(out, name).asked().get("asked", {})
        here, there = asked.get("divergences", {}), theirs.get("divergences", {})
        other = next((one for one in here if one in there and here[one] != there[one]), None)
        if other is not None:
            raise InputError(
                f"the run {name!r} cannot warm-start this search: its divergence {other!r} had another source; leave "
                "it out, or give yours another name"
            )
        for objective in names:
            here, there = _measured_by(objective, asked), _measured_by(objective, theirs)
            # A run that has no figure of that name says nothing of it.
            if there is not None and here != there:
                raise InputError(
                    f"the run {name!r} cannot warm-start this search: its {objective} is another one ({there}, here "
                    f"{here}); leave it out"
                )


def check_scored_alike(out: Path, runs: Sequence[str], scoring: str) -> None:
    """Refuse runs whose models were scored in another precision.

    Raises:
        InputError: Names the run, and its precision.
    """
    for name in runs:
        theirs = RunFolder.open(out, name).asked().get("scoring", "float32")
        if theirs != scoring:
            raise InputError(
                f"the run {name!r} cannot warm-start this search: it was scored in {theirs}, this one in {scoring}; "
                f"give --scoring {theirs}, or leave it out"
            )


def _measured_by(objective: str, asked: Mapping[str, Any]) -> str | None:
    """Return what an objective's figures were measured by, beside what its name says; None where that was not asked."""
    kind, _, task = objective.partition(":")
    if kind == "task":
        return asked.get("fingerprints", {}).get(task)
    if kind == COMMAND and asked.get("command") is not None:
        return f"{asked['command']}, {asked.get('command_direction', 'max')}"
    return None


def steps_differ(out: Path, runs: Sequence[str], step_tokens: int) -> tuple[str, ...]:
    """A note for each run whose optimiser steps have another size: what it found of learning rates may not hold here.

    Args:
        out, runs: As checked by `check_space` and `check_fingerprints`.
        step_tokens: Of this search's steps.
    """
    theirs = {name: RunFolder.open(out, name).asked("plan.batch_tokens")["plan"]["batch_tokens"] for name in runs}
    return tuple(
        f"the run {name!r} trained in steps of {tokens:,} tokens, this search in {step_tokens:,}: what it found of "
        f"learning rates may not hold here; --step-tokens {tokens} makes them equal"
        for name, tokens in theirs.items()
        if tokens != step_tokens
    )
