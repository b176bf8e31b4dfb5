"""A divergence is found by name, installed or registered in this process; an unknown one is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autodistill import plugins
from autodistill.errors import InputError
from autodistill.strategy.divergence import about, divergence_names, get_divergence, register_divergence
from autodistill.strategy.named import load_strategy
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.space import load_space

BUILT_IN = {"forward_kl", "jsd", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "taid"}


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    yield
    for name in plugins.registered("divergences"):
        plugins.forget("divergences", name)


def total_variation(log_p, log_q):
    return (log_p.exp() - log_q.exp()).abs().sum(dim=1) / 2


def test_what_is_installed_says_what_a_strategy_must_know() -> None:
    assert set(divergence_names()) >= BUILT_IN
    found = {name: get_divergence(name) for name in BUILT_IN}
    assert {name for name, one in found.items() if one.mixes} == BUILT_IN - {"forward_kl", "reverse_kl"}
    assert {name for name, one in found.items() if one.unbiased_when_sampled} == {"forward_kl"}
    assert {name for name, one in found.items() if one.moving_target} == {"taid"}


def test_one_of_a_session_is_named_by_a_strategy(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "init: {depth: 1.0}\ndistillation: {divergence: tvd, signal: states, signal_tokens: 0}\n"
    )
    with pytest.raises(InputError, match=r"strategy .*mine.yaml: there is no divergence 'tvd'; .* are forward_kl, jsd"):
        load_strategy(tmp_path / "mine.yaml")
    assert register_divergence("tvd", nonnegative=True)(total_variation) is total_variation
    assert load_strategy(tmp_path / "mine.yaml").distillation.divergence == "tvd"
    assert get_divergence("tvd").nonnegative
    assert not get_divergence("tvd").mixes
    with pytest.raises(InputError, match=r"as tvd does not, and it is 0\.5"):
        Distillation(divergence="tvd", mixture=0.5)
    with pytest.raises(InputError, match=r"divergence is tvd, and sampled tokens give no unbiased estimate of it"):
        Distillation(divergence="tvd", signal="sampled")


def test_a_third_argument_is_the_mixture() -> None:
    register_divergence("blend")(lambda log_p, log_q, mixture: mixture * total_variation(log_p, log_q))
    assert Distillation(divergence="blend", mixture=0.5).mixture == 0.5
    with pytest.raises(InputError, match=r"as blend does, and it is 0\.0"):
        Distillation(divergence="blend")


def test_a_space_of_an_unknown_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "deployments: [{runtime: llama.cpp, format: gguf-q4_0, bits: 4, group_size: 32}]\n"
        "dimensions: {distillation.divergence: {choices: [forward_kl, chi_squared]}}\n"
    )
    with pytest.raises(InputError, match=r"space\.yaml: there is no divergence 'chi_squared'"):
        load_space(tmp_path / "space.yaml")


def test_a_run_of_a_session_s_own_is_read_without_it() -> None:
    """The rows of the run name a divergence that nothing here declares."""
    assert Distillation.from_json({"divergence": "tvd", "mixture": 0.5}).divergence == "tvd"


@pytest.mark.parametrize("name", ["jsd", "a b", "Tvd", ""])
def test_a_name_that_is_taken_or_none_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"has a divergence 'jsd' already|is no name of a divergence"):
        register_divergence(name)(total_variation)


def test_what_is_no_divergence_is_refused() -> None:
    with pytest.raises(InputError, match="takes 1 arguments: it must take log_p and log_q"):
        register_divergence("one")(lambda log_p: log_p)
    with pytest.raises(InputError, match="for sampled tokens: let it give terms and slope"):
        register_divergence("drawn", unbiased_when_sampled=True)(total_variation)


def test_what_the_code_does_not_show_is_said_beside_it() -> None:
    register_divergence("tvd")(about(nonnegative=True)(total_variation))
    plugins.register("divergences", "plain", about(nonnegative=True)(total_variation))
    assert get_divergence("plain").nonnegative


def test_the_source_tells_two_functions_apart() -> None:
    def made(factor: float):
        return lambda log_p, log_q: factor * total_variation(log_p, log_q)

    hashes = [plugins.source_hash(one) for one in (total_variation, total_variation, made(1.0), made(2.0), made(1.0))]
    assert hashes[0] == hashes[1]
    assert hashes[2] == hashes[4]
    assert len({hashes[0], hashes[2], hashes[3]}) == 3
    space: dict = {}
    exec("def typed(log_p, log_q):\n    return (log_p - log_q).sum(1)", space)
    exec("def other(log_p, log_q):\n    return (log_q - log_p).sum(0)", space)
    assert plugins.source_hash(space["typed"]) != plugins.source_hash(space["other"])


def test_a_decorator_without_a_name_is_refused() -> None:
    with pytest.raises(InputError, match="give the divergence a name"):

        @register_divergence
        def nameless(log_p: object, log_q: object) -> object:
            return log_p
