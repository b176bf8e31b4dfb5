"""The Python API as docs/python.md shows it: its code runs from top to bottom, on a tiny teacher and in one process."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import autodistill as ad
from autodistill import plugins
from autodistill.options import options_of
from autodistill.search.request.given_space import strategy_reference
from autodistill.search.request.request import SearchRequest
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.search.conftest import untimed

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
# Replacements that make the page's code small enough to run in seconds. The rest of the page runs unchanged.
SMALLER = {
    '"Qwen/Qwen2.5-1.5B"': '"./model"',
    'budget="8GB", time="2h", name="first"': 'budget="8GB", trials=1, tokens=768, space="space.yaml", **HERE',
    'budget="8GB", time="2h")  # trains': 'budget="8GB", trials=1, tokens=768, space="space.yaml", cache="cache")  #',
    'budget="8GB", time="2h"': 'budget="8GB", trials=1, tokens=768, runner="inline", cache="cache"',
    'budget="210MB"': 'budget="210MB", tokens=512, name="one", runner="inline", cache="cache"',
    'budget="200MB", data="./docs"': 'budget="23.7MB", data="./docs", tokens=256, sequence_length=64, cache="cache"',
    'budgets="1GB,2GB", time="3h"': 'budgets="1GB,2GB", trials=1, tokens=768, space="space.yaml", **QUICK',
    'resume(time="1h")': "resume(trials=2)",
    "print(event": "told.append(event); print(event",
    "ad.measure(one.best.path)": "ad.measure(one.best.path, context=64, prompt=16, decoded=4, rounds=1, **BUSY)",
    ',teacher")': ',teacher", cache="cache")',
    'ad.profile("logit_kd", ': 'ad.profile("logit_kd", step_tokens=64, sequence_length=64, steps=1, cache="cache", ',
    'out="answers.jsonl")': 'out="answers.jsonl", max_tokens=4, cache="cache")',
    'budget="1MB", time="2h"': 'budget="1MB", cache="cache"',
}
SPACE = """
name: small
dimensions:
  init.depth: {low: 0.5, high: 0.75, step: 0.25}
