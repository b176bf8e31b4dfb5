"""A student with its own chat template, compared with transformers' rendering and float64 sums."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodistill.data.chat_template import Renderer, Template
from autodistill.data.conversations import Conversation, Likeliest, Turn, single_turn
from autodistill.data.dataset import Prepared, load_split, rendering_folder
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.data.student_template import copy_text, own_template, share, write_text
from autodistill.distillation.student.pretrained import load_pretrained
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.output_cache import CacheSettings, TeacherCache
from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.trainer import Trainer
from autodistill.inference.scoring import REFERENCE_TOKENS, score, score_teacher
from autodistill.models.loading import load_model
from autodistill.strategy.recipe import Alignment, Distillation
from autodistill.strategy.strategy import Init, Strategy
from autodistill.testing import save_tiny_teacher

# The teacher's template: roles on separate lines, answers ended by </s>.
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# The student's template: an answer follows a space, which is part of its first token, and ends in the EOS of its files.
LINES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {{ m.content }}{{ eos_token }}\n"
    "{% else %}Question: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
LENGTH, VOCABULARY = 128, 300
WORDS = ["The miller carries two apples", "under the old bridge", "near a quiet river", "while the teacher measures"]


def chats(count: int = 40) -> list[dict[str, str]]:
    """Return records so long that no two fit in one sequence, in either template."""
    return [
        {
            "prompt": f"Who is number {n} {WORDS[n % 4]}?",
            "answer": f"{WORDS[n // 4 % 4]}, {WORDS[(n + 1) % 4]} number {n}.",
        }
        for n in range(count)
    ]


def saved(folder: Path, template: str | None, seed: int = 0, eos: str = "</s>", **sizes: Any) -> Path:
    save_tiny_teacher(folder, seed=seed, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Pair:
    teacher: Path
    student: Path
    template: Template
    data: Prepared
    records: list[dict[str, str]]
    folder: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    teacher = saved(folder / "teacher", CHAT, layers=3)
    student = saved(folder / "student", LINES, seed=5, eos="<pad>", layers=2)
    records = chats()
    (folder / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    source = resolve_data(str(folder / "chats.jsonl"))
    template, reason = own_template(student, teacher, source.conversations)
    assert (template, reason) == (Template(LINES, "<s>", "<pad>"), None)
    data = prepare(source, teacher, "tokens", LENGTH, folder, templates=[template])
    return Pair(teacher, student, template, data, records, folder)


@dataclass(frozen=True)
class Alone:
    """One record, rendered by transformers alone and read by both models on its own, in float64.

    Attributes:
        labels: The student's answer, token by token.
        log_q: [n, vocabulary], the student's log probabilities.
        log_p: [m, vocabulary], the teacher's for the last m tokens, with the two models' end tokens swapped.
        states: [m, width], of the last layers of the student and the teacher, from which those m tokens are predicted.
    """

    labels: torch.Tensor
    log_q: torch.Tensor
    log_p: torch.Tensor
    states: tuple[torch.Tensor, torch.Tensor]


def read_alone(pair: Pair, record: dict[str, str], teacher: Any, student: Any) -> Alone:
    messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["answer"]}]
    log_probabilities, answers, states = [], [], []
    for folder, model, before in ((pair.teacher, teacher, ""), (pair.student, student, " ")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)[:-1]  # the line's end
        answer = [*tokenizer(before + record["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert ids[-len(answer) :] == answer
        handle = model.model.layers[-1].register_forward_hook(lambda _, __, output: states.append(output[0, :-1]))
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        handle.remove()
        log_probabilities.append(found)
        answers.append(answer)
    # Both answers end in the same tokens, except for the end token.
    (theirs, own), (log_p, log_q) = answers, log_probabilities
    same = 0
    while same + 1 < min(len(theirs), len(own)) and theirs[-2 - same] == own[-2 - same]:
        same += 1
    swapped = log_p.clone()
    swapped[:, [theirs[-1], own[-1]]] = log_p[:, [own[-1], theirs[-1]]]
    shared = slice(-1 - same, None)
    return Alone(torch.tensor(own), log_q, swapped[shared], (states[1][shared], states[0][shared]))


@pytest.fixture(scope="module")
def models(pair: Pair) -> tuple[Any, Any]:
    """The teacher, and the student with the teacher's ids, in float64."""
    teacher = AutoModelForCausalLM.from_pretrained(pair.teacher, dtype=torch.float64).eval()
    return teacher, load_pretrained(pair.student, pair.teacher).double().eval()


