"""A trial from rung to rung on a tiny teacher: what it reports, leaves on disk and restores, and how it fails."""

import gc
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodistill import plugins
from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import build_student, save_student
from autodistill.distillation.student.check import check_strategy, probe_deployment, student_spec, with_own
from autodistill.distillation.student.pretrained import pretrained_spec
from autodistill.distillation.teacher import target_sources
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.output_cache import CacheSettings
from autodistill.distillation.training.fsdp import Sharding
from autodistill.distillation.training.learning_rate import branch_point, end_of
from autodistill.distillation.training.straight_through import fake_quantize_learned
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import DamagedError, InputError, TrialFailedError
from autodistill.estimates.fit import holdable
from autodistill.evaluation import evaluate as evaluation_module
from autodistill.evaluation.base import Subject
from autodistill.evaluation.evaluate import deployed_weights, evaluate
from autodistill.evaluation.statistics import per_document
from autodistill.export.verify import verify
from autodistill.hardware.budget import Budget
from autodistill.inference.half_precision import load_held
from autodistill.inference.outputs import Answers, TeacherReference
from autodistill.inference.scoring import score, score_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.plugins import load
from autodistill.quantization.formats import get_format
from autodistill.quantization.grids import Grid
from autodistill.quantization.learned_scales import read_scales
from autodistill.quantization.packing import deployed
from autodistill.runs.checkpoints import open_stages
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import Row
from autodistill.runs.students import student_folder, trained_student
from autodistill.search.worker import trial as trial_module
from autodistill.search.worker.attempt import Assignment, work
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.search.worker.trial import Trial
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.named import load_strategy
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Lora
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.testing import save_tiny_teacher
from autodistill.utils.clock import Moment
from autodistill.utils.storage import Storage
from tests import process_group
from tests.crash.kernel import why_not
from tests.utils.test_durable import lost

LENGTH = 32
F16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
Q8 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
Q4 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
INT4 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=32)
INT4_64 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=64)
BF16 = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
ALL = (F16, Q8, Q4, INT4, INT4_64, BF16)
RECIPE = Distillation(
    divergence_weight=0.5, learning_rate=1e-3, alignment=Alignment(projection="linear", layers="last", weight=0.1)
)
STRATEGY = Strategy(
    init=Init(depth=0.5), distillation=RECIPE, finishing=Finishing(format="gguf-q4_0", bits=4, group_size=32)
)


def _task(strategy=STRATEGY, **changes):
    task = TrialTask(
        id="t000",
        strategy=strategy,
        seed=0,
        deployments=ALL,
        probe=probe_deployment(strategy, ALL),
        straight=False,
    )
    return replace(task, **changes)


def _facts(report):
    """Return everything that a report says except times."""
    steps = [replace(step, tokens_per_second=0.0) for step in report.steps]
    return report.rung, report.tokens, report.params, report.evaluation, steps


def _kept(folder, stage):
    """Return the tokens of a stage's checkpoints."""
    return [checkpoint.tokens for checkpoint in open_stages(folder).checkpoints(stage)]


def test_probe_is_the_finishing_grid_or_else_the_widest():
    plain = replace(STRATEGY, finishing=None)
    assert probe_deployment(STRATEGY, (Q4, INT4, INT4_64)) == probe_deployment(STRATEGY, (INT4_64, INT4, Q4)) == Q4
    assert probe_deployment(STRATEGY, ALL) == Q4
    assert probe_deployment(plain, ALL).bits > Q4.bits
    assert probe_deployment(STRATEGY, (Q8, INT4)) == Q8
    assert probe_deployment(plain, (INT4_64, Q4, Q8)) == Q8
    assert probe_deployment(plain, (INT4_64, INT4)) == INT4
    assert probe_deployment(plain, ALL) == probe_deployment(plain, ALL[::-1])
    grouped = replace(STRATEGY, finishing=Finishing(format="compressed-tensors", bits=4, group_size=64))
    assert probe_deployment(grouped, (Q4, INT4, INT4_64)) == INT4_64


def test_what_a_teacher_cannot_be_distilled_by_is_refused_before_loading(lab):
    spec = lab.setting(Path()).teacher_spec

    def strategy(**changes):
        return replace(STRATEGY, distillation=replace(RECIPE, **changes))

    check_strategy(STRATEGY, spec)
    with pytest.raises(InputError, match=r"alignment.count is 4, but the student has 3 layers"):
        check_strategy(strategy(alignment=Alignment(layers="even", count=4)), spec)
    with pytest.raises(InputError, match=r"attention.relation_heads is 3, which does not divide the student's 64"):
        check_strategy(strategy(attention=Attention(kind="relations", relation_heads=3)), spec)
    with pytest.raises(InputError, match=r"attention.teacher_depth is 0.2, the first of the teacher's 6 layers"):
        check_strategy(strategy(attention=Attention(teacher_depth=0.2)), spec)
    with pytest.raises(InputError, match=r"alignment.rank is 65"):
        check_strategy(strategy(alignment=Alignment(projection="low-rank", rank=65)), spec)
    narrow = spec_from_config(json.loads((lab.teacher / "config.json").read_text()) | {"hidden_size": 48})
    with pytest.raises(InputError, match="rows of 48 weights, which the groups of 32"):
        check_strategy(STRATEGY, narrow)
    with pytest.raises(InputError, match="rows of 48 weights, which the groups of 64"):
        Deployment(runtime="vllm", format="compressed-tensors", bits=8, group_size=64).check_model(narrow.tensors)


def test_spec_is_that_of_the_built_student(lab):
    spec = student_spec(STRATEGY, lab.setting(Path()).teacher_spec)
    model, _ = build_student(lab.teacher, STRATEGY.init)
    assert {t.name: t.shape for t in spec.tensors} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert spec.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("deployment", ALL, ids=lambda deployment: deployment.name)