deployments:
  - {runtime: llama.cpp, format: gguf-f16, bits: 16, group_size: 0}
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
baselines: [logit_kd]
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The variables that the page's code defines."""
    folder = tmp_path_factory.mktemp("page")
    save_tiny_teacher(folder / "model", layers=4)
    tiny_text(folder / "docs", documents=30, sentences=24)
    (folder / "space.yaml").write_text(SPACE)
    quick = {"runner": "inline", "cache": "cache"}
    (folder / "prompts.txt").write_text("the river is\nthe tree has\n")
    names: dict[str, Any] = {"HERE": {"name": "first", **quick}, "QUICK": quick, "told": []}
    names["BUSY"] = {"busy": True, "cache": "cache"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        with untimed():
            for number, block in enumerate(BLOCKS):
                for theirs, ours in SMALLER.items():
                    block = block.replace(theirs, ours)
                exec(compile(block, f"docs/python.md, block {number}", "exec", dont_inherit=True), names)
            yield names
    finally:
        os.chdir(before)
        plugins.forget("divergences", "tvd")
        plugins.forget("evaluators", "surprise")


def test_every_substitution_is_of_something_that_the_page_says():
    assert [text for text in SMALLER if text not in PAGE] == []


def test_the_page_imports_nothing_from_within():
    assert re.findall(r"from autodistill|import autodistill\.", PAGE) == []


def test_the_page_s_code_shows_every_public_name():
    code = "\n".join(BLOCKS)
    assert [name for name in ad.__all__ if not re.search(rf"\bad\.{name}\b", code)] == []


def test_what_the_page_says_a_name_is_that_it_is(page: dict[str, Any]):
    said = {name: kind for name, kind in page["__annotations__"].items() if kind is not ad.Evaluator}  # a protocol
    assert len(said) > 9
    assert {name: type(page[name]) for name, kind in said.items() if not isinstance(page[name], kind)} == {}


def test_events_are_told_of_the_whole_search(page: dict[str, Any]):
    kinds = ("SearchStarted", "TrialStarted", "Step", "RungReached", "TrialFinished", "Exported", "SearchFinished")
    assert {type(event) for event in page["told"]} == {getattr(ad, kind) for kind in kinds}


def test_what_is_measured_traced_and_written_is_plain_data(page: dict[str, Any]):
    assert page["answers"]["written"] == 2
    assert page["traced"]["strategy"] == page["again"].id
    assert page["together"]["large"]["kind"] == "teacher"
    assert page["timed"]["measured"]


def test_a_result_has_the_best_student_with_errors_and_the_file_that_its_runtime_is_given(page: dict[str, Any]):
    result, best = page["more"], page["more"].best
    assert isinstance(result, ad.SearchResult)
    assert best.id == result.document["best"]["row_id"]
    assert page["best"].path is None, "the run has gone on since, and has exported another one"
    assert best.metrics["accuracy"].value == result.document["best"]["accuracy"]
    assert best.metrics["accuracy"].stderr == result.document["best"]["accuracy_stderr"]
    assert best.deployment.to_json() == result.document["best"]["deployment"]
    assert (best.path.suffix, best.path.read_bytes()[:4]) == (".gguf", b"GGUF")
    for shown in (best._repr_html_(), result._repr_html_()):
        assert best.id in shown
        assert shown.count("<tr>") == shown.count("</tr>") > 3


def test_what_is_exported_is_loaded_by_another_library(page: dict[str, Any]):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(page["folder"], local_files_only=True)
    assert model.num_parameters() == page["best"].metrics["params"].value


def test_a_strategy_that_is_an_object_is_kept_as_a_file_so_that_its_run_can_go_on(tmp_path: Path):
    strategy = ad.load_strategy("hand_designed")
    path = strategy_reference(strategy, tmp_path)
    assert ad.load_strategy(path) == strategy
    assert strategy_reference(strategy, tmp_path) == path
    assert strategy_reference("logit_kd", tmp_path) == "logit_kd"


def test_a_frame_has_the_leaderboard_with_errors_and_dimensions(page: dict[str, Any]):
    frame, run = page["frame"], page["run"]
    assert list(frame["id"][:2]) == [page["first"].id, page["second"].id]
    # The run has continued since then, and its students are read again.
    assert len(run.students) > len(frame)
    trained = frame[frame["kind"] == "baseline"].iloc[0]
    assert trained["accuracy_stderr"] > 0
    assert trained["init.depth"] == ad.load_strategy("logit_kd").init.depth
    assert math.isnan(frame[frame["kind"] == "teacher"].iloc[0]["init.depth"])


def test_a_difference_is_that_of_the_figures_with_an_error_of_its_own(page: dict[str, Any]):
    first, second = (next(one for one in page["run"].students if one.kind == kind) for kind in ("teacher", "baseline"))
    found = first.difference(second, "accuracy")
    one, other = first.metrics["accuracy"], second.metrics["accuracy"]
    assert found.value == pytest.approx(one.value - other.value)
    assert found.stderr > 0


def test_a_run_goes_on_with_its_settings(page: dict[str, Any]):
    more = page["more"]
    assert (more.name, more.document["plan"]["trials"]) == ("first", 2)
    assert len([one for one in more.students if one.kind == "student"]) >= 2


def test_one_strategy_alone_is_trained_and_its_run_knows_which(page: dict[str, Any]):
    one = page["one"]
    trained = {student.strategy.id for student in one.students if student.kind in ("baseline", "student")}
    assert trained == {page["again"].id}
    assert ad.load_run("one").settings["strategy"] == "logit_kd"


def test_a_run_of_one_strategy_goes_on_without_naming_it(page: dict[str, Any]):
    assert ad.load_run("one").resume(cache="cache").best.id == page["one"].best.id


def test_what_is_planned_estimated_and_picked(page: dict[str, Any]):
    assert page["planned"]["plan"]["trials"] == 1
    assert page["estimate"].fits
    assert page["picked"].student.feasible
    assert ad.pick(budget="8GB", run=["first"]).student.id == page["picked"].student.id
    assert "raspberry" in ad.devices("raspberry pi")[0].name.lower()


def test_what_is_solved_is_the_document_of_the_command_line(page: dict[str, Any]):
    solved, solution = page["solved"], page["solution"]
    (found,) = solved.document["solutions"]
    assert solution.memory_bytes == found["solution"]["bytes"] <= solution.budget_bytes
    assert solution.deployment.to_json() == found["solution"]["deployment"]
    assert (solution.kl.value, solution.kl.stderr) == (found["solution"]["kl"], found["solution"]["kl_stderr"])
    assert [rival.deployment.name for rival in solution.rivals] == [rival["name"] for rival in found["rivals"]]
    measured = [rival for rival in solution.rivals if rival.kl_above_solution is not None]
    assert measured
    for rival in measured:
        assert rival.kl_above_solution.value == pytest.approx(rival.kl.value - solution.kl.value)
    assert {rival.kl for rival in solution.rivals if not rival.fits} == {None}
    assert solved.path is None
    assert solved._repr_html_() == solution._repr_html_()
    assert solution.deployment.name in solution._repr_html_()


def test_an_estimate_has_the_memory_on_the_device_that_was_named(page: dict[str, Any]):
    document = page["estimate"].document
    assert page["estimate"].memory_bytes == document["devices"][0]["total_bytes"]
    assert (
        ad.estimate("./model", format="gguf-q4_0").memory_bytes
        == ad.estimate(Path("model"), format="gguf-q4_0").document["total_bytes"]
    )


def test_what_a_session_registers_is_used_and_recorded_by_name_and_source(page: dict[str, Any]):
    own = page["own"]
    assert own.best.metrics["surprise"].value > 0
    assert set(own.settings["space_definition"]["dimensions"]) == {"init.depth", "distillation.divergence"}
    assert set(own.settings["asked"]["evaluators"]) == {"surprise"}
    assert set(own.settings["asked"]["divergences"]) == {"tvd"}


def test_callbacks_are_told_of_rungs_and_a_data_set_is_saved_and_planned_on(page: dict[str, Any]):
    assert page["told"]
    assert page["same"]["plan"]["trials"] == 1
    assert len(list(Path("cache/objects").rglob("*.jsonl"))) == 1


def test_charts_are_of_the_run(page: dict[str, Any]):
    assert {"layer"} <= set(page["chart"].to_dict(validate=False))
    with pytest.raises(ad.InputError, match="more trials or time"):
        page["more"].plot.importance()


def test_charts_say_how_they_are_installed(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ad.InputError, match=r"pip install 'autodistill-search\[plots\]'"):
        page["more"].plot.pareto()


def test_runs_of_two_folders_are_not_picked_from_together(page: dict[str, Any]):
    other = Path("elsewhere") / "other"
    other.mkdir(parents=True)
    (other / "search.json").write_bytes((page["run"].path / "search.json").read_bytes())
    with pytest.raises(ad.InputError, match="lie in several folders"):
        ad.pick(budget="8GB", run=[page["run"], other])


def test_a_run_that_is_not_there_is_named(page: dict[str, Any]):
    for reference in ("nobody", "results/runs/nobody"):
        with pytest.raises(ad.InputError, match=r"no run 'nobody' in .*: the runs there are first, one, search-"):
            ad.load_run(reference)


def test_several_budgets_have_a_run_each_or_share_one(page: dict[str, Any]):
    several = page["several"]
    assert list(several.runs) == ["1GB", "2GB"]
    assert several["1GB"].name == several["2GB"].name == "several-1GB"
    assert several["2GB"].best.metrics["memory_bytes"].value < 10**9
    assert (several.path / "report.md").exists()
    with pytest.raises(KeyError):
        several["3GB"]
    assert "2GB" in several._repr_html_()


@pytest.mark.parametrize("verb", ["search", "distill", "plan"])
def test_a_verb_has_the_options_that_the_request_declares_for_it(verb: str):
    function = getattr(ad, verb)
    declared = options_of(SearchRequest, verb)
    assert set(declared) == set(inspect.signature(function).parameters) - {"price"}
    for name, option in declared.items():
        assert f"    {name}: {option.helps.get(verb, option.help)}" in function.__doc__


def test_an_option_that_a_verb_does_not_have_is_no_argument():
    with pytest.raises(TypeError, match="sampler"):
        ad.distill("logit_kd", sampler="tpe")
    with pytest.raises(TypeError, match="colour"):
        ad.search(budget="1GB", colour="blue")  # type: ignore[call-arg]
    with pytest.raises(ad.InputError, match="search needs the memory"):
        ad.search()


def test_every_public_name_is_there_and_none_is_imported_before_it_is_asked_for():
    program = (
        "import sys, autodistill as ad\n"
        "print({'torch', 'transformers', 'ray', 'numpy', 'autodistill.api'} & set(sys.modules))\n"
        "print([name for name in ad.__all__ if getattr(ad, name, None) is None or name not in dir(ad)])\n"
        "print({'torch', 'transformers', 'ray', 'datasets'} & set(sys.modules))\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["set()", "[]", "set()"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ad.nothing  # noqa: B018
