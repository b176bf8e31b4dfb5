"""Students with fewer groups of heads: what they cost, and that they are found, against every other choice."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from autodistill.distillation.student.build import build_student
from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.search.solve.cuts import CutScores, allowed_groups, check_shapes, smallest
from autodistill.search.solve.forms import Form, best_forms, cut_forms, forgets
from autodistill.search.solve.options import KEYS, Options
from autodistill.search.solve.shapes import Shapes
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Init
from autodistill.testing import tiny_config
from tests.search.solve.scored import Setting, scored

SIZES: dict[str, Any] = {"layers": 2, "width": 128, "heads": 4, "kv_heads": 4, "ffn": 128}
# With so many streams the cache takes more memory than the weights.
STREAMS = {"context": 512, "batch": 32}
COUNTS, WIDTHS = (2, 1), (128, 64)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    budget = Budget(memory_bytes=10**9, **STREAMS)
    return scored(tmp_path_factory.mktemp("setting"), budget, documents=24, tokens=256, **SIZES)


def within(setting: Setting, limit: int, **dimensions: Any) -> Options:
    """Return the options for a limit; dimensions restrict them, with an underscore in place of the point."""
    options = replace(setting.options, budget=Budget(memory_bytes=limit, **STREAMS))
    declared = {name.replace("_", ".", 1): domain for name, domain in dimensions.items()}
    return replace(options, limits=Space(declared, solved=True).restriction) if declared else options


def kl(setting: Setting, init: Init) -> float:
    """Return the KL, over the whole vocabulary, of a student that is built from the teacher's folder."""
    student, _ = build_student(setting.teacher, init, calibration=setting.calibration)
    tokens = torch.from_numpy(setting.sample.data.tokens.astype(np.int64))
    with torch.no_grad():
        before, after = (
            torch.log_softmax(model(tokens).logits[:, :-1].double(), dim=-1)
            for model in (load_model(setting.teacher, torch.float32), student)
        )
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("count", COUNTS)
def test_groups_cost_what_the_student_without_the_others_loses(setting: Setting, count: int) -> None:
    repaired = Init(depth=1.0, heads=count / 4, repair=True)
    found = setting.shapes.groups(count)
    assert found.exact
    assert found.stderr > 0
    assert found.kl == pytest.approx(kl(setting, repaired), rel=0.02)
    assert found.kl < kl(setting, replace(repaired, repair=False))


def test_what_groups_cost_is_measured_once(setting: Setting) -> None:
    path, told = setting.folder / "again.json", list[str]()
    given = (path, setting.bench, setting.sample, setting.calibration)
    first = Shapes(*given, told.append).groups(2)
    assert told == ["scoring attention with 2 of 4 groups of heads in all layers"]
    assert Shapes(*given, told.append).groups(2) == first
    assert len(told) == 1


