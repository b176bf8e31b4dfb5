"""Traces of real steps, counts of traces in the profiler's own format, and folders that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autodistill.errors import InputError
from autodistill.profiling.trace import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    INDEXING,
    LOSS,
    OPTIMIZER,
    PRODUCTS,
    check_folder,
    counted,
    kind_of,
    record,
    write_spans,
)


def test_a_step_of_products_is_mostly_products(tmp_path: Path) -> None:
    left, right = torch.ones(400, 400), torch.ones(400, 400)
    calls: list[float] = []

    def step() -> None:
        for _ in range(20):
            torch.mm(left, right)
        calls.append(float(left.sum()))

    found = record(step, tmp_path / "trace.json", steps=2, device="cpu", name="products")
    assert len(calls) == 5  # warm-up, timed and traced calls
    assert next(iter(found.kinds)) == PRODUCTS
    assert sum(found.kinds.values()) == pytest.approx(found.traced_seconds, rel=0.01)
    trace = json.loads((tmp_path / "trace.json").read_text())
    named = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    assert len(named) == 40
    assert found.counts.read_back == 2
    assert (found.counts.launches, found.counts.transfers) == (0, 0)


def test_kernels_transfers_and_waits_of_a_cuda_trace_are_counted() -> None:
    def event(category: str, name: str, **more: object) -> dict[str, object]:
        return {"ph": "X", "cat": category, "name": name, "ts": 1, "dur": 1, **more}

    events = [
        event("cpu_op", "aten::mm"),
        event("cpu_op", "aten::_local_scalar_dense"),
        *[event("cuda_runtime", "cudaLaunchKernel")] * 3,
        event("cuda_driver", "cuLaunchKernelEx"),
        event("cuda_runtime", "cudaStreamSynchronize"),
        event("cuda_runtime", "cudaDeviceSynchronize"),
        event("cuda_runtime", "cudaMemcpyAsync"),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", args={"bytes": 4096}),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", args={"bytes": 4}),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", args={"bytes": 10**6}),
        event("kernel", "ampere_sgemm_128x64_nn"),
        {"ph": "f", "cat": "ac2g", "name": "ac2g"},
    ]
    found = counted({"traceEvents": events})
    assert (found.operations, found.read_back, found.launches, found.synchronizations) == (2, 1, 4, 2)
    # Copies within the GPU are not transfers.
    assert (found.transfers, found.transferred_bytes) == (2, 4100)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", PRODUCTS),
        ("aten::bmm", PRODUCTS),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("aten::_fused_adamw_", OPTIMIZER),
        ("aten::logsumexp", LOSS),
        ("aten::_to_copy", COPIES),
        ("aten::embedding_dense_backward", INDEXING),
        ("aten::rsqrt", ELEMENTWISE),
    ],
)
def test_operations_are_told_by_their_names(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


def test_spans_are_a_chrome_trace(tmp_path: Path) -> None:
    write_spans([("a", 10.0, 10.5), ("b", 10.5, 11.0)], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(event["name"], event["ts"], event["dur"]) for event in events] == [("a", 0, 5e5), ("b", 5e5, 5e5)]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write into"):
        check_folder(tmp_path / "file" / "traces")
    check_folder(tmp_path / "new" / "traces")
    assert [*(tmp_path / "new" / "traces").iterdir()] == []
