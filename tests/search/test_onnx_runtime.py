"""A search for students in ONNX Runtime, which evaluates, exports, proves and measures them; `pick` finds one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from autodistill.api.picks import pick
from autodistill.errors import NothingFitsError
from autodistill.hardware.budget import Budget
from autodistill.runs.run_folder import RunFolder
from autodistill.search.finish.export_run import export_run
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text


@pytest.mark.slow
@pytest.mark.timed
def test_a_student_is_found_measured_and_exported_for_it(tmp_path: Path) -> None:
    served = {"runtime": "onnxruntime", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
    space = {"name": "one", "dimensions": {"init.depth": {"choices": [0.5]}}, "deployments": [served]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"init": {"depth": 0.5}}))
    asked = SearchRequest(
        budget=Budget(memory_bytes=10**9, context=128),
        strategy=str(tmp_path / "mine.yaml"),
        space=str(tmp_path / "space.yaml"),
        teacher=str(save_tiny_teacher(tmp_path / "teacher", layers=4, width=128, ffn=192)),
        data=str(tiny_text(tmp_path / "text", documents=20, sentences=24)),
        tokens=1024,
        runner="inline",
        runs=tmp_path / "runs",
        name="run",
        cache=tmp_path / "cache",
    )
    outcome = search(asked)
    best = outcome.finish.best
    assert best.deployment.name == "gguf-q8_0+onnx"
    assert outcome.finish.checks["onnx"].agreement > 0.9
    assert (best.memory_source, best.latency_source) == ("measured", "measured")
    assert (outcome.finish.paths["onnx"] / "model.onnx").is_file()
    with pytest.raises(NothingFitsError, match="is served by onnxruntime, not by vllm; name another --runtime"):
        pick(["run"], budget="1GB", runtime="vllm", runs=tmp_path / "runs", cache=tmp_path / "cache")
    found = pick(
        ["run"], budget="1GB", runtime="onnxruntime", runs=tmp_path / "runs", cache=tmp_path / "cache"
    ).document["pick"]
    assert (found["row_id"], found["runtime"]) == (best.row_id, "onnxruntime")
    # The same codes can also be exported for llama.cpp.
    run = RunFolder(tmp_path / "runs", "run")
    assert export_run(run, best.row_id, ["gguf"], tmp_path / "out")["gguf"].suffix == ".gguf"
