"""What `solve` scores, finds, writes and refuses, on a tiny teacher."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch.nn import Linear

from autodistill.cli.app import main
from autodistill.cli.solve import solve_text
from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.shapes import cut_spec
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.distillation.teacher.stored_grids import stored_as
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimates.block_times import keep_times
from autodistill.estimates.solving import solving_work
from autodistill.estimates.speed import limit_seconds
from autodistill.export.gguf import GgufExporter
from autodistill.export.student_reader import StudentFiles
from autodistill.hardware.budget import Budget, DeviceBudget, LatencyLimit
from autodistill.hardware.catalog import listed
from autodistill.models.config import spec_from_config
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.quantization.formats import TYPES
from autodistill.quantization.rounding import deploy_tensor
from autodistill.search.solve import SolveRequest, forms, plan_solve, solve
from autodistill.search.solve.bench import Bench
from autodistill.search.solve.call import opened
from autodistill.search.solve.call.document import _visited
from autodistill.search.solve.cuts import named, smallest
from autodistill.search.solve.forms import CUTS, cut_forms
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import KEYS, Options
from autodistill.search.solve.rivals import nearest
from autodistill.search.solve.widths import Widths
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Init
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json
from tests.search.solve.timed import quick_in_8_bits

CONTEXT, LENGTH = 256, 64
SIZES: dict[str, Any] = {"layers": 3, "width": 128, "heads": 2, "kv_heads": 1, "ffn": 256}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"), seed=3, **SIZES)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text"), documents=48)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def options_of(folder: Path, limit: int = 10**9) -> Options:
    spec = spec_from_config(read_json(folder / "config.json"))
    return Options(spec=spec, budget=Budget(memory_bytes=limit, context=CONTEXT))


def asked(teacher: Path, text: Path, cache: Path, *limits: int, **more: Any) -> SolveRequest:
    budgets = tuple(Budget(memory_bytes=limit, context=CONTEXT) for limit in limits)
    return SolveRequest(
        budgets=budgets,
        cache=cache,
        teacher=str(teacher),
        data=str(text),
        **{"tokens": 512, "sequence_length": LENGTH, **more},
    )


def binding(found: dict[str, Any]) -> set[str]:
    """Return the names of the limits that bind a solution."""
    return {one["name"] for one in found["limits"] if one["binds"]}


def middle(options: Options) -> int:
    """Return a limit between the smallest storage and 8 bits."""
    eight = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
    return (options.smallest()[1].total_bytes + options.memory(eight).total_bytes) // 2


@pytest.fixture(scope="module")
def found(teacher: Path, text: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    limit = middle(options_of(teacher))
    return solve(asked(teacher, text, cache, limit, export=True, out=tmp_path_factory.mktemp("out")))


def test_gradients_that_are_no_finite_numbers_are_refused(teacher: Path, tmp_path: Path) -> None:
    """Such gradients used to be stored as None, and a mean was taken over them."""
    options = options_of(teacher)
    library = Library(tmp_path / "library.json", None, options, None, lambda _: None)  # type: ignore[arg-type]
    none = [[None, None], [None, None]]
    scores = {name: dict.fromkeys(options.kinds(one), none) for name, one in options.matrices.items()}
    library._held["passes"] = {"0": scores}
    with pytest.raises(InputError, match=r"gradients at .* are no finite numbers: its weights are damaged"):
        library.score(next(iter(options.matrices)), "q4_0")


def test_scores_are_what_replacing_a_matrix_costs(teacher: Path, text: Path, cache: Path, tmp_path: Path) -> None:
    options = options_of(teacher)
    data = prepare(resolve_data(str(text)), teacher, tokenizer_fingerprint(teacher), LENGTH, cache)
    tokens = load_split(data.folder, "train").head(1024)
    bench = Bench(load_model(teacher, torch.float32), options.spec, {})
    sample = bench.sample("calibration", tokens)
    library = Library(tmp_path / "library.json", bench, options, sample, lambda _: None)
    library.build()

    model = load_model(teacher, torch.float32)
    weights = dict(model.named_parameters())
    ids = torch.from_numpy(tokens.tokens.astype(np.int64))

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(ids).logits[:, :-1].double(), dim=-1)

    def replaced(name: str, kind: str) -> float:
        master = weights[name].data
        weights[name].data = deploy_tensor(master, TYPES[kind])
        moved = log_probabilities()
        weights[name].data = master
        return float((before.exp() * (before - moved)).sum(-1).mean())

    before = log_probabilities()
    for name in options.tables:
        for kind in ("q8_0", "q4_0"):
            score = library.score(name, kind)
            assert score.exact
            assert score.kl == pytest.approx(replaced(name, kind), rel=0.02, abs=1e-5)
    pairs = [
        (library.score(name, kind).kl, replaced(name, kind))
        for name in options.matrices
        for kind in ("q5_0", "q4_0", "q2_k")
        if kind in options.kinds(options.matrices[name])
    ]
    scored, direct = np.array(pairs).T
    assert spearmanr(scored, direct).statistic > 0.9
    assert 0.7 < scored.sum() / direct.sum() < 1.4
    assert library.score(KEYS, "f16").kl == 0 < library.score(KEYS, "q8_0").kl < library.score(KEYS, "q4_0").kl


def test_a_solution_fits_is_written_and_beats_what_is_plain(found: dict[str, Any], teacher: Path) -> None:
    (one,) = found["solutions"]
    solution, options = one["solution"], options_of(teacher)
    deployment = Deployment.from_json(solution["deployment"])
    estimate = options.memory(deployment)
    assert solution["bytes"] == estimate.total_bytes <= one["budget"]["memory_bytes"]
    assert solution["left_bytes"] == one["budget"]["memory_bytes"] - solution["bytes"]
    # The counted bytes are those of the file.
    file = gguf.GGUFReader(found["exported"]["path"])
    assert sum(int(tensor.n_bytes) for tensor in file.tensors) == solution["weights_bytes"]
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in file.tensors}
    assert types["token_embd.weight"] == solution["types"]["tables"]["embed_tokens"]
    assert found["exported"]["agreement"] > 0.9
    assert abs(found["exported"]["excess"]) < 0.02
    assert solution["types"]["cache_keys"] in ("f16", found["exported"]["serve"].partition("type-k ")[2].split(" ")[0])

    fitting = [rival for rival in one["rivals"] if rival["fits"] and rival["kl"] is not None]
    assert fitting
    assert all(solution["kl"] < rival["kl"] for rival in fitting)
    assert one["as_good"] is None
    assert solution["predicted_kl"] == pytest.approx(solution["calibration_kl"], rel=0.4)
    assert {rival["what"].split(",")[0] for rival in one["rivals"]} == {"uniform", "mixture of llama.cpp"}


def test_a_plan_says_time_and_memory_and_makes_nothing(
    teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = middle(options_of(teacher))
    planned = plan_solve(asked(teacher, text, tmp_path / "cache", limit))
    plan = planned["plan"]
    parameters = sum(one.numel() for one in load_model(teacher, torch.float32).parameters())
    assert planned["teacher"]["parameters"] == parameters
    assert plan["memory_bytes"] > 8 * parameters
    assert 0 < plan["seconds"] < plan["seconds_with_cuts"]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(NothingFitsError):
        plan_solve(asked(teacher, text, tmp_path / "cache", 1000))
    arguments = ["solve", str(teacher), "--budget", f"{limit}B", "--context", str(CONTEXT), "--plan"]
    assert main([*arguments, "--cache", str(tmp_path / "cache")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{parameters:,} parameters" in said
    assert "All of this is predicted." in said


def test_a_first_answer_reads_a_quarter_and_tries_less(
    teacher: Path, text: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = middle(options_of(teacher))
    wanted = asked(teacher, text, cache, limit, coarse=True)
    first, whole = (plan_solve(one)["plan"]["operations"] for one in (wanted, replace(wanted, coarse=False)))
    # A quarter of the text costs a quarter of the gradients. Less is measured, and no errors are made up for.
    assert first["scores of types, by gradients"] == whole["scores of types, by gradients"] / 4
    assert first["whole storages"] < whole["whole storages"] / 2
    assert first["the solution's errors made up for"] == 0 < whole["the solution's errors made up for"]
    words = ["--context", str(CONTEXT), "--data", str(text), "--tokens", "512", "--sequence-length", str(LENGTH)]
    arguments = ["solve", str(teacher), "--budget", f"{limit}B", "--coarse", *words, "--cache", str(cache)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (solved,) = found["solutions"]
    assert found["coarse"]
    assert (found["calibration_tokens"], found["held_out_tokens"]) == (126, 252)
    assert solved["solution"]["bytes"] <= limit
    assert not solved["solution"]["compensated"]
    plain = [one["kl"] for one in solved["rivals"] if one["fits"] and one["kl"] is not None]
    assert solved["solution"]["kl"] <= min(plain) + 0.01
    assert main(arguments) == 0
    assert "without --coarse more is read and tried" in " ".join(capsys.readouterr().out.split())


def test_a_plan_counts_products_as_an_independent_sum_does(teacher: Path) -> None:
    options = options_of(teacher)
    kinds = dict.fromkeys(options.matrices | options.tables, ("q8_0", "q4_0"))
    work = solving_work(options.spec, kinds, 4, 100)
    linear = sum(
        one.weight.numel() for one in load_model(teacher, torch.float32).model.modules() if type(one) is Linear
    )
    table = options.spec.vocabulary * options.spec.width
    # Counted are one pass forward and one back, each block once more, and the errors of each matrix in two types.
    assert work.operations["scores of types, by gradients"] == 100 * (4 * (linear + table) + (2 + 2 * 2) * linear)
    assert work.operations["scores of tables and cache"] == (2 * len(options.tables) + 4) * 100 * 2 * (linear + table)
    assert work.rounded == {kind: linear + len(options.tables) * table for kind in ("q8_0", "q4_0")}
    rounding = {"q8_0": 1e-9, "q4_0": 2e-9}
    wanted = sum(work.operations.values()) / 1e9 + 3e-9 * work.rounded["q8_0"]
    assert work.seconds(1e9, rounding) == pytest.approx(wanted)


@pytest.mark.slow
def test_files_and_latency_are_limits_too(teacher: Path, text: Path, cache: Path) -> None:
    options = options_of(teacher)
    wide = middle(options) + 200_000
    (free,) = solve(asked(teacher, text, cache, wide))["solutions"]
    limit = (free["solution"]["weights_bytes"] + options.smallest()[1].weights_bytes) // 2
    (small,) = solve(asked(teacher, text, cache, wide, file_bytes=limit))["solutions"]
    assert small["solution"]["weights_bytes"] <= limit < free["solution"]["weights_bytes"]
    # The cache gets what the file may not hold.
    assert small["solution"]["kv_cache_bytes"] >= free["solution"]["kv_cache_bytes"]
    assert binding(free) == {"memory"}
    assert "file size" in binding(small)
    left = {one["name"]: one["left"] for one in small["limits"]}
    assert left["file size"] == limit - small["solution"]["weights_bytes"]
    assert left["memory"] == small["solution"]["left_bytes"]
    with pytest.raises(NothingFitsError, match=r"nothing fits a file of .* give a --file-size of"):
        solve(asked(teacher, text, cache, wide, file_bytes=1000))

    device = next(one for one in listed() if "llama.cpp" in one.runtimes and not one.discrete)
    quick = LatencyLimit(quantity="tpot", percentile=95, seconds=1.0, streams=1)

    def within(seconds: float) -> dict[str, Any]:
        limits = (replace(quick, seconds=seconds),)
        budget = DeviceBudget(memory_bytes=wide, context=CONTEXT, device=device, latency=limits)
        return solve(replace(asked(teacher, text, cache, wide), budgets=(budget,)))

    def takes(found: dict[str, Any]) -> float:
        (solution,) = found["solutions"]
        deployment = Deployment.from_json(solution["solution"]["deployment"])
        return limit_seconds(options.spec, deployment, device, quick, context=CONTEXT)

    slow = takes(within(10.0))
    least = limit_seconds(options.spec, options.smallest()[0], device, quick, context=CONTEXT)
    between = (slow + least) / 2
    assert least < between < slow
    assert takes(late := within(between)) <= between
    assert quick.name in binding(late["solutions"][0])
    assert binding(within(10.0)["solutions"][0]) == {"memory"}
    with pytest.raises(NothingFitsError, match="nothing keeps to the latency"):
        within(1e-9)


def test_a_limit_goes_by_times_of_blocks_where_they_are_there_and_the_result_says_so(
    teacher: Path, text: Path, cache: Path
) -> None:
    options = options_of(teacher)
    device = next(one for one in listed() if "llama.cpp" in one.runtimes and not one.discrete)
    limit = LatencyLimit(quantity="tpot", percentile=50, seconds=0.02, streams=1)
    budget = DeviceBudget(memory_bytes=10**9, context=CONTEXT, device=device, latency=(limit,))
    request = replace(asked(teacher, text, cache, 10**9), budgets=(budget,))
    path = keep_times(cache, quick_in_8_bits(device.name, options.spec, CONTEXT))
    try:
        found = solve(request)
    finally:
        path.unlink()
    (solution,) = (line["solution"] for line in found["solutions"])
    assert {*solution["types"]["matrices"], *solution["types"]["tables"].values()} == {"q8_0"}
    (told,) = solution["latency"]
    assert told["by"] == f"blocks timed on {device.name}, 2026-11-29"
    assert told["seconds"] == pytest.approx(options.spec.layers * 3e-3 + 1e-3)
    shown = " ".join(solve_text(found, 120).split())
    assert f"within 20.0ms, by {told['by']}; the roofline has" in shown


@pytest.mark.slow
def test_more_memory_never_costs_more_and_a_budget_below_the_smallest_is_told(
    teacher: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    options = options_of(teacher)
    whole = options.smallest()[1].total_bytes
    *least, need = smallest(options)
    name = named(*least)
    assert need < whole
    limits = [need - 1, whole - 30_000, whole, middle(options), 10**9]
    swept = solve(asked(teacher, text, cache, *limits, out=tmp_path))
    assert [miss["memory_bytes"] for miss in swept["nothing_fits"]] == [need - 1]
    assert swept["smallest"] == {"name": name, "bytes": need}
    cut, least, between, most = (one["solution"] for one in swept["solutions"])
    assert cut["family"] in CUTS
    assert cut["bytes"] <= whole - 30_000
    assert least["bytes"] <= whole
    assert cut["calibration_kl"] > least["calibration_kl"] > between["calibration_kl"] > most["calibration_kl"]
    assert most["kl"] < 1e-4
    *bound, free = swept["solutions"]
    assert all(binding(one) == {"memory"} for one in bound)
    assert (binding(free), free["plain"], most["name"]) == (set(), "uniform", "gguf-f16")
    assert not any(one["plain"] for one in bound if one["solution"]["family"] in CUTS)
    assert json.loads((tmp_path / "solve.json").read_text())["solutions"][1]["solution"]["name"] == least["name"]


@pytest.mark.slow
def test_a_call_that_was_cut_off_goes_on_to_the_same_solution(
    found: dict[str, Any], teacher: Path, text: Path, tmp_path: Path
) -> None:
    request = asked(teacher, text, tmp_path, middle(options_of(teacher)))

    def cut_at(message: int) -> tuple[list[str], dict[str, Any] | None]:
        told: list[str] = []

        def notify(line: str) -> None:
            told.append(line)
            if len(told) == message:
                raise KeyboardInterrupt

        try:
            return told, solve(request, notify)
        except KeyboardInterrupt:
            return told, None

    assert cut_at(3)[1] is None
    assert cut_at(14)[1] is None
    told, again = cut_at(0)
    assert again is not None
    assert not any("gradients" in line for line in told)
    assert again["solutions"] == found["solutions"]
    # All that is known is read, and nothing is done twice. A damaged file is made anew.
    assert cut_at(1)[1] == again
    (library,) = (tmp_path / "solve").glob("*.json")
    library.write_text(library.read_text()[:1000])
    assert solve(request)["solutions"] == found["solutions"]


def test_a_smaller_table_leaves_the_codes_of_a_file_as_they_are(teacher: Path, tmp_path: Path) -> None:
    mixed = Deployment(
        runtime="llama.cpp",
        format="gguf-q4_1",
        bits=4,
        group_size=32,
        symmetric=False,
        types=(("embeddings", "q5_1"), ("layers.1.mlp.up_proj", "q8_0")),
    )
    file = GgufExporter().export(teacher, mixed, tmp_path / "made").path
    reference = resolve_teacher(str(file))
    made = materialize(reference, tmp_path / "cache")
    folder, stored = stored_as(reference, made, options_of(made.folder).spec, tmp_path / "cache")
    assert stored is not None
    assert (stored.deployment, stored.exact) == (mixed, True)
    # With a smaller table, the codes of all other tensors stay the same.
    smaller = Deployment.from_json(mixed.to_json() | {"types": dict(mixed.types) | {"embeddings": "q4_0"}})
    own = read_gguf(file)
    with StudentFiles(folder.folder, smaller) as files:
        for tensor in own.tensors:
            name = str(own.family.from_gguf_name(tensor.name))
            assert np.array_equal(files.deployed(name), own.values(tensor)) == ("embed" not in name), name


def test_a_teachers_own_codes_are_a_member_and_lose_nothing(teacher: Path, text: Path, tmp_path: Path) -> None:
    own = Deployment(runtime="llama.cpp", format="gguf-q4_1", bits=4, group_size=32, symmetric=False)
    quantised = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    with StudentFiles(teacher, own) as files:
        weights = {name: torch.from_numpy(files.deployed(name).copy()) for name in files.specs}
    save_file(weights, quantised / "model.safetensors", metadata={"format": "pt"})
    found = solve(asked(quantised, text, tmp_path / "cache", options_of(teacher).memory(own).total_bytes))
    (one,) = found["solutions"]
    assert Deployment.from_json(one["solution"]["deployment"]) == own
    assert one["solution"]["kl"] < 1e-9
    assert one["as_good"] == own.name == one["rivals"][0]["name"]
    assert one["plain"] == one["rivals"][0]["what"] == "teacher's own codes"
    assert binding(one) == set()  # its own codes lose nothing
    assert found["teacher"]["stored"].startswith("the teacher is pre-quantised: its matrices lie on Q4_1")


def test_the_nearest_plain_storage_keeps_own_codes_with_the_largest_tables_that_fit(teacher: Path) -> None:
    own = Deployment(runtime="llama.cpp", format="gguf-q4_1", bits=4, group_size=32, symmetric=False)
    whole = options_of(teacher).memory(own).total_bytes
    assert nearest(options_of(teacher), own) == own
    smaller = nearest(options_of(teacher, whole - 1), own)
    assert smaller is not None
    types, owned = options_of(teacher).types(smaller), options_of(teacher).types(own)
    assert all(types[name] == owned[name] for name in options_of(teacher).matrices)
    assert smaller.cache_types == ("q8_0", "q8_0")
    assert types["model.embed_tokens.weight"] == owned["model.embed_tokens.weight"]
    assert nearest(options_of(teacher), None).name == "gguf-f16"
    sixteen = options_of(teacher).memory(nearest(options_of(teacher), None)).total_bytes
    assert nearest(options_of(teacher, sixteen // 4), None) is None


def test_columns_count_by_the_mean_square_of_their_inputs(teacher: Path, text: Path, cache: Path) -> None:
    """A copy of the model records the inputs independently.

    A tied table counts the mean of its rows and of the head.
    """
    options = options_of(teacher)
    data = prepare(resolve_data(str(text)), teacher, tokenizer_fingerprint(teacher), LENGTH, cache)
    tokens = load_split(data.folder, "train").head(256)
    bench = Bench(load_model(teacher, torch.float32), options.spec, {})
    q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
    before = bench.measure(q4_0, bench.sample("calibration", tokens))
    bench.weigh(tokens)
    assert bench.weighed
    model, seen = load_model(teacher, torch.float32), {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda _, given, __, name=name: seen.__setitem__(name, given[0]))
    with torch.no_grad():
        model(torch.from_numpy(tokens.tokens.astype(np.int64)))
    weights = dict(model.named_parameters())
    for name, inputs in seen.items():
        squares = inputs.double().square().flatten(0, 1).mean(0)
        key = f"{name}.weight" if f"{name}.weight" in weights else "model.embed_tokens.weight"
        counts = squares / squares.mean() + (key != f"{name}.weight")
        for kind in ("q4_0", "q4_1"):
            tried = [bench.stored(key, TYPES[kind]), deploy_tensor(weights[key].data, TYPES[kind])]
            mine, plain = ((one - weights[key].data).double().square() @ counts for one in tried)
            assert float(mine.sum()) < 0.97 * float(plain.sum())
    after = bench.measure(q4_0, bench.sample("calibration", tokens))
    assert after.kl < before.kl


def made(fields: dict[str, Any]) -> SolveRequest:
    return SolveRequest(**fields)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": LENGTH}, "fewer than two sequences"),
        ({"tokens": 7 * LENGTH, "coarse": True}, "a quarter of --tokens 448, are fewer than two sequences"),
        ({"tokens": 10**400}, "--tokens must be at most"),
        ({"export": True}, "--export writes the solution of one budget into a folder"),
        ({"budgets": (Budget(memory_bytes=10**9, context=1024),)}, "has a context of 512 tokens: give --context 512"),
        ({"sequence_length": 600, "tokens": 2048}, "give --sequence-length 512 or less"),
        ({"budgets": ()}, "solve takes a budget"),
    ],
)
def test_what_cannot_be_solved_is_refused(
    changes: dict[str, Any], words: str, teacher: Path, text: Path, cache: Path
) -> None:
    fields = vars(asked(teacher, text, cache, 10**9)) | changes
    with pytest.raises(InputError, match=words):
        solve(made(fields))


def test_conversations_are_refused(teacher: Path, cache: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"what is {n}", "answer": "a number"}) for n in range(50)]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match="holds conversations: solve takes plain text"):
        solve(asked(teacher, tmp_path / "asked.jsonl", cache, 10**9))


@pytest.mark.parametrize("family", [pytest.param("narrow", marks=pytest.mark.slow), "layered"])
def test_a_cut_student_is_written_and_runs_as_it_was_measured(
    family: str, teacher: Path, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = options_of(teacher).smallest()[1].total_bytes - 20_000
    monkeypatch.setattr(forms, "cut_forms", partial(cut_forms, families=(family,)))
    # So small a model saves most if its widest layer, and with it all layers, are narrower.
    monkeypatch.setattr(Widths, "best", lambda solver, limit, count: [(192, 64, 128)])
    found = solve(asked(teacher, text, cache, limit, export=True, out=tmp_path))
    (one,) = found["solutions"]
    solution, exported = one["solution"], found["exported"]
    assert solution["family"] == family
    assert "repaired" in solution["name"]
    assert not any(rival["fits"] for rival in one["rivals"])
    # The file has the student's shape, and llama.cpp chooses the tokens that were measured.
    file = gguf.GGUFReader(exported["path"])
    assert sum(int(tensor.n_bytes) for tensor in file.tensors) == solution["weights_bytes"]
    student = cut_spec(Init.from_json(solution["init"]), options_of(teacher).spec)
    assert exported["tensors"] == len(student.tensors)
    assert exported["agreement"] > 0.9
    assert abs(exported["excess"]) < 0.02
    assert not list(cache.glob(".student-*"))


def test_each_student_is_measured_on_all_texts_in_a_row_and_the_best_comes_last() -> None:
    asked_for: list[tuple[str, str]] = []

    def form(name: str) -> Any:
        def joint(deployment: object, sample: str) -> Any:
            asked_for.append((name, sample))
            return SimpleNamespace(accuracy=0.5)

        return SimpleNamespace(scores=SimpleNamespace(joint=joint), deployment=None, name=name)

    best, other = form("best"), form("other")
    texts: tuple[Any, ...] = ("calibration", "held-out", "copying")
    assert _visited([best, other], *texts) == [best, other]
    # A student is made again whenever another one was measured in between.
    assert [name for name, _ in asked_for] == ["other", "best", "best"]
    assert ("best", "copying") in asked_for


def test_a_budget_below_the_smallest_storage_names_it_and_ends_with_3(
    teacher: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    *least, need = smallest(options_of(teacher))
    name = named(*least)
    with pytest.raises(NothingFitsError, match=f"the smallest model that solve can choose, {re.escape(name)}, needs"):
        solve(asked(teacher, text, tmp_path, need - 1))
    words = ["solve", str(teacher), "--budget", "1MB", "--context", "256", "--cache", str(tmp_path), "--json"]
    assert main(words) == 3
    assert name in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("more", [3_000_000, -3_000_000])
def test_a_budget_is_refused_by_what_llama_cpps_process_takes_here(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    options = options_of(teacher)
    predicted = options.smallest()[1].overhead_bytes
    need = smallest(options)[2]
    monkeypatch.setattr(opened, "measured_process_bytes", lambda folder, vocabulary, cache: predicted + more)
    request = asked(teacher, tmp_path / "nowhere", tmp_path, need - 1)
    if more > 0:
        # A budget that is refused names one that is then enough.
        with pytest.raises(NothingFitsError) as caught:
            solve(request)
        told = re.search(r"give a --budget of (\d+)MB", str(caught.value))
        assert told is not None
        assert int(told[1]) * 10**6 >= need + more
    else:
        with pytest.raises(InputError, match="nowhere") as refused:
            solve(request)
        assert not isinstance(refused.value, NothingFitsError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "solve takes --budget"),
        (("--budget", "1GB", "--sweep", "1GB..2GB"), "give one of the two"),
        (("--tiers", "--device", "4090"), "leave --budget, --sweep and --device out"),
        (("--sweep", "1GB"), "write two sizes, like"),
        (("--sweep", "2GB..1GB"), "from a smaller size to a larger"),
        (("--budget", "1GB", "--batch", "0"), "--batch must be at least 1"),
    ],
)
def test_command_lines_that_make_no_budget(
    options: tuple[str, ...], words: str, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["solve", str(teacher), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_every_class_of_gpus_has_its_solution_of_one_library(
    teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(text), "--tokens", "256", "--sequence-length", str(LENGTH), "--cache", str(tmp_path)]
    assert main(["solve", str(teacher), "--tiers", *words, "--batch", "40000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # With so many streams, the caches alone take more memory than a small GPU has.
    budgets = [one["budget"] for one in found["solutions"]]
    sizes = [one["tier_bytes"] for one in budgets]
    misses = [miss["tier_bytes"] for miss in found["nothing_fits"]]
    assert misses + sizes == [size * 10**9 for size in (4, 8, 12, 16, 24, 48, 80)]
    assert next(one["least_device"] for one in budgets if one["tier_bytes"] == 16 * 10**9) == "NVIDIA T4"
    kept = [one["solution"]["calibration_kl"] for one in found["solutions"]]
    assert kept == sorted(kept, reverse=True)
    for one in found["solutions"]:
        assert one["solution"]["types"]["cache_keys"] == one["solution"]["types"]["cache_values"]
    assert len([one for one in (tmp_path / "solve").glob("*.json") if not one.stem.endswith("-shapes")]) == 1


def test_a_person_reads_parts_rivals_and_what_more_would_buy(
    found: dict[str, Any], teacher: Path, text: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = found["solutions"][0]["budget"]["memory_bytes"]
    words = ["--data", str(text), "--context", str(CONTEXT), "--tokens", "512", "--sequence-length", str(LENGTH)]
    assert main(["solve", str(teacher), "--budget", f"{limit}B", *words, "--cache", str(cache)]) == 0
    said = " ".join(capsys.readouterr().out.split())  # lines may be wrapped anywhere
    assert found["solutions"][0]["solution"]["name"] in said
    for word in ("kv cache", "overhead", "predicted KL", "gguf-q4_0", "5.00 MB more would lower", "too large"):
        assert word in said
