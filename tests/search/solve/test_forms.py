"""What cuts cost, and which students are found within a budget, on a tiny teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from autodistill.data.dataset import TokenSet
from autodistill.distillation.student.build import build_student
from autodistill.distillation.student.shapes import cut_spec
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.quantization.rounding import deploy_tensor
from autodistill.search.solve.bench import Bench, Sample, copying
from autodistill.search.solve.cuts import CutScores
from autodistill.search.solve.forms import Form, best_forms, cut_forms, plain_cut
from autodistill.search.solve.library import Score
from autodistill.search.solve.options import Options
from autodistill.search.solve.shapes import Shapes
from autodistill.search.solve.solver import by_block
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Init
from autodistill.utils.json_files import read_json
from tests.search.solve.scored import Setting, scored

LAYERS, FFN, CONTEXT = 4, 256, 256


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    sizes = {"layers": LAYERS, "width": 128, "heads": 2, "kv_heads": 1, "ffn": FFN}
    budget = Budget(memory_bytes=10**9, context=CONTEXT)
    return scored(tmp_path_factory.mktemp("setting"), budget, documents=48, tokens=512, **sizes)


def within(setting: Setting, limit: int) -> Options:
    return Options(spec=setting.options.spec, budget=Budget(memory_bytes=limit, context=CONTEXT))


def formed(setting: Setting, limit: int) -> list[Form]:
    return best_forms(within(setting, limit), setting.library, lambda: setting.shapes, setting.sample)


def unasked() -> Shapes:
    raise AssertionError("no cut is looked at")


def log_probabilities(model: Any, text: TokenSet) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.from_numpy(text.tokens.astype(np.int64))).logits[:, :-1]
    return torch.log_softmax(logits.double(), dim=-1)


def kl(setting: Setting, init: Init, deployment: Deployment | None = None) -> float:
    """Return the KL, over the whole vocabulary, of a student that is built from the teacher's folder."""
    student, _ = build_student(setting.teacher, init, calibration=setting.calibration)
    if deployment is not None:
        tensors = {tensor.name: tensor for tensor in spec_from_config(student.config.to_dict()).tensors}
        for name, weight in student.named_parameters():
            weight.data = deploy_tensor(weight.data, deployment.storage(tensors[name]))
    before = log_probabilities(load_model(setting.teacher, torch.float32), setting.sample.data)
    return float((before.exp() * (before - log_probabilities(student, setting.sample.data))).sum(-1).mean())


@pytest.mark.parametrize(("layer", "width"), [(0, 192), pytest.param(2, 128, marks=pytest.mark.slow)])
def test_a_narrow_ffn_costs_what_the_student_with_it_loses(setting: Setting, layer: int, width: int) -> None:
    widths = tuple(width if index == layer else FFN for index in range(LAYERS))
    setting.shapes.measure([(layer, width)])
    found = setting.shapes.ffn(layer, width)
    assert found.exact
    wanted = kl(setting, Init(depth=1.0, ffn_widths=widths, repair=True))
    assert found.kl == pytest.approx(wanted, rel=0.02, abs=1e-6)
    assert found.stderr > 0


def test_cuts_of_several_layers_are_measured_together_for_a_prediction(setting: Setting) -> None:
    """Their costs do not add up: what the first layers lose, later ones pass on."""
    init = Init(depth=1.0, ffn=0.5, repair=True)
    cut = CutScores(init, setting.options, setting.library, setting.shapes)
    whole = cut.measured_whole(setting.sample)
    wanted = kl(setting, init)
    assert whole.cost == pytest.approx(wanted, rel=0.02)
    assert abs(cut.cost - wanted) > 0.05 * wanted
    deployment = whole.options.smallest()[0]
    types = cut.predict(deployment)[0] - cut.cost
    assert whole.predict(deployment)[0] == pytest.approx(wanted + types, rel=0.02)
    assert whole.behind(deployment)[0].exact


def test_two_that_score_cuts_at_once_keep_what_both_have_scored(setting: Setting, tmp_path: Path) -> None:
    one, other = (
        Shapes(tmp_path / "shapes.json", setting.bench, setting.sample, setting.calibration) for _ in range(2)
    )
    one.measure([(0, 128)])
    other.measure([(1, 128)])
    again = Shapes(tmp_path / "shapes.json", setting.bench, setting.sample, setting.calibration)
    assert [again.ffn(layer, 128) for layer in (0, 1)] == [one.ffn(0, 128), other.ffn(1, 128)]
    assert all(again.ffn(layer, 128).exact for layer in (0, 1))


