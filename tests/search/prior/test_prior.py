"""The recipe that a search begins with: what changes it, what is uncertain, and that a strategy may have it."""

from dataclasses import replace

import pytest

from autodistill.models.config import spec_from_config
from autodistill.search.prior.knowledge import CHOICES, RATE, UNITS, Belief, load
from autodistill.search.prior.prior import prior_for
from autodistill.strategy.space import load_space
from autodistill.testing import tiny_config

SPEC = replace(spec_from_config(tiny_config()), width=576)


# No training of these tests has many tokens per weight of it.
LARGE = replace(spec_from_config(tiny_config(vocab_size=2_000_000)), width=576)


def prior(spec=LARGE, **asked):
    return prior_for(spec, **{"batch_tokens": 256, "steps": 24, "cut": False, **asked})


def test_the_rate_follows_the_law():
    beliefs = load().beliefs
    base = 10 ** (beliefs["rate"].mean + beliefs["family llama"].mean)
    assert prior().recipe.learning_rate == pytest.approx(base, rel=0.01)
    for asked, name, decades in (
        ({"spec": replace(LARGE, width=5760)}, "rate.width", 1),
        ({"batch_tokens": 25600}, "rate.batch", 2),
        ({"steps": 2400}, "rate.steps", 2),
        ({"cut": True}, "rate.cut", 1),
    ):
        found = prior(**asked).recipe.learning_rate
        assert found == pytest.approx(base * 10 ** (decades * beliefs[name].mean), rel=0.01), name
    assert prior(replace(LARGE, width=5760)).recipe.learning_rate < prior().recipe.learning_rate
    assert prior(steps=2400).recipe.learning_rate < prior().recipe.learning_rate


def test_the_rate_falls_with_the_length_until_there_are_many_tokens_for_each_weight():
    law = load().beliefs["rate.steps"].mean
    few, many = (round(share * LARGE.parameters / 256) for share in (0.049, 0.051))
    short, long, longest = (prior(steps=steps).recipe for steps in (few, many, many * 100))
    begun = prior().recipe.learning_rate
    assert short.learning_rate == pytest.approx(begun * (few / 24) ** law, rel=0.01)
    assert long.learning_rate == longest.learning_rate == pytest.approx(begun * 2**law, rel=0.01)
    assert (short.train_embeddings, long.train_embeddings) == (False, True)


def test_an_unseen_family_begins_lower_and_is_less_sure():
    unseen = prior(replace(SPEC, architecture="gpt_neox"))
    assert prior().family_seen
    assert not unseen.family_seen
    assert unseen.recipe.learning_rate < prior().recipe.learning_rate

    def spread(found):
        return found.numbers[RATE].high / found.numbers[RATE].low

    assert spread(unseen) > spread(prior())


def test_every_dimension_is_one_of_a_space_and_has_a_spread():
    found = prior(cut=True)
    assert {*found.numbers, *found.choices} == {*UNITS, *CHOICES}
    # Only a user's own space has a last phase on the student's own text.
    asked = {*found.numbers, *found.choices} - {"distillation.on_policy"}
    assert asked <= {dimension.path for dimension in load_space("default").dimensions}
    for path, one in found.numbers.items():
        assert one.low < one.value < one.high, path
    for path, one in found.choices.items():
        assert one.value in CHOICES[path]
        assert set(one.nats) == set(CHOICES[path])


def test_a_choice_other_than_the_first_has_to_be_likely():
    name = "whole distillation.alignment=even-4"
    known = load()
    for mean, expected in ((-0.005, None), (-0.05, "even-4")):
        beliefs = {**known.beliefs, name: Belief(mean=mean, sd=0.01)}
        alignment = prior(knowledge=replace(known, beliefs=beliefs)).recipe.alignment
        assert (alignment and alignment.name) == expected
