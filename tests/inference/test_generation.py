"""Written answers against a plain loop without a cache, batch or padding, and draws against their distribution."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from autodistill.data.dataset import Question, Questions
from autodistill.errors import NotFiniteError, TrialFailedError
from autodistill.inference.generation import Sampling, answer, write
from autodistill.testing import save_tiny_teacher, tiny_tokenizer

PROMPTS = [[5, 9, 200], [7], list(range(40, 60)), [100, 101, 102, 103, 104], [7, 8]]
STOPS = (1, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("model"), layers=3)


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _alone(model: torch.nn.Module, prompt: list[int], limit: int, stops: tuple[int, ...]) -> list[int]:
    """Return the most likely tokens, each from a forward pass over all tokens before it."""
    written: list[int] = []
    while len(written) < limit and not (written and written[-1] in stops):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + written])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_greedy_answers_are_those_of_each_prompt_alone(model: torch.nn.Module, batch: int) -> None:
    free = {place: _alone(model, prompt, 12, STOPS) for place, prompt in enumerate(PROMPTS)}
    # A token that the model really writes, so that answers end at different lengths.
    stops = (*STOPS, free[2][3])
    expected = {place: _alone(model, prompt, 12, stops) for place, prompt in enumerate(PROMPTS)}
    assert len({len(tokens) for tokens in expected.values()}) > 1
    assert dict(write(model, PROMPTS, stops=stops, max_tokens=12, batch=batch)) == expected


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9)])
def test_logits_that_are_no_numbers_are_no_answer(folder: Path, sampling: Sampling) -> None:
    broken = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Only one row of the head is broken. All other logits, and most likely the first token, stay the same.
    broken.get_output_embeddings().weight.data[200] = torch.nan
    with pytest.raises(TrialFailedError, match="are not finite"):
        list(write(broken, PROMPTS, stops=STOPS, max_tokens=3, sampling=sampling))
    for parameter in broken.parameters():
        parameter.data.fill_(torch.inf)
    with pytest.raises(TrialFailedError, match="are not finite"):
        list(write(broken, PROMPTS, stops=STOPS, max_tokens=3, sampling=sampling, batch=2))


def test_what_a_row_is_filled_up_with_behind_its_end_is_not_looked_at(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "untied", layers=3, tied=False)
    broken = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [[5, 9, 200], [40, 41, 42]]  # of equal length, because padding before a prompt would be read too
    free = [_alone(broken, prompt, 9, ()) for prompt in prompts]
    # A token that ends the first answer early and is not in the second. Reading it makes every logit a NaN.
    stop = next(token for token in free[0][:4] if token not in free[1])
    expected = {0: free[0][: free[0].index(stop) + 1], 1: free[1]}
    broken.get_input_embeddings().weight.data[stop] = torch.nan
    assert dict(write(broken, prompts, stops=[stop], max_tokens=9)) == expected

    # A NaN token inside the second answer belongs to that answer. The first answer is still returned.
    inner = next(token for token in free[1][:8] if token not in free[0])
    broken.get_input_embeddings().weight.data[inner] = torch.nan
    written = write(broken, prompts, stops=[stop], max_tokens=9)
    assert next(written) == (0, expected[0])
    with pytest.raises(NotFiniteError) as failed:
        next(written)
    assert (failed.value.place, failed.value.cause) == (1, "nan")
    assert pickle.loads(pickle.dumps(failed.value)).place == 1


def test_settings_that_a_folder_brings_change_nothing_and_stay(model: torch.nn.Module) -> None:
    plain = dict(write(model, PROMPTS, stops=STOPS, max_tokens=12))
    before = model.generation_config
    own = GenerationConfig(repetition_penalty=5.0, do_sample=True, max_length=3, suppress_tokens=[plain[0][0]])
    model.generation_config = own
    try:
        assert dict(write(model, PROMPTS, stops=STOPS, max_tokens=12)) == plain
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_draws_depend_on_prompt_and_seed_alone(model: torch.nn.Module) -> None:
    def drawn(prompts: list[list[int]], seed: int, batch: int = 16) -> list[list[int]]:
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=seed)
        found = dict(write(model, prompts, stops=STOPS, max_tokens=8, sampling=sampling, batch=batch))
        return [found[place] for place in range(len(prompts))]

    first = drawn(PROMPTS, 0)
    assert drawn(PROMPTS, 0) == first
    assert drawn(PROMPTS[::-1], 0, batch=2) == first[::-1]
    assert drawn(PROMPTS, 1) != first


@pytest.mark.slow
def test_draws_follow_the_models_distribution(tmp_path: Path) -> None:
    """Both settings are tested at once. Testing each alone would take as long again and show no more."""
    folder = save_tiny_teacher(tmp_path / "model", layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    temperature, top_p = 1.5, 0.7
    draws = 1000
    counts = np.zeros(300)
    for seed in range(draws):
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        ((_, tokens),) = write(model, [PROMPTS[0]], stops=STOPS, max_tokens=1, sampling=sampling)
        counts[tokens[0]] += 1
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    p = torch.softmax(logits / temperature, -1).numpy()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p /= p.sum()
    assert counts[p == 0].sum() == 0
    # Pearson's statistic over tokens that are expected at least five times, against its mean and spread.
    often = p * draws >= 5
    statistic = ((counts - p * draws)[often] ** 2 / (p * draws)[often]).sum()
    freedom = often.sum()
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_answers_are_marked_as_text_without_their_end(model: torch.nn.Module, folder: Path) -> None:
    written = _alone(model, PROMPTS[3], 9, STOPS)
    text = tiny_tokenizer().decode(written, skip_special_tokens=True)
    entries = tuple(
        Question(document=place + 10, prompt=tuple(prompt), answer=said, answer_tokens=6, item=None)
        for place, (prompt, said) in enumerate([(PROMPTS[3], text), (PROMPTS[2], "something else")])
    )
    answers = answer(model, Questions(task=None, stops=STOPS, tokenizer=folder, entries=entries), context=512)
    assert answers.texts[0] == text
    assert answers.marks.tolist() == [1.0, 0.0]
    assert answers.documents.tolist() == [10, 11]
    assert answers.unasked == 0


def test_a_question_is_asked_where_it_fits_the_context_with_its_answer(model: torch.nn.Module, folder: Path) -> None:
    sizes = [(6, 10), (18, 2), (19, 2), (6, 15)]  # lengths of prompt and answer; the context has 20 tokens for both
    prompts = [np.random.default_rng(place).integers(3, 300, size).tolist() for place, (size, _) in enumerate(sizes)]
    # The longest answer that is asked for has 10 tokens, so 15 may be written. Two prompts leave room for fewer.
    room = [14, 2]
    written = [_alone(model, prompt, count, STOPS) for prompt, count in zip(prompts, room, strict=False)]
    expected = [tiny_tokenizer().decode(tokens, skip_special_tokens=True) for tokens in written]
    entries = tuple(
        Question(document=place, prompt=tuple(prompt), answer=said, answer_tokens=tokens, item=None)
        for place, (prompt, said, (_, tokens)) in enumerate(zip(prompts, [*expected, "", ""], sizes, strict=True))
    )
    questions = Questions(task=None, stops=STOPS, tokenizer=folder, entries=entries)
    answers = answer(model, questions, context=20)
    assert answers.texts == (*expected, "", "")
    assert answers.marks.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert answers.documents.tolist() == [0, 1, 2, 3]
    assert answers.unasked == 2
    assert answer(model, questions, context=7).unasked == 4


def test_an_answer_is_as_sure_as_its_tokens_are_likely(model: torch.nn.Module, folder: Path) -> None:
    entries = tuple(
        Question(document=place, prompt=tuple(prompt), answer="something", answer_tokens=size, item=None)
        for place, (prompt, size) in enumerate([(PROMPTS[2], 6), (PROMPTS[0], 6), (PROMPTS[3], 60)])
    )
    questions = Questions(task=None, stops=STOPS, tokenizer=folder, entries=entries)
    found = answer(model, questions, context=40, confident=True)
    assert found.tokens is not None
    assert found.confidence is not None
    for place, prompt in enumerate((PROMPTS[2], PROMPTS[0])):
        written = _alone(model, prompt, 9, STOPS)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1].double()
        chosen = torch.log_softmax(logits, -1)[range(len(written)), written]
        assert found.tokens[place] == len(written)
        assert found.confidence[place] == pytest.approx(float(chosen.mean().exp()), rel=1e-4)
    # Not asked, because it does not fit.
    assert (found.tokens[2], found.confidence[2]) == (0, 0.0)
    assert answer(model, questions, context=40).confidence is None