def documents(data: Any) -> list[int]:
    """Return the record in each sequence, which contains one."""
    found = [np.unique(row[row >= 0]).tolist() for row in data.documents]
    assert all(len(one) == 1 for one in found)
    return [one[0] for one in found]


@pytest.mark.parametrize(
    ("signal", "positions"),
    [
        ("online", "answers"),
        ("states", "answers"),
        ("top-k", "answers"),
        ("written", "answers"),
        ("online", "uncertain"),
    ],
)
def test_losses_are_those_of_the_records_read_alone(
    pair: Pair, models: tuple[Any, Any], workshop: Any, signal: str, positions: str
) -> None:
    data = load_split(pair.data.folder, "train", pair.template.name)
    assert data.teacher is not None
    cache = ensure_cache(
        lambda: load_model(pair.teacher, torch.float32),
        teacher_fingerprint="teacher",
        data_fingerprint=pair.data.fingerprint,
        data=load_split(pair.data.folder, "train"),
        vocabulary=VOCABULARY,
        width=64,
        settings=CacheSettings(top_k=VOCABULARY, temperatures=(1.0,), final=True, states=(0, 1, 2)),
        root=pair.folder / "outputs",
        limit_bytes=10**8,
    )
    weight, count, part = 0.7, 4, 0.4
    if signal == "written":
        top = TeacherCache(cache).top(range(len(data.tokens)), 1.0, VOCABULARY)
        shape = (len(data.tokens), LENGTH - 1, VOCABULARY)
        ids, log_p = (
            np.pad(values.numpy().reshape(shape), ((0, 0), (1, 0), (0, 0))) for values in (top.ids, top.log_p)
        )
        data = replace(data, teacher=replace(data.teacher, writer_logprobs=Likeliest(ids.astype(np.int32), log_p)))
    recipe = Distillation(
        divergence_weight=weight,
        learning_rate=1e-3,
        signal=signal,  # type: ignore[arg-type]
        signal_tokens=VOCABULARY if signal == "top-k" else 0,
        positions=positions,
        **({"uncertain_share": part} if positions == "uncertain" else {}),
        train_embeddings=True,
        alignment=Alignment(projection="none", layers="last", weight=0.25),
    )
    strategy = Strategy(init=Init(source="pretrained", model=str(pair.student), depth=1.0), distillation=recipe)
    trainer = Trainer(
        load_pretrained(pair.student, pair.teacher),
        teaching=Teaching(
            kept_layers=(0, 2), layers=3, width=64, cache=TeacherCache(cache), live=LiveTeacher(pair.teacher)
        ),
        strategy=strategy,
        plan=workshop.plan(sequence_length=LENGTH, batch_tokens=count * LENGTH, tokens=count * LENGTH, micro_batch=3),
        data=data.head(count * LENGTH),
        seed=0,
    )
    (step,) = trainer.train_stable(count * LENGTH)
    aparts, surprises, entropies, aligned = [], [], [], 0.0
    for place in documents(data.head(count * LENGTH)):
        alone = read_alone(pair, pair.records[place], *models)
        own = alone.log_q[-len(alone.log_p) :]
        # The teacher's outputs do not cover the first tokens.
        apart = torch.full((len(alone.labels),), torch.nan, dtype=torch.float64)
        apart[-len(own) :] = (alone.log_p.exp() * (alone.log_p - own)).sum(-1)
        aparts.append(apart)
        surprises.append(-alone.log_q.gather(1, alone.labels[:, None])[:, 0])
        entropies.append(-(alone.log_q.exp() * alone.log_q).sum(-1))
        here, there = (part / part.square().mean(-1, keepdim=True).sqrt() for part in alone.states)
        aligned += float((here - there).square().mean(-1).sum())
    apart, surprise = (torch.cat(values) for values in (aparts, surprises))
    rows, heard = len(apart), ~apart.isnan()
    assert 0 < heard.sum() < rows
    chosen = torch.arange(rows)
    if positions == "uncertain":
        starts = np.cumsum([0, *map(len, entropies)])
        most = (one.topk(math.ceil(part * len(one))).indices for one in entropies)
        chosen = torch.cat([start + found for start, found in zip(starts, most, strict=False)])
    loss = torch.where(heard, weight * apart.nan_to_num() + (1 - weight) * surprise, surprise)[chosen].mean()
    tolerance = 1e-4 if signal == "online" else 5e-3  # outputs are kept in float16
    assert step.divergence == pytest.approx(float(apart.nan_to_num()[chosen].mean()), rel=tolerance)
    assert step.cross_entropy == pytest.approx(float(surprise[chosen].mean()), rel=1e-4)
    assert step.alignment == pytest.approx(aligned / rows, rel=5e-3)
    assert step.loss == pytest.approx(float(loss) + 0.25 * aligned / rows, rel=5e-3)


