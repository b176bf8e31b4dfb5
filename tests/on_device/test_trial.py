"""A trial, and everything that reads a model, on a device that is not the CPU: reports are the same as on the CPU."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import cut_student
from autodistill.distillation.student.check import probe_deployment
from autodistill.distillation.teacher.build_cache import ensure_cache, writing_rate
from autodistill.distillation.teacher.importance import measure_importance
from autodistill.distillation.teacher.output_cache import CacheSettings, TeacherCache
from autodistill.evaluation.base import Subject
from autodistill.evaluation.evaluate import deployed_weights, evaluate
from autodistill.hardware.budget import Budget
from autodistill.inference import batching as parallel
from autodistill.inference.generation import Sampling, write
from autodistill.inference.half_precision import load_held
from autodistill.inference.likelihood import continuations, rolling
from autodistill.inference.scoring import choices, score, score_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.search.planning.placement import Workers
from autodistill.search.setup import throughput as pace
from autodistill.search.setup.throughput import measure_speed
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.trial import Trial
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Alignment, Attention, Distillation
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.testing import save_tiny_teacher, tiny_text

LENGTH = 32
F16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
Q8 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
Q4 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
INT4 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=32)
ALL = (F16, Q8, Q4, INT4)
RECIPE = Distillation(
    divergence_weight=0.5, learning_rate=1e-3, alignment=Alignment(projection="linear", layers="last", weight=0.1)
)
STRATEGY = Strategy(
    init=Init(depth=0.5),
    distillation=RECIPE,
    finishing=Finishing(format="gguf-q4_0", bits=4, group_size=32, scales="learned"),
)


@pytest.fixture(autouse=True)
def same_attention():
    """The device has no fused attention, so the CPU computes attention in the same steps."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trials")


@pytest.fixture(scope="module")
def teacher(folder):
    return save_tiny_teacher(folder / "teacher")


@pytest.fixture(scope="module")
def shallow(folder):
    """A teacher with a third of the layers: each operation of the device is a Python call, and more show no more."""
    return save_tiny_teacher(folder / "shallow", layers=2)


@pytest.fixture(scope="module")
def data(folder, teacher):
    return prepare(resolve_data(str(tiny_text(folder / "text"))), teacher, "tokenizer", LENGTH, folder)


@pytest.fixture(scope="module")
def validation(data):
    return load_split(data.folder, "validation").head(4 * LENGTH)


def _spec(teacher):
    return spec_from_config(json.loads((teacher / "config.json").read_text()))


def _setting(workshop, teacher, data, folder, device, **changes):
    """Return the setting of trials on a device, made on that device."""
    folder.mkdir()
    cache = ensure_cache(
        lambda: load_model(teacher, torch.float32),
        teacher_fingerprint="t",
        data_fingerprint=data.fingerprint,
        data=load_split(data.folder, "train").head(256),
        vocabulary=300,
        width=64,
        settings=CacheSettings(top_k=64, states=(2, 3, 4, 5)),
        root=folder / "cache",
        limit_bytes=10**8,
        device=device,
    )
    held_out = load_split(data.folder, "validation").head(128)
    _, reference = score_teacher(load_model(teacher, torch.float32, device), held_out, device=device)
    reference.save(folder / "reference.npz")
    return TrialSetting(
        teacher=teacher,
        teacher_spec=_spec(teacher),
        teacher_reference=folder / "reference.npz",
        teacher_accuracy=0.5,
        data=data.folder,
        cache=cache,
        checkpoints=folder / "checkpoints",
        budget=Budget(memory_bytes=10**9, context=128),
        plan=workshop.plan(
            **{"tokens": 256, "rungs": (128, 256), "keep": (1,), "eval_tokens": 128, "rung_eval_tokens": 64, **changes}
        ),
        evaluators=("accuracy", "perplexity", "agreement", "kl", "calibration", "memory", "size"),
        metric="accuracy",
        direction="max",
        device=device,
    )


def _figures(report):
    return {name: found.value for name, found in report.evaluation.measurements.items()}