def test_where_the_cache_takes_the_memory_groups_of_heads_give_way(setting: Setting) -> None:
    whole = setting.options.smallest()[1]
    options = within(setting, whole.total_bytes - whole.kv_cache_bytes // 3)
    (found,) = best_forms(options, setting.library, lambda: setting.shapes, setting.sample)
    assert found.family == "grouped"
    assert found.options.spec.kv_heads in COUNTS
    assert found.bytes <= options.budget.memory_bytes
    need = found.options.memory(found.deployment)
    held = setting.options.memory(found.deployment).kv_cache_bytes
    assert need.kv_cache_bytes == held * found.options.spec.kv_heads // 4
    assert isinstance(found.scores, CutScores)
    assert found.scores.cuts["heads left out"] == setting.shapes.groups(found.options.spec.kv_heads).kl
    # Half of the keys, rounded, cost half as much.
    part = found.options.spec.kv_heads / 4
    assert found.scores.score(KEYS, "q4_0").kl == pytest.approx(part * setting.library.score(KEYS, "q4_0").kl)


def test_what_is_found_loses_hardly_more_than_the_best_of_every_shape_and_storage(setting: Setting) -> None:
    whole = setting.options.smallest()[1]
    limits = (whole.kv_cache_bytes // 3, whole.kv_cache_bytes // 2, whole.kv_cache_bytes * 5 // 7)
    for spared in limits:
        options = within(setting, whole.total_bytes - spared, finishing_format={"choices": ["gguf-q4_0"]})
        every = []
        for count, width in product(COUNTS, WIDTHS):
            init = Init(depth=1.0, heads=count / 4, ffn=width / 128, repair=True)
            cut = CutScores(init, options, setting.library, setting.shapes)
            types = dict.fromkeys(cut.options.matrices, "q4_0")
            (table,) = cut.options.tables.values()
            for kind, pair in product(cut.options.kinds(table), cut.options.caches):
                stored = cut.options.deployment(types | {table.name: kind}, pair)
                if cut.options.fits(stored):
                    every.append(cut.joint(stored, setting.sample).kl)
        found = cut_forms(options, setting.library, setting.shapes, setting.sample, families=("grouped",))
        assert bool(found) == bool(every)
        if every:
            assert min(every) - 1e-9 <= found[0].joint.kl <= min(every) + 0.02


def test_a_space_narrows_the_heads(setting: Setting) -> None:
    whole = setting.options.smallest()[1]
    limit = whole.total_bytes - whole.kv_cache_bytes // 3
    given = (setting.library, setting.shapes, setting.sample)
    assert cut_forms(within(setting, limit, init_heads={"choices": [1.0]}), *given) == []
    (found,) = cut_forms(within(setting, 10**9, init_heads={"choices": [0.25]}), *given)
    assert (found.family, found.options.spec.kv_heads) == ("grouped", 1)
    (both,) = cut_forms(within(setting, limit, init_heads={"low": 0.5, "high": 1.0}), *given)
    assert both.options.spec.kv_heads == 2
    assert allowed_groups(within(setting, limit, init_depth={"choices": [1.0]})) == COUNTS
    # A fraction is rounded to groups, as in every student.
    assert allowed_groups(within(setting, limit, init_heads={"choices": [0.45]})) == (2,)
    check_shapes(within(setting, limit, init_heads={"choices": [0.45]}))
    with pytest.raises(InputError, match=r"init\.heads 0\.75 leaves 3 heads, which do not divide the width of 128"):
        check_shapes(within(setting, limit, init_heads={"choices": [0.75]}))


def test_the_smallest_student_has_fewest_heads(setting: Setting) -> None:
    init, deployment, need = smallest(setting.options)
    assert (init.heads, init.ffn) == (0.25, 0.5)
    cut = CutScores(init, setting.options, setting.library, setting.shapes)
    assert cut.options.memory(deployment).total_bytes == need


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}, (2, 1)),
        # transformers' Llama has no 24 heads in a width of 2048.
        ({"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 2048}, (4, 2)),
        ({"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 2048}, (16, 8)),
        ({"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 512}, ()),
        # Qwen3's heads need not fill its width.
        (
            {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 2048, "architecture": "qwen3"},
            (6, 4, 2),
        ),
        # llama.cpp takes Qwen2's heads to fill its width.
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512, "architecture": "qwen2"}, ()),
    ],
)
def test_only_numbers_of_groups_that_models_and_runtimes_have_are_tried(
    sizes: dict[str, Any], counts: tuple[int, ...]
) -> None:
    spec = spec_from_config(tiny_config(**{"head_dim": 64, "intermediate_size": 512, **sizes}))
    found = allowed_groups(Options(spec=spec, budget=Budget(memory_bytes=10**9)))
    assert found == counts


def test_a_student_without_heads_that_copies_less_is_replaced(setting: Setting) -> None:
    init = Init(depth=1.0, heads=0.5, repair=True)
    cut = CutScores(init, setting.options, setting.library, setting.shapes)
    probe = replace(setting.sample, teacher=replace(setting.sample.teacher, accuracy=0.9))

    class Copier:
        def joint(self, *_: Any) -> Any:
            return replace(probe.teacher, accuracy=0.1)

    given: dict[str, Any] = {"family": "grouped", "options": cut.options, "scores": Copier()}
    found: Any = type("Found", (), {"deployment": cut.options.smallest()[0]})()
    assert forgets(Form(init=init, found=found, **given), probe)
    assert not forgets(Form(init=replace(init, heads=1.0, ffn=0.5), found=found, **given), probe)


def test_heads_alone_may_be_repaired() -> None:
    assert Init(depth=1.0, heads=0.5, repair=True).describe() == "all layers heads 50% repaired"
    with pytest.raises(InputError, match=r"give init\.ffn or init\.heads below 1"):
        Init(depth=1.0, repair=True)