def test_an_evaluation_is_that_of_the_unpacked_weights(lab, deployment):
    setting = lab.setting(Path())
    spec = student_spec(STRATEGY, setting.teacher_spec)
    storages = {t.name: deployment.storage(t) for t in spec.tensors}
    model, _ = build_student(lab.teacher, STRATEGY.init)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = load_split(lab.data.folder, "validation")
    reference = TeacherReference.load(lab.reference)
    evaluation, scores = evaluate(
        model,
        Subject(spec=spec, deployment=deployment, budget=setting.budget),
        data,
        reference,
        evaluators=setting.evaluators,
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    replaced, _ = build_student(lab.teacher, STRATEGY.init)
    with torch.no_grad():
        for name, p in replaced.named_parameters():
            p.copy_(torch.from_numpy(deployed(p.numpy().copy(), storages[name])))
        ids = torch.from_numpy(data.tokens.astype(np.int64))
        logits = replaced(ids).logits[:, :-1].double().flatten(0, 1)
    labels = ids[:, 1:].flatten()
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-4, atol=1e-4)
    found = {name: measurement.value for name, measurement in evaluation.measurements.items()}
    chosen = logits.argmax(-1)
    assert found["accuracy"] == pytest.approx(float((chosen == labels).double().mean()), abs=2e-3)
    assert found["agreement"] == pytest.approx((chosen.numpy() == reference.top1).mean(), abs=2e-3)
    assert found["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    assert evaluation.deployment == deployment
    assert sum(evaluation.documents["count"]) == len(nll)
    assert sum(evaluation.documents["sum"]) == scores.correct.sum()


@pytest.mark.parametrize("on_grid", [True, False])
def test_a_teacher_that_packing_leaves_as_it_is_has_its_own_scores(lab, on_grid):
    """They equal, to the last digit, those of a pass that reads every token, whether packing changes weights or not."""
    setting = lab.setting(Path())
    spec, model = setting.teacher_spec, load_model(lab.teacher, torch.float32)
    if on_grid:
        with deployed_weights(model, spec, Q4):
            values = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.data = values[name]
    with deployed_weights(model, spec, Q4) as same:
        assert same is on_grid
    with deployed_weights(model, spec, replace(Q4, cache_type_k="q8_0")) as same:
        assert same is False
    data = load_split(setting.data, "validation").head(512)
    own, reference = score_teacher(model, data)
    read, known = (
        evaluate(
            model,
            Subject(spec=spec, deployment=Q4, budget=setting.budget),
            data,
            reference,
            evaluators=("accuracy", "perplexity", "agreement", "kl", "calibration"),
            unpacked=unpacked,
        )[0]
        for unpacked in (None, own)
    )
    assert {name: item.value for name, item in known.measurements.items()} == pytest.approx(
        {name: item.value for name, item in read.measurements.items()}, rel=1e-12, abs=1e-7
    )
    assert (known.documents, known.teacher_accuracy) == (read.documents, read.teacher_accuracy)
    assert (known.measurements["agreement"].value == 1) is on_grid


@pytest.mark.parametrize("deployment", ALL, ids=lambda deployment: deployment.name)
def test_masters_come_back_whatever_happens(lab, deployment):
    spec = student_spec(STRATEGY, lab.setting(Path()).teacher_spec)
    model, _ = build_student(lab.teacher, STRATEGY.init)
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    changed = []

    def interrupted():
        with deployed_weights(model, spec, deployment):
            changed.extend(name for name, p in model.named_parameters() if not torch.equal(p, before[name][2]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(changed) >= 3 * 7
    for name, p in model.named_parameters():
        parameter, memory, values = before[name]
        assert p is parameter
        assert p.data_ptr() == memory
        assert torch.equal(p, values)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_on_an_accelerator_packed_values_take_the_place_of_the_masters(lab, monkeypatch):
    """A copy in place of `cpu` acts as it does on an accelerator: the model's own memory is then free."""
    spec = student_spec(STRATEGY, lab.setting(Path()).teacher_spec)
    model, _ = build_student(lab.teacher, STRATEGY.init)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    packed = {t.name for t in spec.tensors if Q4.storage(t) != "f32"}
    memory = {name: StorageWeakRef(p.untyped_storage()) for name, p in model.named_parameters()}
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    with deployed_weights(model, spec, Q4):
        assert {name for name, storage in memory.items() if storage.expired()} == packed
        for name, p in model.named_parameters():
            storage = next(Q4.storage(t) for t in spec.tensors if t.name == name)
            assert np.array_equal(p.detach().numpy(), deployed(before[name].numpy().copy(), storage))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_masters_come_back_where_packing_fails_half_way(lab, monkeypatch):
    spec = student_spec(STRATEGY, lab.setting(Path()).teacher_spec)
    model, _ = build_student(lab.teacher, STRATEGY.init)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    original, calls = evaluation_module.deploy_tensor, []

    def fails(weight, storage, scales):
        calls.append(storage)
        if len(calls) == 9:
            raise MemoryError
        return original(weight, storage, scales)

    monkeypatch.setattr(evaluation_module, "deploy_tensor", fails)
    with pytest.raises(MemoryError), deployed_weights(model, spec, Q4):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("context", [8, 512, 10**6])
def test_the_student_is_asked_in_the_budgets_context(lab, context):
    """A prompt beyond this context does not count, as in a deployed student."""
    setting, seen = lab.setting(Path()), []

    class Asking:
        name, needs = "asking", "student"

        def supports(self, deployment):
            return True

        def evaluate(self, subject):
            student = subject.student
            seen.append(student.context)
            long, short = (student.likelihoods([("the river " * count, "boat")])[0] for count in (20, 12))
            assert (long.log_likelihood == short.log_likelihood) == (context == 8)
            return ()

    evaluate(
        load_model(lab.teacher, torch.float32),
        Subject(spec=setting.teacher_spec, deployment=F16, budget=replace(setting.budget, context=context)),
        load_split(lab.data.folder, "validation"),
        None,
        evaluators=(Asking(),),
        tokenizer=lab.teacher,
    )
    assert seen == [min(context, setting.teacher_spec.max_context)]


def test_a_metric_that_is_no_mean_ranks_by_its_figure_alone(lab):
    """Such an evaluation keeps the documents of accuracy, but fewer right tokens do not mean a better ECE."""
    setting = lab.setting(Path())
    evaluation, scores = evaluate(
        load_model(lab.teacher, torch.float32),
        Subject(spec=setting.teacher_spec, deployment=F16, budget=setting.budget),
        load_split(lab.data.folder, "validation"),
        TeacherReference.load(lab.reference),
        evaluators=("accuracy", "perplexity", "calibration"),
        metric="ece",
    )
    means = per_document(scores.correct, scores.documents)
    documents = evaluation.documents
    assert documents == means | {"metric": "accuracy", "others": {"perplexity": documents["others"]["perplexity"]}}
    better, worse = (
        Row(
            row_id=deployment.name,
            trial="t000",
            kind="student",
            name="a",
            deployment=deployment,
            status="completed",
            feasible=True,
            fidelity=1.0,
            memory_bytes=deployment.bits,
            documents=documents | {"sum": [right * count for count in documents["count"]]},
            other={"ece": ece},
        )
        for deployment, right, ece in ((F16, 1, 0.02), (Q4, 0, 0.30))
    )
    assert [(one.row, one.tied) for one in rank([worse, better], "ece", "min")] == [(better, False), (worse, False)]


def test_documents_count_tokens_and_hits(lab):
    data = load_split(lab.data.folder, "validation")
    model = load_model(lab.teacher, torch.float32)
    scores, _ = score(model, data)
    documents = per_document(scores.correct, scores.documents)
    for document, count, hits in zip(documents["ids"], documents["count"], documents["sum"], strict=True):
        own = scores.documents == document
        assert (count, hits) == (own.sum(), scores.correct[own].sum())
    assert json.loads(json.dumps(documents)) == documents


def test_from_rung_to_rung(lab, tmp_path):
    trial = Trial(Workbench(lab.setting(tmp_path)), _task())
    reports = []
    for rung, tokens in enumerate((256, 512, 768)):
        reports.append(trial.run(rung))
        assert (reports[-1].rung, reports[-1].tokens) == (rung, tokens)
        # Checkpoints lie in the stable part. The last rung leaves those before it, because nothing follows it.
        branches = [branch_point(target, 0.25, 64) for target in (256, 512) if target <= tokens]
        assert _kept(tmp_path, "t000") == branches
        assert student_folder(tmp_path / "t000").exists() == (rung == 2)
    assert [report.evaluation.deployment for report in reports] == [Q4] * 3
    assert reports[0].evaluation.measurements["accuracy"].detail["tokens"] == 256 // LENGTH * (LENGTH - 1)
    assert reports[2].evaluation.measurements["accuracy"].detail["tokens"] == 512 // LENGTH * (LENGTH - 1)
    assert [step.tokens for step in reports[0].steps] == [64, 128, 192, 256]
    assert [step.tokens for step in reports[1].steps] == [256, 320, 384, 448, 512]
    for report in reports:
        assert set(report.seconds) == {"train", "evaluate", "other"}
        assert min(report.seconds.values()) > 0
        assert report.params == student_spec(STRATEGY, lab.setting(Path()).teacher_spec).parameters
    assert [path.name for path in (tmp_path / "t000").iterdir()] == ["student"]


def _processes(function, arguments, count):
    """Start processes that only know their arguments: forks of a process that has imported what they need."""
    multiprocessing.set_forkserver_preload([__name__, "tests.conftest"])
    return multiprocessing.start_processes(function, arguments, nprocs=count, join=False, start_method="forkserver")


def _alone(rank, setting, task, rung, path):
    path.write_bytes(pickle.dumps(Trial(Workbench(setting), task).run(rung)))


@pytest.mark.slow
def test_a_fresh_process_continues_to_the_same_figures(lab, tmp_path):
    setting = lab.setting(tmp_path / "here")
    bench = Workbench(setting)
    trial = Trial(bench, _task())
    expected = [_facts(trial.run(rung)) for rung in (0, 1)]

    elsewhere = replace(setting, checkpoints=tmp_path / "there")
    assert _facts(Trial(Workbench(elsewhere), _task()).run(0)) == expected[0]
    process = _processes(_alone, (elsewhere, _task(), 1, tmp_path / "out"), 1)
    while not process.join():
        pass
    assert _facts(pickle.loads((tmp_path / "out").read_bytes())) == expected[1]


def test_a_rung_told_again_after_a_kill_is_the_same(lab, tmp_path):
    trial = Trial(Workbench(lab.setting(tmp_path)), _task())
    trial.run(0)
    first = trial.run(1)
    again = trial.run(1)  # its checkpoint is already that of this rung
    assert again.evaluation == first.evaluation
    assert [step.tokens for step in again.steps] == [448, 512]


def test_what_a_rung_judged_is_kept_where_that_is_asked_for_until_the_end_is_reached(lab, tmp_path):
    setting = lab.setting(tmp_path)
    trial = Trial(Workbench(setting), _task())
    for rung in (0, 1):
        judged = trial.run(rung)
    before = _kept(tmp_path, "t000")
    kept = trial.run(1, keep=True)
    assert kept.evaluation == judged.evaluation
    assert kept.trained == 128, "its decay alone is trained again"
    assert _kept(tmp_path, "t000") == before
    folder = student_folder(tmp_path / "t000", 512)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    data = load_split(lab.data.folder, "validation").head(256)
    reference = TeacherReference.load(lab.reference).head(data.tokens[:, 1:].size)
    spec = student_spec(STRATEGY, setting.teacher_spec)
    again, _ = evaluate(
        model, Subject(spec=spec, deployment=Q4, budget=setting.budget), data, reference, evaluators=setting.evaluators
    )
    assert again == judged.evaluation
    trial.run(2)
    assert [path.name for path in (tmp_path / "t000").iterdir()] == ["student"]


def test_a_pretrained_student_is_trained_where_nothing_lies_at_its_reference(lab, tmp_path, monkeypatch):
    """This happens on a node with a copy from the storage: the reference is relative to another machine's folder."""
    small, model = save_tiny_teacher(tmp_path / "small", layers=2, seed=5), "./small"
    strategy = replace(STRATEGY, init=Init(source="pretrained", model=model, depth=1.0))

    def run(folder):
        setting = lab.setting(tmp_path / folder, pretrained={model: small})
        return Trial(Workbench(setting), _task(strategy)).run(0)

    monkeypatch.chdir(tmp_path)
    expected = run("here")
    pretrained_spec.cache_clear()
    monkeypatch.chdir(tmp_path / "here")
    assert _facts(run("there")) == _facts(expected)
    assert expected.params == sum(tensor.numel() for tensor in load_file(small / "model.safetensors").values())


def test_of_two_tries_of_a_trial_the_second_ones_student_is_that_of_the_search(lab, tmp_path):
    """The node of the first try died in the evaluation, after it sent its student.

    The second try decayed differently.
    """
    storage = Storage(f"file://{tmp_path}/there")
    first, second = (
        Trial(Workbench(lab.setting(tmp_path / name, storage=storage)), _task(strategy, straight=True, probe=Q4))
        for name, strategy in (("first", STRATEGY), ("second", replace(STRATEGY, finishing=None)))
    )
    first.run(2)
    report = second.run(2)
    own = load_file(student_folder(tmp_path / "second" / "t000") / "model.safetensors")
    found = load_file(trained_student(tmp_path / "driver" / "t000", storage) / "model.safetensors")
    assert all(torch.equal(found[name], own[name]) for name in own)
    assert first.evaluate(report.evaluation.deployment).evaluation == report.evaluation


def test_straight_to_the_last_rung_is_the_same_student(lab, tmp_path):
    bench = Workbench(lab.setting(tmp_path))
    straight = Trial(bench, _task(id="straight", straight=True)).run(2)
    stepwise = Trial(bench, _task(id="stepwise"))
    for rung in range(2):
        stepwise.run(rung)
    assert stepwise.run(2).evaluation == straight.evaluation
    students = [load_file(student_folder(tmp_path / name) / "model.safetensors") for name in ("straight", "stepwise")]
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])
    # Checkpoints stay where the decays of the earlier rungs branch off. If its time ends, it is judged at one of them.
    assert _kept(tmp_path, "straight") == [branch_point(target, 0.25, 64) for target in (256, 512)]


def test_a_bench_binds_no_process_to_a_share_of_a_gpu(lab, tmp_path, monkeypatch):
    """The process may be the search's own, which also exports and opens the test split there."""
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", lambda share: pytest.fail("bound"))
    setting = lab.setting(tmp_path)
    Workbench(replace(setting, device="cuda", plan=replace(setting.plan, gpus=0.5)))


def test_the_saved_student_is_what_was_evaluated(lab, tmp_path):
    setting = lab.setting(tmp_path)
    trial = Trial(Workbench(setting), _task(straight=True))
    report = trial.run(2)
    folder = student_folder(tmp_path / "t000")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    data = load_split(lab.data.folder, "validation").head(512)
    reference = TeacherReference.load(lab.reference).head(data.tokens[:, 1:].size)
    spec = student_spec(STRATEGY, setting.teacher_spec)
    for deployment in ALL:
        again, _ = evaluate(
            model,
            Subject(spec=spec, deployment=deployment, budget=setting.budget),
            data,
            reference,
            evaluators=setting.evaluators,
        )
        later = trial.evaluate(deployment)
        assert again == later.evaluation
        assert (later.rung, later.tokens, later.steps) == (2, report.tokens, ())
        if deployment == report.evaluation.deployment:
            assert again == report.evaluation
    weights = load_file(folder / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    text = "The miller paints a silver lamp."
    mine, theirs = (AutoTokenizer.from_pretrained(path)(text).input_ids for path in (folder, lab.teacher))
    assert mine == theirs


def test_the_student_and_the_checkpoints_of_a_trial_outlive_a_power_failure(lab, tmp_path):
    if why := why_not():
        pytest.skip(why)
    assert lost(lambda folder: Trial(Workbench(lab.setting(folder)), _task()).run(2), tmp_path / "checkpoints") == []


# Either kind watches the same layer of the student, and holds the same layer of the teacher.
@pytest.mark.parametrize(
    "attention",
    [Attention(), pytest.param(Attention(kind="relations", relation_heads=4), marks=pytest.mark.slow)],
)
def test_nothing_of_the_alignments_leaves_the_training(lab, tmp_path, attention):
    """Neither the student's folder nor any export holds a projection or a layer of the teacher."""
    alignment = Alignment(layers="all", projection="mlp", distance="l2", balance=True)
    strategy = replace(STRATEGY, distillation=replace(RECIPE, alignment=alignment, attention=attention))
    setting = lab.setting(tmp_path)
    bench = Workbench(setting)
    for rung in range(3):
        report = Trial(bench, _task(strategy)).run(rung)
    assert report.steps[-1].alignment > 0
    assert report.steps[-1].attention > 0
    straight = Trial(bench, _task(strategy, id="t001", straight=True)).run(2)
    assert straight.evaluation == report.evaluation
    folder = student_folder(tmp_path / "t000")
    expected = {tensor.name for tensor in student_spec(strategy, setting.teacher_spec).tensors}
    assert set(load_file(folder / "model.safetensors")) == expected
    written = json.loads((folder / "config.json").read_text())
    assert "watched" not in json.dumps(written)
    for deployment in (BF16, Q8, INT4):
        exporter = load("exporters", get_format(deployment.format).container)
        artifact = exporter.export(folder, deployment, tmp_path / deployment.name)
        assert {name for name, _ in exporter.unpack(artifact.path)} == expected


LEARNED = {
    name: Finishing(format=name, bits=bits, group_size=group, symmetric=symmetric, scales="learned", **more)
    for name, bits, group, symmetric, more in (
        ("gguf-q4_0", 4, 32, True, {"keep": ("layers.1",)}),
        ("gguf-q4_1", 4, 32, False, {}),
        ("gguf-q4_k", 4, 32, False, {"keep": ("layers.1",)}),
        ("gguf-q6_k", 6, 16, True, {}),
        ("gguf-q4_k_m", 4, 32, False, {"keep": ("layers.1",)}),
        ("compressed-tensors", 3, 64, False, {"keep": ("attention",), "start": 0.5}),
    )
}


@pytest.mark.parametrize(
    "finishing",
    [
        # A mixture has what each of its types has.
        pytest.param(one, id=name, marks=[pytest.mark.slow] if name in ("gguf-q4_0", "gguf-q4_k", "gguf-q6_k") else [])
        for name, one in LEARNED.items()
    ],
)
def test_the_export_holds_the_weights_that_a_learned_grid_was_trained_on(request, tmp_path, finishing):
    lab = request.getfixturevalue("wide_lab" if "_k" in finishing.format else "lab")
    setting = lab.setting(tmp_path)
    # At this rate, scales move within a few steps.
    strategy = replace(STRATEGY, finishing=finishing, distillation=replace(RECIPE, learning_rate=5e-3))
    deployments = with_own(strategy, ALL)
    assert deployments[: len(ALL)] == ALL
    own = deployments[-1]
    probe = probe_deployment(strategy, deployments)
    assert probe.scheme == finishing.scheme
    task = _task(strategy, deployments=deployments, probe=probe, straight=True)
    shown = {}
    trial = Trial(Workbench(setting), task)
    trainer = trial._trainer()
    trial._trainer = lambda: trainer
    report = trial.run(2)
    folder = student_folder(tmp_path / "t000")
    spec = student_spec(strategy, setting.teacher_spec)
    scales = read_scales(folder, own)
    assert set(scales) == {t.name for t in spec.tensors if "proj" in t.name and isinstance(own.storage(t), Grid)}

    # The training's own forward pass uses these weights after its last step, with the scales that were stored.
    grids = {t.name: own.storage(t) for t in spec.tensors if isinstance(own.storage(t), Grid)}
    masters = {name: p.detach().numpy().copy() for name, p in trainer.model.named_parameters()}
    for name, (values, offsets) in scales.items():
        scale = torch.from_numpy(values)
        offset = None if offsets is None else torch.from_numpy(offsets)
        shown[name] = fake_quantize_learned(torch.from_numpy(masters[name]), scale, offset, grids[name]).numpy()
        # The scales are learned: the weights alone would give others.
        assert not np.array_equal(shown[name], deployed(masters[name], grids[name]))

    container = get_format(own.format).container
    exporter = plugins.load("exporters", container)
    artifact = exporter.export(folder, own, tmp_path / "out")
    verify(exporter, artifact, folder, own)
    for name, values in exporter.unpack(artifact.path):
        expected = shown.get(
            name, deployed(masters[name], own.storage(next(t for t in spec.tensors if t.name == name)))
        )
        np.testing.assert_array_equal(values, expected, err_msg=name)

    # Under its own grid, the student is evaluated with these scales, like the saved folder. Under others, it is not.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    data = load_split(lab.data.folder, "validation").head(512)
    reference = TeacherReference.load(lab.reference).head(data.tokens[:, 1:].size)
    for deployment in (own, F16):
        again, _ = evaluate(
            model,
            Subject(spec=spec, deployment=deployment, budget=setting.budget),
            data,
            reference,
            evaluators=setting.evaluators,
            scales=read_scales(folder, deployment),
        )
        assert again == trial.evaluate(deployment).evaluation
    plain, _ = evaluate(
        model, Subject(spec=spec, deployment=own, budget=setting.budget), data, reference, evaluators=setting.evaluators
    )
    assert report.evaluation == trial.evaluate(own).evaluation != plain


@pytest.mark.parametrize("name", ["qat_int4", "qat_int2", "qat_q4_mixed"])
def test_named_finishings_run(lab, tmp_path, name):
    strategy = load_strategy(name)
    setting = lab.setting(tmp_path)
    check_strategy(strategy, setting.teacher_spec)
    deployments = holdable(student_spec(strategy, setting.teacher_spec), with_own(strategy, ALL))
    probe = probe_deployment(strategy, deployments)
    assert strategy.finishing is not None
    assert probe.scheme == strategy.finishing.scheme
    report = Trial(Workbench(setting), _task(strategy, deployments=deployments, probe=probe, straight=True)).run(2)
    assert report.evaluation.deployment == probe
    assert 0 < report.evaluation.measurements["accuracy"].value < 1


def test_a_student_takes_the_teachers_texts_but_not_its_weights(lab, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    kept = {"tokenizer.json": "{}", "chat_template.jinja": "x", "merges.txt": "y", "tokenizer.model": "z"}
    left = {"teacher.json": "{}", "model.safetensors.index.json": "{}", "pytorch_model.bin": "p", "a.gguf": "g"}
    for name, text in (kept | left | {"config.json": "not the student's", "model-00001.safetensors": "w"}).items():
        (teacher / name).write_text(text)
    (teacher / "onnx").mkdir()
    model, _ = build_student(lab.teacher, STRATEGY.init)
    save_student(model, teacher, tmp_path / "student")
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert names == {*kept, "config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((tmp_path / "student" / "config.json").read_text())["num_hidden_layers"] == 3


def test_the_metric_of_training_gets_better(lab, tmp_path):
    plan = replace(lab.plan, tokens=1024, rungs=(64, 1024), keep=(1,))
    strategy = Strategy(init=Init(depth=0.8), distillation=Distillation(divergence_weight=0.0, learning_rate=5e-3))
    trial = Trial(Workbench(lab.setting(tmp_path, plan=plan)), _task(strategy))
    first, last = trial.run(0), trial.run(1)
    before, after = (report.evaluation.measurements["perplexity"].value for report in (first, last))
    assert last.evaluation.deployment == probe_deployment(strategy, ALL)
    assert after < before


def test_steps_are_thinned_to_twenty_with_the_last_among_them(lab, tmp_path):
    plan = replace(lab.plan, tokens=1024, rungs=(1024,), keep=(), batch_tokens=32)
    seen = []
    report = Trial(Workbench(lab.setting(tmp_path, plan=plan)), _task(straight=True), seen.append).run(0)
    assert len(seen) == 32
    assert len(report.steps) == 16
    assert report.steps[-1] == seen[-1]
    assert [step.tokens for step in report.steps] == [64 * (i + 1) for i in range(16)]


OUT_OF_MEMORY = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has ..."),
    "python": MemoryError(),
    "torch on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_out_of_memory(lab, tmp_path, error):
    def fails(record):
        raise error

    with pytest.raises(TrialFailedError) as caught:
        Trial(Workbench(lab.setting(tmp_path)), _task(), fails).run(0)
    assert caught.value.cause == "out-of-memory"
    assert "\n" not in str(caught.value)
    assert str(caught.value)


def test_torchs_own_refusal_is_out_of_memory(lab, tmp_path):
    with pytest.raises(TrialFailedError) as caught:
        Trial(Workbench(lab.setting(tmp_path)), _task(), lambda record: torch.empty(2**50)).run(0)
    assert caught.value.cause == "out-of-memory"


def test_other_errors_are_not_called_so(lab, tmp_path):
    def fails(record):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        Trial(Workbench(lab.setting(tmp_path)), _task(), fails).run(0)


def test_nan(lab, tmp_path):
    broken = replace(STRATEGY, distillation=replace(RECIPE, learning_rate=0.99))
    bench = Workbench(lab.setting(tmp_path))
    trial = Trial(bench, _task(broken))

    class Spoilt:
        settings = bench.cache.settings

        def top(self, indices, temperature, count):
            target = bench_cache.top(indices, temperature, count)
            return replace(target, log_p=target.log_p * float("nan"))

        def state(self, indices, layer):
            return bench_cache.state(indices, layer)

    bench_cache, bench.cache = bench.cache, Spoilt()
    with pytest.raises(TrialFailedError) as caught:
        trial.run(2)
    assert caught.value.cause == "nan"


def test_a_cache_of_other_data_is_refused(lab, workshop, tmp_path):
    """The cache is for another tokenizer's tokens, which would be mistaken for these."""
    with pytest.raises(
        InputError, match=f"is of the data data, and these are {lab.data.fingerprint}: they have another text"
    ):
        Workbench(lab.setting(tmp_path, cache=workshop.folder))


def test_a_cache_that_changes_between_trials_fails_them_and_says_what_to_do(lab, tmp_path):
    """The search checks the cache's checksums. A worker opens it later, possibly on another disk."""
    copy = shutil.copytree(lab.cache, tmp_path / "copy")
    bench = Workbench(lab.setting(tmp_path, cache=copy))
    with (copy / "outputs.arrow").open("r+b") as file:
        file.seek(file.seek(0, 2) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(TrialFailedError, match=r"outputs\.arrow is not the file of teacher") as said:
        work(bench, Assignment(task=_task(), rung=2), lambda record: None)
    assert said.value.cause == "error"


def test_what_the_cache_lacks_is_refused_before_anything_is_trained(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(trial_module, "Trainer", lambda *arguments, **more: pytest.fail("a trainer was built"))
    bench = Workbench(lab.setting(tmp_path))
    many = replace(RECIPE, signal_tokens=65)
    with pytest.raises(InputError, match=r"the teacher cache lacks the 65 likeliest tokens, which the strategy reads"):
        Trial(bench, _task(replace(STRATEGY, distillation=many))).run(0)
    bench = Workbench(lab.setting(tmp_path, cache=None))
    with pytest.raises(InputError, match=r"lacks the 64 likeliest tokens, temperature 1, the states of layer 5"):
        Trial(bench, _task()).run(0)


def test_an_online_teacher_needs_no_cache_and_is_shared_by_trials(lab, tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(target_sources, "load_held", lambda *arguments: loads.append(1) or load_held(*arguments))
    bench = Workbench(lab.setting(tmp_path, cache=None))
    online = Distillation(
        divergence="reverse_kl", divergence_weight=1.0, signal="online", signal_tokens=0, learning_rate=1e-3
    )
    strategy = Strategy(init=Init(depth=0.5), distillation=online)
    first = Trial(bench, _task(strategy)).run(0)
    second = Trial(bench, _task(strategy, id="t001")).run(0)
    assert loads == [1]
    assert _facts(first) == _facts(second)
    assert first.steps[-1].divergence < first.steps[0].divergence


def test_stopped_in_a_step_it_goes_on_from_the_last_rung(lab, tmp_path):
    class Stop(Exception):
        pass

    def stops(record):
        if record.tokens == 384:
            raise Stop

    bench = Workbench(lab.setting(tmp_path))
    Trial(bench, _task()).run(0)
    with pytest.raises(Stop):
        Trial(bench, _task(), stops).run(1)
    assert _kept(tmp_path, "t000") == [192]
    expected = Trial(bench, _task(id="other"))
    expected.run(0)
    assert _facts(Trial(bench, _task()).run(1)) == _facts(expected.run(1))


FINISHINGS = (
    None,
    Finishing(format="gguf-q8_0", bits=8, group_size=32),
    Finishing(format="compressed-tensors", bits=4, group_size=32, scales="learned", start=0.5),
)


# Tested are the plain finishing and the one that keeps most in a checkpoint. Those between them are slow.
@pytest.mark.parametrize(
    ("recipe", "finishing"),
    [
        pytest.param(RECIPE, FINISHINGS[0], id="alignment-plain"),
        pytest.param(
            replace(RECIPE, divergence="taid", mixture=0.3, train_embeddings=True, signal="states", signal_tokens=0),
            FINISHINGS[2],
            id="taid-learned",
            marks=pytest.mark.slow,
        ),
        pytest.param(replace(RECIPE, lora=Lora(rank=4)), FINISHINGS[1], id="lora-q8", marks=pytest.mark.slow),
        pytest.param(replace(RECIPE, lora=Lora(rank=4)), FINISHINGS[2], id="lora-learned"),
    ],
)
def test_a_trial_that_shares_a_stage_is_the_trial_that_trained_all_of_it(lab, tmp_path, recipe, finishing):
    """Two trials differ in their finishing. The second resumes from the first one's checkpoints at every rung."""
    first = replace(STRATEGY, distillation=recipe)
    second = replace(first, finishing=finishing)
    assert first.id != second.id
    results = {}
    for folder, stage in (("apart", ""), ("shared", "stage")):
        bench = Workbench(lab.setting(tmp_path / folder))
        for strategy, name in ((first, "t000"), (second, "t001")):
            trial = Trial(bench, _task(strategy, id=name, stage=stage))
            results[folder, name] = [trial.run(rung) for rung in range(3)]
    for name in ("t000", "t001"):
        apart, shared = results["apart", name], results["shared", name]
        assert [(one.evaluation, one.params) for one in shared] == [(one.evaluation, one.params) for one in apart]
        students = [
            load_file(student_folder(tmp_path / folder / name) / "model.safetensors") for folder in ("apart", "shared")
        ]
        assert all(torch.equal(students[0][key], students[1][key]) for key in students[0])
    decays = [tokens - branch_point(tokens, 0.25, 64) for tokens in (256, 512, 768)]
    assert [one.trained for one in results["shared", "t001"]] == decays
    assert [one.shared for one in results["shared", "t001"]] == [192, 192, 192]
    for other in (("apart", "t000"), ("apart", "t001"), ("shared", "t000")):
        assert [one.shared for one in results[other]] == [0, 0, 0]
        assert [one.trained for one in results[other]] == [256, 512 - 192, 768 - 384]
    assert _kept(tmp_path / "shared", "stage") == [192, 384, 576]


def test_a_longer_trial_goes_on_past_the_plan_and_is_that_which_trained_all_of_it(lab, tmp_path):
    plan = replace(lab.plan, lengths=(1.0, 1.25))
    results = []
    for folder, stage in (("shared", "stage"), ("apart", "")):
        bench = Workbench(lab.setting(tmp_path / folder, plan=plan))
        parent = Trial(bench, _task(straight=True, stage=stage)).run(2)
        longer = Trial(bench, _task(id="t000x1.25", straight=True, length=1.25, stage=stage))
        report = longer.run(2)
        assert longer.evaluate(F16).tokens == 960
        results.append((parent, report))
    (parent, shared), (_, apart) = results
    assert (shared.tokens, shared.evaluation) == (apart.tokens, apart.evaluation)
    assert shared.tokens == 960
    assert (shared.shared, shared.trained) == (576, 960 - 576)
    assert apart.trained == 960
    assert shared.evaluation != parent.evaluation
    # Its decay branches off a quarter before its own end, and its schedules keep the plan's values.
    assert _kept(tmp_path / "shared", "stage") == [192, 384, 576, 704]
    ends = {step.tokens: step for step in shared.steps}
    assert ends[704].learning_rate == RECIPE.learning_rate
    assert ends[960].learning_rate < RECIPE.learning_rate / 2


def test_what_is_trained_on_until_a_time_is_the_same_as_what_was_planned_to_end_there(lab, tmp_path, monkeypatch):
    """A second of this clock is a step. The decay, a quarter of all steps, begins so that it ends in time."""
    plan = replace(lab.plan, longest=4.0, data_tokens=960)
    steps, ticks = [], itertools.count()

    def run(folder, length, until):
        bench = Workbench(lab.setting(tmp_path / folder, plan=plan))
        Trial(bench, _task(straight=True, stage="stage")).run(2)
        steps.clear()
        task = _task(id="t000x", straight=True, length=length, stage="stage")
        return Trial(bench, task, steps.append).run(2, until=until)

    class Late(Exception):
        pass

    def late(record):
        raise Late

    with monkeypatch.context() as patch:
        patch.setattr("autodistill.search.worker.trial.time", SimpleNamespace(perf_counter=lambda: 0.0))
        patch.setattr("autodistill.utils.clock.time", SimpleNamespace(monotonic=lambda: float(len(steps))))
        patch.setattr(Trial, "_rounding_seconds", lambda trial, model: None)
        patch.setattr(
            "autodistill.distillation.training.trainer.time", SimpleNamespace(perf_counter=lambda: float(next(ticks)))
        )
        cut = run("cut", 4.0, Moment(18.0))
        # It is too late from the start. The training still passes the plan's tokens and takes the steps that time it.
        least = run("least", 4.0, Moment(0.0))
    # By hand, from the parent's branch at step 9: at step 17, another step and the 6 of its decay would end in time, at
    # 8 + 1.1 * 1.25 * 7 < 18, because steps on a grid are slower. At step 18 they would end at 9 + 1.1 * 1.25 * 7 > 18.
    assert (cut.tokens, cut.trained) == (24 * 64, (24 - 9) * 64)
    assert _kept(tmp_path / "cut", "stage") == [192, 384, 576, 18 * 64]
    assert least.tokens == end_of((9 + 4) * 64, 0.25, 64) > plan.tokens
    planned = run("planned", cut.tokens / plan.tokens, None)
    assert (planned.tokens, planned.trained, planned.evaluation) == (cut.tokens, cut.trained, cut.evaluation)
    # The end of the time budget interrupts a training, but not a decay that has begun: its work would be lost.
    with pytest.raises(Late):
        Trial(Workbench(lab.setting(tmp_path / "late", plan=plan)), _task(straight=True, length=2.0), late).run(2)
    bench = Workbench(lab.setting(tmp_path / "least", plan=plan))
    again = Trial(bench, _task(id="t000x", straight=True, length=least.tokens / plan.tokens, stage="stage"), late)
    assert again.run(2, until=Moment(0.0)).evaluation == least.evaluation


def test_a_decay_on_a_machine_that_became_slower_ends_sooner(lab, tmp_path, monkeypatch):
    """Steps advance this clock by 1 before the decay, which begins at step 18, and by 3 in it."""
    plan = replace(lab.plan, longest=4.0, data_tokens=960)
    bench = Workbench(lab.setting(tmp_path, plan=plan))
    Trial(bench, _task(straight=True, stage="stage")).run(2)
    clock, step = SimpleNamespace(now=0.0), Trainer._step

    def slower(trainer, *arguments):
        began, clock.now = clock.now, clock.now + (1.0 if trainer.tokens < 18 * 64 else 3.0)
        moments = iter((began, clock.now))
        patched = SimpleNamespace(perf_counter=lambda: next(moments))
        monkeypatch.setattr("autodistill.distillation.training.trainer.time", patched)
        return step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_step", slower)
    monkeypatch.setattr(Trial, "_rounding_seconds", lambda trial, model: None)
    monkeypatch.setattr("autodistill.search.worker.trial.time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr("autodistill.utils.clock.time", SimpleNamespace(monotonic=lambda: clock.now))
    found = Trial(bench, _task(id="t000x", straight=True, length=4.0, stage="stage")).run(2, until=Moment(18.0))
    # The time is over after three of the six steps. One more step follows, from half of the rate.
    assert (found.tokens, found.trained) == (22 * 64, (22 - 9) * 64)
    rates = [step.learning_rate / RECIPE.learning_rate for step in found.steps if step.tokens > 18 * 64]
    assert rates == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6])


def test_a_trunk_is_the_same_whatever_decays_branch_off_it(lab, tmp_path):
    plan = replace(lab.plan, longest=4.0, data_tokens=960)
    longer = partial(_task, straight=True, stage="stage")

    def at(folder):
        bench = Workbench(lab.setting(tmp_path / folder, plan=plan))
        Trial(bench, _task(straight=True, stage="stage")).run(2)
        return bench

    whole = Trial(at("whole"), longer(id="t000x", length=2.0)).run(2)
    bench = at("branched")
    branch = Trial(bench, longer(id="t000x", length=1.25, decay=0.13)).run(2)
    # The decay has two of 15 steps. The checkpoint that it starts from is only of use to the trunk.
    assert (branch.tokens, branch.trained) == (960, 960 - 576)
    assert _kept(tmp_path / "branched", "stage") == [192, 384, 576, 832]
    assert [step.learning_rate for step in branch.steps[-2:]] == [RECIPE.learning_rate, RECIPE.learning_rate / 2]
    end = Trial(bench, longer(id="t000xx", length=2.0)).run(2)
    assert (end.tokens, end.trained, end.evaluation) == (whole.tokens, whole.tokens - 832, whole.evaluation)
    assert branch.evaluation != end.evaluation
    assert _kept(tmp_path / "branched", "stage") == _kept(tmp_path / "whole", "stage")


@pytest.mark.parametrize(
    ("depth", "factor", "scales", "at_once", "expected"),
    [
        (0.5, 2**0.75, "alone", 1, 1e6),
        (1.0, 1.0, "absmax", 2, 1.0),
        (0.5, 2**0.46, "absmax", 2, 1e6),  # many tokens per weight
        pytest.param(1.0, 1.0, "alone", 1, 1.0, marks=pytest.mark.slow),
        pytest.param(0.5, 2**0.75, "absmax", 2, 1.0, marks=pytest.mark.slow),
    ],
)
def test_a_trunk_alone_on_a_machine_has_wider_steps_and_a_larger_rate(
    lab, tmp_path, depth, factor, scales, at_once, expected
):
    finishing = Finishing(format="gguf-q4_0", bits=4, group_size=32, scales=scales)
    strategy = replace(STRATEGY, init=Init(depth=depth), finishing=finishing)
    task = partial(_task, strategy=strategy, straight=True, stage="stage")
    plan = replace(lab.plan, longest=4.0, expected=expected, data_tokens=960, workers=2, micro_batch=1, at_once=2)
    bench = Workbench(lab.setting(tmp_path, plan=plan))
    Trial(bench, task()).run(2)
    # It goes on from a stage of narrower steps. It takes half as many steps of twice the sequences, at a suitable rate.
    # The whole teacher keeps its rate, because it would forget otherwise.
    steps = Trial(bench, task(id="t000x", length=2.0), threads=2).run(2).steps
    assert steps[0].learning_rate == pytest.approx(factor * RECIPE.learning_rate, rel=1e-5)
    assert steps[1].tokens - steps[0].tokens == 2 * plan.batch_tokens
    # When training scales, two processes read a sequence each. When training weights, one process reads two.
    assert steps[0].micro_batch == at_once


@pytest.mark.parametrize("threads", [0, 2])
def test_what_a_wider_step_takes_longer_on_the_grid_is_shared_out_to_the_plans_steps(
    lab, tmp_path, monkeypatch, threads
):
    plan = replace(lab.plan, longest=4.0, data_tokens=960, workers=2, micro_batch=1, at_once=4)
    bench, told = Workbench(lab.setting(tmp_path, plan=plan)), []
    Trial(bench, _task(straight=True, stage="stage")).run(2)

    class Watched(trial_module.TimedTraining):
        def __init__(self, *given, on_grid, **more):
            told.append(on_grid)
            super().__init__(*given, on_grid=on_grid, **more)

    monkeypatch.setattr(trial_module, "TimedTraining", Watched)
    monkeypatch.setattr(trial_module, "rounding_seconds", lambda *given, **more: 2.0)
    trial = Trial(bench, _task(id="t000x", straight=True, length=4.0, stage="stage"), threads=threads)
    trial.run(2, until=Moment.after(2.0))
    assert told == [2.0 if not threads else 0.5]


def test_a_long_stretch_is_saved_now_and_then_and_a_kill_costs_no_more(lab, tmp_path, monkeypatch):
    expected = Trial(Workbench(lab.setting(tmp_path / "whole")), _task()).run(0)
    monkeypatch.setattr(trial_module, "_SAVED_EVERY", 0.0)

    class Killed(Exception):
        pass

    def kill(record):
        if record.tokens == 192:
            raise Killed

    bench = Workbench(lab.setting(tmp_path / "cut"))
    with pytest.raises(Killed):
        Trial(bench, _task(), kill).run(0)
    # The last checkpoint replaced the one before.
    assert _kept(tmp_path / "cut", "t000") == [128]
    trained = []
    report = Trial(bench, _task(), trained.append).run(0)
    assert [record.tokens for record in trained] == [192, 256]
    assert (report.evaluation, report.trained) == (expected.evaluation, 128)
    assert _kept(tmp_path / "cut", "t000") == [192]


def test_a_trial_that_passes_rungs_leaves_a_checkpoint_at_each_for_others(lab, tmp_path):
    bench = Workbench(lab.setting(tmp_path))
    Trial(bench, _task(id="b000", straight=True, stage="stage")).run(2)
    assert _kept(tmp_path, "stage") == [192, 384, 576]
    report = Trial(bench, _task(replace(STRATEGY, finishing=None), stage="stage")).run(0)
    assert (report.shared, report.trained) == (192, 64)


def test_what_a_killed_stretch_had_reused_is_known_when_it_is_run_again(lab, tmp_path):
    """The kill comes between its checkpoint and its report.

    The reused tokens still count as others', not as its own.
    """
    bench = Workbench(lab.setting(tmp_path))
    Trial(bench, _task(id="t000", stage="stage")).run(0)
    other = Trial(bench, _task(replace(STRATEGY, finishing=None), id="b001", straight=True, stage="stage"))
    once, again = other.run(2), other.run(2)
    assert (once.shared, once.trained) == (192, 768 - 192)
    assert (again.shared, again.trained) == (192, 768 - 576)
    assert (once.resumed, again.resumed) == (0, 576 - 192), "what it had trained itself, which nobody was told"
    assert again.evaluation == once.evaluation


def test_a_checkpoint_that_cannot_be_written_costs_training_and_nothing_else(lab, tmp_path):
    """The file system refuses files of that size, as a full disk would."""
    expected = [Trial(Workbench(lab.setting(tmp_path / "whole")), _task()).run(rung) for rung in (0, 1)]
    bench = Workbench(lab.setting(tmp_path / "full"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    reports = []
    for rung in (0, 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            reports.append(Trial(bench, _task()).run(rung))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [one.evaluation for one in reports] == [one.evaluation for one in expected]
    assert _kept(tmp_path / "full", "t000") == []
    assert [one.trained for one in reports] == [256, 512]
    assert "checkpoint at 192 tokens could not be written: " in str(reports[0].unsaved)
    assert expected[0].unsaved is None


@pytest.mark.parametrize("stored", [False, True])
def test_a_checkpoint_with_one_changed_bit_is_trained_again(lab, tmp_path, stored):
    """The bit belongs to an optimiser's moment or to a weight, so a reader finds the file as sound as before."""
    storage = Storage(f"file://{tmp_path}/there") if stored else None
    setting = lab.setting(tmp_path / "here", storage=storage)
    expected = Trial(Workbench(lab.setting(tmp_path / "whole")), _task(straight=True)).run(2)
    Trial(Workbench(setting), _task()).run(1)
    places = [tmp_path / "here" / "stages", *([tmp_path / "there" / "stages"] if stored else [])]
    paths = [next(iter(sorted(place.glob("t000.*.safetensors"))[::-1])) for place in places]
    for path in paths:
        _flip(path, path.stat().st_size - 1000)
    report = Trial(Workbench(setting), _task()).run(2)
    assert report.evaluation == expected.evaluation
    assert "its checksum differs" in report.damaged
    assert str(paths[0].name) in report.damaged


def test_of_a_damaged_copy_of_a_stored_checkpoint_another_one_is_fetched(lab, tmp_path):
    setting = lab.setting(tmp_path / "here", storage=Storage(f"file://{tmp_path}/there"))
    Trial(Workbench(setting), _task()).run(1)
    path = max((tmp_path / "here" / "stages").glob("t000.*.safetensors"))
    _flip(path, path.stat().st_size - 1000)
    report = Trial(Workbench(setting), _task()).run(2)
    assert (report.damaged, report.trained) == (None, report.tokens - int(path.name.split(".")[1]))


def test_of_a_damaged_copy_of_a_stored_student_another_one_is_fetched(lab, tmp_path):
    setting = lab.setting(tmp_path / "here", storage=Storage(f"file://{tmp_path}/there"))
    trial = Trial(Workbench(setting), _task(straight=True))
    report = trial.run(2)
    weights = student_folder(tmp_path / "here" / "t000") / "model.safetensors"
    before = weights.read_bytes()
    _flip(weights, weights.stat().st_size - 1000)
    assert trial.evaluate(report.evaluation.deployment).evaluation == report.evaluation
    assert weights.read_bytes() == before
    for place in (weights, tmp_path / "there" / "students" / "t000" / "model.safetensors"):
        _flip(place, place.stat().st_size - 1000)
    with pytest.raises(DamagedError, match=r"model\.safetensors has changed"):
        trial.evaluate(report.evaluation.deployment)


def test_scales_that_were_changed_or_laid_beside_a_student_are_not_evaluated(lab, tmp_path):
    trial = Trial(Workbench(lab.setting(tmp_path)), _task(straight=True, probe=Q4))
    report = trial.run(2)
    (student_folder(tmp_path / "t000") / "grid_scales.safetensors").write_bytes(b"of another student")
    with pytest.raises(DamagedError, match="grid_scales"):
        trial.evaluate(report.evaluation.deployment)


def _flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_checkpoint_is_trained_again(lab, tmp_path):
    bench = Workbench(lab.setting(tmp_path))
    trial = Trial(bench, _task())
    trial.run(0)
    expected = trial.run(1)
    for tokens in (192, 384):
        path, _ = open_stages(tmp_path).find("t000", tokens)
        path.write_bytes(path.read_bytes()[:5000])
    again = trial.run(1)
    assert again.evaluation == expected.evaluation
    assert again.trained == 512
    assert _kept(tmp_path, "t000") == [384]


def _member(rank, port, setting, task, folder):
    """Run one of a trial's two processes. Write its report, and how many sharded modules are left at each look."""
    process_group.begin()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    gc.disable()  # so that no chance collection happens
    bench, evaluating, left = Workbench(setting, Sharding("cpu")), TrialSetting.evaluate, []

    def look():
        left.append(sum(issubclass(type(one), FSDPModule) for one in gc.get_objects()))

    def evaluate_and_look(*args, **more):
        look()
        return evaluating(*args, **more)

    TrialSetting.evaluate = evaluate_and_look
    report = Trial(bench, task).run(0)
    look()
    (folder / str(rank)).write_bytes(pickle.dumps((report, left)))
    process_group.leave()


@pytest.mark.slow
def test_two_processes_go_on_where_the_first_cannot_write_a_checkpoint_and_leave_no_shards(lab, tmp_path):
    plan = replace(lab.plan, tokens=1024, rungs=(512, 1024), keep=(1,), batch_tokens=128, micro_batch=2)
    expected = Trial(Workbench(lab.setting(tmp_path / "alone", plan=plan)), _task()).run(0)
    setting = lab.setting(tmp_path / "together", plan=replace(plan, processes=2))
    # A file blocks the path where the first process makes the folder that it writes to.
    (setting.checkpoints / "stages").mkdir(parents=True)
    (setting.checkpoints / "stages" / ".partial").touch()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = _processes(_member, (port, setting, _task(), tmp_path), 2)
    ends = time.monotonic() + 400
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < ends, "one waits for the other"
    finally:
        for process in processes.processes:
            process.kill()
    (report, left), (nothing, others) = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in (0, 1))
    assert nothing is None
    assert "checkpoint at 384 tokens could not be written: " in report.unsaved
    perplexities = [one.evaluation.measurements["perplexity"].value for one in (report, expected)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-3)
    assert (left, others) == ([0, 0], [0])


def test_processes_take_their_shards_of_a_student_on_the_cpu(lab, tmp_path, monkeypatch):
    given = []

    class Made(Exception):
        pass

    def make(model, **more):
        given.append({parameter.device.type for parameter in model.parameters()})
        raise Made

    monkeypatch.setattr(trial_module, "Trainer", make)
    for sharding in (None, SimpleNamespace(rank=0, count=2)):
        with pytest.raises(Made):
            Trial(Workbench(lab.setting(tmp_path, device="meta"), sharding), _task()).run(0)
    assert given == [{"meta"}, {"cpu"}]


@pytest.fixture(scope="module")
def quiz(lab, tmp_path_factory):
    """Return the lab with questions of a task instead of text, and with the teacher's scores and answers for them."""
    folder = tmp_path_factory.mktemp("quiz")
    source = resolve_data("reasoning-gym:chain_sum?size=150&max_terms=3&max_digits=1&worked=false")
    data = prepare(source, lab.teacher, "tokenizer", 128, folder)
    teacher = load_model(lab.teacher, torch.float32)
    cache = ensure_cache(
        lambda: load_model(lab.teacher, torch.float32),
        teacher_fingerprint="t",
        data_fingerprint=data.fingerprint,
        data=load_split(data.folder, "train").head(1024),
        vocabulary=300,
        width=64,
        settings=CacheSettings(states=tuple(range(6))),
        root=folder / "cache",
        limit_bytes=10**8,
    )
    _, reference = score_teacher(teacher, load_split(data.folder, "validation"))
    reference.save(folder / "reference.npz")
    plan = replace(lab.plan, sequence_length=128, batch_tokens=256, tokens=768, rungs=(256, 768), keep=(1,))
    return replace(lab, data=data, cache=cache, reference=folder / "reference.npz", plan=plan)


def test_a_trial_answers_questions_in_writing_where_that_is_asked_for(quiz, tmp_path):
    setting = quiz.setting(tmp_path, evaluators=("accuracy", "exact_match"), metric="exact_match")
    bench = Workbench(setting)
    report = Trial(bench, _task()).run(0)
    evaluation = report.evaluation
    data, reference = bench.held_out(quiz.plan.rung_eval_tokens)
    assert len(reference.top1) == data.predicted < data.tokens[:, 1:].size
    measured = evaluation.measurements["exact_match"]
    assert measured.detail["questions"] == len(data.questions.entries) == len(evaluation.documents["ids"])
    assert evaluation.documents["metric"] == "exact_match"
    assert evaluation.documents["ids"] == sorted(entry.document for entry in data.questions.entries)
    assert sum(evaluation.documents["sum"]) / sum(evaluation.documents["count"]) == measured.value
    assert evaluation.measurements["accuracy"].detail["tokens"] == data.predicted


def test_a_packed_model_answers_with_its_packed_weights(quiz, tmp_path, monkeypatch):
    """Every answer is requested while the weights are the deployment's."""
    spec = quiz.setting(tmp_path).teacher_spec
    model, seen = load_model(quiz.teacher, torch.float32), []
    right = {}

    def answering(given, questions, *, context, device):
        assert context == 300  # the budget's context, not the 512 tokens that the model can read
        seen.append(given.model.layers[0].mlp.up_proj.weight.detach().clone())
        right.update({entry.document: entry.answer for entry in questions.entries})
        marks = np.arange(len(questions.entries)) % 2 == 0
        documents = np.array([entry.document for entry in questions.entries], np.int32)
        return Answers(texts=tuple(right.values()), marks=marks.astype(float), documents=documents)

    monkeypatch.setattr(evaluation_module, "answer", answering)
    data = load_split(quiz.data.folder, "validation").head(512)
    budget = Budget(memory_bytes=10**9, context=300)
    evaluation, _ = evaluate(
        model, Subject(spec=spec, deployment=Q4, budget=budget), data, None, evaluators=("exact_match",)
    )
    master = load_file(quiz.teacher / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    storage = Q4.storage(next(tensor for tensor in spec.tensors if tensor.name == "model.layers.0.mlp.up_proj.weight"))
    np.testing.assert_array_equal(seen[0].numpy(), deployed(master.numpy(), storage))
    assert evaluation.measurements["exact_match"].value == pytest.approx(0.5, abs=0.1)
    assert all(re.fullmatch(r"-?\d+", answer) for answer in right.values())


def test_answers_need_questions(lab, tmp_path):
    setting = lab.setting(tmp_path)
    data = load_split(lab.data.folder, "validation").head(64)
    with pytest.raises(InputError, match=r"exact_match needs questions with answers: give --data"):
        evaluate(
            load_model(lab.teacher, torch.float32),
            Subject(spec=setting.teacher_spec, deployment=F16, budget=setting.budget),
            data,
            None,
            evaluators=("exact_match",),
        )
