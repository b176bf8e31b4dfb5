"""The child process that reads whole sequences in llama.cpp's library and returns what they lose there.

llama.cpp's server reports only the token after a prompt's last token. Its library reports all, and the shared object of
xllamacpp exports the library. The program is run by path, like `llama_cpp_child`. It ends at once if the library's
settings do not lie where they are expected; the caller then asks the server.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from ctypes import c_bool, c_char_p, c_int32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

# Fields of `llama_context_params` that are set or checked here: their offset in bytes, and their default value.
_DEFAULTS = {"n_ctx": (0, 512), "n_batch": (4, 2048), "n_ubatch": (8, 512), "n_seq_max": (12, 1), "n_threads": (28, 4)}
_DEFAULTS |= {"n_threads_batch": (32, 4), "flash_attn_type": (52, -1), "type_k": (104, 1), "type_v": (108, 1)}
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
# As `ggml_type` numbers them.
_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
# Number of tokens whose logits are held at once.
_AT_ONCE = 64


class _Settings(ctypes.Structure):
    """Memory for a structure of settings of unknown size. What lies behind the structure is never read."""

    _fields_ = (("data", ctypes.c_ubyte * 1024),)


class _Batch(ctypes.Structure):
    """`llama_batch`: tokens that continue the previous ones, and a flag for each whether its logits are wanted."""

    _fields_ = (
        ("n_tokens", c_int32),
        *((name, c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


class _Library:
    """A GGUF file with its own context.

    Args:
        settings: The same as for `LlamaServer`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import xllamacpp

        (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
        self._library = ctypes.CDLL(str(path))
        self._call("llama_backend_init", None)
        load = self._function("llama_model_load_from_file", c_void_p, c_char_p, _Settings)
        self._model = load(settings["path"].encode(), self._call("llama_model_default_params", _Settings))
        if not self._model:
            sys.exit(f"llama.cpp's library could not load {settings['path']}")
        begin = self._function("llama_init_from_model", c_void_p, c_void_p, _Settings)
        self._context = begin(self._model, self._asked(settings))
        if not self._context:
            sys.exit("llama.cpp's library made no context")
        self._decode = self._function("llama_decode", c_int32, c_void_p, _Batch)
        self._logits = self._function("llama_get_logits", ctypes.POINTER(ctypes.c_float), c_void_p)
        self._clear = self._function("llama_memory_clear", None, c_void_p, c_bool)
        self._memory = self._of("llama_get_memory", c_void_p, self._context)
        vocabulary = self._of("llama_model_get_vocab", c_void_p, self._model)
        self._tokens = self._of("llama_vocab_n_tokens", c_int32, vocabulary)
        if self._of("llama_n_ctx", ctypes.c_uint32, self._context) < settings["context"]:
            sys.exit("llama.cpp's library has settings of another layout")

    def read(self, sequence: list[int]) -> tuple[list[int], list[float]]:
        """Return the likeliest token at each place but the first, and the negative log-likelihood of the one there."""
        top1: list[int] = []
        nll: list[float] = []
        self._clear(self._memory, True)
        for first in range(0, len(sequence) - 1, _AT_ONCE):
            labels = np.array(sequence[first + 1 : first + 1 + _AT_ONCE])
            tokens = np.array(sequence[first : first + len(labels)], dtype=np.int32)
            wanted = np.ones(len(tokens), dtype=np.int8)
            batch = _Batch(n_tokens=len(tokens), token=tokens.ctypes.data, logits=wanted.ctypes.data)
            if (code := self._decode(self._context, batch)) != 0:
                sys.exit(f"llama.cpp's library could not read {len(sequence)} tokens (code {code})")
            logits = np.ctypeslib.as_array(self._logits(self._context), (len(tokens), self._tokens))
            largest = logits.max(axis=1)
            total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64))
            top1 += logits.argmax(axis=1).tolist()
            nll += (total - logits[np.arange(len(labels)), labels]).tolist()
        return top1, nll

    def _asked(self, settings: dict[str, Any]) -> _Settings:
        given = self._call("llama_context_default_params", _Settings)
        numbers = memoryview(given).cast("B")
        if any(struct.unpack_from("<i", numbers, place)[0] != usual for place, usual in _DEFAULTS.values()):
            sys.exit("llama.cpp's library has settings of another layout")
        asked = {"n_ctx": settings["context"], "flash_attn_type": _FLASH_ATTENTION[settings["flash_attention"]]}
        asked |= dict.fromkeys(("n_threads", "n_threads_batch"), settings["threads"])
        asked |= {f"type_{one}": _TYPES[settings[f"cache_type_{one}"]] for one in ("k", "v")}
        for name, number in asked.items():
            struct.pack_into("<i", numbers, _DEFAULTS[name][0], number)
        return given

    def _function(self, name: str, returned: Any, *taken: Any) -> Any:
        found = getattr(self._library, name)
        found.restype, found.argtypes = returned, taken
        return found

    def _call(self, name: str, returned: Any) -> Any:
        return self._function(name, returned)()

    def _of(self, name: str, returned: Any, pointer: Any) -> Any:
        return self._function(name, returned, c_void_p)(pointer)


def main() -> None:
    """Load the file, report that in one line, and answer each sequence in a line until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the runtime prints goes to the log
    library = _Library(json.loads(sys.argv[1]))
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(library.read(**json.loads(line))), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
