"""The teacher's rows do not change if a search is cut off between its scores and these rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autodistill.evaluation.evaluate import deployed_weights
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.search.construction.construction import Construction
from autodistill.search.search import search
from autodistill.search.setup.teacher_phase import as_stored
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import WHOLE, Strategy
from autodistill.utils.json_files import read_json
from tests.search.small_search import small_inputs, small_request


@pytest.mark.slow
def test_rows_of_a_teacher_on_a_grid_are_the_same_after_a_kill(tmp_path: Path) -> None:
    """After a cut right after the scores, each row is read again.

    It equals exactly what was known without reading it.
    """
    inputs = small_inputs(tmp_path)
    folder = inputs / "teacher"
    model, spec = load_model(folder, torch.float32), spec_from_config(read_json(folder / "config.json"))
    eight = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
    with deployed_weights(model, spec, eight):
        model.save_pretrained(folder)
    whole = search(small_request(inputs, tmp_path / "whole", name="run"))
    run = tmp_path / "cut" / "run"
    run.parent.mkdir()
    (tmp_path / "whole" / "run").rename(run)
    log = run / "trials.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    scored = next(place for place, line in enumerate(lines) if json.loads(line)["event"] == "teacher")
    log.write_text("".join(lines[: scored + 1]))
    again = search(small_request(inputs, run.parent, name="run", resume=True))
    of_teacher = [
        {row.row_id: (row.accuracy, row.perplexity, row.agreement, row.other["kl"], row.documents) for row in one.rows}
        for one in (whole, again)
    ]
    assert of_teacher[0].keys() == of_teacher[1].keys()
    assert all(of_teacher[1][row] == of_teacher[0][row] for row in of_teacher[0] if row.startswith("teacher"))
    assert of_teacher[1]["teacher-gguf-q8_0"][2:4] == (1, 0)


@pytest.mark.parametrize("solved", [True, False])
def test_what_trains_its_weights_has_the_row_of_its_codes_first_where_it_was_solved(solved: bool) -> None:
    """A plain storage of the teacher already has its row among the teacher's."""
    stored = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
    one = Construction(init=WHOLE, deployment=stored, bytes=1, solved=solved)
    by_codes, by_weights = (
        Strategy(init=WHOLE, distillation=Distillation(), finishing=next(iter(one.finishings(many).values())))
        for many in (False, True)
    )
    assert (by_codes.codes, by_weights.codes) == (stored.scheme, None)
    assert as_stored(by_weights, [one]) == (by_codes if solved else by_weights)
    assert as_stored(by_codes, [one]) == by_codes
