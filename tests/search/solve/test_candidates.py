"""Files of other tools next to a solution: which are refused, how they are measured, and one that wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autodistill.cli.app import main
from autodistill.errors import InputError, NothingFitsError
from autodistill.evaluation.base import Measurement
from autodistill.export.gguf import GgufExporter
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.loading import load_model
from autodistill.search.solve import SolveRequest, options, solve
from autodistill.search.solve.bench import Bench
from autodistill.search.solve.call import document
from autodistill.search.solve.call import export as exporting
from autodistill.search.solve.call.candidates import Candidate, check_candidate, open_candidate
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json

SIZES: dict[str, Any] = {"layers": 2, "width": 128, "heads": 2, "kv_heads": 1, "ffn": 128}
Q8_0 = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
Q5_0 = Deployment(runtime="llama.cpp", format="gguf-q5_0", bits=5, group_size=32)


def made(folder: Path, deployment: Deployment, out: Path) -> Path:
    return GgufExporter().export(folder, deployment, out).path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"), seed=3, **SIZES)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text"), documents=48)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def file(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(teacher, Q5_0, tmp_path_factory.mktemp("file"))


def asked(teacher: Path, text: Path, cache: Path, limit: int, **more: Any) -> SolveRequest:
    budgets = (Budget(memory_bytes=limit, context=256),)
    load: dict[str, Any] = {"tokens": 256, "sequence_length": 64}
    return SolveRequest(budgets=budgets, cache=cache, teacher=str(teacher), data=str(text), **load, **more)


def options_of(folder: Path, limit: int = 10**9) -> Options:
    spec = spec_from_config(read_json(folder / "config.json"))
    return Options(spec=spec, budget=Budget(memory_bytes=limit, context=256))


def test_a_file_is_measured_as_what_it_stores_and_counts_its_own_bytes(
    teacher: Path, text: Path, cache: Path, file: Path
) -> None:
    options = options_of(teacher)
    (one,) = solve(asked(teacher, text, cache, 10**9, candidates=(file,)))["solutions"]
    lines = {line["name"]: line for line in one["rivals"]}
    mine, ours = lines["student.gguf"], lines["gguf-q5_0"]
    assert (mine["what"], mine["path"], mine["predicted_kl"]) == ("candidate", str(file), None)
    assert Deployment.from_json(mine["deployment"]) == Q5_0
    assert mine["bytes"] == ours["bytes"] == options.memory(Q5_0).total_bytes
    if ours["kl"] is not None:
        assert (mine["kl"], mine["nll"], mine["accuracy"]) == (ours["kl"], ours["nll"], ours["accuracy"])
    assert 0 < mine["kl"] < 0.5
    assert 0 <= mine["accuracy"] <= 1
    assert mine["accuracy_stderr"] > 0
    assert one["winner"] is None  # with so much memory 16 bits are better


def test_a_file_that_does_not_fit_is_tried_with_a_smaller_cache(teacher: Path, file: Path) -> None:
    spec = options_of(teacher).spec
    small = Options(spec=spec, budget=Budget(memory_bytes=10**9, context=256, batch=64))
    candidate = open_candidate(file, spec)
    whole = candidate.memory(small).total_bytes
    less = candidate.with_cache(("q8_0", "q8_0")).memory(small).total_bytes
    assert less < whole
    for limit, cache_types in ((whole, "f16"), (whole - 1, "q8_0"), (less, "q8_0"), (less - 1, "f16")):
        tried = candidate.fitting(replace(small, budget=replace(small.budget, memory_bytes=limit)))
        assert tried.cache_types == (cache_types, cache_types)
    assert candidate.with_cache(("q8_0", "q8_0")).name == "student.gguf+kv-q8_0"


@pytest.fixture
def only_q4_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the solver know only one type, and no rivals."""
    monkeypatch.setattr(Options, "kinds", lambda self, tensor: ("q4_0",))
    monkeypatch.setattr(options, "_families", options._families.__wrapped__)  # without those of other tests
    monkeypatch.setattr(document, "rivals", lambda *arguments: ())


