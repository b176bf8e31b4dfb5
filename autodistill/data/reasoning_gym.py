"""Tasks of reasoning-gym: questions and answers generated from a seed, and the scores of written answers."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from autodistill.data.conversations import Conversation, single_turn, without_thoughts
from autodistill.errors import InputError, MissingDependencyError
from autodistill.utils.yaml_files import parse_yaml

LICENSE = "Apache-2.0"
# The mark before the final answer (the convention of GSM8K, arXiv 2110.14168).
FINAL = "####"
_PREFIX = "reasoning-gym:"
_SIZE, _SEED = 2000, 0
_MOST = {"size": 10**7, "seed": 2**63 - 1}  # making this many items takes days
_INSTALL = "pip install 'autodistill-search[tasks]'"
_SYNTAX = "reasoning-gym:TASK?option=value&..., like reasoning-gym:chain_sum?size=2000&seed=3&max_terms=4"

Marker = Callable[[str, str, int | None], float]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions and answers of a task.

    Attributes:
        name: Short name for a person.
        conversations: A conversation for each distinct question, with the number of its item.
    """

    name: str
    conversations: tuple[Conversation, ...]


def is_task(ref: str) -> bool:
    """Return whether a reference names a task."""
    return ref.startswith(_PREFIX)


def read_task(ref: str) -> Task:
    """Generate the questions of a task.

    Item i depends only on seed + i. Two references therefore share items unless their seeds are further apart than
    their sizes. If the steps to an answer are known (see `_solution`), the answer consists of the steps and, after
    "####", the result. With `worked=false` it is the result only.

    Args:
        ref: "reasoning-gym:TASK?option=value&...", with the options `size` (2000 by default), `seed` (0), `worked`, and
            the options of the task, as YAML.

    Raises:
        MissingDependencyError: reasoning-gym is not installed.
        InputError: An unknown task or option (the message lists the known ones), or a value that the task refuses.
    """
    dataset, worked = _dataset(ref)
    found: dict[str, Conversation] = {}
    for number in range(dataset.size):
        try:
            item = dataset[number]
        except Exception as error:  # each task has its own code, and may fail with options that it did not check
            raise InputError(
                f"the task {ref} cannot make item number {number} ({error}): choose other options"
            ) from error
        question = item["question"].strip()
        found.setdefault(question, single_turn(question, _answer(item, worked), number))
    conversations = tuple(one for one in found.values() if one.answer.strip())
    if not conversations:
        raise InputError(f"the task {ref} has no item with an answer: choose another")
    return Task(name=ref.partition("?")[0].removeprefix(_PREFIX), conversations=conversations)


def marker(task: str | None) -> Marker:
    """Return the function that scores a written answer, 0 to 1, from it, the expected answer and the item number.

    Thoughts, and everything up to the last "####", are ignored. A task marks by its own rules. Without a task the two
    answers must be equal.

    Args:
        task: Reference of the task, or None.

    Raises:
        MissingDependencyError: reasoning-gym is not installed.
    """
    if task is None:
        return lambda written, expected, item: float(_final(written) == _final(expected))
    dataset, _ = _dataset(task)

    def mark(written: str, expected: str, item: int | None) -> float:
        """Return the mark that the task itself gives to an answer, from 0 to 1."""
        if item is None:
            raise ValueError(f"an answer to {task} is marked by the number of its item, and has none")
        try:
            return float(dataset.score_answer(_final(written), entry=dataset[item]))
        except Exception:  # each task has its own code, and an answer that it cannot read is wrong
            return 0.0

    return mark


def _dataset(ref: str) -> tuple[Any, bool]:
    """Return the data set of a reference, and whether its answers include the steps."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MissingDependencyError(f"{ref} needs the package reasoning-gym, which is not installed: {_INSTALL}")
    from reasoning_gym.factory import DATASETS

    name, _, query = ref.removeprefix(_PREFIX).partition("?")
    if name not in DATASETS:
        known = sorted(DATASETS)
        raise InputError(f"reasoning-gym has no task {name!r} ({_SYNTAX}); its tasks are {', '.join(known)}")
    options = _options(query, ref)
    worked = options.pop("worked", True)
    kind, configuration = DATASETS[name]
    allowed = sorted(field.name for field in dataclasses.fields(configuration))
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise InputError(
            f"the task {name} has no option {unknown[0]!r}; its options are {', '.join([*allowed, 'worked'])}"
        )
    if not isinstance(worked, bool):
        raise InputError(f"the option worked of {ref} is true or false, not {worked!r}")
    for option in ("size", "seed"):
        value = options.setdefault(option, {"size": _SIZE, "seed": _SEED}[option])
        least = 1 if option == "size" else 0
        if type(value) is not int or not least <= value <= _MOST[option]:
            raise InputError(
                f"the option {option} of {ref} is a whole number from {least} to {_MOST[option]:,}, not {value!r}"
            )
    try:
        made = configuration(**options)
        made.validate()
        return kind(config=made), worked
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"the task {name} refuses its options ({error}): correct {query or ref!r}") from error


def _options(query: str, ref: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise InputError(f"cannot read the options of {ref}: write {_SYNTAX}") from error
    try:
        return {name: parse_yaml(value, name) for name, value in pairs}
    except InputError as error:
        raise InputError(f"cannot read the options of {ref} ({error}): write {_SYNTAX}") from None


def _answer(item: Mapping[str, Any], worked: bool) -> str:
    answer = str(item["answer"] or "").strip()
    solution = _solution(item["metadata"]) if worked else None
    if not solution or not answer:
        return answer
    return solution if FINAL in solution else f"{solution}\n{FINAL} {answer}"


def _solution(metadata: Mapping[str, Any]) -> str | None:
    """Return the steps to an item's answer, if they are known."""
    if metadata.get("source_dataset") == "chain_sum":
        return _chain(metadata["expression"])
    solution = metadata.get("answer_cot")
    return solution if isinstance(solution, str) else None


def _chain(expression: str) -> str:
    """Return the steps of a chain of sums from left to right: "3 + 4 = 7", "7 - 2 = 5"."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return "\n".join(lines)


def _final(answer: str) -> str:
    return without_thoughts(answer).rpartition(FINAL)[2].strip()
