"""A model card distinguishes a student's packings from the other models of its run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import yaml

from autodistill.export.model_card import NOT_STATED, Origin, model_card
from autodistill.models.config import config_of, resized, spec_from_config, uniform
from autodistill.runs.results.row import Row
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Alignment, Distillation
from autodistill.strategy.strategy import Finishing, Strategy
from autodistill.testing import tiny_config

Q4 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
Q8 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
PLAIN = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
ORIGIN = Origin(
    teacher="SmolLM2-135M-Instruct",
    data="pydoc",
    teacher_license="Apache-2.0",
    data_license="PSF-2.0",
    quantized="Q4_1",
)


def row(trial: str, deployment: Deployment, accuracy: float, kind: str = "student", **fields: Any) -> Row:
    strategy = Strategy()
    split = fields.pop("split", "validation")
    least: dict[str, Any] = {
        "row_id": f"{trial}-{deployment.name}-{split}",
        "trial": trial,
        "kind": kind,
        "name": trial,
        "deployment": deployment.to_json(),
        "status": "completed",
        "feasible": True,
        "split": split,
        "fidelity": 1.0,
        "accuracy": accuracy,
        "strategy": strategy.to_json(),
        "strategy_id": strategy.id,
    }
    return Row.from_json(least | fields)


def test_layers_that_differ_are_told_with_what_programs_make_of_them() -> None:
    spec = resized(spec_from_config(tiny_config(num_hidden_layers=3)), ffn_widths=(64, 192, 128))
    best = replace(BEST, shape=config_of(spec))
    card = model_card(best, Q4, [best], ORIGIN)
    assert 'from 64 to 192 neurons: llama.cpp computes such a model as its architecture "deci". Stock' in card
    card = model_card(best, PLAIN, [best], ORIGIN)
    assert f"holds {uniform(spec).parameters:,} weights for the {spec.parameters:,} of the student" in card
    alike = replace(BEST, shape=config_of(uniform(spec)))
    assert "FFN width" not in model_card(alike, PLAIN, [alike], ORIGIN) + model_card(BEST, Q4, [BEST], ORIGIN)


BEST = row(
    "t001",
    Q4,
    0.41234,
    accuracy_stderr=0.0051,
    retention=0.91,
    memory_bytes=150_000_000,
    memory_source="measured",
    latency_ms=7.25,
    latency_source="measured",
    size_bytes=91_700_000,
)
ROWS = [
    row("t001", Q8, 0.43),
    BEST,
    row("t001", Q4, 0.44, split="test"),
    row("t001", Q4, 0.11, fidelity=0.5, train_tokens=500),
    row("t002", Q4, 0.12),
    row("t002", Q4, 0.21, split="test"),
    row("b000", Q8, 0.22, "baseline", split="test"),
    row("teacher", Q4, 0.23, "teacher"),
    row("teacher", Q8, 0.13, "teacher"),
    row("teacher", PLAIN, 0.24, "teacher", split="test"),
    row("initial", Q4, 0.25, "initial", split="test"),
]


def tables(card: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the cells of the student's rows, and those of other models."""
    own, _, rest = card.split("## Measurements")[1].partition("## Compared with")
    cells = [[line.strip("| ").split(" | ") for line in part.splitlines() if line[:2] == "| "] for part in (own, rest)]
    return cells[0][2:], cells[1][2:]


def test_each_row_of_the_student_is_one_of_its_own_packings() -> None:
    own, others = tables(model_card(BEST, Q4, ROWS, ORIGIN))
    assert own[0] == [
        *("**gguf-q4_0**", "validation", "0.4123 ± 0.0051", "0.910", "-"),
        *("150 MB (measured)", "7.2 ms (measured)", "91.7 MB"),
    ]
    assert [line[:3] for line in own[1:]] == [
        ["**gguf-q4_0**", "test", "0.4400"],
        ["gguf-q8_0", "validation", "0.4300"],
    ]
    assert [line[:4] for line in others] == [
        ["student t002, after 100% of the plan's tokens", "gguf-q4_0", "test", "0.2100"],
        ["baseline b000, after 100% of the plan's tokens", "gguf-q8_0", "test", "0.2200"],
        ["teacher", "gguf-q4_0", "validation", "0.2300"],
        ["teacher", "huggingface", "test", "0.2400"],
        ["untrained student", "gguf-q4_0", "test", "0.2500"],
    ]


def test_the_test_split_has_the_memory_and_size_that_the_packing_was_measured_to_have() -> None:
    """Scoring loads nothing in a runtime, so its row has predicted memory although another row has a measured one."""
    scored = row("t001", Q4, 0.44, split="test", memory_bytes=149_000_000, memory_source="predicted", size_bytes=90**4)
    other = replace(scored, row_id="b000", trial="b000", kind="baseline")
    own, others = tables(model_card(BEST, Q4, [BEST, scored, other], ORIGIN))
    assert [line[5] for line in own] == ["150 MB (measured)"] * 2
    assert [line[7] for line in own] == ["91.7 MB"] * 2
    assert [line[6] for line in others] == ["149 MB (predicted)"], "of another student nothing was measured"


def test_a_card_says_what_the_student_was_made_of_and_how() -> None:
    card = model_card(BEST, Q4, ROWS, ORIGIN)
    _, header, body = card.split("---\n", 2)
    stated = yaml.safe_load(header)
    assert (stated["license"], stated["library_name"]) == ("apache-2.0", "gguf")
    assert yaml.safe_load(model_card(BEST, PLAIN, ROWS, ORIGIN).split("---\n", 2)[1])["library_name"] == "transformers"
    assert Strategy().id in body
    assert "inherit: Apache-2.0" in body
    assert "(pydoc): PSF-2.0" in body
    assert "from a file in Q4_1 and dequantised" in body
    assert "of the tokens that were planned" not in body
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == Strategy().to_json()


