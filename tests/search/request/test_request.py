"""What a search refuses before any work. Each message is one line that says what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from autodistill.errors import AutoDistillError, InputError
from autodistill.hardware.budget import Budget, DeviceBudget, parse_latency
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device
from autodistill.runs.remote_copy import keep
from autodistill.runs.run_folder import RunFolder
from autodistill.search.planning.durations import TRAINING
from autodistill.search.request.given_space import against
from autodistill.search.request.references import with_models
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import resolve
from autodistill.search.request.validate import check_request
from autodistill.strategy.named import load_strategy
from autodistill.strategy.space import Space
from autodistill.testing import save_tiny_teacher, small_plan, tiny_text
from autodistill.utils.json_files import write_json
from autodistill.utils.storage import Storage
from tests.data.test_documents import Hub as DataHub
from tests.distillation.teacher.test_resolve import Hub

SPACE = """
dimensions:
  init.layers: {choices: [even, contiguous]}
deployments: [{runtime: transformers, format: huggingface, bits: 16, group_size: 0}]
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> SearchRequest:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "two.yaml").write_text(SPACE)
    (folder / "longer.yaml").write_text(f"{SPACE}lengths: [1, 2]\n")
    (folder / "file").write_text("no folder")
    return SearchRequest(
        budget=Budget(memory_bytes=16 * 10**9, context=256),
        space="declared",
        teacher=str(save_tiny_teacher(folder / "teacher", layers=5)),
        data=str(tiny_text(folder / "text")),
        runs=folder / "runs",
        cache=folder / "cache",
        runner="inline",
    )


