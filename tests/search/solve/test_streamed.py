"""A teacher with one block in memory at a time gives the scores and figures of one that is whole in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autodistill.cli.app import main
from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.inference.blocks_on_disk import BlocksOnDisk
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.search.solve import SolveRequest, plan_solve, solve
from autodistill.search.solve.bench import Bench, load_bench
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import Options
from autodistill.search.solve.streamed import StreamedBench, load_streamed
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json

SIZES: dict[str, Any] = {"layers": 3, "width": 128, "heads": 2, "kv_heads": 1, "ffn": 256}
ARCHITECTURES = ("llama", "gemma3_text", "gpt_neox")


@pytest.fixture(
    scope="module", params=["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ARCHITECTURES[1:])]
)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    sizes = SIZES if request.param != "gpt_neox" else {**SIZES, "kv_heads": 2}
    folder = save_tiny_teacher(tmp_path_factory.mktemp("teacher"), architecture=request.param, seed=3, **sizes)
    return Teacher(folder=folder, fingerprint="", name="tiny", license=None)


def test_constants_and_weights_are_those_of_a_loaded_model(teacher: Teacher) -> None:
    whole, apart = load_model(teacher.folder, torch.float32), BlocksOnDisk(teacher.folder)
    constants, own = dict(whole.named_buffers()), dict(apart.model.named_buffers())
    assert constants.keys() == own.keys()
    assert all(torch.equal(own[name], values) for name, values in constants.items())
    weights = dict(apart.model.named_parameters())
    for name, values in whole.named_parameters():
        assert name in apart.in_blocks or torch.equal(weights[name], values)
    for index in range(SIZES["layers"]):
        with apart.block(index) as names:
            assert all(torch.equal(weights[name], whole.get_parameter(name)) for name in names)
            # No other block is in memory.
            assert {name for name in apart.in_blocks if weights[name].numel()} == set(names)
    assert not any(weights[name].numel() for name in apart.in_blocks)


def test_scores_and_figures_are_those_of_a_whole_model(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The whole model takes the gradients of all blocks at once, like a model of no family.
    monkeypatch.setattr(Bench, "by_block", property(lambda bench: isinstance(bench, StreamedBench)))
    spec = spec_from_config(read_json(teacher.folder / "config.json"))
    options = Options(spec=spec, budget=Budget(memory_bytes=10**9, context=256))
    tokens = np.random.default_rng(0).integers(3, 250, (6, 64)).astype(np.int32)
    text = TokenSet(tokens=tokens, documents=np.repeat(np.arange(6, dtype=np.int32)[:, None], 64, axis=1))
    found = {}
    for way, bench in (("whole", load_bench(teacher, spec, None)), ("streamed", load_streamed(teacher, spec, None))):
        sample = bench.sample("calibration", text)
        library = Library(tmp_path / f"{way}.json", bench, options, sample, lambda _: None)
        library.build()
        kinds = {name: options.kinds(tensor) for name, tensor in (options.matrices | options.tables).items()}
        scores = {(name, kind): library.score(name, kind) for name, of in kinds.items() for kind in of}
        cache = next((pair for pair in options.caches if pair[0] == "q8_0"), ("f16", "f16"))
        mixed = options.deployment(options.smallest_types(), cache)
        with bench.shown({one.name: mixed.storage(one) for one in spec.tensors}):
            chosen = bench.choices(text)
        other = bench.sample("held-out", TokenSet(tokens=tokens[:2, ::-1].copy(), documents=text.documents[:2]))
        both = bench.measure_all(mixed, sample, other)
        assert both == (bench.measure(mixed, sample), bench.measure(mixed, other))
        assert both[0].nll != both[1].nll
        found[way] = (scores, sample, both, chosen)
    (whole, sample, joint, chosen), (streamed, own_sample, own_joint, own_chosen) = found["whole"], found["streamed"]
    assert own_sample.teacher == sample.teacher
    assert own_joint == joint
    assert all(np.array_equal(one, other) for one, other in zip(own_chosen, chosen, strict=True))
    assert streamed.keys() == whole.keys()
    for key, score in whole.items():
        # The streamed gradients are summed in another order.
        assert streamed[key].kl == pytest.approx(score.kl, rel=1e-4, abs=1e-12)
        assert streamed[key].stderr == pytest.approx(score.stderr, rel=1e-3, abs=1e-12)
        assert streamed[key].exact == score.exact


def test_on_a_gpu_both_texts_go_through_a_block_while_it_is_in_memory(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamedBench, "reads_together", True)
    spec = spec_from_config(read_json(teacher.folder / "config.json"))
    options = Options(spec=spec, budget=Budget(memory_bytes=10**9, context=256))
    bench = load_streamed(teacher, spec, None)
    tokens = np.random.default_rng(0).integers(3, 250, (4, 64)).astype(np.int32)
    documents = np.repeat(np.arange(4, dtype=np.int32)[:, None], 64, axis=1)
    sample, other = (
        bench.sample(name, TokenSet(tokens=tokens[part], documents=documents[part]))
        for name, part in (("calibration", slice(2)), ("held-out", slice(2, 4)))
    )
    library = Library(tmp_path / "library.json", bench, options, sample, lambda _: None, other)
    eight = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
    expected, read = bench.measure(eight, other), []
    block = StreamedBench._block
    monkeypatch.setattr(StreamedBench, "_block", lambda bench, index: read.append(index) or block(bench, index))
    library.joint(eight, sample)
    assert read == list(range(spec.layers))
    assert library.joint(eight, other) == expected
    assert len(read) == spec.layers


@pytest.mark.slow
def test_a_teacher_larger_than_its_memory_is_solved_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", seed=3, **{**SIZES, "layers": 4})
    text = tiny_text(tmp_path / "text", documents=30)

    def asked(**more: Any) -> SolveRequest:
        given: dict[str, Any] = {
            "teacher": str(teacher),
            "data": str(text),
            "tokens": 256,
            "sequence_length": 64,
        } | more
        given = {"cache": tmp_path / "cache"} | given
        return SolveRequest(budgets=(Budget(memory_bytes=40 * 10**6, context=256),), **given)

    whole = plan_solve(asked())["plan"]
    assert not whole["streamed"]
    less = whole["memory_bytes"] - 1
    planned = plan_solve(asked(memory_bytes=less))["plan"]
    assert planned["streamed"]
    assert planned["memory_bytes"] < planned["memory_bytes_whole"] == whole["memory_bytes"]
    in_whole, by_layer = solve(asked()), solve(asked(memory_bytes=less, cache=tmp_path / "other"))
    assert (in_whole["streamed"], by_layer["streamed"]) == (False, True)
    (one,), (other,) = in_whole["solutions"], by_layer["solutions"]
    assert other["solution"]["deployment"] == one["solution"]["deployment"]
    assert other["solution"]["kl"] == pytest.approx(one["solution"]["kl"])
    with pytest.raises(InputError, match=r"even with one layer in memory at a time: give a --memory of \d+MB"):
        plan_solve(asked(memory_bytes=planned["memory_bytes"] - 1))
    with pytest.raises(InputError, match=r"leave --candidate out, or give more --memory"):
        plan_solve(asked(memory_bytes=less, candidates=(tmp_path / "a.gguf",)))
    arguments = ["solve", str(teacher), "--budget", "40MB", "--context", "256", "--tokens", "256", "--plan"]
    assert main([*arguments, "--sequence-length", "64", "--memory", f"{less}B"]) == 0
    assert "one of its layers is in memory at a time" in " ".join(capsys.readouterr().out.split())
