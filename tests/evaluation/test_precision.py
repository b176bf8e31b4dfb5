"""Models scored in less than float32: what is computed, what stays unchanged, what is recorded and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.errors import InputError
from autodistill.evaluation.base import Subject
from autodistill.evaluation.evaluate import evaluate
from autodistill.evaluation.precision import check_scoring, check_scoring_on, scored_in
from autodistill.hardware.budget import Budget
from autodistill.hardware.machine import Gpu, Machine, computes_tf32
from autodistill.inference.scoring import score_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.spec import ModelSpec
from autodistill.search.campaign.observer import Observer
from autodistill.search.request.resolve import resolve
from autodistill.search.request.validate import check_request
from autodistill.search.search import search
from autodistill.search.solve.bench import Bench, load_bench
from autodistill.search.solve.library import Library, library_file
from autodistill.search.solve.options import Options
from autodistill.search.solve.shapes import shapes_file
from autodistill.search.solve.streamed import load_streamed
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher
from autodistill.utils.json_files import read_json
from tests.search.small_search import small_inputs, small_request

IN_16_BITS = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
IN_4_BITS = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
PRODUCTS = torch.backends.cuda.matmul


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = save_tiny_teacher(
        tmp_path_factory.mktemp("teacher"), layers=2, width=64, heads=2, kv_heads=1, ffn=128, seed=3
    )
    return Teacher(folder=folder, fingerprint="abc", name="tiny", license=None)


@pytest.fixture(scope="module")
def spec(teacher: Teacher) -> ModelSpec:
    return spec_from_config(read_json(teacher.folder / "config.json"))


@pytest.fixture
def model(teacher: Teacher) -> Any:
    return load_model(teacher.folder, torch.float32)


@pytest.fixture(scope="module")
def text() -> TokenSet:
    tokens = np.random.default_rng(0).integers(3, 250, (6, 48)).astype(np.int32)
    return TokenSet(tokens=tokens, documents=np.repeat(np.arange(6, dtype=np.int32)[:, None], 48, axis=1))


def test_the_body_multiplies_in_bfloat16_and_the_head_in_float32(model: Any, text: TokenSet) -> None:
    plain, _ = score_teacher(model, text)
    with scored_in(model, "bf16", "cpu"):
        found, _ = score_teacher(model, text)
    ids = torch.from_numpy(text.tokens.astype(np.int64))
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = torch.cat([model.base_model(one[None]).last_hidden_state for one in ids])
        nll = -torch.log_softmax(model.lm_head(states.float())[:, :-1], dim=-1).gather(2, ids[:, 1:, None])
    assert np.allclose(found.nll, nll.double().flatten(), atol=1e-6)
    gaps = np.abs(found.nll - plain.nll)
    assert 1e-5 < gaps.max() < 0.1
    # After the context has ended, nothing of it remains.
    assert np.array_equal(score_teacher(model, text)[0].nll, plain.nll)


def test_float32_is_what_it_was(model: Any, text: TokenSet) -> None:
    plain, _ = score_teacher(model, text)
    with scored_in(model, "float32", "cpu"):
        assert np.array_equal(score_teacher(model, text)[0].nll, plain.nll)


@pytest.mark.parametrize("deployment", [IN_16_BITS, IN_4_BITS], ids=lambda one: one.name)
def test_each_deployment_is_scored_with_its_own_weights(
    model: Any, spec: ModelSpec, text: TokenSet, deployment: Deployment
) -> None:
    """A cache of rounded weights, which autocast has, would give all others the figures of the first."""
    with scored_in(model, "bf16", "cpu"):
        _, reference = score_teacher(model, text)
    subject = Subject(spec=spec, deployment=deployment, budget=Budget(memory_bytes=10**9, context=256))
    found, scores = evaluate(model, subject, text, reference, scoring="bf16", evaluators=("accuracy", "kl"))
    plain, of_plain = evaluate(model, subject, text, reference, evaluators=("accuracy", "kl"))
    assert (found.scoring, plain.scoring) == ("bf16", "float32")
    assert 1e-5 < np.abs(scores.nll - of_plain.nll).max() < 0.1
    kl = found.measurements["kl"].value
    assert kl == pytest.approx(plain.measurements["kl"].value, rel=0.1, abs=1e-4)
    assert (kl > 1e-3) == (deployment.bits == 4)


def test_tf32_is_asked_for_in_the_body_alone(model: Any, text: TokenSet, request: pytest.FixtureRequest) -> None:
    """Pretend that a device has TF32: only the setting that torch sees during the products matters."""
    # An accelerator runs one pass after another. If passes ran in parallel, as on cores, one would see another's
    # setting.
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)
    seen: dict[str, set[bool]] = {"body": set(), "head": set()}
    model.base_model.layers[0].register_forward_hook(lambda *_: seen["body"].add(PRODUCTS.allow_tf32))
    model.lm_head.register_forward_hook(lambda *_: seen["head"].add(PRODUCTS.allow_tf32))
    with scored_in(model, "tf32", "cpu"):
        score_teacher(model, text)
        assert not PRODUCTS.allow_tf32
    assert seen == {"body": {True}, "head": {False}}

    def broken(*_: Any) -> None:
        raise ValueError("broken")

    hook = model.base_model.layers[1].register_forward_hook(broken)
    with pytest.raises(ValueError, match="broken"), scored_in(model, "tf32", "cpu"):
        score_teacher(model, text)
    hook.remove()
    assert not PRODUCTS.allow_tf32
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize(
    ("kind", "capability", "hip", "able"),
    [
        ("cuda", (8, 0), None, True),
        ("cuda", (9, 0), None, True),
        ("cuda", (7, 5), None, False),
        ("cuda", (9, 4), "6.2", False),
        ("cpu", (8, 0), None, False),
    ],
)
def test_tf32_is_of_ampere_and_later(
    kind: str, capability: tuple[int, int], hip: str | None, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert computes_tf32(kind) is able


def test_what_a_machine_lacks_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Machine(cpus=2, memory_bytes=10**9)
    new = Machine(cpus=2, memory_bytes=10**9, gpus=(Gpu(name="A100", memory_bytes=10**9),), bf16=True, tf32=True)
    for scoring in ("float32", "tf32", "bf16"):
        check_scoring(scoring, [new])
    check_scoring("float32", [old])
    with pytest.raises(InputError, match=r"^--scoring tf32: TF32 is of NVIDIA's GPUs .*; leave it out$"):
        check_scoring("tf32", [new, old])
    with pytest.raises(InputError, match=r"^--scoring bf16: what scores here only emulates bfloat16"):
        check_scoring("bf16", [new, old])
    monkeypatch.setattr("autodistill.evaluation.precision.computes_bf16", lambda kind: kind == "cuda")
    check_scoring_on("bf16", "cuda")
    with pytest.raises(InputError, match="--scoring bf16"):
        check_scoring_on("bf16", "cpu")


def _library(bench: Bench, options: Options, text: TokenSet, file: Path) -> Library:
    library = Library(file, bench, options, bench.sample("calibration", text), lambda _: None)
    library.build()
    return library


def test_the_library_in_bfloat16_is_near_that_in_float32(
    teacher: Teacher, spec: ModelSpec, text: TokenSet, tmp_path: Path
) -> None:
    options = Options(spec=spec, budget=Budget(memory_bytes=10**9, context=256))
    plain = _library(load_bench(teacher, spec, None), options, text, tmp_path / "plain.json")
    whole = _library(load_bench(teacher, spec, None, "bf16"), options, text, tmp_path / "whole.json")
    streamed = _library(load_streamed(teacher, spec, None, "bf16"), options, text, tmp_path / "streamed.json")
    gaps = []
    for name, tensor in (options.matrices | options.tables).items():
        for kind in options.kinds(tensor):
            assert streamed.score(name, kind).kl == pytest.approx(whole.score(name, kind).kl, rel=1e-4, abs=1e-9)
            if plain.score(name, kind).kl > 1e-4:
                gaps.append(whole.score(name, kind).kl / plain.score(name, kind).kl - 1)
    assert len(gaps) > 20
    assert 1e-5 < np.abs(gaps).mean() < 0.1


def test_scores_of_each_precision_have_a_file_of_their_own(spec: ModelSpec, tmp_path: Path) -> None:
    options = Options(spec=spec, budget=Budget(memory_bytes=10**9, context=256))
    precisions: Any = ("float32", "tf32", "bf16")
    files = {library_file(tmp_path, "a", "b", (1, 2, 3), options, one) for one in precisions}
    files |= {shapes_file(tmp_path, "a", "b", (1, 2, 3), one) for one in precisions}
    assert len(files) == 6


@pytest.mark.slow
def test_a_search_says_what_it_was_scored_in_and_goes_on_in_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, said = small_inputs(tmp_path), Observer()
    # Also on an old machine, which does not compute in bf16.
    monkeypatch.setattr("autodistill.hardware.machine.computes_bf16", lambda kind: True)
    asked = small_request(inputs, tmp_path / "runs", scoring="bf16")
    rows = search(asked, said).rows
    assert {row.other.get("scoring") for row in rows if row.accuracy is not None} == {"bf16"}
    assert read_json(tmp_path / "runs" / "run" / "search.json")["scoring"] == "bf16"
    assert "bf16" in (tmp_path / "runs" / "run" / "report.md").read_text()
    assert check_request(replace(asked, scoring=None, resume=True)).scoring == "bf16"
    with pytest.raises(InputError, match=r"made with another scoring \(bf16, now float32\)"):
        check_request(replace(asked, scoring="float32", resume=True))
    with pytest.raises(InputError, match=r"'run' cannot warm-start this search: it was scored in bf16, this one in fl"):
        check_request(replace(asked, scoring=None, name="other", warm_start="run"))
    stored = read_json(tmp_path / "runs" / "run" / "search.json")
    with pytest.raises(InputError, match="scoring is 'float8'; it can be float32, tf32, bf16"):
        resolve(replace(asked, scoring=None, resume=True), stored | {"scoring": "float8"})
    with pytest.raises(InputError, match="--scoring tf32: TF32 is of NVIDIA's GPUs from Ampere on"):
        search(replace(asked, scoring="tf32", name="third"), said)
