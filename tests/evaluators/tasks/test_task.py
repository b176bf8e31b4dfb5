"""Tasks given to a tiny student, marked again by hand from transformers' own logits."""

from __future__ import annotations

import json
import math
import re
import string
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from autodistill.data.task_files import TaskFile, read_tasks
from autodistill.evaluation.base import Measurement, Subject
from autodistill.evaluators.tasks.generated_answer import normalized
from autodistill.evaluators.tasks.task import evaluator_of
from autodistill.inference.outputs import Likelihood
from autodistill.inference.packed_student import PackedStudent


def make(folder: Path, records: list[dict[str, Any]], **task: Any) -> TaskFile:
    (folder / "q.jsonl").write_text("\n".join(json.dumps(one) for one in records))
    (folder / "t.yaml").write_text(json.dumps({"tasks": [{"name": "quiz", "files": "q.jsonl"} | task]}))
    return read_tasks(folder / "t.yaml")[0]


def measure(task: TaskFile, subject: Subject) -> Measurement:
    (found,) = evaluator_of(task).evaluate(subject)
    return found


@pytest.fixture
def quiz(tmp_path: Path) -> TaskFile:
    records = [
        {
            "question": f"The fox number {number}",
            "choices": ["runs", "carries the wooden boat", "x"],
            "gold": number % 3,
        }
        for number in range(40)
    ]
    template = {"prompt": "{question}", "choices": "{choices}", "answer": "{gold}"}
    return make(tmp_path, records, metric="multiple_choice", template=template)


