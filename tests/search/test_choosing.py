"""What is exported if training does harm, or if no training is needed: the best row, whatever its kind."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoConfig

from autodistill.advisor.candidates import stored
from autodistill.cli.summary import search_summary
from autodistill.errors import InputError
from autodistill.estimates.fit import fits
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.runs.events import RowTested
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.selection import chosen
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import leaderboard_of
from autodistill.search.explain import explain
from autodistill.search.finish.export_run import export_run
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.search import Outcome, search
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json, write_json

GGUF = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
FOLDER = {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}
VLLM = {"runtime": "vllm", "format": "compressed-tensors", "bits": 8, "group_size": 32}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_teacher(folder / "teacher", layers=4, width=64)
    tiny_text(folder / "text", documents=120, sentences=8)
    return folder


def space(path: Path, depth: float, deployments: list[dict[str, Any]]) -> str:
    """Write a space whose students are all trained at ruinous rates."""
    dimensions = {"init.depth": {"choices": [depth]}, "distillation.learning_rate": {"choices": [0.9, 0.8]}}
    recipe = {"init": {"depth": depth}, "distillation": {"learning_rate": 0.7}}
    written = {"name": "ruinous", "dimensions": dimensions, "deployments": deployments, "baselines": {"rash": recipe}}
    path.write_text(yaml.safe_dump(written))
    return str(path)


def request(inputs: Path, out: Path, **changes: object) -> SearchRequest:
    fields: dict[str, object] = {
        # The teacher does not fit in 16 bits, but it fits as GGUF in 8 bits.
        "budget": Budget(memory_bytes=10**8, context=256),
        "teacher": str(inputs / "teacher"),
        "data": str(inputs / "text"),
        "metric": "agreement",
        "trials": 1,
        "tokens": 1024,
        "runner": "inline",
        "runs": out,
        "name": "run",
        "cache": inputs / "cache",
    }
    return SearchRequest(**(fields | changes))  # type: ignore[arg-type]


def whole(inputs: Path, folder: Path, **changes: object) -> SearchRequest:
    """Return a request whose students begin as the whole teacher."""
    deployments = space(folder / "whole.yaml", 1.0, [GGUF, VLLM, FOLDER])
    return request(inputs, folder / "runs", space=deployments, **changes)


@pytest.fixture(scope="module")
def ruined(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, RunFolder]:
    folder = tmp_path_factory.mktemp("ruined")
    return search(whole(inputs, folder)), RunFolder(folder / "runs", "run")


@pytest.fixture(scope="module")
def insisted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, RunFolder]:
    folder = tmp_path_factory.mktemp("insisted")
    return search(whole(inputs, folder, students_only=True)), RunFolder(folder / "runs", "run")


def summary_of(outcome: Outcome, run: RunFolder) -> str:
    ranked, metric = leaderboard_of(run)
    return search_summary(outcome.document, ranked, metric)


def page(run: RunFolder) -> str:
    return (run.path / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_quantized_teacher_that_does_better_than_all_that_was_trained_is_exported_as_what_it_is(
    ruined: tuple[Outcome, RunFolder],
) -> None:
    outcome, run = ruined
    best = outcome.finish.best
    assert (best.row_id, best.kind) == ("teacher-gguf-q8_0", "teacher")
    assert outcome.finish.checks["gguf"].agreement > 0.9
    assert abs(outcome.finish.checks["gguf"].excess) < 0.02
    fields = GGUFReader(outcome.finish.paths["gguf"]).fields
    assert fields["general.name"].contents() == "teacher"
    card = (run.student("gguf") / "README.md").read_text(encoding="utf-8")
    assert (
        "\n# teacher\n\nThis is teacher itself: AutoDistill quantised it, and nothing was distilled or trained." in card
    )
    assert "## Strategy" not in card
    said = "No trained student is better than the teacher itself as gguf-q8_0, which is exported as it is"
    text = summary_of(outcome, run)
    assert text.splitlines()[-1].startswith(f"{said}. Gain on test over the baseline, paired: +0.9")
    assert re.search(r"^quantised teacher, exported +gguf-q8_0", text, re.M)
    assert page(run).splitlines()[2].startswith(said)
    answer = page(run).split("## Answer\n\n")[1].split("\n\n")[0]
    assert answer.startswith("**teacher** (teacher) as gguf-q8_0: agreement 0.9")
    assert "It is the teacher itself as gguf-q8_0: no trained student is better. The first trained" in answer
    assert outcome.document["exported"] == {
        "row_id": "teacher-gguf-q8_0",
        "named": "the teacher itself as gguf-q8_0",
        "trained": False,
    }
    assert outcome.document["gain_over_untrained"] is None
    assert leaderboard_of(run)[0][0].row.row_id == best.row_id
    assert explain(run).binding.startswith("The best, the teacher itself as gguf-q8_0, needs ")
    assert explain(run).gains == text.splitlines()[-1]


def test_training_that_ends_below_its_beginning_is_said_with_both_figures(ruined: tuple[Outcome, RunFolder]) -> None:
    outcome, run = ruined
    (note,) = [one for one in outcome.document["notes"] if "made it worse than before" in one]
    rows = {row.row_id: row for row in outcome.rows}
    trained = max(
        (row for row in outcome.rows if row.kind in DISTILLED and row.feasible), key=lambda row: row.agreement or 0
    )
    assert f"agreement {trained.agreement:.4f} after it" in note
    assert f"{rows['teacher-gguf-q8_0'].agreement:.4f} before (the teacher itself as gguf-q8_0)" in note
    assert note in page(run)
    assert note[1:] in summary_of(outcome, run)


@pytest.mark.slow
def test_a_packed_teacher_is_exported_again_from_its_row_in_every_container(
    ruined: tuple[Outcome, RunFolder], tmp_path: Path
) -> None:
    outcome, run = ruined
    again = export_run(run, None, ["gguf", "huggingface"], tmp_path / "best")
    assert again["gguf"].read_bytes() == outcome.finish.paths["gguf"].read_bytes()
    row = next(row for row in outcome.rows if row.kind == "teacher" and row.deployment.format == VLLM["format"])
    packed = export_run(run, row.row_id, ["compressed-tensors"], tmp_path / "packed")["compressed-tensors"]
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    candidates = {one.cells["row_id"] for one in stored(run.path.parent)}
    assert {"teacher-gguf-q8_0", row.row_id} < candidates


def test_a_teacher_that_has_changed_is_not_exported_under_its_old_figures(
    inputs: Path, ruined: tuple[Outcome, RunFolder], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path, "run")
    shutil.copytree(ruined[1].path, run.path)
    asked = read_json(run.search_file)
    other = save_tiny_teacher(tmp_path / "other", layers=4, width=64, seed=5)
    write_json(run.search_file, asked | {"teacher": asked["teacher"] | {"reference": str(other)}})
    with pytest.raises(InputError, match="has changed since the run"):
        export_run(run, "teacher-gguf-q8_0", ["gguf"], tmp_path / "out")


def test_a_search_that_goes_on_with_nothing_more_exports_the_same(
    inputs: Path, ruined: tuple[Outcome, RunFolder], tmp_path: Path
) -> None:
    outcome, run = ruined
    out = tmp_path / "runs"
    shutil.copytree(run.path.parent, out)
    again = search(request(inputs, out, space=str(run.path.parent.parent / "whole.yaml"), resume=True))
    assert again.finish.best.row_id == outcome.finish.best.row_id
    for name in ("exported", "gain_over_untrained", "gain_over_baseline", "test"):
        assert again.document[name] == outcome.document[name], name


def test_with_students_only_the_best_student_is_exported_and_what_does_better_is_said(
    inputs: Path, insisted: tuple[Outcome, RunFolder], tmp_path: Path
) -> None:
    outcome, run = insisted
    best = outcome.finish.best
    assert best.kind in DISTILLED
    assert read_json(run.search_file)["students_only"] is True
    rows = run.events.rows()
    assert chosen(rows, "agreement", "max", students_only=True) == best
    assert chosen(rows, "agreement", "max", students_only=False).kind == "teacher"  # type: ignore[union-attr]
    gain = outcome.document["gain_over_untrained"]
    assert gain["named"] == "the teacher itself as gguf-q8_0"
    assert gain["value"] < -0.9
    last = summary_of(outcome, run).splitlines()[-1]
    assert last.startswith(
        "Gain on test over the best that needs no training (the teacher itself as gguf-q8_0), paired: -0.9"
    )
    assert page(run).splitlines()[2] == last
    assert "Only trained students could be chosen. Better is the teacher itself as gguf-q8_0" in page(run)
    notes = " ".join(outcome.document["notes"])
    assert "quantising the teacher beats distilling it here: the teacher itself as gguf-q8_0 has agreement 0.9" in notes
    assert "made it worse than before" in notes
    assert "passed over" not in notes
    exported = export_run(run, None, ["gguf"], tmp_path / "again")["gguf"]
    assert exported.read_bytes() == outcome.finish.paths["gguf"].read_bytes()
    assert explain(run).binding.startswith(f"The best, {best.name} as gguf-q8_0, needs ")
    assert {one.cells["kind"] for one in stored(run.path.parent)} <= set(DISTILLED)
    # A resumed run keeps what was asked for, even if the option is not given again.
    again = request(inputs, run.path.parent, space=str(run.path.parent.parent / "whole.yaml"), resume=True)
    assert check_request(again).students_only
    assert check_request(replace(again, students_only=True)).students_only


def test_a_run_that_chose_among_all_is_not_resumed_with_students_only(
    inputs: Path, ruined: tuple[Outcome, RunFolder]
) -> None:
    run = ruined[1]
    again = request(inputs, run.path.parent, space=str(run.path.parent.parent / "whole.yaml"), resume=True)
    assert not check_request(again).students_only
    with pytest.raises(InputError, match=r"made with another choice \(whatever is best, now students only\)"):
        check_request(replace(again, students_only=True))


def test_the_gains_are_those_of_the_scores_of_each_document(
    ruined: tuple[Outcome, RunFolder], insisted: tuple[Outcome, RunFolder]
) -> None:
    """They are computed from the logs alone, and the errors by the formula that a ratio's bootstrap approximates."""
    for (outcome, run), name in ((insisted, "gain_over_untrained"), (ruined, "gain_over_baseline")):
        rows = {row.row_id: row for row in run.events.rows(RowTested)}
        gain = outcome.document[name]
        found, other = (rows[row_id].documents for row_id in (f"{outcome.finish.best.row_id}-test", gain["over"]))
        assert found is not None
        assert other is not None
        theirs = dict(zip(other["ids"], other["sum"], strict=True))
        gaps = np.array([mine - theirs[one] for one, mine in zip(found["ids"], found["sum"], strict=True)])
        counts = np.array(found["count"])
        expected = gaps.sum() / counts.sum()
        assert gain["value"] == pytest.approx(expected)
        many = len(counts)
        assert many >= 10
        widened = scipy.stats.t.ppf(scipy.stats.norm.cdf(1), many - 1)
        error = widened * np.sqrt(many / (many - 1) * ((gaps - expected * counts) ** 2).sum()) / counts.sum()
        assert gain["stderr"] == pytest.approx(error, rel=0.1)


