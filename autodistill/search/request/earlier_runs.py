"""Checks of the earlier runs that a search learns from. Runs that measured something else are refused."""

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
    """Split a text of run names separated by commas.

    Raises:
        InputError: A name is empty or occurs twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"--warm-start takes names of runs separated by commas, each once, not {text!r}")
    return names


def check_space(out: Path, runs: Sequence[str], space: Space) -> None:
    """Refuse runs that do not exist or have another space, in which the same point means another strategy.

    Baselines and starts may differ: they are ordinary points, or lie outside the space and say nothing about it.

    Raises:
        InputError: The message names the run and the parts of its space that differ.
    """
    mine = space.to_json()
    for name in runs:
        stored = RunFolder.open(out, name).read_settings(
            "space_hash", "space_definition.deployments", "space_definition.dimensions"
        )
        if stored["space_hash"] == space.hash:
            continue  # the same space, even if the run left out choices that could not fit its budget
        theirs = stored["space_definition"]
        parts = ["deployments"] if mine["deployments"] != theirs["deployments"] else []
        here, there = mine["dimensions"], theirs["dimensions"]
        parts += [path for path in {**here, **there} if here.get(path) != there.get(path)]
        if parts:
            raise InputError(
                f"the run {name!r} cannot warm-start this search: its space differs, in {', '.join(parts)}; search the "
                "same --space, or leave it out"
            )


def check_fingerprints(out: Path, runs: Sequence[str], fingerprints: Mapping[str, str]) -> None:
    """Refuse runs of another teacher or other data, because their values cannot be compared.

    Args:
        out, runs: The folder of the runs, and their names.
        fingerprints: The fingerprints of "teacher" and "data".

    Raises:
        InputError: The message names the run and which of the two differs.
    """
    for name in runs:
        stored = RunFolder.open(out, name).read_settings(
            *(f"{part}.{field}" for part in fingerprints for field in _KNOWN_BY)
        )
        for part, now in fingerprints.items():
            if stored[part]["fingerprint"] != now:
                raise InputError(
                    f"the run {name!r} cannot warm-start this search: its {part} is a different one "
                    f"({stored[part]['reference']}, {stored[part]['fingerprint']}, here {now}); leave it out"
                )


def check_asked(out: Path, runs: Sequence[str], asked: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse runs whose figures of the same name were measured on other questions or by another command.

    Args:
        out, runs: The folder of the runs, and their names.
        asked: What this search measures, in the form of `search.json`.
        names: Names of the objectives of this search.

    Raises:
        InputError: The message names the run and what differs.
    """
    for name in runs:
        theirs = RunFolder.open(out, name).read_settings().get("asked", {})
        here, there = asked.get("divergences", {}), theirs.get("divergences", {})
        other = next((one for one in here if one in there and here[one] != there[one]), None)
        if other is not None:
            raise InputError(
                f"the run {name!r} cannot warm-start this search: its divergence {other!r} had another source; leave "
                "it out, or give yours another name"
            )
        for objective in names:
            here, there = _measured_by(objective, asked), _measured_by(objective, theirs)
            # A run without a figure of that name cannot contradict it.
            if there is not None and here != there:
                raise InputError(
                    f"the run {name!r} cannot warm-start this search: its {objective} is a different one ({there}, "
                    f"here {here}); leave it out"
                )


def check_scored_alike(out: Path, runs: Sequence[str], scoring: str) -> None:
    """Refuse runs whose models were scored in another precision.

    Raises:
        InputError: The message names the run and its precision.
    """
    for name in runs:
        theirs = RunFolder.open(out, name).read_settings().get("scoring", "float32")
        if theirs != scoring:
            raise InputError(
                f"the run {name!r} cannot warm-start this search: it was scored in {theirs}, this one in {scoring}; "
                f"give --scoring {theirs}, or leave it out"
            )


def _measured_by(objective: str, asked: Mapping[str, Any]) -> str | None:
    """Return the task fingerprint or command behind an objective. None if its name says all, or if it was not asked."""
    kind, _, task = objective.partition(":")
    if kind == "task":
        return asked.get("fingerprints", {}).get(task)
    if kind == COMMAND and asked.get("command") is not None:
        return f"{asked['command']}, {asked.get('command_direction', 'max')}"
    return None


def steps_differ(out: Path, runs: Sequence[str], step_tokens: int) -> tuple[str, ...]:
    """Return a note for each run with another step size: its results on learning rates may not hold here.

    Args:
        out, runs: The folder and names, checked by `check_space` and `check_fingerprints`.
        step_tokens: Tokens of each step of this search.
    """
    theirs = {
        name: RunFolder.open(out, name).read_settings("plan.batch_tokens")["plan"]["batch_tokens"] for name in runs
    }
    return tuple(
        f"the run {name!r} trained in steps of {tokens:,} tokens, this search in {step_tokens:,}: what it found about "
        f"learning rates may not hold here; --step-tokens {tokens} makes them equal"
        for name, tokens in theirs.items()
        if tokens != step_tokens
    )
