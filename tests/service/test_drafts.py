"""Drafts of a real server: their counts, their record, and one line for a file that is no draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodistill.advisor.describe import deployment_named
from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.export.gguf import GgufExporter
from autodistill.service.client import Answer
from autodistill.service.drafts import FILE, Tried, _draft_figures, drafts, record_served, recorded
from autodistill.service.launch import settle
from autodistill.service.request import DraftsRequest, ServeRequest
from autodistill.testing import save_tiny_teacher


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher in 16 bits, and a draft of it in 4 bits."""
    folder = tmp_path_factory.mktemp("drafts")
    teacher = save_tiny_teacher(folder / "teacher", layers=2)
    names = {"whole": "gguf-f16", "small": "gguf-q4_0"}
    return {
        name: GgufExporter().export(teacher, deployment_named(one), folder / name).path for name, one in names.items()
    }


def asked(models: dict[str, Path], out: Path, *tried: Path, **options: Any) -> DraftsRequest:
    small = {"prompts": 2, "prompt": 8, "decoded": 16, "threads": 1, "time": "60s", "runs": out}
    return DraftsRequest(models["whole"], drafts=[str(one) for one in tried], **{**small, **options})


def test_a_draft_is_tried_beside_the_model_alone_and_recorded(models: dict[str, Path], tmp_path: Path) -> None:
    found = drafts(asked(models, tmp_path, models["small"]))
    (one,) = found["drafts"]
    assert (one["draft"], one["target"]) == (str(models["small"]), str(models["whole"]))
    assert one["answers"] == one["same"] == 2
    assert 0 < one["accepted"] <= one["drafted"]
    assert one["acceptance"] == one["accepted"] / one["drafted"]
    # 15 tokens follow the first one of each answer. Each token that was not taken from the draft needs a pass.
    assert one["tokens_per_pass"] == pytest.approx(30 / (30 - one["accepted"]))
    assert one["expected"] == pytest.approx(one["tokens_per_pass"] / (1 + 3 * one["cost"]))
    assert one["size_bytes"] == models["small"].stat().st_size
    assert found["kept_in"] == str(tmp_path / FILE)
    shown = drafts(asked(models, tmp_path))
    assert shown["drafts"] == json.loads(json.dumps(found["drafts"]))
    assert recorded(models["small"], tmp_path / FILE) == []


def test_speed_is_of_the_same_beginnings() -> None:
    def tried(*steps: float, taken: int = 0, text: str = "a") -> Tried:
        return Tried(
            answers=tuple(
                Answer(tokens=4, first_seconds=9.0, token_seconds=(one,) * 3, drafted=3, accepted=taken, text=text)
                for one in steps
            )
        )

    found = _draft_figures(tried(0.2, 0.4, 0.9), tried(0.1, 0.1, taken=2, text="b"), tried(0.05, 0.05))
    assert (found["answers"], found["same"], found["acceptance"]) == (2, 0, pytest.approx(2 / 3))
    assert found["speed"] == pytest.approx(0.6 / 0.2)
    assert found["tokens_per_pass"] == pytest.approx(6 / 2)
    assert found["cost"] == pytest.approx(0.05 / 0.3)
    assert found["expected"] == pytest.approx(3 / (1 + 3 * 0.05 / 0.3))
    assert found["speed_stderr"] > 0
    assert np.isfinite(found["acceptance_stderr"])


def test_what_a_server_was_asked_is_recorded_where_something_was_drafted(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = settle(ServeRequest(models["whole"], port=0, draft=models["small"]))
    done = {"drafted": 40, "accepted": 30, "acceptance": 0.75, "answer_tokens": 50}
    said: list[str] = []
    record_served(setting, tmp_path, done | {"drafted": 0}, said.append)
    record_served(settle(ServeRequest(models["whole"], port=0)), tmp_path, done, said.append)
    assert not (tmp_path / FILE).exists()
    record_served(setting, tmp_path, done, said.append)
    (one,) = recorded(models["whole"], tmp_path / FILE)
    assert (one["how"], one["drafted"], one["accepted"]) == ("serve", 40, 30)
    assert said == []
    (tmp_path / "file").touch()
    record_served(setting, tmp_path / "file", done, said.append)
    assert "the acceptance was not recorded" in said[0]
    words = ["drafts", str(models["whole"]), "--runs", str(tmp_path)]
    assert main(words) == 0
    assert "75.0%" in capsys.readouterr().out
    assert main(["drafts", str(models["small"]), "--runs", str(tmp_path)]) == 0
    assert "No draft of" in capsys.readouterr().out
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "drafted", "target": 3}\n')
    assert main(words) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time": "2h"}, "--time"),
        ({"decoded": 2}, "--decoded must be 3"),
        ({"prompts": 0}, "--prompts"),
        ({"decoded": 600}, "has no room for --decoded 600"),
        ({"text": "no-such-text"}, "no-such-text"),
    ],
)
def test_what_cannot_be_is_refused(
    models: dict[str, Path], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        drafts(asked(models, tmp_path, models["small"], **options))
    assert not (tmp_path / FILE).exists()


def test_a_draft_of_another_vocabulary_is_refused_before_anything_is_served(
    models: dict[str, Path], tmp_path: Path
) -> None:
    other = save_tiny_teacher(tmp_path / "teacher", layers=2, vocabulary=350)
    file = GgufExporter().export(other, deployment_named("gguf-q8_0"), tmp_path / "gguf").path
    with pytest.raises(InputError, match="a draft with the same tokenizer"):
        drafts(asked(models, tmp_path, models["small"], file))
