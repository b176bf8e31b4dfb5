"""Runs an exported model in its runtime, alone in a process that knows nothing of the model; run by path."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Logits: TypeAlias = npt.NDArray[np.float32]
Reader: TypeAlias = Callable[[npt.NDArray[np.int64]], Logits]
"""Takes the tokens that follow, int64 [batch, tokens], and returns their logits, [batch, tokens, vocabulary]."""


def _onnx(path: str, threads: int) -> Callable[[], Reader]:
    """ONNX Runtime, with the cache that the graph gives back."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    cached = [one for one in session.get_inputs() if one.name.startswith("past_key_values.")]
    names = [one.name for one in session.get_outputs()]

    def begin() -> Reader:
        """Return a reader with an empty cache."""
        cache: dict[str, Any] = {}

        def read(tokens: npt.NDArray[np.int64]) -> Logits:
            """Return the logits of the tokens that follow."""
            batch = len(tokens)
            for one in cached if not cache else ():
                dtype = np.float16 if one.type == "tensor(float16)" else np.float32
                cache[one.name] = np.zeros((batch, one.shape[1], 0, one.shape[3]), dtype)
            before = next(iter(cache.values())).shape[2]
            total = before + tokens.shape[1]
            found = session.run(
                None,
                {
                    "input_ids": tokens,
                    "attention_mask": np.ones((batch, total), np.int64),
                    "position_ids": np.tile(np.arange(before, total), (batch, 1)),
                    **cache,
                },
            )
            given = dict(zip(names, found, strict=True))
            cache.update({name: given[name.replace("past_key_values.", "present.")] for name in cache})
            return given["logits"].astype(np.float32)

        return read

    return begin


def _whole(forward: Callable[[Any], Any]) -> Callable[[], Reader]:
    """A module without a cache: it reads everything again."""
    import torch

    def begin() -> Reader:
        """Return a reader that has read nothing."""
        before: list[npt.NDArray[np.int64]] = []

        def read(tokens: npt.NDArray[np.int64]) -> Logits:
            """Return the logits of the tokens that follow, from all tokens so far."""
            before.append(tokens)
            with torch.inference_mode():
                logits = forward(torch.from_numpy(np.concatenate(before, axis=1)))
            found: Logits = logits[:, -tokens.shape[1] :].float().numpy()
            return found

        return read

    return begin


def _torchscript(path: str, threads: int) -> Callable[[], Reader]:
    import torch

    torch.set_num_threads(threads)
    return _whole(torch.jit.load(path))


def _pt2(path: str, threads: int) -> Callable[[], Reader]:
    import torch

    torch.set_num_threads(threads)
    return _whole(torch.export.load(path).module())


def _aoti(path: str, threads: int) -> Callable[[], Reader]:
    import torch
    from torch._inductor import aoti_load_package

    torch.set_num_threads(threads)
    return _whole(aoti_load_package(path))


_RUNTIMES = {"onnx": _onnx, "torchscript": _torchscript, "pt2": _pt2, "aoti": _aoti}


def _likeliest(logits: Logits, count: int) -> tuple[npt.NDArray[np.int32], Logits]:
    """Return the likeliest tokens of each row, best first, and their log-probabilities."""
    count = min(count, logits.shape[-1])
    some = np.sort(np.argpartition(-logits, count - 1, axis=-1)[..., :count], axis=-1)
    # Of equal ones the first, as argmax takes it.
    order = np.argsort(-np.take_along_axis(logits, some, -1), axis=-1, kind="stable")
    tokens = np.take_along_axis(some, order, -1)
    tokens[..., 0] = logits.argmax(axis=-1)
    top = logits.max(axis=-1, keepdims=True)
    total = top + np.log(np.exp(logits - top, dtype=np.float64).sum(axis=-1, keepdims=True))
    return tokens.astype(np.int32), (np.take_along_axis(logits, tokens, -1) - total).astype(np.float32)


def main(settings: dict[str, Any]) -> None:
    """Read sequences, write tokens after the first ones of the first sequence, and keep what came out.

    Args:
        settings: "runtime", one of `_RUNTIMES`; "path" of the file; "tokens", an .npy file of sequences; "out", the
            .npz file to write; "threads"; "prompt" and "written", tokens that are read and written; "kept", how many
            of the likeliest tokens of each place are.
    """
    begin = _RUNTIMES[settings["runtime"]](settings["path"], settings["threads"])
    sequences = np.load(settings["tokens"], allow_pickle=False).astype(np.int64)
    found = [_likeliest(begin()(row[None])[0], settings["kept"]) for row in sequences]
    read, tokens = begin(), sequences[:1, : settings["prompt"]]
    written = []
    for _ in range(settings["written"]):
        tokens = read(tokens)[:, -1:].argmax(axis=-1)
        written.append(int(tokens[0, 0]))
    loaded = sorted(name for name in ("transformers", "autodistill") if name in sys.modules)
    assert not loaded, f"{loaded} was loaded"
    likeliest, log_probs = (np.stack(part) for part in zip(*found, strict=True))
    np.savez(settings["out"], likeliest=likeliest, log_probs=log_probs, written=np.array(written, np.int64))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