def test_baselines_of_ones_own_take_the_place_of_the_spaces(asked: SearchRequest, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("init: {depth: 0.6}\n")
    config = check_request(replace(asked, baseline=("full_recipe", str(mine))))
    assert list(config.space.baselines) == ["full_recipe", "mine"]
    assert config.space.baselines["full_recipe"] == load_strategy("full_recipe")
    assert config.space.baselines["mine"].init.depth == 0.6
    assert config.space.dimensions == check_request(asked).space.dimensions


def test_a_type_of_cache_is_that_of_every_deployment_in_llama_cpp(asked: SearchRequest, tmp_path: Path) -> None:
    plain = check_request(asked).space
    config = check_request(replace(asked, kv_type="q8_0")).space
    assert {one.cache_types for one in config.deployments if one.runtime == "llama.cpp"} == {("q8_0", "q8_0")}
    others = [one for one in config.deployments if one.runtime != "llama.cpp"]
    assert others == [one for one in plain.deployments if one.runtime != "llama.cpp"]
    assert len(config.deployments) == len(plain.deployments)
    assert config.hash != plain.hash
    with pytest.raises(InputError, match=r"--kv-type is 'q5_0'; it can be f16, q8_0, q4_0"):
        check_request(replace(asked, kv_type="q5_0"))
    (tmp_path / "transformers.yaml").write_text(SPACE)
    with pytest.raises(InputError, match=r"--kv-type applies to llama.cpp, which no deployment of the space .* uses"):
        check_request(replace(asked, space=str(tmp_path / "transformers.yaml"), kv_type="q8_0"))


def test_a_run_goes_on_with_its_cache_and_with_no_other(asked: SearchRequest) -> None:
    begun = check_request(replace(asked, kv_type="q8_0"))
    stored = {
        "space_definition": begun.space.to_json(),
        "space_hash": begun.space.hash,
        "kv_type": begun.kv_type,
    }
    assert resolve(asked, stored).space.hash == begun.space.hash
    assert resolve(replace(asked, kv_type="q8_0"), stored).space.hash == begun.space.hash
    with pytest.raises(InputError, match="began without --kv-type f16: leave it out"):
        resolve(replace(asked, kv_type="f16"), stored)


def test_one_runtime_serves_whatever_it_can_of_a_space_and_goes_on_with_it(asked: SearchRequest) -> None:
    plain, begun = check_request(asked).space, check_request(replace(asked, runtime="onnxruntime"))
    deployments = begun.space.deployments
    assert {one.runtime for one in deployments} == {"onnxruntime"}
    assert {one.scheme for one in deployments} < {one.scheme for one in plain.deployments}
    stored = {
        "space_definition": begun.space.to_json(),
        "space_hash": begun.space.hash,
        "served_by": begun.served_by,
    }
    assert resolve(asked, stored).space.hash == begun.space.hash
    with pytest.raises(InputError, match="began without --runtime vllm: leave it out"):
        resolve(replace(asked, runtime="vllm"), stored)
    with pytest.raises(InputError, match="--runtime mlx serves no deployment of the space"):
        check_request(replace(asked, runtime="mlx"))
    with pytest.raises(InputError, match=r"solves types for llama\.cpp; give --space declared"):
        check_request(replace(asked, space="default", runtime="onnxruntime"))


def test_a_run_goes_on_with_its_own_baselines_and_with_no_others(asked: SearchRequest, tmp_path: Path) -> None:
    stored = stored_run(asked) | {
        "baselines": ["gkd"],
        "space_hash": check_request(replace(asked, baseline=("gkd",))).space.hash,
    }
    with RunFolder.create(tmp_path, "run") as run:
        write_json(run.search_file, stored)
    resumed = replace(asked, runs=tmp_path, name="run", resume=True)
    assert list(check_request(resumed).space.baselines) == ["gkd"]
    with pytest.raises(InputError, match=r"another baseline \(gkd, now full_recipe\)"):
        check_request(replace(resumed, baseline=("full_recipe",)))


def stored_run(asked: SearchRequest) -> dict[str, Any]:
    """Return the parts of `search.json` that a resumed run is compared with."""
    return {
        "teacher": {"reference": asked.teacher, "fingerprint": "t"},
        "data": {"reference": asked.data, "fingerprint": "d"},
        "space": "declared",
        "space_hash": check_request(asked).space.hash,
        "metric": "accuracy",
        "sampler": "tpe",
        "seed": 0,
        "budget": asked.budget.to_json(),
        "direction": "max",
        "plan": small_plan(trials=3).to_json(),
        "speed": {"cache": 1e3, "score": 1e3, "worker_train": 1e3, "worker_score": 1e3},
        "space_definition": check_request(asked).space.to_json(),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objectives": "accuracy,speed"}, ["'speed'", "direction is not known", "latency"]),
        ({"objectives": "latency,accuracy"}, ["'latency'", "put one of accuracy"]),
        ({"objectives": "perplexity,memory", "metric": "accuracy"}, ["contradicts", "leave --metric out"]),
        ({"objectives": "accuracy,exact_match"}, ["exact_match needs questions", "--data"]),
        ({"objectives": "accuracy,latency", "device": "no such thing"}, ["no such thing"]),
        ({"trials": 3, "space": "two.yaml"}, ["--trials 3", "2 strategies", "another --space"]),
        ({"trials": 0}, ["--trials must be at least 1"]),
        ({"seed": 2**32 - 2, "confirm": 2}, ["seeds lie between 0 and 4294967295", "--confirm"]),
        ({"explore": 0.0}, ["--explore is a share from 0.1 to 1", "not 0"]),
        ({"explore": 0.5, "confirm": 2}, ["--explore 0.5", "--confirm", "leave one of them out"]),
        ({"explore": 0.5, "space": "longer.yaml"}, ["--explore 0.5", "(lengths)", "leave one of them out"]),
        ({"explore": 0.5, "trials": 2, "tokens": 512}, ["--explore 0.5", "no time budget", "leave one of them out"]),
        ({"baseline": ("full_recipe", "./full_recipe.yaml")}, ["there is no strategy file ./full_recipe.yaml"]),
        ({"baseline": ("gkd", "gkd")}, ["--baseline needs a name of its own", "gkd, gkd"]),
        ({"warm_start": "nobody"}, ["no run 'nobody'"]),
        ({"warm_start": "a,a"}, ["each once"]),
        ({"resume": True}, ["--resume", "--name"]),
        ({"resume": True, "name": "nobody"}, ["no run 'nobody'"]),
        ({"cache": "file"}, ["cannot write into", "--cache"]),
        ({"sampler": "annealing"}, ["the samplers are"]),
        ({"budget": Budget(memory_bytes=10**6, context=256)}, ["nothing fits", "raise --budget"]),
        ({"budget": Budget(memory_bytes=10**9, context=513)}, ["a context of 512 tokens", "--context 512 or less"]),
        (
            {"budget": Budget(memory_bytes=10**9, context=513), "strategy": "logit_kd"},
            ["a context of 512 tokens", "--context 512 or less"],
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(asked: SearchRequest, changes: dict[str, Any], words: list[str]) -> None:
    folder = asked.runs.parent
    if changes.get("space", "default") != "default":
        changes = changes | {"space": str(folder / changes["space"])}
    if "cache" in changes:
        changes = changes | {"cache": folder / changes["cache"]}
    with pytest.raises(AutoDistillError) as caught:
        check_request(replace(asked, **changes))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not asked.runs.exists()


def test_as_many_trials_as_a_space_holds_may_be_asked_for(asked: SearchRequest) -> None:
    space = str(asked.runs.parent / "two.yaml")
    assert check_request(replace(asked, space=space, trials=2)).space.dimensions
    assert check_request(replace(asked, trials=10**6)).metric == "accuracy"


def test_one_objective_is_what_the_metric_is(asked: SearchRequest) -> None:
    one, other = (
        check_request(replace(asked, **how)) for how in ({"objectives": "perplexity"}, {"metric": "perplexity"})
    )
    assert one.objectives == other.objectives
    assert (one.metric, one.device) == ("perplexity", None)


def test_a_run_that_was_stored_before_there_were_limits_of_latency_has_none(
    asked: SearchRequest, tmp_path: Path
) -> None:
    """The budget is stored as it was then, with or without a device."""
    budget = {"memory_bytes": 10**9, "context": 256, "batch": 1, "latency_seconds": None}
    stored = stored_run(asked) | {"budget": budget}
    with RunFolder.create(tmp_path, "run") as run:
        write_json(run.search_file, stored)
    again = replace(asked, runs=tmp_path, name="run", resume=True)
    device = find_device("pi 5", devices())
    plain = Budget(memory_bytes=10**9, context=256)
    placed = DeviceBudget(memory_bytes=10**9, context=256, device=device)
    for same in (plain, placed):
        assert check_request(replace(again, budget=same)).stored is not None
    others = {
        "1.00 GB at context 256, batch 2": replace(plain, batch=2),
        "1.00 GB at context 256, batch 1, on .*, tpot_p95=10.0s@streams=1": replace(
            placed, latency=parse_latency("10s")
        ),
        # A difference that rounding hides is shown in full.
        ".*1000000001.*": replace(plain, memory_bytes=10**9 + 1),
    }
    for words, other in others.items():
        with pytest.raises(InputError, match=rf"another budget \(.*1.*, now {words}\): resume it with the same"):
            check_request(replace(again, budget=other))


def test_a_run_goes_on_with_its_device_as_it_was(asked: SearchRequest, tmp_path: Path) -> None:
    """A device that is measured again may have other figures and other usable memory, but it is the same device."""
    pi = find_device("pi 5", devices())
    limits = parse_latency("10s")
    before = DeviceBudget(memory_bytes=pi.usable_bytes, context=256, device=pi, latency=limits)
    with RunFolder.create(tmp_path, "run") as run:
        judged = {"objectives": ["accuracy", "latency"], "device": pi.to_json()}
        write_json(run.search_file, stored_run(asked) | judged | {"budget": before.to_json()})
    again = replace(asked, runs=tmp_path, name="run", resume=True)
    measured = replace(pi, bandwidth=0.9 * pi.bandwidth, usable_bytes=pi.usable_bytes - 1, sources={})
    now = replace(before, device=measured, memory_bytes=measured.usable_bytes)
    found = check_request(replace(again, budget=now))
    assert (found.budget, found.device) == (before, pi)
    other = find_device("pi 4", devices())
    for changed, what in (
        (replace(now, latency=parse_latency("11s")), "budget"),
        (replace(now, memory_bytes=10**9), "budget"),
        (replace(now, batch=2), "budget"),
        (replace(now, device=other), "device"),
    ):
        with pytest.raises(InputError, match=f"another {what}"):
            check_request(replace(again, budget=changed))
    # If the user names no device, another machine goes on with the run's device.
    assert check_request(replace(again, budget=None)).budget == before


def test_a_context_that_nobody_asked_for_is_what_teacher_and_pretrained_models_read(
    asked: SearchRequest, tmp_path: Path
) -> None:
    plain = replace(asked, budget="1GB")
    assert check_request(plain).budget == Budget(memory_bytes=10**9, context=512)
    sibling = save_tiny_teacher(tmp_path / "sibling", layers=2, width=64)
    config = json.loads((sibling / "config.json").read_text())
    (sibling / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 300}))
    init = {"source": "pretrained", "model": str(sibling), "depth": 1.0}
    (tmp_path / "mine.yaml").write_text(json.dumps({"init": init}))
    both = replace(plain, strategy=str(tmp_path / "mine.yaml"))
    assert check_request(both).budget.context == 300
    wide = save_tiny_teacher(tmp_path / "wide", layers=5)
    (wide / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5, "max_position_embeddings": 9000}))
    assert check_request(replace(plain, teacher=str(wide))).budget.context == 2048
    with pytest.raises(
        InputError, match=r"a context of 512 tokens, and the budget is stated at 2048: .*or leave it out"
    ):
        check_request(replace(plain, context=2048))