def test_only_what_learnt_from_the_teacher_is_called_distilled() -> None:
    """Earlier, a student trained on labels alone was called distilled, and every card had the tag."""

    def said(**changes: Any) -> tuple[str, list[str]]:
        card = model_card(replace(BEST, **changes), Q4, [BEST], ORIGIN)
        _, header, body = card.split("---\n", 2)
        return body.split("It is stored")[0], yaml.safe_load(header)["tags"]

    labels = Distillation(divergence_weight=0.0)
    trained, tags = said(strategy=Strategy(distillation=labels))
    assert "trained on pydoc" in trained
    assert "on the labels alone, so nothing was distilled" in trained
    assert "Distilled" not in trained
    assert "distillation" not in tags
    for taught in (
        Distillation(),
        replace(labels, alignment=Alignment()),
        replace(labels, final_divergence_weight=0.5),
    ):
        text, tags = said(strategy=Strategy(distillation=taught))
        assert "Distilled from" in text
        assert "scales" not in text
        assert "distillation" in tags
    text, tags = said(kind="initial")
    assert "not trained" in text
    assert "Distilled" not in text
    assert "distillation" not in tags
    assert "distillation" not in said(kind="teacher")[1]
    finishing = Finishing(format="gguf-q4_0", bits=4, group_size=32, scales="alone")
    assert (
        "Only the scales of its codes were trained."
        in said(strategy=Strategy(distillation=labels, finishing=finishing))[0]
    )


def test_what_is_not_known_is_not_claimed() -> None:
    unknown = replace(ORIGIN, teacher_license=None, data_license=None, quantized=None)
    card = model_card(ROWS[3], PLAIN, [*ROWS[:2], ROWS[3]], unknown)
    assert "license:" not in card
    assert card.count(NOT_STATED) == 2
    assert "dequantised" not in card
    assert "It was trained for 50% of the tokens that were planned." in card
    assert "stored here as huggingface. It was not measured under this quantisation scheme." in card
    assert [line[2] for line in tables(card)[0]] == ["0.1100"]
    assert "Compared with" not in card


@pytest.mark.parametrize("license", ["MIT", None])
def test_a_runs_document_tells_the_origin(license: str | None) -> None:
    search = {
        "teacher": {"name": "big", "quantised": "Q8_0"},
        "data": {"name": "text"},
        "licences": {"big": license or NOT_STATED, "text": NOT_STATED},
    }
    expected = Origin(teacher="big", data="text", teacher_license=license, data_license=None, quantized="Q8_0")
    assert Origin.of(search) == expected


HOSTILE = "x\nlicense: gpl-3.0\n---\n# A title\n<script>alert(1)</script> | [a](javascript:b) `c` **d** _e_"


def text_of(page: str) -> list[tuple[str, str]]:
    """Return the kind and the text of each block of a page, as a parser of GitHub's Markdown reads it."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(page)
    kinds = []
    for token in tokens:
        for child in token.children or []:
            kinds.append((child.type, child.content))
        if token.type.endswith(("_open", "_block", "fence", "hr")):
            kinds.append((token.type, token.content))
    return kinds


def test_names_and_licenses_of_others_are_text_and_nothing_else() -> None:
    """Separate lines in the header, HTML, links and headings all stay plain letters of a name."""
    origin = replace(ORIGIN, teacher=HOSTILE, data=HOSTILE, teacher_license=HOSTILE, data_license=HOSTILE)
    rows = [replace(one, name=HOSTILE) for one in ROWS]
    card = model_card(BEST, Q4, rows, origin)
    _, header, body = card.split("---\n", 2)
    plain_card = model_card(BEST, Q4, ROWS, ORIGIN)
    head = yaml.safe_load(header)
    assert head["license"] == " ".join(HOSTILE.lower().split())
    assert set(head) == set(yaml.safe_load(plain_card.split("---\n", 2)[1]))
    kinds = [kind for kind, _ in text_of(body)]
    assert not {"html_block", "html_inline", "link_open", "em_open"} & set(kinds)
    assert kinds.count("heading_open") == [kind for kind, _ in text_of(plain_card.split("---\n", 2)[2])].count(
        "heading_open"
    )
    assert "".join(text for kind, text in text_of(body) if kind == "text").count("<script>alert(1)</script>") >= 5


@pytest.mark.parametrize("license", [7, ["mit", "apache-2.0"], {"a": 1}, "", None, True])
def test_a_license_of_another_kind_makes_a_card(license: Any) -> None:
    search = {
        "teacher": {"name": "big", "quantised": None},
        "data": {"name": "text"},
        "licences": {"big": license, "text": license},
    }
    card = model_card(BEST, Q4, ROWS, Origin.of(search))
    expected = "mit, apache-2.0" if isinstance(license, list) else None
    assert yaml.safe_load(card.split("---\n", 2)[1]).get("license") == expected


def test_a_cache_of_few_bits_is_told_with_the_arguments_that_set_it() -> None:
    cached = replace(Q4, cache_type_k="q8_0", cache_type_v="q4_0")
    card = model_card(row("t001", cached, 0.4), cached, [], ORIGIN)
    assert "It is stored here as gguf-q4_0+k-q8_0-v-q4_0." in card
    assert "`--cache-type-k q8_0 --cache-type-v q4_0 --flash-attn on`" in card
    assert "--cache-type" not in model_card(BEST, Q4, ROWS, ORIGIN)