@pytest.mark.usefixtures("only_q4_0")
def test_a_better_file_is_taken_copied_and_run(
    teacher: Path, text: Path, tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ("--budget", "1GB", "--context", "256", "--tokens", "256", "--sequence-length", "64")
    places = ("--data", str(text), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"))
    assert main(["solve", str(teacher), *budget, *places, "--candidate", str(file), "--export", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (one,) = found["solutions"]
    assert one["winner"] == {"name": "student.gguf", "path": str(file)}
    assert one["as_good"] is None
    assert one["rivals"][0]["kl"] < one["solution"]["kl"]
    assert one["rivals"][0]["kl_above_solution"] < 0
    assert found["exported"]["name"] == "student.gguf"
    assert found["exported"]["agreement"] > 0.9
    assert abs(found["exported"]["excess"]) < 0.02
    assert (tmp_path / "out" / "student.gguf").read_bytes() == file.read_bytes()
    # Nothing is measured again, and the user is informed.
    assert main(["solve", str(teacher), *budget, *places, "--candidate", str(file)]) == 0
    said = capsys.readouterr()
    assert "measuring" not in said.err
    assert "student.gguf has a lower KL on the calibration text" in " ".join(said.out.split())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: save_tiny_teacher(folder, architecture="qwen3", **SIZES), "the architecture qwen3, and the"),
        (
            lambda folder: save_tiny_teacher(folder, **SIZES | {"ffn": 192}),
            r"has .*192.* for .*the teacher has \[",
        ),
        (
            lambda folder: save_tiny_teacher(folder, **SIZES | {"layers": 3}),
            r"for blk\.2\..* where the teacher has none",
        ),
        (lambda folder: save_tiny_teacher(folder, seed=4, **SIZES), "holds other weights than the teacher's"),
    ],
    ids=["architecture", "width", "depth", "weights"],
)
def test_a_file_of_another_model_is_refused_in_a_line(
    change: Callable[[Path], Path], words: str, teacher: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    other = made(change(tmp_path / "other"), Q8_0, tmp_path / "made")
    with pytest.raises(InputError, match=words) as failure:
        solve(asked(teacher, text, cache, 10**9, candidates=(other,)))
    assert "\n" not in str(failure.value)


def test_a_damaged_or_missing_file_is_refused_before_anything_is_read(
    teacher: Path, tmp_path: Path, file: Path
) -> None:
    (tmp_path / "half.gguf").write_bytes(file.read_bytes()[:-1000])
    (tmp_path / "text.gguf").write_text("no model")
    for name, words in (("half", "truncated or damaged"), ("text", "not a GGUF file"), ("none", "none.gguf")):
        request = asked(teacher, tmp_path / "nowhere", tmp_path, 10**9, candidates=(tmp_path / f"{name}.gguf",))
        with pytest.raises(InputError, match=words):
            solve(request)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.rope.freq_base": 12345.0}, r"llama.rope.freq_base 12345.0, where the teacher has 10000"),
        ({"tokenizer.ggml.tokens": ["a"] * 300}, "another tokenizer: its token 0 is 'a'"),
        ({"tokenizer.ggml.tokens": ["a"]}, "has 1 tokens"),
        ({"tokenizer.ggml.tokens": None}, "has 0 tokens"),
        ({"tokenizer.ggml.merges": ["a b"]}, "merges characters in another order"),
        ({"tokenizer.ggml.model": "bert"}, "a tokenizer of the kind 'bert'"),
    ],
)
def test_what_a_file_says_of_model_and_tokenizer_must_be_the_teachers(
    changes: dict[str, Any], words: str, teacher: Path, file: Path
) -> None:
    spec, header = options_of(teacher).spec, read_gguf(file)
    check_candidate(open_candidate(file, spec), teacher, spec)
    other = Candidate(file=replace(header, metadata=header.metadata | changes), stored=None)
    with pytest.raises(InputError, match=words):
        check_candidate(other, teacher, spec)


def test_types_that_are_not_written_here_are_measured(teacher: Path, file: Path) -> None:
    """IQ4_XS is an example: another tool wrote the bytes, and the gguf package reads them."""
    candidate = replace(open_candidate(file, options_of(teacher).spec), stored=None)
    assert candidate.memory(options_of(teacher)).total_bytes == options_of(teacher).memory(Q5_0).total_bytes
    bench = Bench(load_model(teacher, torch.float32), options_of(teacher).spec, {})
    before = {name: weight.clone() for name, weight in bench.model.named_parameters()}
    with bench.replaced(candidate.weights(bench)):
        moved = {name for name, weight in bench.model.named_parameters() if not weight.equal(before[name])}
    assert moved == {name for name in before if "norm" not in name}
    assert all(weight.equal(before[name]) for name, weight in bench.model.named_parameters())


def test_what_takes_more_than_the_budget_when_it_runs_is_removed(
    teacher: Path, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Heavier:
        def evaluate(self, subject: Any) -> tuple[Measurement, ...]:
            return (Measurement(name="memory_bytes", value=1.2e9, unit="bytes", direction="min", source="measured"),)

    monkeypatch.setattr(exporting, "load_evaluator", lambda name: Heavier())
    with pytest.raises(NothingFitsError, match=r"1.20 GB in llama.cpp, 200 MB over the budget, .* --budget 800MB"):
        solve(asked(teacher, text, cache, 10**9, export=True, out=tmp_path))
    assert not list(tmp_path.glob("*.gguf"))
