"""llama.cpp's own quantiser, `llama_model_quantize` of a library of llama.cpp, called as `llama-quantize` calls it.

The xllamacpp package's own library lacks this function; @node-llama-cpp/linux-x64 of the npm registry has it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "IQ4_NL": 25}
"""Numbers of the quantiser's types of files (`llama_ftype`), by the names that users give."""


class _Importance(ctypes.Structure):
    """`llama_model_imatrix_data`: the mean squares of the inputs of one matrix. An entry without a name is the last."""

    _fields_ = (("name", ctypes.c_char_p), ("values", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Params(ctypes.Structure):
    """The fields of `llama_model_quantize_params` up to the last one that is set, and room for those of any release."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("file_type", ctypes.c_int32),
        ("types", ctypes.c_int32 * 2),
        ("switches", ctypes.c_bool * 6),
        ("importance", ctypes.POINTER(_Importance)),
        ("others", ctypes.c_char * 480),
    )


def load_quantizer(path: Path) -> ctypes.CDLL:
    """Load a library of llama.cpp, beside which those lie that it loads itself."""
    for one in sorted(path.parent.glob("libggml-base.so*")):
        ctypes.CDLL(str(one), mode=ctypes.RTLD_GLOBAL)
    found = ctypes.CDLL(str(path))
    found.llama_model_quantize_default_params.restype = _Params
    found.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Params)]
    found.llama_model_quantize.restype = ctypes.c_uint32
    found.llama_backend_init()
    return found


def quantize(
    library: ctypes.CDLL,
    model: Path,
    out: Path,
    file_type: int,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> None:
    """Write a quantised file of a GGUF file.

    Args:
        library: What `load_quantizer` returns.
        model: The file, in 16 or 32 bits.
        out: The new file.
        file_type: One of `FILE_TYPES`.
        importance: The importance matrix: the mean square of each input of a matrix, by its name in the file.

    Raises:
        RuntimeError: llama.cpp refuses.
    """
    params = library.llama_model_quantize_default_params()
    params.file_type, params.threads = file_type, 1
    held = {name: np.ascontiguousarray(values, np.float32) for name, values in (importance or {}).items()}
    entries = [_Importance(name.encode(), values.ctypes.data, values.size) for name, values in held.items()]
    if entries:
        params.importance = (_Importance * (len(entries) + 1))(*entries)
    if library.llama_model_quantize(str(model).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp did not quantise {model} to its type {file_type}")