def test_scores_are_those_of_shared_tokens_read_alone(pair: Pair, models: tuple[Any, Any]) -> None:
    theirs, own = (load_split(pair.data.folder, "validation", name) for name in ("", pair.template.name))
    assert documents(theirs) == documents(own)
    teacher_scores, reference = score_teacher(load_model(pair.teacher, torch.float32), theirs)
    student = load_pretrained(pair.student, pair.teacher)
    scores, _ = score(student, own, reference)
    np.testing.assert_array_equal(scores.documents, teacher_scores.documents)
    nll, agrees, apart = [], [], []
    for place in documents(own):
        alone = read_alone(pair, pair.records[place], *models)
        shared = len(alone.log_p)
        log_q = alone.log_q[-shared:]
        nll.append(-log_q.gather(1, alone.labels[-shared:, None])[:, 0])
        agrees.append(log_q.argmax(-1) == alone.log_p.argmax(-1))
        likeliest = alone.log_p.topk(REFERENCE_TOKENS, dim=1).indices
        p, q = (rows.gather(1, likeliest).exp() for rows in (alone.log_p, log_q))
        rest, others = 1 - p.sum(1), 1 - q.sum(1)
        apart.append((p * (p / q).log()).sum(1) + rest * (rest / others).log())
    np.testing.assert_allclose(scores.nll, torch.cat(nll), rtol=1e-4)
    np.testing.assert_array_equal(scores.agrees, torch.cat(agrees))
    assert scores.divergence is not None
    np.testing.assert_allclose(scores.divergence, torch.cat(apart), rtol=1e-3, atol=1e-5)


def test_both_renderings_are_packed_into_the_same_sequences(pair: Pair) -> None:
    info = pair.data.renderings[pair.template.name]
    assert info.records == len(pair.records)
    assert info.ends == ("</s>", "<pad>")
    shared = answers = 0
    for split in ("train", "validation", "test"):
        own = load_split(pair.data.folder, split, pair.template.name)
        theirs = own.teacher
        assert theirs is not None
        assert own.ends == (1, 2)
        assert own.shared is not None
        assert theirs.shared is not None
        assert own.answers is not None
        for mine, other, here, there in zip(own.tokens, theirs.tokens, own.shared, theirs.shared, strict=True):
            # </s> and <pad> end answers.
            np.testing.assert_array_equal(mine[here], np.where(other[there] == 1, 2, other[there]))
        assert not (own.shared & ~own.answers).any()
        shared, answers = shared + own.shared.sum(), answers + own.answers.sum()
        for few in (own.head(1), own.head(3 * LENGTH)):
            assert few.teacher is not None
            assert few.predicted == few.teacher.predicted == few.shared[:, 1:].sum()
    assert (info.shared, info.answers) == (shared, answers)
    plain = prepare(resolve_data(str(pair.folder / "chats.jsonl")), pair.teacher, "tokens", LENGTH, pair.folder)
    assert plain.fingerprint != pair.data.fingerprint
    assert load_split(plain.folder, "train").shared is None


def test_questions_are_put_in_the_students_template(pair: Pair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.student)
    questions = load_split(pair.data.folder, "validation", pair.template.name).questions
    assert questions is not None
    assert questions.stops == (2,)
    for one in questions.entries:
        prompt = [{"role": "user", "content": pair.records[one.document]["prompt"]}]
        expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert list(one.prompt) == expected
    assert questions.tokenizer == rendering_folder(pair.data.folder, pair.template.name)
    loaded = AutoTokenizer.from_pretrained(questions.tokenizer)
    assert loaded.chat_template == LINES
    assert (loaded.eos_token_id, loaded.bos_token_id) == (2, 0)
    assert json.loads((questions.tokenizer / "generation_config.json").read_text())["eos_token_id"] == 2