def test_the_chosen_one_is_likeliest_by_character(quiz: TaskFile, subject: Subject) -> None:
    student = subject.student
    assert isinstance(student, PackedStudent)
    tokenizer = AutoTokenizer.from_pretrained(student.tokenizer)
    right, plain = [], []
    for example in quiz.validation:
        sums = []
        for choice in example.choices:
            before = len(tokenizer(example.prompt, add_special_tokens=False)["input_ids"])
            ids = tokenizer(f"{example.prompt} {choice}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = student.model(ids).logits[0, :-1].double().log_softmax(-1)
            sums.append(float(logits.gather(1, ids[0, 1:, None])[before - 1 :].sum()))
        scores = [total / len(choice) for total, choice in zip(sums, example.choices, strict=True)]
        right.append(int(np.argmax(scores)) == example.gold)
        plain.append(int(np.argmax(sums)) == example.gold)
    found = measure(quiz, subject)
    assert found.name == "task:quiz"
    assert found.value == pytest.approx(np.mean(right))
    assert found.detail["accuracy_by_sum"] == pytest.approx(np.mean(plain))
    count, share = len(right), np.mean(right)
    assert found.stderr == pytest.approx((share * (1 - share) / (count - 1)) ** 0.5)
    assert (found.detail["examples"], found.detail["of"], found.detail["split"]) == (count, count, "validation")


@pytest.mark.parametrize("batch", [1, 64])
def test_figures_do_not_depend_on_the_batch(quiz: TaskFile, subject: Subject, batch: int) -> None:
    assert isinstance(subject.student, PackedStudent)
    other = replace(subject, student=replace(subject.student, batch_tokens=batch))
    assert measure(quiz, other).value == pytest.approx(measure(quiz, subject).value, abs=1e-4)


def test_splits_and_shares(quiz: TaskFile, subject: Subject) -> None:
    assert isinstance(subject.student, PackedStudent)
    test = measure(quiz, replace(subject, student=replace(subject.student, split="test")))
    few = measure(quiz, replace(subject, student=replace(subject.student, share=0.5)))
    assert test.detail["examples"] == len(quiz.test)
    assert few.detail["examples"] == max(8, math.ceil(len(quiz.validation) / 2))
    assert set(few.documents["ids"]) < set(measure(quiz, subject).documents["ids"])
    assert not set(test.documents["ids"]) & set(few.documents["ids"])


def test_written_answers_are_those_of_greedy_decoding(tmp_path: Path, subject: Subject) -> None:
    assert isinstance(subject.student, PackedStudent)
    prompts = [f"The fox number {number}" for number in range(30)]
    texts = subject.student.write(prompts, max_tokens=6, stops=("\n",))
    answers = [text if number % 3 else "something else" for number, text in enumerate(texts)]
    usable = [
        {"question": prompt, "answer": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
        if normalized(answer)
    ]
    assert len(usable) > 20
    template = {"prompt": "{question}", "answer": "{answer}"}
    task = make(tmp_path, usable, metric="exact_match", template=template, max_tokens=6)
    expected = [one.answers != ("something else",) for one in task.validation]
    assert measure(task, subject).value == pytest.approx(np.mean(expected))


def test_chat_puts_the_prompt_into_the_template(tmp_path: Path, quiz: TaskFile, subject: Subject) -> None:
    student = subject.student
    assert isinstance(student, PackedStudent)
    tokenizer = AutoTokenizer.from_pretrained(student.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    chatting = replace(student, tokenizer=tmp_path / "chat")
    assert chatting.chats(["hello"]) == ["[user]hello</s>[assistant]"]
    asked: list[tuple[str, str]] = []

    def listen(pairs: list[tuple[str, str]]) -> list[Likelihood]:
        asked.extend(pairs)
        return student.likelihoods(pairs)

    listening = SimpleNamespace(split="validation", share=1.0, context=512, chats=chatting.chats, likelihoods=listen)
    measure(replace(quiz, chat=True), replace(subject, student=listening))  # type: ignore[arg-type]
    first = quiz.validation[0]
    # If the answers that are learned follow empty thoughts, questions end in these too.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "('!' if m.role == 'assistant' else '') + m['content']"
    )
    tokenizer.save_pretrained(tmp_path / "thinking")
    assert replace(student, tokenizer=tmp_path / "thinking").chats(["hello"]) == ["[user]hello</s>[assistant]!"]
    assert asked[0] == (f"[user]{first.prompt}</s>[assistant]", "runs")
    assert len(asked) == 3 * len(quiz.validation)


def test_a_perplexity_is_the_exponential_of_its_windows_mean(tmp_path: Path, subject: Subject) -> None:
    assert isinstance(subject.student, PackedStudent)
    records = [{"text": f"The fox number {number} carries the wooden boat. " * 4} for number in range(30)]
    task = make(tmp_path, records, metric="perplexity", template={"text": "{text}"}, window=16, stride=4)
    found = measure(task, subject)
    parts = subject.student.rolling([one.prompt for one in task.validation], 16, 4)
    assert found.value == pytest.approx(math.exp(np.concatenate(parts).mean()))
    assert (found.detail["window"], found.detail["stride"], found.direction) == (16, 4, "min")
    closer = measure(replace(task, stride=16), subject)
    assert closer.detail["tokens"] < found.detail["tokens"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The Answer.", "answer", True),
        ("  a  5 ", "5", True),
        ("-5", "5", False),
        ("3.5", "35", False),
        ("3.50.", "3.50", True),
        ("Ｆｉｖｅ!", "five", True),
        ("theory", "ory", False),
        ("$1,000", "1000", True),
        ("1,000,000", "1000000", True),
        ("A.", "a", True),
        ("the A", "A", True),
        ("vitamin A", "vitamin", False),
        ("A", "the", False),
        ("A", "", False),
        ("A, B", "B", False),
        ("type-a person", "type-person", False),
        ("...", "", False),
        ("%", "$", False),
        (" \n", "", True),
        ("C++", "C", False),
        ("C#", "C", False),
        ("1/2", "12", False),
        ("10:30", "1030", False),
        ("1,2", "12", False),
        (".5", "5", False),
        ("$.50", ".50", True),
        ("<5", ">5", False),
        ("x >= 5", "x > 5", False),
        ("2^n", "2n", False),
        ("Answer: 5", "answer 5", True),
        ("**5**", "5", True),
        ("5%", "5", True),
    ],
)
def test_normalization(one: str, other: str, same: bool) -> None:
    assert (normalized(one) == normalized(other)) == same


@pytest.mark.parametrize(
    "text",
    [
        "The Mona Lisa.",
        '"The Great Gatsby", a novel (1925)',
        "an apple and the pear",
        "U.S. Army",
        "It's O'Brien!",
        "Washington, D.C.",
        "$1,000 for a ticket",
        "a  an the end",
        "What? Nobody; nothing: none.",
    ],
)
def test_words_are_normalized_as_by_squad(text: str) -> None:
    """As in SQuAD's evaluation script 1.1: lower case, no punctuation, no articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
    assert normalized(text) == " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


@pytest.mark.parametrize(("gold", "written", "share"), [("A", "", 0.0), ("A", "a.", 1.0), ("...", "", 0.0)])
def test_no_answer_is_never_right(tmp_path: Path, subject: Subject, gold: str, written: str, share: float) -> None:
    records = [{"question": f"q{number}", "answer": gold} for number in range(30)]
    task = make(tmp_path, records, metric="exact_match", template={"prompt": "{question}", "answer": "{answer}"})
    student = SimpleNamespace(
        split="validation", share=1.0, context=512, write=lambda prompts, **_: [written] * len(prompts)
    )
    assert measure(task, replace(subject, student=student)).value == share  # type: ignore[arg-type]