@pytest.mark.slow  # tests/search/test_stopped.py checks it for a search that is stopped
def test_a_student_that_training_ruined_gives_way_to_what_it_began_as(inputs: Path, tmp_path: Path) -> None:
    """The teacher does not fit, but half of it does. It is exported as it was cut, and cut again from the log."""
    half = space(tmp_path / "half.yaml", 0.5, [GGUF])
    spec = spec_from_config(json.loads((inputs / "teacher" / "config.json").read_text()))
    deployment = Deployment.from_json(GGUF)
    (need,) = (fit.need for fit in fits(spec, [deployment], Budget(memory_bytes=10**9, context=256)))
    budget = Budget(memory_bytes=need - 1, context=256)
    outcome = search(request(inputs, tmp_path / "runs", space=half, budget=budget))
    best, run = outcome.finish.best, RunFolder(tmp_path / "runs", "run")
    assert (best.kind, best.train_tokens, best.feasible) == ("initial", 0, True)
    assert best.row_id.endswith("i-gguf-q8_0")
    trained = next(row for row in outcome.rows if row.row_id == best.row_id.replace("i-", "-"))
    assert (best.agreement or 0) > (trained.agreement or 0)
    config = AutoConfig.from_pretrained(outcome.finish.paths["huggingface"])
    assert config.num_hidden_layers == 2
    # The cut student has the layers exactly as in the teacher.
    kept = load_file(outcome.finish.paths["huggingface"] / "model.safetensors")
    theirs = load_file(inputs / "teacher" / "model.safetensors")
    assert torch.equal(
        kept["model.embed_tokens.weight"].float(), theirs["model.embed_tokens.weight"].bfloat16().float()
    )
    last = summary_of(outcome, run).splitlines()[-1]
    assert last.startswith(f"No trained student is better than untrained {trained.trial} as gguf-q8_0")
    assert any("made it worse than before" in note for note in outcome.document["notes"])
    again = export_run(run, best.row_id, ["gguf"], tmp_path / "again")["gguf"]
    assert again.read_bytes() == outcome.finish.paths["gguf"].read_bytes()
    assert next(row for row in outcome.finish.test if row.trial == best.trial).kind == "initial"