def _run(setting, strategy):
    """Return reports of a trial's rungs, each by a separate worker, and of its student under another deployment."""
    task = TrialTask(
        id="t000", strategy=strategy, seed=0, deployments=ALL, probe=probe_deployment(strategy, ALL), straight=False
    )
    reports = [Trial(Workbench(setting), task).run(rung) for rung in range(2)]
    return [*reports, Trial(Workbench(setting), task).evaluate(INT4)]


ATTENTIVE = replace(STRATEGY, finishing=None, distillation=replace(RECIPE, attention=Attention(kind="maps")))


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        (STRATEGY, {}),
        pytest.param(ATTENTIVE, {"micro_batch": 1, "checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(replace(STRATEGY, finishing=None), {"optimizer_state": "bfloat16"}, marks=pytest.mark.slow),
        # bitsandbytes is slow on a CPU.
        pytest.param(replace(STRATEGY, finishing=None), {"optimizer_state": "int8"}, marks=pytest.mark.slow),
    ],
    ids=["learned scales", "checkpointing", "16-bit states", "8-bit states"],
)
@pytest.mark.usefixtures("generators")
def test_a_trial_reports_what_it_does_on_the_cpu(workshop, teacher, data, tmp_path, device, strategy, changes):
    here, there = (
        _run(_setting(workshop, teacher, data, tmp_path / kind, kind, **changes), strategy) for kind in ("cpu", device)
    )
    for ours, theirs in zip(here, there, strict=True):
        assert _figures(theirs) == pytest.approx(_figures(ours), rel=2e-3, abs=2e-3)
        assert (theirs.trained, theirs.shared, theirs.unsaved) == (ours.trained, ours.shared, ours.unsaved)
        for step, other in zip(theirs.steps, ours.steps, strict=True):
            assert step.loss == pytest.approx(other.loss, rel=1e-3)


def test_it_trains_in_bfloat16(workshop, teacher, data, tmp_path, device):
    reports = _run(
        _setting(workshop, teacher, data, tmp_path / "made", device, bf16=True, checkpointing=True), STRATEGY
    )
    losses = [step.loss for report in reports for step in report.steps]
    assert np.isfinite(losses).all()


def _waits(workshop, device, traffic, strategy, **changes):
    """Return the lines of the package that waited for the device in the second step, and how often."""
    trainer = workshop.trainer(strategy, device=device, tokens=64 * 8, **changes)
    steps = trainer.train_stable(64 * 3)
    next(steps)
    traffic.waits.clear()
    next(steps)
    return _own(traffic)


def _own(traffic):
    """Leave out transformers' check for packed sequences, which it makes before the first layer of each pass."""
    return {line: count for line, count in traffic.waits.items() if line != "transformers"}


def test_a_step_waits_for_the_device_twice(workshop, device, traffic):
    plain = replace(STRATEGY, finishing=None)
    for changes in ({}, {"micro_batch": 1}):
        waits = _waits(workshop, device, traffic, plain, **changes)
        # One wait for its losses, and one for the norm of its gradients.
        assert sum(waits.values()) == 2, waits


@pytest.mark.parametrize("deployment", [Q4, INT4, pytest.param(Q8, marks=pytest.mark.slow)], ids=lambda one: one.name)
def test_a_grid_adds_no_waiting(workshop, device, traffic, deployment):
    spec = _spec(workshop.teacher)
    trainer = workshop.trainer(replace(STRATEGY, finishing=None), device=device, tokens=64 * 8)
    grids = {tensor.name: deployment.storage(tensor) for tensor in spec.tensors if len(tensor.shape) == 2}
    steps = trainer.train_decay(64 * 3, grids.get)
    next(steps)
    traffic.waits.clear()
    next(steps)
    assert sum(_own(traffic).values()) == 2, traffic.waits