def test_a_run_goes_on_at_its_own_context_unless_another_is_asked_for(asked: SearchRequest, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, "run") as run:
        write_json(run.search_file, stored_run(asked))
    again = replace(asked, runs=tmp_path, name="run", resume=True)
    memory = "16GB"
    assert check_request(replace(again, budget=memory)).budget == asked.budget
    with pytest.raises(InputError, match="another budget"):
        check_request(replace(again, budget=memory, context=2048))


def test_a_run_that_another_machine_goes_on_with_is_refused(asked: SearchRequest, tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/shared")
    with RunFolder.create(tmp_path / "there", "run") as run:
        write_json(run.search_file, stored_run(asked) | {"storage": storage.uri})
        keep(run.search_file, storage.at("run"))
    again = replace(asked, runs=tmp_path / "here", name="run", resume=True, storage=storage.uri)
    with pytest.raises(InputError, match=r"no run 'other', neither in .*here nor on file://.*shared: check --name"):
        check_request(replace(again, name="other"))
    holder = {"host": "elsewhere", "process": 7, "place": "another kernel", "born": 1.0, "token": "theirs"}
    storage.write("run/lease.json", json.dumps(holder).encode())
    with pytest.raises(InputError, match="is held by process 7 on elsewhere"):
        check_request(again)
    assert not (tmp_path / "here").exists()
    storage.remove("run/lease.json")
    assert check_request(again).stored is not None


def test_a_run_goes_on_as_another_machine_left_it_and_not_as_this_one_did(asked: SearchRequest, tmp_path: Path) -> None:
    """A begins with 9 trials, B goes on with 40 and further seeds, and then A goes on."""
    storage = Storage(f"file://{tmp_path}/shared")
    stored = stored_run(asked) | {"storage": storage.uri}
    for out, trials, more in (("here", 9, {}), ("there", 40, {"confirm": 3, "seconds": {}})):
        with RunFolder.create(tmp_path / out, "run") as run:
            write_json(run.search_file, {**stored, **more, "plan": small_plan(trials=trials).to_json()})
            keep(run.search_file, storage.at("run"))
    again = replace(asked, runs=tmp_path / "here", name="run", resume=True)
    for given in (None, storage.uri):
        config = check_request(replace(again, storage=given))
        assert config.stored is not None
        assert (config.stored["plan"]["trials"], config.confirm, "seconds" in config.stored) == (40, 3, True)
    # A run of the same name on another storage is another run.
    other = Storage(f"file://{tmp_path}/other")
    write_json(tmp_path / "search.json", {**stored, "storage": other.uri})
    keep(tmp_path / "search.json", other.at("run"))
    with pytest.raises(InputError, match=r"is kept on file://.*shared, not on file://.*other"):
        check_request(replace(again, storage=other.uri))
    assert json.loads((tmp_path / "here" / "run" / "search.json").read_text())["storage"] == storage.uri


def test_time_that_holds_no_training_is_refused_where_a_run_has_finished(asked: SearchRequest, tmp_path: Path) -> None:
    plan = small_plan(seconds={"workers": 15.0, "export": 60.0, "test": 75.0, "trials": 300.0})
    speed = {"cache": 1e3, "score": 1e3, "worker_train": 100.0, "worker_score": 1e9}
    for name, more in (("whole", {"seconds": {}}), ("cut", {})):
        with RunFolder.create(tmp_path, name) as run:
            write_json(run.search_file, stored_run(asked) | {"plan": plan.to_json(), "speed": speed, **more})
    whole, cut = (replace(asked, runs=tmp_path, name=name, resume=True) for name in ("whole", "cut"))
    with pytest.raises(
        InputError, match=r"--time .* adds no training to the run 'whole'.*: give --time \d+s or more"
    ) as no:
        check_request(replace(whole, time=160.0, trials=12))
    # 1,024 tokens at 100 a second take a tenth longer than measured, plus 150 s. The advised time is a tenth more.
    least = int(str(no.value).rpartition("--time ")[2].removesuffix("s or more"))
    assert least == pytest.approx(1.1 * (150 + 1024 / 100 * TRAINING), abs=3)
    check_request(replace(whole, time=float(least)))
    check_request(whole)
    check_request(replace(cut, time=60.0))


def test_a_warm_start_is_as_before_when_a_run_goes_on(asked: SearchRequest, tmp_path: Path) -> None:
    """The earlier run may be gone by then."""
    with RunFolder.create(tmp_path, "run") as run:
        warmed = {"runs": ["gone"], "observations": [], "first": []}
        write_json(run.search_file, stored_run(asked) | {"warm_start": warmed})
    again = replace(asked, runs=tmp_path, name="run", resume=True)
    assert check_request(again).warm_start == ("gone",)
    with pytest.raises(InputError, match="another warm start"):
        check_request(replace(again, warm_start="other"))


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 0.5),
        ({"explore": 0.8}, 0.8),
        ({"confirm": 2}, 1.0),
        ({"confirm": 2, "explore": 1.0}, 1.0),
        ({"trials": 3, "tokens": 512}, 1.0),
        ({"trials": 3, "tokens": 512, "time": 60.0}, 0.5),
        ({"space": "longer.yaml"}, 1.0),
        ({"strategy": "logit_kd"}, 0.2),
        ({"strategy": "logit_kd", "tokens": 512}, 1.0),
        ({"space": "default"}, 0.2),
        ({"space": "default", "time": 3600.0}, 0.25),
    ],
)
def test_a_share_of_the_box_is_for_the_best_unless_something_else_has_the_rest(
    asked: SearchRequest, changes: dict[str, Any], share: float
) -> None:
    if changes.get("space", "default") != "default":
        changes = changes | {"space": str(asked.runs.parent / changes["space"])}
    assert check_request(replace(asked, **changes)).explore == share


