"""Constructions as choices of a space: which ones race, where they lie, and that every other dimension varies too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autodistill.errors import InputError, NothingFitsError
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.construction.construction import Construction, arms, with_constructions
from autodistill.search.construction.plain import plain_constructions
from autodistill.search.construction.recipe import first_prior
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space, load_space
from autodistill.strategy.strategy import WHOLE, Init, Strategy
from autodistill.testing import tiny_config

SPEC = spec_from_config(tiny_config())
Q4 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
F16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
MIXED = replace(Q4, types=(("embeddings", "q5_0"),), cache_type_k="q8_0", cache_type_v="q8_0")
NARROW = Init(depth=1.0, ffn=0.5)


def grid(bits: int, group: int) -> Deployment:
    return Deployment(runtime="vllm", format="compressed-tensors", bits=bits, group_size=group)


def made(deployment: Deployment = Q4, **fields: object) -> Construction:
    fields = {"init": WHOLE, "bytes": 100, "solved": True, "kl": 0.1} | fields
    return Construction(deployment=deployment, **fields)  # type: ignore[arg-type]


def test_no_search_is_the_best_plain_storage_of_the_whole_teacher_and_hopeless_cuts_are_no_arms() -> None:
    plain, worse = made(Q4, solved=False, kl=0.2), made(F16, solved=False, kl=0.3)
    solved, near, far = made(MIXED, kl=0.1), made(Q4, init=NARROW, kl=0.3), made(init=Init(depth=0.5), kl=0.5)
    assert arms([worse, plain, far, near, solved]) == (solved, plain, near)


def test_no_search_is_a_plain_cut_where_the_whole_teacher_fits_in_two_bits_only() -> None:
    few = made(replace(Q4, format="gguf-q2_k", bits=2, group_size=16, symmetric=False), solved=False, kl=0.08)
    cut, solved = made(Q4, init=NARROW, solved=False, kl=0.2), made(MIXED, init=NARROW, kl=0.1)
    assert arms([few, cut, solved]) == (solved, cut)
    assert arms([few, solved]) == (few, solved)
    space = with_constructions(load_space("default"), [few, cut, solved], first_prior(SPEC, batch_tokens=256, steps=8))
    assert space.starts["no search"].init == NARROW
    assert space.starts["no search"].finishing is not None
    assert space.starts["no search"].finishing.format == "gguf-q4_0"


def test_of_a_shape_the_solved_storage_of_least_kl_is_raced() -> None:
    best = made(Q4, init=NARROW, kl=0.15)
    assert arms([made(MIXED, init=NARROW, kl=0.2), best]) == (best,)


def test_where_nothing_was_scored_plain_cuts_are_raced_too() -> None:
    plain = made(Q4, solved=False, kl=None)
    cut = made(Q4, solved=False, kl=None, init=NARROW)
    assert arms([cut, plain]) == (plain, cut)
    assert arms([replace(cut, kl=0.2), replace(plain, kl=0.1)]) == (replace(plain, kl=0.1),)


def test_a_file_that_is_named_is_raced_beside_no_search_and_trains_the_scales_of_its_codes() -> None:
    init = Init(source="pretrained", model="/elsewhere/model-Q4_0.gguf", depth=1.0)
    file = made(Q4, init=init, solved=False, kl=0.05, own_codes=True)
    plain, solved = made(F16, solved=False, kl=0.2), made(MIXED, kl=0.1)
    assert arms([plain, solved, file]) == (file, solved, plain)
    assert arms([plain, solved, replace(file, kl=0.5)]) == (solved, plain)
    assert (file.candidate, file.whole, file.near, file.how) == (True, False, True, "candidate")
    assert file.describe().startswith("model-Q4_0.gguf as gguf-q4_0, candidate, 100")
    first = next(iter(file.finishings().values()))
    assert first is not None
    assert (first.scales, first.rounding) == ("alone", "nearest")
    space = with_constructions(
        load_space("default"), [plain, solved, file], first_prior(SPEC, batch_tokens=256, steps=8)
    )
    assert "no search" in space.starts
    assert next(iter(space.starts)) == "candidate model-Q4_0.gguf"
    assert space.starts["candidate model-Q4_0.gguf"].init == init
    assert init.model in space.models


def test_a_construction_is_its_plain_data() -> None:
    one = made(MIXED, kl_stderr=0.01)
    assert Construction.from_json(one.to_json()) == one


def test_nothing_is_trained_on_16_bits_whatever_the_tables_have() -> None:
    for one in (F16, replace(F16, types=(("embeddings", "q8_0"),))):
        assert list(made(one).finishings().values()) == [None]


def test_scales_are_trained_first_of_codes_that_make_up_for_their_errors() -> None:
    for one in (made(MIXED), made(MIXED, init=NARROW)):
        found = list(one.finishings().values())
        assert [finishing and finishing.scales for finishing in found] == ["alone", "absmax"]
        assert [finishing and finishing.rounding for finishing in found] == ["compensated", "nearest"]
        assert all(finishing and finishing.scheme == MIXED.scheme for finishing in found)


def test_arms_are_starts_of_the_space_which_is_known_by_what_was_declared() -> None:
    declared = load_space("default")
    assert declared.solved
    found = [made(Q4, solved=False), made(MIXED, kl=0.2), made(Q4, init=NARROW, kl=0.3)]
    space = with_constructions(declared, found, first_prior(SPEC, batch_tokens=256, steps=8))
    assert not space.solved
    assert space.hash == declared.hash
    assert list(space.starts) == ["no search", "labels alone", "solved whole", "solved ffn-50%"]
    assert all(space.point(one) is not None for one in space.starts.values())
    assert [one.init for one in space.starts.values()] == [WHOLE, WHOLE, WHOLE, NARROW]
    known, alone = space.starts["no search"], space.starts["labels alone"]
    assert known.distillation.weighs_teacher
    assert alone == replace(known, distillation=replace(known.distillation, divergence_weight=0.0))
    assert space.deployments[:2] == (Q4, MIXED)
    assert set(declared.deployments) <= set(space.deployments)
    again = Space.from_json(space.to_json())
    assert again.starts == space.starts


def test_a_student_near_its_teacher_begins_by_the_labels_alone() -> None:
    """Such a student lacks knowledge of its own text. A teacher that has not read this text cannot provide it."""
    found = [made(MIXED, kl=0.05), made(Q4, solved=False, kl=0.08), made(Q4, init=NARROW, kl=0.2)]
    space = with_constructions(load_space("default"), found, first_prior(SPEC, batch_tokens=256, steps=8))
    told = {name: start.distillation.weighs_teacher for name, start in space.starts.items()}
    assert list(told) == ["solved whole", "by its teacher too", "no search", "solved ffn-50%"]
    assert list(told.values()) == [False, True, False, True]


def test_a_long_training_begins_by_the_labels_alone_whatever_the_student_is() -> None:
    """A race of few steps would weight the teacher higher than a long training justifies."""
    found = [made(MIXED, kl=0.05), made(Q4, solved=False, kl=0.08), made(Q4, init=NARROW, kl=0.2)]
    # At most 13,824 tokens of SmolLM2 were planned in a budget of six minutes. Training on labels alone won there.
    space = with_constructions(load_space("default"), found, first_prior(SPEC, batch_tokens=256, steps=54))
    assert list(space.starts) == ["solved whole", "no search", "solved ffn-50%"]
    assert not any(start.distillation.weighs_teacher for start in space.starts.values())


def test_a_recipe_outside_of_a_space_is_moved_to_its_nearest_end() -> None:
    declared = Space({"distillation.learning_rate": {"low": 0.1, "high": 0.2}}, solved=True)
    space = with_constructions(declared, [made()], first_prior(SPEC, batch_tokens=256))
    (start,) = space.starts.values()
    assert start.distillation.learning_rate == 0.1


def test_a_space_of_five_dimensions_varies_every_one() -> None:
    declared = Space(
        {
            "distillation.divergence_weight": {"choices": [0.5]},
            "distillation.temperature.shape": {"choices": ["constant", "linear", "cosine"]},
            "distillation.temperature.start": {"low": 1.0, "high": 6.0},
            "distillation.temperature.end": {
                "low": 0.5,
                "high": 3.0,
                "when": {"distillation.temperature.shape": ["linear", "cosine"]},
            },
            "distillation.alignment": {
                "choices": {"last": {"layers": "last"}, "even-2": {"layers": "even", "count": 2}}
            },
            "distillation.alignment.projection": {"choices": ["none", "linear", "mlp"]},
        },
        solved=True,
    )
    grids = [made(grid(bits, group), kl=bits / 100) for bits in (4, 8) for group in (32, 64)]
    # Each construction has a shape of its own, so that all of them are raced.
    found = [replace(one, init=Init(depth=1.0, ffn=0.5 + place / 10)) for place, one in enumerate(grids)]
    space = with_constructions(declared, found, first_prior(SPEC, batch_tokens=256))
    sampler = Sampler(space, name="random")
    strategies = [space.strategy(point) for number in range(40) if (point := sampler.propose(number)) is not None]
    told = [one.distillation for one in strategies]
    assert {one.temperature.shape for one in told} == {"constant", "linear", "cosine"}
    assert len({(one.temperature.start, one.temperature.end) for one in told}) > 20
    assert {one.alignment.layers for one in told if one.alignment} == {"last", "even"}
    assert {one.alignment.projection for one in told if one.alignment} == {"none", "linear", "mlp"}
    assert {one.finishing.bits for one in strategies if one.finishing} == {4, 8}
    assert {one.finishing.group_size for one in strategies if one.finishing} == {32, 64}


def test_how_training_ends_on_the_solved_grids_is_raced_where_a_space_says_so() -> None:
    declared = Space(
        {"finishing.scales": {"choices": ["learned"]}, "finishing.start": {"low": 0.1, "high": 0.5}}, solved=True
    )
    found = [made(Q4, solved=False), made(MIXED, kl=0.2), made(F16, init=NARROW, kl=0.1)]
    space = with_constructions(declared, found, first_prior(SPEC, batch_tokens=256))
    sampler = Sampler(space, name="random")
    strategies = [space.strategy(point) for number in range(20) if (point := sampler.propose(number)) is not None]
    ends = [one.finishing for one in (*strategies, *space.starts.values()) if one.finishing]
    assert {one.scales for one in ends} == {"learned"}
    assert len({one.start for one in ends}) > 5
    assert {one.scheme for one in ends} == {Q4.scheme, MIXED.scheme}


def test_plain_constructions_keep_to_what_a_space_allows() -> None:
    budget = Budget(memory_bytes=10**9, context=64)
    four = {"finishing.bits": {"choices": [4]}, "init.ffn": {"choices": [0.5]}}
    found = plain_constructions(SPEC, Space(four, solved=True), budget)
    assert {one.init.ffn for one in found} == {0.5}
    assert {one.deployment.bits for one in found} == {4}
    fixed = Space({"init": {"choices": {"whole": {"depth": 1.0}}}}, deployments=[Q4], solved=True)
    assert [(one.init, one.deployment) for one in plain_constructions(SPEC, fixed, budget)] == [(WHOLE, Q4)]
    named = Space({"init": {"choices": {"half": {"depth": 0.5, "layers": "contiguous"}}}}, solved=True)
    assert {one.init for one in plain_constructions(SPEC, named, budget)} == {Init(depth=0.5, layers="contiguous")}
    with pytest.raises(InputError, match=r"init\.depth leaves fewer than two of the teacher's"):
        plain_constructions(SPEC, Space({"init.depth": {"choices": [0.01]}}, solved=True), budget)
    with pytest.raises(
        NothingFitsError, match=r"of those that the space allows \(whole teacher\): the smallest deployment, gguf-q4_0"
    ):
        plain_constructions(SPEC, fixed, replace(budget, memory_bytes=10**6))


def test_plain_constructions_fit_and_the_smallest_is_named_where_none_does() -> None:
    space = load_space("default")
    budget = Budget(memory_bytes=10**9, context=64)
    found = plain_constructions(SPEC, space, budget)
    assert found[0].init == WHOLE
    assert all(one.bytes <= budget.memory_bytes and not one.solved for one in found)
    tight = replace(budget, memory_bytes=min(one.bytes for one in found) - 1)
    assert all(one.bytes <= tight.memory_bytes for one in plain_constructions(SPEC, space, tight))
    with pytest.raises(NothingFitsError, match=r"the smallest deployment, .* needs .* over the 1(\.0+)? MB budget"):
        plain_constructions(SPEC, space, replace(budget, memory_bytes=10**6))


def test_a_cache_that_is_asked_for_is_the_only_one() -> None:
    space = load_space("default")
    wide = spec_from_config(tiny_config(head_dim=32))
    cached = replace(F16, cache_type_k="q8_0", cache_type_v="q8_0")
    tight = Budget(memory_bytes=22 * 10**6, context=64)
    found = plain_constructions(wide, replace(space, deployments=(cached,)), tight, "q8_0")
    assert {one.deployment.cache_types for one in found} == {("q8_0", "q8_0")}
    with pytest.raises(InputError, match="no deployment of the space"):
        plain_constructions(SPEC, replace(space, deployments=(cached,)), tight, "q8_0")


def test_the_teachers_own_codes_are_trained_by_scales_as_they_lie_in_its_file() -> None:
    """Compensated rounding would search for codes that are already known, and correct errors that do not occur."""
    own = Deployment(runtime="llama.cpp", format="gguf-q4_1", bits=4, group_size=32, symmetric=False)
    first = [
        next(iter(Construction(init=WHOLE, deployment=own, bytes=1, own_codes=known).finishings().values()))
        for known in (True, False)
    ]
    assert [Strategy(init=WHOLE, finishing=one).codes for one in first] == [None, own.scheme]
    assert all(one is not None and one.scales == "alone" for one in first)


def test_a_training_of_many_tokens_a_weight_keeps_to_the_teacher_where_nothing_may_be_forgotten() -> None:
    """Labels alone then lead away from general text. If only the task counts, they keep their full weight."""
    found = plain_constructions(SPEC, load_space("default"), Budget(memory_bytes=10**9, context=256))
    long = replace(first_prior(SPEC, batch_tokens=256), tokens=100_000, tokens_per_weight=0.001)
    drifting = replace(long, tokens_per_weight=0.5)
    for prior, general, weighs in ((long, True, False), (drifting, False, False), (drifting, True, True)):
        made = with_constructions(load_space("default"), found, prior, general=general)
        assert {one.distillation.weighs_teacher for one in made.starts.values()} == {weighs}
    kept = with_constructions(load_space("default"), found, drifting, general=True).starts.values()
    assert {one.distillation.divergence_weight for one in kept} == {drifting.recipe.divergence_weight}


def test_a_training_of_many_tokens_a_weight_trains_weights_where_codes_are_not_the_teachers_own() -> None:
    """A few steps would not move weights to their next codes."""
    few = replace(first_prior(SPEC, batch_tokens=256), tokens_per_weight=0.001)
    q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
    for own, alone in ((False, (True, False)), (True, (True, True))):
        found = [Construction(init=WHOLE, deployment=q4_0, bytes=1, own_codes=own)]
        for prior, expected in zip((few, replace(few, tokens_per_weight=0.5)), alone, strict=True):
            starts = with_constructions(load_space("default"), found, prior).starts.values()
            assert {one.scales_alone for one in starts} == {expected}