def test_the_cache_is_the_cpus(teacher, data, tmp_path, device):
    tokens = load_split(data.folder, "train").head(128)
    settings = CacheSettings(top_k=16, draws=(12,), final=True, states=(1, 5))
    found = []
    for kind in ("cpu", device):
        folder = ensure_cache(
            lambda: load_model(teacher, torch.float32),
            teacher_fingerprint=kind,
            data_fingerprint=data.fingerprint,
            data=tokens,
            vocabulary=300,
            width=64,
            settings=settings,
            root=tmp_path,
            limit_bytes=10**8,
            device=kind,
        )
        cache = TeacherCache(folder)
        top, drawn = cache.top([0, 2], 2.0, 16), cache.sampled([0, 2], 1.0, 12)
        states = [cache.state([1], 5), cache.state_size([1], 1), cache.final([3])]
        found.append([top.ids, top.log_p, drawn.ids, drawn.weights, *states])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=2e-3, atol=2e-3)


def test_scores_and_choices_are_the_cpus(teacher, validation, device):
    models = [load_model(teacher, torch.float32, kind) for kind in ("cpu", device)]
    (ours, reference), (theirs, other) = (
        score_teacher(model, validation, device=kind) for model, kind in zip(models, ("cpu", device), strict=True)
    )
    np.testing.assert_allclose(theirs.nll, ours.nll, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(other.top1, reference.top1)
    scores, _ = score(models[1], validation, reference, device=device)
    np.testing.assert_allclose(scores.divergence, 0, atol=1e-5)
    chosen = (choices(model, validation, device=kind) for model, kind in zip(models, ("cpu", device), strict=True))
    for one, two in zip(*chosen, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("bf16", "keys"), [(False, 4), (True, 2)])
def test_heads_are_equal_where_float32_asks_for_it(teacher, device, monkeypatch, bf16, keys):
    seen = []

    def attend(query, key, value, **options):
        seen.append((query.shape[1], key.shape[1], value.shape[1]))
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    model = load_model(teacher, torch.float32, device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        model.base_model(input_ids=torch.ones(1, 8, dtype=torch.int64, device=device), use_cache=False)
    assert set(seen) == {(4, keys, keys)}


def test_a_calibration_is_the_cpus(teacher, validation, device):
    ours, theirs = (
        measure_importance(load_model(teacher, torch.float32), validation, kind) for kind in ("cpu", device)
    )
    for name in ("similarity", "neurons", "groups", "channels"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-4, atol=1e-5)


def test_likelihoods_are_the_cpus(teacher, device):
    pairs = [([5, 9, 20], [7, 8]), ([5, 9, 20], [4]), ([30], [41, 42, 43])]
    texts = [list(range(3, 60)), [9, 8, 7]]
    found = []
    for kind in ("cpu", device):
        model = load_model(teacher, torch.float32, kind)
        found.append(
            (
                [one.log_likelihood for one in continuations(model, pairs, device=kind)],
                np.concatenate(rolling(model, texts, window=16, stride=8, device=kind)),
            )
        )
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-4)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9, seed=3)], ids=["greedy", "drawn"]
)
def test_what_is_written_is_the_cpus(shallow, device, sampling):
    prompts = [[5, 9, 200], [7], list(range(40, 60))]
    ours, theirs = (
        dict(
            write(
                load_model(shallow, torch.float32, kind),
                prompts,
                stops=(1, 30),
                max_tokens=8,
                sampling=sampling,
                device=kind,
            )
        )
        for kind in ("cpu", device)
    )
    assert theirs == ours


