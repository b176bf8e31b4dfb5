"""The teacher's rows: the same whether a search was cut off between its scores and them, or not."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from autodistill.evaluation.evaluate import deployed_weights
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.search.search import search
from autodistill.strategy.deployment import Deployment
from autodistill.utils.json_files import read_json
from tests.search.small_search import small_inputs, small_request


def test_rows_of_a_teacher_on_a_grid_are_the_same_after_a_kill(tmp_path: Path) -> None:
    """Cut off after its scores, each row is read again, to the last digit what was known of it without reading."""
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
