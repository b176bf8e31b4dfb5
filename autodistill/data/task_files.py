"""Read task files: YAML that names files of questions (JSONL, Parquet), how to ask them, and how to score answers."""

from __future__ import annotations

import hashlib
import math
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from autodistill.data.conversations import Record
from autodistill.data.documents import read_records
from autodistill.errors import InputError
from autodistill.utils.yaml_files import read_yaml

TaskMetric = Literal["multiple_choice", "exact_match", "perplexity"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}", re.ASCII)
# Labels of choices, like "A. " and "B) ".
_LABEL = re.compile(r"\(?([A-Z])[.):]\s+")
_COMMON = {"name", "files", "test_files", "template", "metric", "limit"}
_TEMPLATES = {
    "multiple_choice": ("prompt", "choices", "answer"),
    "exact_match": ("prompt", "answer"),
    "perplexity": ("text",),
}
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "multiple_choice": {"labels": False, "chat": False},
    "exact_match": {"chat": False, "max_tokens": 32, "stop": ["\n"]},
    "perplexity": {"window": 512, "stride": 256},
}
# The fewest examples that are read, for any share of a task: fewer carry no information.
_FEWEST = 8


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question or one text for a student.

    Attributes:
        document: Number of the first record with the same prompt, for standard errors and paired comparisons.
        prompt: The text before the choice or the answer; for perplexity, the text.
        choices: The choices of multiple choice; () for other metrics.
        gold: Index of the right choice.
        answers: The right answers of exact match, any of which counts; () for other metrics.
    """

    document: int
    prompt: str
    choices: tuple[str, ...] = ()
    gold: int = 0
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """One task of a file with its examples, as plain data.

    Attributes:
        name: Name of the task. Its figure is "task:" followed by the name.
        metric: How answers are scored.
        validation, test: The examples of each split, in a fixed shuffled order.
        fingerprint: Hash of all examples and options.
        chat: Whether a prompt is a user's turn in the tokenizer's chat template.
        max_tokens: The most tokens of a written answer.
        stop: Texts that end a written answer.
        window, stride: Number of tokens in a window of a text, and from the start of one window to that of the next.
    """

    name: str
    metric: TaskMetric
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    fingerprint: str
    chat: bool = False
    max_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    window: int = 512
    stride: int = 256

    def examples(self, split: str, share: float = 1.0) -> tuple[Example, ...]:
        """Return the first examples of a split: a share of them, but at least 8."""
        found = self.test if split == "test" else self.validation
        return found[: max(_FEWEST, math.ceil(share * len(found)))]


def read_tasks(path: Path) -> tuple[TaskFile, ...]:
    """Read a task file and all files that it names.

    The file holds `tasks`, a list of mappings:

    - `name`: letters, digits, "-" and "_".
    - `files`: a .jsonl or .parquet file or a list of them, relative to the task file. Half of the records, by a hash of
      their prompts, are the validation split, by which a search ranks. The other half is the test split.
    - `test_files`: the files of the test split. All of `files` is then the validation split.
    - `limit`: the most examples of a split that are read; all by default.
    - `metric` and `template`. In a template "{field}" stands for a field of a record, and a brace is written twice.
      `multiple_choice` has `prompt`, `choices` and `answer`. `choices` is a list of templates, or one "{field}" that is
      a list, or text with one choice a line. `answer` is the right choice's text, its label, or its index from 0. If
      all numbers among the task's answers are texts of choices, they are read as texts, else as indices. `exact_match`
      has `prompt` and `answer` (if "{field}" is a list, any of its items counts). `perplexity` has `text`.
    - `labels: true` removes labels such as "A. " from the choices. Text is then split at its labels, not at its lines.
    - `chat: true` puts the prompt into the chat template of the tokenizer.
    - `max_tokens` (32) and `stop` (a line break) of a written answer; `window` (512) and `stride` (256) of a text.

    Raises:
        InputError: The message names the file or line, and says what is wrong there.
    """
    data = read_yaml(path)
    entries = data.get("tasks") if isinstance(data, Mapping) else None
    if not isinstance(entries, list) or not entries or set(data) != {"tasks"}:
        raise InputError(f"{path} must hold `tasks`, a list of one or more tasks, and nothing else")
    found = tuple(_task(entry, f"task {number} of {path}", path.parent) for number, entry in enumerate(entries, 1))
    names = [task.name for task in found]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise InputError(f"{path} has two tasks of the name {doubled}: rename one")
    return found


def _task(entry: Any, where: str, folder: Path) -> TaskFile:
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is not a mapping of name, files, template and metric")
    metric = entry.get("metric")
    if not isinstance(metric, str) or metric not in _TEMPLATES:
        raise InputError(f"{where} has the metric {metric!r}; the metrics are {', '.join(_TEMPLATES)}")
    known = {*_COMMON, *_OPTIONS[metric]}
    unknown = sorted(str(key) for key in entry if key not in known)
    if unknown:
        raise InputError(f"{where} has no field {unknown[0]!r}; the fields of {metric} are {', '.join(sorted(known))}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{where} has the name {name!r}: use up to 60 letters, digits, '-' and '_'")
    where = f"task {name} of {where.split(' of ', 1)[1]}"
    options = {key: entry.get(key, default) for key, default in _OPTIONS[metric].items()}
    _check_options(options, where)
    limit = entry.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(f"{where} has the limit {limit!r}: give a whole number from 1")
    template = entry.get("template")
    parts = _TEMPLATES[metric]
    if not isinstance(template, Mapping) or set(template) != set(parts):
        raise InputError(f"{where} needs a template with exactly {', '.join(parts)}")
    records = _records(_paths(entry, "files", where, folder))
    further = _records(_paths(entry, "test_files", where, folder)) if "test_files" in entry else []
    make = _maker(metric, template, bool(options.get("labels")), where, [*records, *further])
    first = list(_examples(records, make))
    if further:
        validation, test = first, list(_examples(further, make))
    else:
        validation = [example for example in first if _digest(example)[0] % 2 == 0]
        test = [example for example in first if _digest(example)[0] % 2]
    for split, examples in (("validation", validation), ("test", test)):
        if not examples:
            raise InputError(f"{where} has no example for its {split} split: give more records, or test_files")
    ordered = {
        split: tuple(sorted(examples, key=lambda one: (_digest(one), one.document)))[:limit]
        for split, examples in (("validation", validation), ("test", test))
    }
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    plain.pop("labels", None)
    digest = hashlib.sha256(repr((metric, ordered, sorted(plain.items()))).encode("utf-8", "surrogatepass"))
    return TaskFile(name=name, metric=metric, **ordered, fingerprint=digest.hexdigest()[:16], **plain)  # type: ignore[arg-type]


def _check_options(options: Mapping[str, Any], where: str) -> None:
    for key in ("labels", "chat"):
        if not isinstance(options.get(key, False), bool):
            raise InputError(f"{where} has {key} {options[key]!r}: give true or false")
    for key in ("max_tokens", "window", "stride"):
        value, least = options.get(key, 2), 2 if key == "window" else 1
        if type(value) is not int or not least <= value <= 10**6:
            raise InputError(f"{where} has {key} {value!r}: give a whole number from {least}")
    if options.get("stride", 1) > options.get("window", 1):
        raise InputError(f"{where} has a stride of {options['stride']} over its window of {options['window']}")
    stop = options.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise InputError(f"{where} has stop {stop!r}: give a list of texts")


def _paths(entry: Mapping[Any, Any], key: str, where: str, folder: Path) -> list[Path]:
    given = entry.get(key)
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not given or not all(isinstance(one, str) and one for one in given):
        raise InputError(f"{where} needs {key}: a .jsonl or .parquet file, or a list of them")
    return [folder / os.path.expanduser(one) for one in given]


Maker = Callable[[Mapping[str, Any], str, int], Example]


def _records(paths: Sequence[Path]) -> list[tuple[str, Record]]:
    found: list[tuple[str, Record]] = []
    for path in paths:
        records = read_records(path)
        if not records:
            raise InputError(f"{path} holds no record: give a file with some")
        found += [(f"{where} of {path}", record) for where, record in records]
    return found


def _examples(records: Iterable[tuple[str, Record]], make: Maker) -> Iterator[Example]:
    """Yield an example for each record; records with the same prompt share the number of the first."""
    first: dict[str, int] = {}
    for number, (place, record) in enumerate(records):
        example = make(record, place, number)
        document = first.setdefault(example.prompt, number)
        yield example if document == number else replace(example, document=document)


def _digest(example: Example) -> bytes:
    return hashlib.sha256(example.prompt.encode("utf-8", "surrogatepass")).digest()


def _maker(
    metric: str, template: Mapping[str, Any], labels: bool, where: str, records: Iterable[tuple[str, Record]]
) -> Maker:
    """Return a function that makes an example from a record, its place and its number.

    `records` must be all records of the task.
    """
    texts = {part: _template(value, f"{part} of {where}", part) for part, value in template.items()}
    choices = template.get("choices")

    def asked(record: Mapping[str, Any], place: str) -> _GoldAnswer:
        """Return the question that a record asks, with its choices."""
        found = (
            [_filled(one, record, place) for one in texts["choices"]]
            if isinstance(choices, list)
            else _listed(texts["choices"], record, place, labels)
        )
        plain = tuple(_unlabeled(one) if labels else one.strip() for one in found)
        if len(plain) < 2 or not all(plain):
            raise InputError(f"{place} has {len(plain)} choices, or a blank one: give two or more")
        return _GoldAnswer(place=place, raw=_value(texts["answer"], record, place), found=found, plain=plain)

    by_text = metric == "multiple_choice" and _numbers_are_texts(asked(record, place) for place, record in records)

    def make(record: Mapping[str, Any], place: str, number: int) -> Example:
        """Return a record as an example of the task."""
        if metric == "perplexity":
            text = _filled(texts["text"], record, place)
            if not text.strip():
                raise InputError(f"{place} has a blank text: remove the record")
            return Example(document=number, prompt=text)
        prompt = _filled(texts["prompt"], record, place)
        if not prompt.strip():
            raise InputError(f"{place} has a blank prompt: remove the record")
        if metric == "exact_match":
            return Example(document=number, prompt=prompt, answers=_answers(texts["answer"], record, place))
        one = asked(record, place)
        gold = _gold(str(one.raw) if by_text and isinstance(one.raw, int) else one.raw, one.found, one.plain, labels)
        if gold is None:
            raise InputError(f"{place}: the gold answer {str(one.raw)[:60]!r} is not among its choices ({one.told})")
        if one.plain.count(one.plain[gold]) > 1:
            raise InputError(f"{place} has its gold answer twice among its choices ({one.told}): remove the record")
        return Example(document=number, prompt=prompt, choices=one.plain, gold=gold)

    return make


@dataclass(frozen=True, kw_only=True)
class _GoldAnswer:
    """The gold answer of a record, and its choices as written (`found`) and without labels (`plain`)."""

    place: str
    raw: Any
    found: Sequence[str]
    plain: tuple[str, ...]

    @property
    def told(self) -> str:
        return "; ".join(" ".join(one.split())[:30] for one in self.plain[:6])


def _numbers_are_texts(records: Iterable[_GoldAnswer]) -> bool:
    """Return whether integers among the gold answers are texts of choices; otherwise they are indices."""
    numbers = [one for one in records if isinstance(one.raw, int)]
    if not all(str(one.raw) in one.plain for one in numbers):
        return False
    if all(0 <= one.raw < len(one.plain) for one in numbers):
        for one in numbers:
            if one.plain[one.raw] != str(one.raw):
                raise InputError(
                    f"{one.place}: the gold answer {one.raw} is one of its choices ({one.told}), and the place from 0 "
                    f'of another: write texts, like "{one.raw}", or labels, like "A"'
                )
    return True


# A parsed template: pieces of literal text, each followed by the name of a field or None.
_Template = list[tuple[str, str | None]]


def _template(value: Any, where: str, part: str) -> Any:
    """Parse a template, or a list of them. Braces hold field names only, so nothing is evaluated."""
    if part == "choices" and isinstance(value, list):
        if len(value) < 2:
            raise InputError(f"{where} are a list of two or more templates, or one field like '{{options}}'")
        return [_template(one, where, "choice") for one in value]
    if not isinstance(value, str):
        raise InputError(f"{where} is not a text with fields in braces, like 'Question: {{question}}'")
    try:
        pieces = [(text, field, form, conversion) for text, field, form, conversion in string.Formatter().parse(value)]
    except ValueError as error:
        raise InputError(f"{where} cannot be read ({error}): write a brace twice to mean itself") from error
    for _, field, form, conversion in pieces:
        if field is not None and (not field or form or conversion):
            raise InputError(f"{where} has {{{field}}}: write the name of a field alone in its braces")
    if part == "choices" and [bool(text) or field is None for text, field, *_ in pieces] != [False]:
        raise InputError(f"{where} are a list of two or more templates, or one field like '{{options}}'")
    return [(text, field) for text, field, *_ in pieces]


def _filled(template: _Template, record: Mapping[str, Any], place: str) -> str:
    parts = []
    for text, field in template:
        parts.append(text)
        if field is not None:
            value = _field(field, record, place)
            if not isinstance(value, str | int | float) or isinstance(value, bool):
                raise InputError(f"{place} has a field {field} that is neither text nor a number: {str(value)[:60]!r}")
            parts.append(str(value))
    return "".join(parts)


def _field(field: str, record: Mapping[str, Any], place: str) -> Any:
    if field not in record:
        raise InputError(
            f"{place} has no field {field!r}, which the template names; its fields are {', '.join(record)}"
        )
    return record[field]


def _value(template: _Template, record: Mapping[str, Any], place: str) -> Any:
    """Return the field itself if the template is only that field, else text."""
    if len(template) == 1 and not template[0][0] and template[0][1] is not None:
        value = _field(template[0][1], record, place)
        if isinstance(value, int | list) and not isinstance(value, bool):
            return value
    return _filled(template, record, place)


def _answers(template: _Template, record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    value = _value(template, record, place)
    if isinstance(value, list) and not all(type(one) in (str, int, float) for one in value):
        raise InputError(f"{place} has answers that are neither text nor numbers")
    answers = tuple(str(one).strip() for one in value) if isinstance(value, list) else (str(value).strip(),)
    if not answers or not all(answers):
        raise InputError(f"{place} has no answer, or a blank one: give one or remove the record")
    return answers


def _listed(template: _Template, record: Mapping[str, Any], place: str, labels: bool) -> list[str]:
    """Return the choices in one field: its items, its lines, or the text after each label."""
    value = _field(str(template[0][1]), record, place)
    if isinstance(value, list):
        if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in value):
            raise InputError(f"{place} has choices that are neither text nor numbers")
        return [str(one) for one in value]
    if not isinstance(value, str):
        raise InputError(f"{place} has choices that are neither a list nor text with one a line")
    lines = value.split("\n")
    if not labels:
        return [line for line in lines if line.strip()]
    found: list[str] = []
    for line in lines:
        match = _LABEL.match(line)
        if match and ord(match[1]) == ord("A") + len(found):
            found.append(line)
        elif found:
            found[-1] += "\n" + line
    return found


def _unlabeled(choice: str) -> str:
    return _LABEL.sub("", choice, count=1).strip() if _LABEL.match(choice) else choice.strip()


def _gold(raw: Any, found: Sequence[str], plain: Sequence[str], labels: bool) -> int | None:
    """Return the index of the right choice, which is given by index, by text with or without its label, or by label."""
    if isinstance(raw, int):
        return raw if 0 <= raw < len(found) else None
    if not isinstance(raw, str):
        return None
    whole = [choice.strip() for choice in found]
    for wanted, among in ((raw.strip(), whole), (_unlabeled(raw) if labels else raw.strip(), list(plain))):
        if wanted in among:
            return among.index(wanted)
    label = raw.strip().rstrip(".):").lstrip("(")
    if len(label) == 1 and "A" <= label <= "Z" and ord(label) - ord("A") < len(found):
        return ord(label) - ord("A")
    return None
