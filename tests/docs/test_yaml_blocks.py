"""Every YAML block of a page in docs/ is valid as what it shows: a space, a part of a space, or tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from autodistill.data.task_files import read_tasks
from autodistill.strategy.space import Space
from autodistill.utils.yaml_files import read_yaml

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Parts of a space that a block leaves out because it shows another part.
DIMENSIONS = {"init.depth": {"choices": [0.5, 1.0]}}
DEPLOYMENTS = [{"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}]
BLOCKS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in sorted(DOCS.rglob("*.md"))
    for number, text in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]


def test_pages_show_some():
    assert len(BLOCKS) > 7


@pytest.mark.parametrize("text", BLOCKS)
def test_a_block_is_what_it_is_shown_as(text: str, tmp_path: Path):
    path = tmp_path / "shown.yaml"
    # The block about K-quants starts inside its dimensions.
    path.write_text(f"dimensions:\n{text}" if text.startswith(" ") else text)
    said = read_yaml(path)
    if "tasks" in said:
        (tmp_path / "openbookqa").mkdir()
        records = ({"question": f"{n}?", "options": "A. yes\nB. no", "answer": "B. no"} for n in range(20))
        (tmp_path / "openbookqa" / "test.jsonl").write_text("\n".join(map(json.dumps, records)))
        assert [task.name for task in read_tasks(path)] == [one["name"] for one in said["tasks"]]
        return
    space = Space.from_json({"dimensions": DIMENSIONS, "deployments": DEPLOYMENTS} | said)
    assert {*said.get("dimensions", ())} <= {one.path for one in (*space.dimensions, *space.restrictions)}
    asked = [one for one in said.get("deployments", ()) if one != "solved"]
    assert len(space.deployments) == len(asked or DEPLOYMENTS)
