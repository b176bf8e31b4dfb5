"""What a budget, a tokenizer and a machine leave of a space, for students of the teacher's own shape."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.distillation.student.check import student_spec
from autodistill.errors import InputError, MissingDependencyError, NothingFitsError
from autodistill.estimates.fit import fits, holdable
from autodistill.hardware.budget import Budget, DeviceBudget
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.models.config import config_of, spec_from_config
from autodistill.search.campaign.admission import candidate_of
from autodistill.search.planning.placement import Place
from autodistill.search.request.feasibility import by_size, check_teacher, on_its_device, shortest_context
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import _check_kind, check_request, check_students
from autodistill.search.setup.loading import load
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space, load_space
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json, write_json

SMALL = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SEVEN = SMALL | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SPACE = load_space("declared")


LARGE = Budget(memory_bytes=10**12, context=256)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> SearchRequest:
    folder = tmp_path_factory.mktemp("inputs")
    return SearchRequest(
        budget=LARGE,
        space="declared",
        teacher=str(save_tiny_teacher(folder / "teacher", layers=5)),
        data=str(tiny_text(folder / "text")),
        runs=folder / "runs",
        cache=folder / "cache",
        runner="inline",
    )


UNKNOWN = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False}
LISTED = {
    "gguf": {"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0},
    "folder": {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0},
}


def uncut(tmp_path: Path, *deployments: str, **changes: object) -> SearchConfig:
    """Return a request in a space of these deployments, with a teacher whose text llama.cpp would cut differently."""
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=4)
    path = teacher / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": UNKNOWN}))
    space = SPACE.to_json() | {"deployments": [LISTED[name] for name in deployments]}
    write_json(tmp_path / "space.yaml", space)
    fields = {
        "budget": Budget(memory_bytes=16 * 10**9, context=256),
        "teacher": str(teacher),
        "data": str(tiny_text(tmp_path / "text", documents=30, sentences=24)),
        "space": str(tmp_path / "space.yaml"),
        "runs": tmp_path / "runs",
        "cache": tmp_path / "cache",
    }
    return check_request(SearchRequest(**(fields | changes)))  # type: ignore[arg-type]


def test_a_baseline_that_a_teacher_does_not_allow_is_named(asked: SearchRequest) -> None:
    with pytest.raises(InputError, match=r"the strategy narrow does not suit this teacher: alignment\.count is 8"):
        check_request(replace(asked, baseline=("hand_designed", "narrow")))


@pytest.mark.parametrize(
    ("strategy", "dimensions", "said"),
    [
        (None, {}, "'mine' trained one strategy: resume it with autodistill distill STRATEGY --resume --name mine"),
        ("lora", {"init.depth": {}}, "'mine' is a search: resume it with autodistill search --resume --name mine"),
        (None, {"init.depth": {}}, None),
        ("lora", {}, None),
    ],
)
def test_a_run_is_resumed_by_the_command_that_made_it(
    strategy: str | None, dimensions: dict[str, Any], said: str | None
) -> None:
    config: Any = SimpleNamespace(name="mine", strategy=strategy)
    with pytest.raises(InputError, match=re.escape(said)) if said else nullcontext():
        _check_kind(config, {"space_definition": {"dimensions": dimensions}})


def test_a_tokenizer_that_llama_cpp_lacks_takes_nothing_from_onnx_runtime(tmp_path: Path) -> None:
    loaded = load(uncut(tmp_path, "gguf", runtime="onnxruntime"), Place.local())
    assert loaded.spec.text_not_in_gguf
    assert not [note for note in loaded.notes if "GGUF" in note]


def test_a_tokenizer_that_llama_cpp_lacks_leaves_gguf_out_before_anything_is_trained(tmp_path: Path) -> None:
    config = uncut(tmp_path, "gguf", "folder")
    loaded = load(config, Place.local())
    assert "its pre_tokenizer is none of those that are known there" in loaded.spec.text_not_in_gguf
    (told,) = (note for note in loaded.notes if "GGUF" in note)
    assert told == f"the space's GGUF deployments are left out: {loaded.spec.text_not_in_gguf}"
    for strategy in config.space.baselines.values():
        if strategy.finishing is None:
            student = student_spec(strategy, loaded.spec)
            held = holdable(student, config.space.deployments)
            assert [deployment.format for deployment in held] == ["huggingface"]
            # The configuration that a row keeps gives the same result.
            assert holdable(spec_from_config(config_of(student)), config.space.deployments) == held


def test_a_pretrained_student_has_the_teachers_tokenizer(tmp_path: Path) -> None:
    teacher = replace(spec_from_config(SMALL), text_not_in_gguf="no such cut", not_in_gguf="no such scaling")
    small = save_tiny_teacher(tmp_path / "small", layers=1)
    strategy = next(iter(SPACE.baselines.values()))
    strategy = replace(strategy, init=Init(source="pretrained", model=str(small), depth=1.0))
    student = student_spec(strategy, teacher)
    assert (student.text_not_in_gguf, student.not_in_gguf) == ("no such cut", "")
    assert {deployment.container for deployment in holdable(student, SPACE.deployments)} == {
        "compressed-tensors",
        "huggingface",
    }


def test_a_space_of_gguf_alone_is_refused_for_such_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would cut text into other tokens"):
        load(uncut(tmp_path, "gguf"), Place.local())
    assert not (tmp_path / "runs").exists()


def test_what_is_left_must_fit_the_budget(tmp_path: Path) -> None:
    narrow = Budget(memory_bytes=40 * 10**6, context=256)
    with pytest.raises(NothingFitsError, match="nothing fits") as caught:
        load(uncut(tmp_path, "gguf", "folder", budget=narrow), Place.local())
    said = str(caught.value)
    assert "What needs less memory is left out: llama.cpp would cut text into other tokens" in said, "the cause"
    with pytest.raises(NothingFitsError) as caught:
        load(uncut(tmp_path, "folder", budget=narrow), Place.local())
    assert "is left out" not in str(caught.value), "of a space without GGUF files nothing smaller is"


def test_a_packing_that_the_installed_package_does_not_know_is_refused_before_any_work(
    asked: SearchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = {"runtime": "transformers", "format": "compressed-tensors", "bits": 3, "group_size": 32}
    write_json(tmp_path / "space.yaml", SPACE.to_json() | {"deployments": [LISTED["folder"], narrow]})
    check_request(replace(asked, space=str(tmp_path / "space.yaml")))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.17.0")
    with pytest.raises(MissingDependencyError, match=r"int3-g32 is packed as compressed-tensors 0\.18"):
        check_request(replace(asked, space=str(tmp_path / "space.yaml")))
    check_request(asked)


@pytest.mark.parametrize(("runtime", "refused"), [("llama.cpp", True), ("onnxruntime", False)])
def test_training_on_a_grid_of_gguf_asks_for_a_gguf_file_only_where_that_is_what_is_served(
    tmp_path: Path, runtime: str, refused: bool
) -> None:
    teacher = spec_from_config(read_json(save_tiny_teacher(tmp_path / "teacher", layers=2) / "config.json"))
    grid = {"format": "gguf-q4_0", "bits": 4, "group_size": 32}
    question: Any = SimpleNamespace(
        teacher_spec=replace(teacher, text_not_in_gguf="another kind of tokenizer"),
        deployments=(Deployment(runtime=runtime, **grid), Deployment.from_json(LISTED["folder"])),
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        raced=False,
    )
    found = candidate_of(question, Strategy(init=Init(depth=1.0, ffn=1.0), finishing=Finishing(**grid)))
    assert ("another kind of tokenizer" in (found.reason or "")) == refused
    assert bool(found.fits) != refused


def test_sequences_are_as_long_as_the_teacher_reads_and_no_longer() -> None:
    teacher = spec_from_config(SMALL)
    check_teacher(teacher, SPACE, LARGE, 2048)
    with pytest.raises(InputError, match="the teacher reads at most 2048 tokens at once, and sequences have 2049"):
        check_teacher(teacher, SPACE, LARGE, 2049)
    check_teacher(teacher, SPACE, replace(LARGE, context=2048), 2048)
    with pytest.raises(InputError, match="the teacher has a context of 2048 tokens, and the budget is stated at 2049"):
        check_teacher(teacher, SPACE, replace(LARGE, context=2049), 2048)


def test_the_shortest_context_is_of_the_model_that_reads_the_fewest_tokens(tmp_path: Path) -> None:
    small = str(save_tiny_teacher(tmp_path / "small", layers=1))
    read = read_json(Path(small) / "config.json")["max_position_embeddings"]
    space = replace(SPACE, baselines={"small": Strategy(init=Init(source="pretrained", model=small, depth=1.0))})
    for context, expected in ((read - 1, (read - 1, "the teacher")), (read + 1, (read, f"the pretrained {small}"))):
        teacher = replace(spec_from_config(SMALL), max_context=context)
        assert shortest_context(teacher, space) == expected


def test_a_space_loses_the_deployments_that_the_device_cannot_serve() -> None:
    phone = find_device("snapdragon 8 gen 2", devices())
    budget = DeviceBudget(memory_bytes=10**9, device=phone)
    folder, gguf = (Deployment.from_json(LISTED[name]) for name in ("folder", "gguf"))
    onnx = replace(folder, runtime="onnxruntime")
    assert on_its_device(replace(SPACE, deployments=(folder, gguf)), budget).deployments == (gguf,)
    assert on_its_device(replace(SPACE, deployments=(gguf,)), budget).deployments == (gguf,)
    for first, second in ((folder, onnx), (onnx, folder)):
        with pytest.raises(InputError, match=f"is for this device: .* serves .*, not {first.runtime}; name another"):
            on_its_device(replace(SPACE, deployments=(first, second)), budget)


def test_of_what_no_deployment_holds_the_smallest_student_says_why() -> None:
    """Groups of 32 divide the outputs of 8 heads of 60, but neither those of 4 heads nor 1000 neurons."""
    q8 = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
    space = Space.from_json({"dimensions": {"init.heads": {"choices": [1.0, 0.5]}}, "deployments": [q8]})
    teacher = spec_from_config(
        SMALL | {"intermediate_size": 1000, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 60}
    )
    assert [strategy.init.heads for strategy, _ in by_size(space, teacher)] == [0.5, 1.0]
    with pytest.raises(InputError, match=r"can hold the smallest student: \S*o_proj\.weight has rows of 240 weights"):
        check_teacher(teacher, space, LARGE, 2048)


def test_strategies_that_the_teacher_does_not_allow_are_left_out_unless_none_is_left() -> None:
    q8 = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
    teacher = spec_from_config(SMALL)  # 30 layers

    def widths(**choices: list[int]) -> Space:
        dimensions = {"init.depth": {"choices": [1.0]}, "init.ffn_widths": {"choices": choices}}
        return Space.from_json({"dimensions": dimensions, "deployments": [q8]})

    found = by_size(widths(short=[64], narrow=[64] * 30, wide=[128] * 30), teacher)
    assert [student.ffn_width for _, student in found] == [64, 128]
    assert [strategy.init.ffn_widths[0] for strategy, _ in found] == [64, 128]
    with pytest.raises(InputError, match=r"init\.ffn_widths has 2 numbers, and 30 of the teacher's 30 layers"):
        by_size(widths(pair=[64, 64], short=[64]), teacher)


def test_a_budget_that_nobody_meets_is_compared_with_the_student_of_the_least_memory() -> None:
    q8 = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
    space = Space.from_json({"dimensions": {"init.depth": {"choices": [1.0, 0.5, 0.75]}}, "deployments": [q8]})
    teacher, least = spec_from_config(SMALL), Strategy(init=Init(depth=0.5))
    need = min(fit.need for fit in fits(student_spec(least, teacher), space.deployments, LARGE))
    check_teacher(teacher, space, replace(LARGE, memory_bytes=need), 2048)
    with pytest.raises(NothingFitsError, match=r"lowest requirements \(50% even\)") as refused:
        check_teacher(teacher, space, replace(LARGE, memory_bytes=need - 1), 2048)
    assert "is left out" not in str(refused.value)
    cut = replace(teacher, text_not_in_gguf="another cut", not_in_gguf="another scaling")
    folder = replace(space, deployments=(Deployment.from_json(LISTED["folder"]), *space.deployments))
    with pytest.raises(NothingFitsError, match=r"What needs less memory is left out: another scaling$"):
        check_teacher(cut, folder, replace(LARGE, memory_bytes=1000), 2048)
    with pytest.raises(NothingFitsError) as refused:
        check_teacher(cut, replace(folder, deployments=folder.deployments[:1]), replace(LARGE, memory_bytes=1000), 2048)
    assert "is left out" not in str(refused.value)


def test_what_a_solved_space_offers_is_compared_with_the_measured_process(tmp_path: Path) -> None:
    """The budget holds the whole teacher in a mixture of types, and in no plain type."""
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture="gemma4_text", layers=6)
    text = tiny_text(tmp_path / "text")
    spec = replace(spec_from_config(read_json(teacher / "config.json")), process_bytes=60_000_000)
    plain, least = (
        min(fit.need for fit in fits(spec, held, LARGE))
        for held in (holdable(spec, SPACE.deployments), (Options(spec=spec, budget=LARGE).smallest()[0],))
    )
    assert least < plain
    budget = replace(LARGE, memory_bytes=(least + plain) // 2)
    request = SearchRequest(
        budget=budget, teacher=str(teacher), data=str(text), runs=tmp_path, cache=tmp_path / "cache", sequence_length=64
    )
    config = check_request(request)
    check_students(config, spec)
    with pytest.raises(NothingFitsError, match=r"the smallest deployment, gguf-\w+\+types-\w+, needs .* over the"):
        check_students(replace(config, budget=replace(budget, memory_bytes=least - 1)), spec)