@pytest.mark.parametrize(
    ("deployment", "held"),
    [
        (Q8, "float32"),
        (INT4, "bfloat16"),
        *(
            pytest.param(deployment, held, marks=pytest.mark.slow)
            for deployment, held in ((F16, "float32"), (Q4, "float32"), (INT4, "float32"), (Q4, "bfloat16"))
        ),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_a_packed_teacher_is_evaluated_as_on_the_cpu(teacher, validation, device, deployment, held):
    spec, found = _spec(teacher), []
    for kind in ("cpu", device):
        model = load_held(teacher, held, kind)
        before = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
        evaluation, _ = evaluate(
            model,
            Subject(spec=spec, deployment=deployment, budget=Budget(memory_bytes=10**9, context=128)),
            validation,
            None,
            evaluators=("accuracy", "perplexity", "calibration"),
            device=kind,
        )
        found.append({name: one.value for name, one in evaluation.measurements.items()})
        with deployed_weights(model, spec, deployment):
            assert {parameter.device.type for parameter in model.parameters()} == {kind}
        for name, parameter in model.named_parameters():
            assert parameter.device.type == kind
            assert torch.equal(parameter.detach().cpu(), before[name])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def _half(model):
    return cut_student(model, Init(depth=0.5), None)[0]


def _measure(teacher, device, largest=_half, **more):
    return measure_speed(
        load_model(teacher, torch.float32),
        _spec(teacher),
        largest,
        Workers(count=1, threads=1, bf16=True, device=device),
        1,
        device=device,
        sequence_length=LENGTH,
        checkpointing=True,
        **more,
    )


def test_a_device_holds_the_teacher_or_the_student_when_it_is_measured(shallow, device, monkeypatch):
    models, together, gradients = [], [], []
    forward = torch.nn.Embedding.forward

    def cut(model):
        models.extend([model, _half(model)])
        return models[1]

    def watched(module, ids):
        lying = [{weight.device.type for weight in model.parameters()} for model in models]
        together.append((lying, torch.is_grad_enabled()))
        if torch.is_grad_enabled():
            gradients.extend(weight.grad for weight in models[1].parameters())
        return forward(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", watched)
    _measure(shallow, device, cut, sizes=(1, 2))
    assert ([{"cpu"}, {device}], True) in together
    assert {tuple(map(frozenset, lying)) for lying, _ in together if lying} == {
        (frozenset({"cpu"}), frozenset({device}))
    }
    # No gradient of a step is left for the next one.
    assert set(gradients) == {None}


def test_steps_of_more_sequences_are_timed_as_far_as_memory_holds_them(shallow, device, monkeypatch):
    monkeypatch.setattr(pace, "WORTH", 0.0)
    forward, sizes = torch.nn.Embedding.forward, []

    def holding(module, ids):
        if torch.is_grad_enabled():
            sizes.append(len(ids))
            if len(ids) > 3:
                raise torch.OutOfMemoryError("out of memory")
        return forward(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", holding)
    speed, rates = _measure(shallow, device, sizes=(1, 2, 4, 8))
    assert list(rates) == [1, 2]
    assert set(sizes) == {1, 2, 4}
    assert min(speed.cache, speed.score, speed.worker_train, speed.worker_score, *rates.values()) > 0


@contextmanager
def _passes(model, holds=10**9):
    """Record the number of sequences in each pass of a model's body. With more than `holds`, memory runs out."""
    sizes = []

    def see(module, arguments, given):
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > holds:
            raise torch.OutOfMemoryError("out of memory")

    handle = model.base_model.register_forward_pre_hook(see, with_kwargs=True)
    yield sizes
    handle.remove()


def _cached(teacher, model, data, root, device):
    """Return the bytes of each column of the cache for all sequences, as arrays of numbers."""
    folder = ensure_cache(
        lambda: model,
        teacher_fingerprint="t",
        data_fingerprint="d",
        data=data,
        vocabulary=300,
        width=64,
        settings=CacheSettings(top_k=16, draws=(12,), final=True, states=(0, 1)),
        root=root,
        limit_bytes=10**8,
        device=device,
    )
    cache, every = TeacherCache(folder), range(len(data.tokens))
    assert cache.sequences == len(data.tokens)
    top, drawn = cache.top(every, 2.0, 16), cache.sampled(every, 1.0, 12)
    sparse = [top.ids, top.log_p, drawn.ids, drawn.weights]
    return [*sparse, cache.final(every).float(), cache.state(every, 1).float(), cache.state_size(every, 0)]


def test_a_batched_cache_is_the_unbatched_one(shallow, data, tmp_path, device, monkeypatch):
    tokens, found, model = load_split(data.folder, "train").head(13 * LENGTH), [], load_model(shallow, torch.float32)
    # The logits of two sequences are processed at once.
    monkeypatch.setattr(parallel, "_LOGITS_BYTES", 4 * 300 * 2 * LENGTH)
    cases = {"alone": (LENGTH, 99, 13 * [1]), "batched": (5 * LENGTH, 99, [5, 5, 3]), "short": (99 * LENGTH, 4, None)}
    for name, (most, holds, expected) in cases.items():
        monkeypatch.setattr(parallel, "PASS_TOKENS", most)
        with _passes(model, holds) as sizes:
            found.append(_cached(shallow, model, tokens, tmp_path / name, device))
        assert sizes == (expected or [13, 6, 3, 3, 3, 3, 1]), name
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            # The resolution of float16, in which states are kept.
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def test_the_writing_of_a_cache_is_timed_and_leaves_nothing(teacher, data, tmp_path, device):
    some = load_split(data.folder, "train").head(8 * LENGTH)
    rate = writing_rate(load_model(teacher, torch.float32), some, CacheSettings(top_k=4), tmp_path / "root", device)
    assert 0 < rate < math.inf
    assert not list((tmp_path / "root").iterdir())


def test_batched_scores_are_those_of_one_sequence_at_a_time(shallow, data, device, monkeypatch):
    held_out = load_split(data.folder, "validation").head(7 * LENGTH)
    marked = np.random.default_rng(0).random(held_out.tokens.shape) < 0.4
    marked[2] = False
    model = load_model(shallow, torch.float32, device)
    monkeypatch.setattr(parallel, "_LOGITS_BYTES", 4 * 300 * 40)
    for tokens in (held_out, replace(held_out, answers=marked)):
        found = []
        for most, holds, expected in (
            (LENGTH, 9, 7 * [1]),
            (3 * LENGTH, 9, [3, 3, 1]),
            (10**6, 2, [7, 3, 1] + 6 * [1]),
        ):
            monkeypatch.setattr(parallel, "PASS_TOKENS", most)
            with _passes(model, holds) as sizes:
                scores, reference = score_teacher(model, tokens, device=device)
            assert sizes == expected
            found.append((scores.nll, scores.confidence, reference.top1, np.sort(reference.log_probs, axis=1)))
            np.testing.assert_allclose(score(model, tokens, reference, device=device)[0].divergence, 0, atol=1e-5)
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                np.testing.assert_allclose(two, one, rtol=0, atol=1e-4)


def test_batched_windows_and_continuations_are_those_of_one_at_a_time(shallow, device, monkeypatch):
    dice = np.random.default_rng(3)
    texts = [dice.integers(3, 300, size).tolist() for size in (90, 1, 7, 2, 33)]
    pairs = [(dice.integers(3, 300, 5).tolist(), dice.integers(3, 300, size).tolist()) for size in (1, 4, 2, 6, 3, 1)]
    model = load_model(shallow, torch.float32, device)
    monkeypatch.setattr(parallel, "_LOGITS_BYTES", 4 * 300 * 10)
    found, counts = [], []
    for most in (1, 10**6):
        monkeypatch.setattr(parallel, "PASS_TOKENS", most)
        with _passes(model) as sizes:
            nll = np.concatenate(rolling(model, texts, window=16, stride=8, device=device))
            asked = [one.log_likelihood for one in continuations(model, pairs, device=device)]
        found.append((nll, asked))
        counts.append(len(sizes))
    # Seventeen windows. Each prompt has one pass, and what follows it has another unless it is a single token.
    assert counts == [17 + 6 + 4, 3]
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-4)


def test_what_is_written_at_once_is_what_is_written_alone(shallow, device):
    dice = np.random.default_rng(4)
    prompts = [dice.integers(3, 300, size).tolist() for size in (3, 9, 1, 4, 6)]
    model, found, firsts = load_model(shallow, torch.float32, device), [], []
    for batch, holds in ((1, 9), (None, 9), (None, 2)):
        with _passes(model, holds) as sizes:
            found.append(dict(write(model, prompts, stops=(1,), max_tokens=4, batch=batch, device=device)))
        firsts.append((sizes[0], max(size for size in sizes if size <= holds)))
    assert found[1] == found[2] == found[0]
    assert firsts == [(1, 1), (5, 5), (5, 2)]
