"""Tasks of reasoning-gym against the package itself, and references that are refused."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest

from autodistill.data.reasoning_gym import marker, read_task
from autodistill.errors import InputError, MissingDependencyError


def their_data(name: str, **settings: Any) -> Any:
    """Return a data set that the package itself makes. It is imported here because that takes two seconds."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **settings)


def test_questions_and_results_are_the_packages_own() -> None:
    task = read_task("reasoning-gym:leg_counting?size=12&seed=5&max_animals=4")
    theirs = their_data("leg_counting", size=12, seed=5, max_animals=4)
    assert [one.item for one in task.conversations] == list(range(12))
    for one, item in zip(task.conversations, theirs, strict=True):
        assert one.prompt[0].content == item["question"].strip()
        assert one.answer == item["answer"]


def test_a_chain_is_worked_from_left_to_right_to_the_packages_result() -> None:
    ref = "reasoning-gym:chain_sum?size=40&seed=7&min_digits=1&max_digits=3&allow_negation=true"
    theirs = their_data("chain_sum", size=40, seed=7, min_digits=1, max_digits=3, allow_negation=True)
    for one in read_task(ref).conversations:
        *lines, final = one.answer.split("\n")
        item = theirs[one.item]
        assert final == f"#### {item['answer']}"
        assert len(lines) == item["metadata"]["num_terms"] - 1
        for line in lines:
            left, right = line.split(" = ")
            assert eval(left) == int(right)  # only digits, signs and spaces
        for line, after in itertools.pairwise(lines):
            assert after.startswith(line.split(" = ")[1])
    bare = read_task(ref + "&worked=false").conversations
    assert [one.answer for one in bare] == [theirs[one.item]["answer"] for one in bare]


def test_a_solution_that_the_item_brings_is_the_answer() -> None:
    theirs = their_data("gsm_symbolic", size=3, seed=0)
    for one, item in zip(read_task("reasoning-gym:gsm_symbolic?size=3").conversations, theirs, strict=True):
        assert one.answer == item["metadata"]["answer_cot"]


def test_items_come_from_seed_plus_number_and_each_question_once() -> None:
    one, other = (read_task(f"reasoning-gym:chain_sum?size=20&seed={seed}").conversations for seed in (0, 10))
    assert [item.turns for item in one[10:]] == [item.turns for item in other[:10]]
    few = read_task("reasoning-gym:chain_sum?size=300&max_terms=2&max_digits=1").conversations
    assert len({item.prompt for item in few}) == len(few) < 300


def test_marks_are_the_tasks_own_for_what_stands_last() -> None:
    ref = "reasoning-gym:chain_sum?size=5&seed=3"
    mark, theirs = marker(ref), their_data("chain_sum", size=5, seed=3)
    for number, item in enumerate(theirs):
        right, wrong = item["answer"], str(int(item["answer"]) + 1)
        assert mark(right, "", number) == mark(f"{wrong} = 1\n#### {right}", "", number) == 1.0
        for text in (wrong, f"{right}\n#### {wrong}", "", "####", "nonsense", right + right):
            assert mark(text, "", number) == theirs.score_answer(text.rpartition("####")[2].strip(), item) < 1.0


def test_thoughts_before_an_answer_are_not_marked() -> None:
    """As in Qwen3, the marks are not special tokens, so decoding keeps them."""
    block = "<think>\n\n</think>\n\n"
    ref = "reasoning-gym:chain_sum?size=5&seed=3"
    expected = str(their_data("chain_sum", size=5, seed=3)[1]["answer"])
    for mark, item in ((marker(None), None), (marker(ref), 1)):
        assert mark(expected, expected, item) == 1.0
        assert mark(block + expected, expected, item) == 1.0
        assert mark(f"It is {expected}0, </think> no.</think> {expected}", f"{block}{expected}", item) == 1.0
        assert mark(f"<think>\n{expected}", expected, item) < 1.0, "thoughts without an end hold no answer"
        assert mark(f"<think>#### {expected}</think> 1{expected}", expected, item) < 1.0


def test_without_a_task_answers_must_be_the_same() -> None:
    mark = marker(None)
    assert mark(" Paris\n", "Paris", None) == mark("So...\n#### 7", "7", None) == 1.0
    assert mark("paris", "Paris", None) == mark("", "Paris", None) == 0.0


@pytest.mark.parametrize("text", ["(((", "None", "1/0", "[1, 2", "\x00"])
def test_an_answer_that_no_task_can_read_is_wrong(text: str) -> None:
    for name in ("countdown", "propositional_logic", "simple_equations", "sudoku"):
        assert marker(f"reasoning-gym:{name}?size=1")(text, "", 0) < 1.0


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("chain_som", r"no task 'chain_som'.*chain_sum"),
        ("", r"no task ''"),
        ("chain_sum?terms=3", r"no option 'terms'; its options are .*max_terms.*worked"),
        ("chain_sum?max_terms=1", r"refuses its options \(max_terms must be >= min_terms\)"),
        ("chain_sum?max_terms=many", r"refuses its options"),
        ("chain_sum?size=0", r"size .* from 1 to 10,000,000, not 0"),
        ("chain_sum?size=2.5", r"size .* not 2.5"),
        ("chain_sum?seed=-1", r"seed .* from 0 to 9,223,372,036,854,775,807, not -1"),
        ("chain_sum?worked=maybe", r"worked .* true or false"),
        ("chain_sum?size", r"cannot read the options"),
        ("chain_sum?size=[", r"cannot read the options"),
    ],
)
def test_a_faulty_reference_is_refused_in_one_line(ref: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_task(f"reasoning-gym:{ref}")
    assert "\n" not in str(caught.value)


def test_without_the_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "reasoning_gym" else find(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'autodistill-search\[tasks\]'"):
        read_task("reasoning-gym:chain_sum")