def test_a_resumed_run_shares_its_box_as_before(asked: SearchRequest, tmp_path: Path) -> None:
    for name, before in (("half", {"explore": 0.5}), ("older", {})):
        with RunFolder.create(tmp_path, name) as run:
            stored = stored_run(asked)
            plan = stored["plan"] | ({"longest": 4.0} if before else {})
            write_json(run.search_file, {**stored, **before, "plan": plan})
    half, older = (replace(asked, runs=tmp_path, name=name, resume=True) for name in ("half", "older"))
    assert (check_request(half).explore, check_request(older).explore) == (0.5, 1.0)
    with pytest.raises(InputError, match=r"planned with --explore 0\.5, not 0\.7: resume it without"):
        check_request(replace(half, explore=0.7))
    with pytest.raises(InputError, match=r"training its best trials further.*start a new run with --confirm"):
        check_request(replace(half, confirm=2))


def test_a_run_of_a_hub_teacher_goes_on_at_the_commit_that_it_was_made_with(
    asked: SearchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(Path(str(asked.teacher)), tmp_path / "hub", monkeypatch)
    asked = replace(asked, teacher="somebody/model", runs=tmp_path, name="run")
    stored = stored_run(asked)
    with RunFolder.create(tmp_path, "run") as run:
        write_json(run.search_file, stored | {"teacher": stored["teacher"] | {"revision": hub.commit}})
    hub.commit = "b" * 40
    resumed = replace(asked, resume=True)
    for teacher in ("somebody/model", None):
        assert check_request(replace(resumed, teacher=teacher)).teacher.revision == "a" * 40
    assert check_request(replace(asked, name="another")).teacher.revision == "b" * 40
    with pytest.raises(InputError, match=r"another teacher \(somebody/model, now somebody/model@bbb"):
        check_request(replace(resumed, teacher="somebody/model@" + "b" * 40))


def test_a_run_of_a_hub_s_data_goes_on_at_the_commit_that_it_was_made_with(
    asked: SearchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = DataHub(tmp_path / "hub", monkeypatch)
    asked = replace(asked, data="somebody/stories", runs=tmp_path, name="run")
    stored = stored_run(asked)
    with RunFolder.create(tmp_path, "run") as run:
        write_json(run.search_file, stored | {"data": stored["data"] | {"revision": hub.commit}})
    hub.commit = "b" * 40
    resumed = replace(asked, resume=True)
    for data in ("somebody/stories", None):
        assert check_request(replace(resumed, data=data)).source.revision == "a" * 40
    assert check_request(replace(asked, name="another")).source.revision == "b" * 40
    with pytest.raises(InputError, match=r"another data \(somebody/stories, now somebody/stories@bbb"):
        check_request(replace(resumed, data="somebody/stories@" + "b" * 40))


def test_a_run_goes_on_from_another_working_directory(
    asked: SearchRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are stored with whole paths. Older runs, which have relative ones, continue where they began."""
    teacher, data = Path(str(asked.teacher)), Path(str(asked.data))
    monkeypatch.chdir(teacher.parent)
    began = replace(asked, teacher=f"./{teacher.name}", data=data.name, runs=tmp_path, name="run")
    config = check_request(began)
    assert (config.teacher_reference, config.data_reference) == (str(teacher), str(data))
    stored = stored_run(began)
    for name, references in (("run", (str(teacher), str(data))), ("older", (f"./{teacher.name}", data.name))):
        with RunFolder.create(tmp_path, name) as run:
            parts = zip(("teacher", "data"), references, strict=True)
            named = {part: stored[part] | {"reference": reference} for part, reference in parts}
            write_json(run.search_file, stored | named)
        resumed = replace(began, name=name, resume=True)
        assert check_request(resumed).teacher.path == teacher
        assert check_request(replace(resumed, teacher=None, data=None)).teacher.path == teacher
    monkeypatch.chdir(tmp_path)
    resumed = replace(began, teacher=None, data=None, name="run", resume=True)
    assert check_request(resumed).teacher.path == teacher
    with pytest.raises(InputError, match=r"the run's teacher is not at \./teacher: give it by --teacher"):
        check_request(replace(resumed, name="older"))


@pytest.mark.parametrize("older", [False, True])
def test_models_and_strategies_of_a_run_are_found_from_another_folder(
    asked: SearchRequest, older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of earlier versions, which stored them as they were given, continue where they began."""
    shutil.copytree(str(asked.teacher), tmp_path / "small")
    shutil.copytree(str(asked.teacher), tmp_path / "pretrained")  # also a value of another field
    given = {"source": "pretrained", "model": "./small", "depth": 1.0}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"init": given}))
    dimensions = {"init.source": ["pretrained"], "init.model": ["pretrained", "somebody/model"], "init.depth": [1.0]}
    domains = {path: {"choices": choices} for path, choices in dimensions.items()}
    space = with_models(Space(domains, baselines={"one": {"init": given}}), str(tmp_path))
    assert {*space.models} == {str(tmp_path / "pretrained"), "somebody/model", str(tmp_path / "small")}
    assert space.baselines["one"].init.model == str(tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    began = replace(asked, baseline=("mine.yaml",), runs=tmp_path, name="run")
    config = check_request(began)
    assert config.baselines == (str(tmp_path / "mine.yaml"),)
    assert config.space.models == (str(tmp_path / "small"),)
    stored = stored_run(began) | {"baselines": list(config.baselines), "folder": str(tmp_path)}
    stored |= {"pretrained": {model: {} for model in config.space.models}}
    if older:
        del stored["folder"], stored["pretrained"]
        as_given = check_request(replace(began, baseline=None)).space
        stored |= {"baselines": ["mine.yaml"], "space_hash": against(as_given, ["mine.yaml"]).hash}
    with RunFolder.create(tmp_path, "run") as run:
        write_json(run.search_file, stored)
    resumed = replace(began, baseline=None, resume=True)
    assert check_request(resumed).space.hash == stored["space_hash"]
    assert check_request(replace(resumed, baseline=began.baseline)).space.hash == stored["space_hash"]
    monkeypatch.chdir("/")
    if not older:
        assert check_request(resumed).space.hash == stored["space_hash"]
        (tmp_path / "small").rename(tmp_path / "gone")
        with pytest.raises(InputError, match=r"pretrained model is not at /.*/small: put it back, or a link to it"):
            check_request(resumed)
        (tmp_path / "mine.yaml").rename(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match=r"baseline is not at .*mine.yaml: give it by --baseline"):
        check_request(resumed)


def test_a_search_for_a_device_leaves_out_what_the_device_does_not_serve(asked: SearchRequest) -> None:
    def runtimes(device: str) -> set[str]:
        placed = DeviceBudget(memory_bytes=10**9, context=256, device=find_device(device, devices()))
        found = check_request(replace(asked, budget=placed))
        return {deployment.runtime for deployment in found.space.deployments}

    assert runtimes("pi 5") == {"llama.cpp"}
    assert runtimes("4090") == {"llama.cpp", "vllm", "transformers"}


@pytest.mark.parametrize("name", ["metric_command", "metric", "space", "storage", "warm_start", "runner", "baseline"])
@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_text_is_no_default(asked: SearchRequest, name: str, blank: str) -> None:
    with pytest.raises(InputError, match=f"{name} is empty"):
        replace(asked, **{name: (blank,) if name == "baseline" else blank})


@pytest.mark.parametrize(("batch", "most"), [(None, 16), (16, 16), (32, 32)])
def test_streams_of_a_latency_are_held_in_memory_whatever_batch_allows_them(
    asked: SearchRequest, batch: int | None, most: int
) -> None:
    placed = replace(asked, budget=None, device="t4", latency="5s@streams=16", batch=batch, context=64)
    assert check_request(placed).budget.batch == most


def test_texts_are_read_once_whoever_gives_them() -> None:
    typed = SearchRequest(
        budget="8GB", time="1h30m", latency="50ms", metric_timeout="2m", cache_limit="1GiB", device="t4"
    )
    assert (typed.budget, typed.time, typed.metric_timeout, typed.cache_limit) == (8 * 10**9, 5400.0, 120.0, 2**30)
    assert typed.latency == parse_latency("50ms")
    again = replace(typed, seed=1)
    assert (again.budget, again.time, again.latency) == (typed.budget, typed.time, typed.latency)
    assert SearchRequest(budget=8 * 10**9, time=5400.0).time == typed.time


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "search needs the memory"),
        ({"budget": "8GB", "time": "soon"}, "'soon' is not a duration"),
        ({"budget": "8GB", "devices": ["mine.yaml"]}, "choose one with --device"),
        ({"device": "t4", "latency": "50ms@streams=16", "batch": 4}, "contradicts --latency @streams=16"),
        ({"budget": "8GB", "context": 0}, "--context must be at least 1"),
    ],
)
def test_limits_that_cannot_be_are_refused_before_a_device_is_looked_for(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SearchRequest(**given)
