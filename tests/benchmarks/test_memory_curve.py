"""Loss by memory beside files of other tools: what llama.cpp is given, and what the picture and the table show."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common import llama_quantizer
from benchmarks.engine import memory_curve
from benchmarks.engine.memory_curve_chart import picture

SOLVED = {
    "teacher": {"name": "tiny"},
    "data": {"name": "text"},
    "held_out_tokens": 512,
    "solutions": [
        {
            "solution": {
                "bytes": size,
                "kl": kl,
                "kl_stderr": 0.01,
                "types": {"cache_keys": "q8_0", "cache_values": "q8_0"},
            },
            "rivals": [{"what": "teacher's own codes", "bytes": 2 * 10**8, "kl": 0.0, "kl_stderr": 0.0}],
        }
        for size, kl in ((180 * 10**6, 0.001), (150 * 10**6, 0.2))
    ],
}


def line(form: str, cache: str, size: int, kl: float) -> dict[str, Any]:
    sizes = {"bytes": size, "weights_bytes": 9 * 10**7}
    return {"tool": "llama.cpp", "form": form, "cache": cache, **sizes, "kl": kl, "kl_stderr": 0.01} | {
        "nll": 3.0,
        "nll_stderr": 0.1,
    }


FILES = [line("Q4_0", "f16", 198 * 10**6, 0.2), line("Q4_0", "q8_0", 176 * 10**6, 0.21)]
TRAINED = {
    f"block-{budget}/{arm}": [
        {"arm": arm, "budget": {"memory_bytes": budget * 10**6}, "fits": True, "test": {"nll": [3.0, 0.1]}}
    ]
    for budget in (150, 175)
    for arm in ("search", "untrained", "another")
} | {"block-150/finetune": [{"arm": "finetune", "nothing_fits": "no"}]}


class Library:
    """Keeps what the quantiser is called with."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.given: dict[str, Any] = {}

    def llama_model_quantize_default_params(self) -> Any:
        return llama_quantizer._Params()

    def llama_model_quantize(self, model: bytes, out: bytes, given: Any) -> int:
        params, entries = given._obj, {}
        place = 0
        while params.importance and params.importance[place].name is not None:
            one = params.importance[place]
            held = ctypes.cast(one.values, ctypes.POINTER(ctypes.c_float))
            entries[one.name.decode()] = [held[index] for index in range(one.size)]
            place += 1
        self.given = {"model": model, "out": out, "type": params.file_type, "importance": entries}
        return self.code


def test_llama_cpp_gets_the_importance_of_each_matrix_by_its_name_in_the_file() -> None:
    library: Any = Library()
    importance = {"blk.0.attn_q.weight": np.array([1, 2], np.float32), "blk.0.ffn_up.weight": np.ones(3, np.float32)}
    llama_quantizer.quantize(library, Path("f16.gguf"), Path("q.gguf"), 2, importance)
    assert library.given == {
        "model": b"f16.gguf",
        "out": b"q.gguf",
        "type": 2,
        "importance": {"blk.0.attn_q.weight": [1, 2], "blk.0.ffn_up.weight": [1, 1, 1]},
    }
    llama_quantizer.quantize(library, Path("f16.gguf"), Path("q.gguf"), 3)
    assert library.given["importance"] == {}
    refusing: Any = Library(1)
    with pytest.raises(RuntimeError, match=r"did not quantise f16.gguf to its type 3"):
        llama_quantizer.quantize(refusing, Path("f16.gguf"), Path("q.gguf"), 3)


def test_importance_lies_where_llama_cpp_reads_it() -> None:
    """The offsets are those of llama.h: two numbers, two types, six switches, and then pointers."""
    params = llama_quantizer._Params
    assert (params.types.offset, params.switches.offset, params.importance.offset) == (8, 16, 24)


def test_the_table_compares_a_file_with_the_best_solution_of_no_more_memory() -> None:
    small = line("Q2_K", "q8_0", 140 * 10**6, 0.5)
    beside = {(one[1], one[2]): one[-1] for one in memory_curve.rows([*FILES, small], SOLVED)}
    assert beside == {
        ("Q4_0", "16 bits"): "0.0010 in 180 MB",
        ("Q4_0", "8 bits"): "0.2000 in 150 MB",
        ("Q2_K", "8 bits"): "-",
    }


def test_the_picture_has_every_series_and_cuts_no_name_off() -> None:
    pytest.importorskip("altair")
    drawn = picture(SOLVED, FILES, TRAINED).to_dict()
    assert drawn["config"]["legend"]["labelLimit"] == 0
    above, below = (panel["data"]["values"] for panel in drawn["vconcat"])
    assert [(one["series"], one["label"], one["memory"]) for one in above] == [
        ("autodistill solve", "", 180.0),
        ("autodistill solve", "", 150.0),
        ("the model as it is packaged", "", 200.0),
        ("llama.cpp, importance matrix", "", 198.0),
        ("llama.cpp, importance matrix", "Q4_0", 176.0),
    ]
    assert {(one["arm"], one["memory"]) for one in below} == {
        (name, budget)
        for name in ("autodistill search: trained, 10 minutes", "autodistill solve: not trained")
        for budget in (150.0, 175.0)
    }