def test_gradients_tell_what_narrow_ffns_cost_and_what_costs_much_is_measured(setting: Setting, tmp_path: Path) -> None:
    def made(name: str, much: float) -> dict[tuple[int, int], Score]:
        shapes = Shapes(tmp_path / name, setting.bench, setting.sample, setting.calibration, much=much)
        shapes.build()
        return {(layer, width): shapes.ffn(layer, width) for layer in range(LAYERS) for width in shapes.scored}

    told, measured = made("told.json", np.inf), made("measured.json", 0.0)
    assert not any(one.exact for one in told.values())
    assert all(one.exact for one in measured.values())
    pairs = np.array([(told[cut].kl, measured[cut].kl) for cut in told])
    assert spearmanr(*pairs.T).statistic > 0.8
    assert 0.6 < pairs[:, 0].sum() / pairs[:, 1].sum() < 1.7
    middle = float(np.median(pairs[:, 0]))
    assert {cut for cut, one in made("some.json", middle).items() if one.exact} == {
        cut for cut, one in told.items() if one.kl > middle
    }


def test_other_widths_are_told_to_follow_from_those(setting: Setting) -> None:
    assert setting.shapes.widths == (256, 192, 128, 64)
    for layer in range(LAYERS):
        costs = [setting.shapes.ffn(layer, width) for width in setting.shapes.widths]
        assert [one.kl for one in costs] == sorted(one.kl for one in costs)
        assert (costs[0].exact, costs[-1].exact) == (True, False)
        first, last, other = (one.kl for one in costs[1:])
        # The interpolation is a straight line through both in logarithms.
        slope = np.clip(np.log(last / first) / np.log(2), 1, 4)
        assert other == pytest.approx(last * 1.5**slope)


@pytest.mark.parametrize("count", [1, 2])
def test_a_block_of_layers_costs_what_the_student_without_it_loses(setting: Setting, count: int) -> None:
    spans = setting.shapes.spans(count)
    assert [cost.kl for _, cost in spans] == sorted(cost.kl for _, cost in spans)
    assert {first for first, _ in spans} == set(range(1, LAYERS - count))
    for first, cost in spans:
        assert cost.kl == pytest.approx(kl(setting, Init(depth=1.0, dropped=(first, count))), rel=0.02)


