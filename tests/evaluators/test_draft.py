"""Acceptance and time of a draft, against a plain walk and against llama.cpp's own counters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autodistill.advisor.describe import deployment_named
from autodistill.evaluation.base import Subject
from autodistill.evaluation.speculative import PROPOSED, speculate
from autodistill.evaluators.draft import Draft
from autodistill.export.gguf import GgufExporter
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.service.launch import Service, settle
from autodistill.service.request import ServeRequest
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher


def walked(agrees: str, proposed: int) -> tuple[int, int, int]:
    """Return the numbers of proposals, accepted proposals and passes for one document."""
    asked = taken = passes = 0
    while agrees:
        ahead = agrees[: min(proposed, len(agrees) - 1)]
        right = len(ahead) - len(ahead.lstrip("1"))
        asked, taken, passes, agrees = asked + len(ahead), taken + right, passes + 1, agrees[right + 1 :]
    return asked, taken, passes


@pytest.mark.parametrize("proposed", [1, 3, 8])
def test_each_document_is_followed_from_its_beginning(proposed: int) -> None:
    dice = np.random.default_rng(proposed)
    texts = ["".join(dice.choice(["1", "1", "0"], size=size)) for size in (1, 2, 5, 40, 7)]
    agrees = np.array([one == "1" for one in "".join(texts)])
    documents = np.repeat(np.array([4, 0, 9, 2, 4], np.int32), [len(one) for one in texts])
    found = speculate(agrees, documents, proposed)
    counts = np.array([walked(one, proposed) for one in texts]).sum(axis=0)
    assert [len(found.taken), found.taken.sum(), found.passes.sum()] == counts.tolist()
    assert found.tokens_per_pass == pytest.approx(len(agrees) / counts[2])
    # Every token that the teacher did not give came from the draft.
    assert (~found.passes).sum() == found.taken.sum()


def test_nothing_gives_no_draft() -> None:
    with pytest.raises(ValueError, match="0 positions"):
        speculate(np.zeros(0, bool), np.zeros(0, np.int32))


def test_a_draft_that_is_always_right_saves_what_its_weights_cost(subject: Subject) -> None:
    assert subject.scores is not None
    right = replace(subject.scores, agrees=np.ones(len(subject.scores.agrees), bool))
    time, share = Draft().evaluate(replace(subject, scores=right))
    assert (share.value, share.name) == (1.0, "draft_acceptance")
    assert time.detail["tokens_per_pass"] == pytest.approx(1 + PROPOSED, rel=0.1)
    cost = time.detail["cost"]
    assert 0.25 < cost < 0.5  # 4.5 bits per weight instead of 16, plus norms and tables
    assert time.value == pytest.approx((1 + PROPOSED * cost) / time.detail["tokens_per_pass"])
    never = replace(subject.scores, agrees=~right.agrees)
    slow, none = Draft().evaluate(replace(subject, scores=never))
    assert (none.value, slow.value) == (0.0, pytest.approx(1 + PROPOSED * cost))
    assert sum(slow.documents["sum"]) / sum(slow.documents["count"]) == pytest.approx(slow.value)


def test_along_the_teachers_own_text_the_counts_are_those_of_llama_cpp(tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher", layers=2)

    def packed(name: str) -> Path:
        deployment: Deployment = deployment_named(name)
        return GgufExporter().export(folder, deployment, tmp_path / name).path

    whole, small = packed("gguf-f16"), packed("gguf-q4_0")
    prompts = np.random.default_rng(0).integers(3, 300, (3, 9)).tolist()
    counts = []
    setting = settle(ServeRequest(whole, port=0, threads=1, streams=1, context=256, draft=small))
    with (
        Service(setting) as service,
        service.client() as client,
        LlamaServer(whole, 256, 1) as teacher,
        LlamaServer(small, 256, 1) as draft,
    ):
        for prompt in prompts:
            written = teacher.write(prompt, 24).tokens
            agrees = [draft.next_token([*prompt, *written[:place]]) == written[place] for place in range(24)]
            # The first token belongs to the prompt, and nothing is proposed for it.
            found = speculate(np.array(agrees[1:]), np.zeros(23, np.int32))
            answer = client.complete(prompt, 24)
            assert (answer.drafted, answer.accepted) == (len(found.taken), found.taken.sum())
            counts.append((answer.drafted, answer.accepted))
    # Some proposals were accepted, and some were not.
    assert 0 < sum(taken for _, taken in counts) < sum(asked for asked, _ in counts)