def test_only_what_stands_in_the_same_place_of_an_answer_is_shared(pair: Pair) -> None:
    renderers = [Renderer(pair.teacher), Renderer(pair.teacher, pair.template)]
    turns = [("user", "Hi"), ("assistant", "the two\n"), ("user", "So?"), ("assistant", "É the the")]
    conversation = Conversation(tuple(Turn(*turn) for turn in turns))
    records = [one.render([conversation])[0] for one in renderers]
    theirs, own = share(records, [one.end for one in renderers])
    assert theirs.shared is not None
    assert own.shared is not None
    decode = renderers[0].tokenizer.decode
    # "the" after a space is one token, and two without it; the space before "É" is a token of its own.
    assert decode(theirs.tokens[theirs.shared]) == " two\n</s>É the the</s>"
    assert decode(own.tokens[own.shared]) == " two\n<pad>É the the<pad>"
    assert decode(own.tokens[own.answers & ~own.shared]) == " the "
    lone = share([one.render([single_turn("a", "b")])[0] for one in renderers], [1, 2])
    assert [decode(one.tokens[one.shared]) for one in lone] == ["</s>", "<pad>"]


def test_a_teacher_without_a_template_shares_what_its_plain_lines_have(pair: Pair, tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain", None, layers=1)
    conversations = [single_turn("Hi", "the two")]
    template, _ = own_template(pair.student, plain, conversations)
    assert template == pair.template
    renderers = [Renderer(plain), Renderer(plain, template)]
    records = share([one.render(conversations)[0] for one in renderers], [1, 2])
    decode = renderers[0].tokenizer.decode
    assert [decode(one.tokens[one.shared]) for one in records] == [" two</s>", " two<pad>"]


def test_what_describes_text_has_the_template_and_its_ends_and_else_is_the_teachers(pair: Pair, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(pair.teacher, teacher)
    (teacher / "gguf_tokenizer.json").write_text(json.dumps({"pre": "smollm", "eos_token_id": 1}))
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.5}))
    write_text(teacher, Renderer(teacher, pair.template), tmp_path / "text")
    assert json.loads((tmp_path / "text" / "gguf_tokenizer.json").read_text()) == {"pre": "smollm"}
    settings = json.loads((tmp_path / "text" / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2, "temperature": 0.5}
    loaded, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "text", teacher))
    assert loaded.get_vocab() == theirs.get_vocab()
    assert (loaded.chat_template, theirs.chat_template) == (LINES, CHAT)


def test_templates_beside_the_default_one_come_along_where_the_template_is_the_teachers(
    pair: Pair, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(pair.teacher, teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = {"default": CHAT, "tool_use": "{{ 'tools' }}"}
    tokenizer.save_pretrained(teacher)
    (tmp_path / "copy").mkdir()
    copy_text(teacher, tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == tokenizer.chat_template
    write_text(teacher, Renderer(teacher, pair.template), tmp_path / "text")
    assert AutoTokenizer.from_pretrained(tmp_path / "text").chat_template == LINES


def test_a_template_is_used_where_it_renders_otherwise_and_can_be_written(pair: Pair, tmp_path: Path) -> None:
    conversations = (
        single_turn("Hi", "Ho"),
        Conversation((Turn("system", "Be."), Turn("user", "a"), Turn("assistant", "b"))),
    )

    def found(template: str | None, **changes: Any) -> tuple[Template | None, str | None]:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        return own_template(saved(folder, template, layers=1, **changes), pair.teacher, conversations)

    assert found(None) == (None, None)
    assert found(CHAT) == (None, None)
    assert found("{# the same, written otherwise #}" + CHAT) == (None, None)
    assert found(LINES)[0] == Template(LINES, "<s>", "</s>")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LINES
    template, reason = found(refusing)
    assert template is None
    assert reason is not None
    assert "refuses a conversation of system, user, assistant" in reason
    # A special token that the teacher's vocabulary lacks.
    folder = saved(tmp_path / "other", "{% for m in messages %}<turn>{{ m.content }}</s>{% endfor %}", layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.save_pretrained(folder)
    assert own_template(folder, pair.teacher, conversations) == (
        None,
        "the teacher's tokenizer does not write its '<turn>' as that token",
    )


def test_records_whose_answers_share_nothing_are_left_out_with_their_count(pair: Pair) -> None:
    apart = replace(
        pair.template, text=LINES.replace("{{ m.content }}{{ eos_token }}", "{{ m.content }} {{ eos_token }}")
    )
    records = [*chats(), *({"prompt": f"Number {n}?", "answer": "b"} for n in range(3))]
    path = pair.folder / "short.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    data = prepare(resolve_data(str(path)), pair.teacher, "tokens", LENGTH, pair.folder, templates=[apart])
    assert data.notes == ("3 of 43 records are left out: their answers share no token in all templates",)
    assert data.renderings[apart.name].differing == 40