def test_below_the_smallest_types_the_shape_gives_way(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodistill.search.solve.forms._HOPELESS", math.inf)
    limit = setting.options.smallest()[1].total_bytes - 60_000
    found = formed(setting, limit)
    assert {one.family for one in found} == {"narrow", "shallow"}
    assert [one.joint.kl for one in found] == sorted(one.joint.kl for one in found)
    for one in found:
        assert one.bytes <= limit
        # The trained and exported student is built from the teacher's folder. The cache is simulated separately.
        plain = Deployment.from_json(
            {name: value for name, value in one.deployment.to_json().items() if "cache_type" not in name}
        )
        student, _ = build_student(setting.teacher, one.init, calibration=setting.calibration)
        spec = spec_from_config(student.config.to_dict())
        options = Options(spec=spec, budget=setting.options.budget)
        assert options.memory(one.deployment).total_bytes == one.bytes
        measured = Bench(student, spec, {}, cut=True).measure(plain, setting.sample)
        assert measured.kl == pytest.approx(kl(setting, one.init, plain), rel=0.02)
        assert setting.shapes.joint(one.init, plain, setting.sample).kl == pytest.approx(measured.kl, rel=1e-5)
        assert one.found.predicted[0] == pytest.approx(one.joint.kl, rel=0.6)


def test_where_the_whole_teacher_fits_and_loses_little_no_cut_is_looked_at(setting: Setting) -> None:
    (found,) = best_forms(setting.options, setting.library, unasked, setting.sample)
    assert (found.family, found.init) == ("whole", Init(depth=1.0))
    assert found.joint.kl < 0.1


def test_cuts_are_looked_at_beside_a_teacher_that_loses_little_where_that_takes_little(setting: Setting) -> None:
    whole = best_forms(setting.options, setting.library, lambda: setting.shapes, setting.sample)
    loses = whole[0].joint.kl
    beside = best_forms(setting.options, setting.library, lambda: setting.shapes, setting.sample, tight=loses / 2)
    assert [one.family for one in whole] == ["whole"]
    assert {one.family for one in beside} > {"whole"}


def test_the_costs_of_blocks_and_cuts_add_up_to_what_is_predicted(setting: Setting) -> None:
    options = within(setting, setting.options.smallest()[1].total_bytes + 100_000)
    found = cut_forms(options, setting.library, setting.shapes, setting.sample)
    assert {one.family for one in found} == {"narrow", "shallow"}
    for one in found:
        assert isinstance(one.scores, CutScores)
        blocks = by_block(one.options, one.scores, one.deployment)
        layers = {str(layer) for layer in range(one.options.spec.layers)}
        assert blocks.keys() == {*layers, "embeddings", "cache"}
        assert one.scores.cuts.keys() == layers | ({"layers left out"} if one.init.dropped else set())
        predicted, _ = one.scores.predict(one.deployment)
        assert sum([*blocks.values(), *one.scores.cuts.values()]) == pytest.approx(predicted)


def test_a_family_alone_is_as_among_all(setting: Setting) -> None:
    limit = setting.options.smallest()[1].total_bytes + 100_000
    options = within(setting, limit)
    every = cut_forms(options, setting.library, setting.shapes, setting.sample)
    assert {one.family for one in every} == {"narrow", "shallow"}
    (alone,) = cut_forms(options, setting.library, setting.shapes, setting.sample, families=("narrow",))
    assert (alone.init, alone.deployment) in {(one.init, one.deployment) for one in every}


def test_a_family_whose_scores_are_far_behind_another_is_measured_only_where_there_is_time(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = within(setting, setting.options.smallest()[1].total_bytes + 100_000)
    monkeypatch.setattr("autodistill.search.solve.forms._HOPELESS", 0.01)
    found = {
        thorough: [
            one.family for one in cut_forms(options, setting.library, setting.shapes, setting.sample, thorough=thorough)
        ]
        for thorough in (True, False)
    }
    assert sorted(found[True]) == ["narrow", "shallow"]
    assert found[False] == ["narrow"]


def test_nothing_fits_nothing(setting: Setting) -> None:
    assert formed(setting, 10**6) == []


def test_what_is_in_the_file_is_not_measured_again(setting: Setting, tmp_path: Path) -> None:
    told: list[str] = []

    def notify(line: str) -> None:
        told.append(line)
        if len(told) == 4:
            raise KeyboardInterrupt

    def made() -> Shapes:
        return Shapes(tmp_path / "shapes.json", setting.bench, setting.sample, setting.calibration, notify, much=0.0)

    with pytest.raises(KeyboardInterrupt):
        made().build()
    told.clear()
    held = read_json(tmp_path / "shapes.json")
    assert set(held["ffn"]) == {"0=192", "0=128"}
    assert len(held["gradients"]) == 2 * LAYERS
    setting.shapes.measure([(0, 128)])
    assert held["ffn"]["0=128"]["kl"] == setting.shapes.ffn(0, 128).kl
    with pytest.raises(KeyboardInterrupt):
        made().build()
    again = {f"{layer}={width}" for layer in range(3) for width in (192, 128)}
    assert set(read_json(tmp_path / "shapes.json")["ffn"]) == again
    (tmp_path / "shapes.json").write_text("{")
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        made().build()


class Copier:
    """Scores in which a student with a 4-bit cache copies nothing; all other scores come from a library."""

    def __init__(self, library: Any, probe: Sample) -> None:
        self._library, self._probe, self.asked = library, probe, list[Deployment]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def joint(self, deployment: Deployment, sample: Sample) -> Any:
        if sample is not self._probe:
            return self._library.joint(deployment, sample)
        self.asked.append(deployment)
        return replace(self._probe.teacher, accuracy=0.1 if "q4_0" in deployment.cache_types else 0.9)


def test_a_cache_with_which_nothing_is_copied_gives_way(setting: Setting) -> None:
    wide = setting.options.smallest_types() | dict.fromkeys(setting.options.tables, "q8_0")
    limit = setting.options.memory(setting.options.deployment(wide, ("q8_0", "q8_0"))).total_bytes
    forced = replace(within(setting, limit), cache_type=None)
    probe = copying(setting.bench, setting.sample.data, 64)
    assert probe.data.predicted == 32
    assert (probe.data.tokens[0, :32] == probe.data.tokens[0, 32:]).all()
    able = replace(probe, teacher=replace(probe.teacher, accuracy=0.9))
    library = Copier(setting.library, able)
    found = best_forms(forced, library, lambda: setting.shapes, setting.sample, probe=able)  # type: ignore[arg-type]
    assert found
    whole = [one for one in found if one.family == "whole"]
    assert all("q4_0" not in one.deployment.cache_types for one in whole)
    # A teacher that copies nothing vetoes nothing.
    unable = replace(probe, teacher=replace(probe.teacher, accuracy=0.0))
    blind = Copier(setting.library, unable)
    assert best_forms(forced, blind, lambda: setting.shapes, setting.sample, probe=unable)  # type: ignore[arg-type]
    assert not blind.asked


def restricted(setting: Setting, limit: int, dimensions: dict[str, Any], *deployments: Any) -> list[Form]:
    space = Space(dimensions, deployments=deployments or None, solved=True)
    options = replace(within(setting, limit), limits=space.restriction)
    return best_forms(options, setting.library, lambda: setting.shapes, setting.sample)


def test_a_space_narrows_the_types_and_fixes_them(setting: Setting) -> None:
    limit = setting.options.smallest()[1].total_bytes + 100_000
    four = restricted(setting, limit, {"finishing.bits": {"choices": [4, 5]}})
    names = setting.options.matrices
    assert four
    for one in four:
        kinds = {kind for name, kind in one.options.types(one.deployment).items() if name in names}
        assert kinds <= {"q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "iq4_nl", "mxfp4"}
    fixed = {"runtime": "llama.cpp", "format": "gguf-q4_0", "bits": 4, "group_size": 32, "cache_type_k": "q8_0"}
    found = restricted(setting, limit, {"init.depth": {"choices": [1.0]}}, fixed)
    assert {one.deployment.name for one in found} == {Deployment.from_json(fixed).name}
    assert all(one.bytes <= limit for one in found)


def test_a_space_narrows_the_shapes(setting: Setting) -> None:
    limit = setting.options.smallest()[1].total_bytes - 20_000
    assert {one.family for one in restricted(setting, limit, {"init.ffn": {"choices": [1.0]}})} == {"shallow"}
    narrow = restricted(setting, limit, {"init.depth": {"choices": [1.0]}, "init.ffn": {"low": 0.5, "high": 0.75}})
    assert {one.family for one in narrow} <= {"narrow", "layered"}
    assert all(128 <= width <= 192 for one in narrow for width in one.options.spec.ffn_by_layer)
    (both, *_) = restricted(setting, limit, {"init.depth": {"choices": [0.75]}, "init.ffn": {"choices": [0.5]}})
    assert (both.options.spec.layers, both.options.spec.ffn_width) == (LAYERS - 1, 128)


def test_shapes_that_a_space_names_are_measured_as_they_are(setting: Setting) -> None:
    shallow = {"depth": 0.5, "layers": "contiguous"}
    named = {"init": {"choices": {"shallow": shallow, "narrow": {"depth": 1.0, "ffn": 0.5}}}}
    found = restricted(setting, 10**9, named)
    assert {one.init for one in found} == {Init(depth=0.5, layers="contiguous"), Init(depth=1.0, ffn=0.5)}
    assert [one.family for one in found] == ["named", "named"]
    for one in found:
        assert one.joint.kl == pytest.approx(kl(setting, one.init, one.deployment), rel=0.05)


def test_a_plain_cut_is_the_widest_that_fits_in_enough_bits(setting: Setting) -> None:
    options = setting.options
    q4 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
    halved = replace(options, spec=cut_spec(Init(depth=1.0, ffn=0.5), options.spec))
    limit = halved.memory(q4).total_bytes
    form = plain_cut(within(setting, limit), setting.library, lambda: setting.shapes, setting.sample, 4)
    assert form is not None
    assert form.init.repair
    assert 0.5 <= form.init.ffn < 1
    types = within(setting, limit).types(form.deployment)
    assert all(options.held[kind].bits >= 4 for kind in types.values())  # type: ignore[union-attr]
    assert form.bytes <= limit
    assert form.joint.kl == pytest.approx(kl(setting, form.init, form.deployment), rel=0.02)
    wider = replace(within(setting, limit), spec=cut_spec(Init(depth=1.0, ffn=form.init.ffn + 64 / FFN), options.spec))
    least = replace(q4, types=(("embeddings", "q4_0"),), cache_type_k="q8_0", cache_type_v="q8_0")
    assert not wider.fits(least)


def test_nothing_is_cut_where_not_even_the_narrowest_fits_in_enough_bits(setting: Setting) -> None:
    little = within(setting, 10**6)
    assert plain_cut(little, setting.library, lambda: setting.shapes, setting.sample, 4) is None
    uncut = replace(setting.options, cuts=False)
    assert plain_cut(uncut, setting.library, unasked, setting.sample, 2) is None


def test_a_space_that_names_its_shapes_gets_no_other_plain_cut(setting: Setting) -> None:
    named = {"init": {"choices": {"shallow": {"depth": 0.5, "layers": "contiguous"}}}}
    options = replace(setting.options, limits=Space(named, solved=True).restriction)
    assert plain_cut(setting.options, setting.library, lambda: setting.shapes, setting.sample, 4) is not None
    assert plain_cut(options, setting.library, unasked, setting.sample, 4) is None


def test_a_faster_shape_is_preferred_where_it_is_hardly_worse(setting: Setting) -> None:
    options = within(setting, setting.options.smallest()[1].total_bytes + 100_000)
    given = (options, setting.library, setting.shapes, setting.sample)
    (best,), (fast,) = (cut_forms(*given, families=("narrow",), level=level) for level in (0.0, math.inf))
    assert best.joint.kl <= fast.joint.kl
    assert fast.options.spec.parameters <= best.options.spec.parameters
