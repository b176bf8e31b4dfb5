"""Runs an exported model in its runtime, in a process that knows nothing else of the model; executed by path."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Logits: TypeAlias = npt.NDArray[np.float32]
Reader: TypeAlias = Callable[[npt.NDArray[np.int64]], Logits]
"""Takes the next tokens, int64 [batch, tokens], and returns their logits, [batch, tokens, vocabulary]."""

_ENGINE_PROMPT, _ENGINE_TOKENS = "The quick brown fox jumps over the lazy dog, and", 32
"""The prompt for LiteRT-LM, which accepts only text, and the number of tokens that it writes after the prompt."""


def _onnx(path: str, threads: int) -> Callable[[], Reader]:
    """Run ONNX Runtime, with the cache that the graph returns."""
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
            """Return the logits of the next tokens."""
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
    """Run a module without a cache, which reads all tokens again."""
    import torch

    def begin() -> Reader:
        """Return a reader that has read nothing."""
        before: list[npt.NDArray[np.int64]] = []

        def read(tokens: npt.NDArray[np.int64]) -> Logits:
            """Return the logits of the next tokens, computed from all tokens so far."""
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


def _litert(path: str, threads: int) -> Callable[[], Reader]:
    """Run LiteRT, with the cache that the file returns: prompts in chunks, and the rest token by token."""
    from ai_edge_litert.interpreter import Interpreter

    return _by_signatures(Interpreter(path, num_threads=threads))


def _by_signatures(loaded: Any) -> Callable[[], Reader]:
    """Run a loaded LiteRT file."""
    loaded.allocate_tensors()
    chunks, single = (loaded.get_signature_runner(name) for name in ("prefill", "decode"))
    shapes = {name: one["shape"] for name, one in chunks.get_input_details().items()}
    chunk, context = int(shapes["tokens"][1]), int(shapes["kv_cache_k_0"][2])

    def begin() -> Reader:
        """Return a reader with an empty cache."""
        cache = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name.startswith("kv_")}
        before = 0

        def read(tokens: npt.NDArray[np.int64]) -> Logits:
            """Return the logits of the next tokens."""
            nonlocal before
            found, rest = [], tokens.astype(np.int32)
            while rest.shape[1]:
                whole = rest.shape[1] > 1 and before + chunk <= context
                count = min(rest.shape[1], chunk) if whole else 1
                # Cache entries from padding behind the text are overwritten before any token sees them.
                part = np.pad(rest[:, :count], ((0, 0), (0, chunk - count))) if whole else rest[:, :1]
                places = np.arange(before, before + part.shape[1], dtype=np.int32)
                given = (chunks if whole else single)(tokens=part, input_pos=places, **cache)
                found.append(given.pop("logits")[:, :count])
                cache.update(given)
                before, rest = before + count, rest[:, count:]
            return np.concatenate(found, axis=1)

        return read

    return begin


def _litertlm(path: str, threads: int) -> Callable[[], Reader]:
    """Run the model of a LiteRT-LM container in LiteRT, after checking that LiteRT-LM writes the same text."""
    import io
    import os

    import litert_lm
    from ai_edge_litert.interpreter import Interpreter
    from litert_lm_builder import litertlm_peek
    from litert_lm_builder.litertlm_header_schema_py_generated import AnySectionDataType

    header = litertlm_peek.read_litertlm_header(path, io.StringIO())
    sections = [header.SectionMetadata().Objects(place) for place in range(header.SectionMetadata().ObjectsLength())]
    (model,) = (one for one in sections if one.DataType() == AnySectionDataType.TFLiteModel)
    with open(path, "rb") as file:
        file.seek(model.BeginOffset())
        content = file.read(model.EndOffset() - model.BeginOffset())
    begin = _by_signatures(Interpreter(model_content=content, num_threads=threads))
    backend = litert_lm.Backend.CPU(thread_count=threads)
    with litert_lm.Engine(path, backend=backend, cache_dir=os.getcwd()) as engine:  # this process's own folder
        greedy = litert_lm.SamplerConfig(top_k=1)
        with engine.create_session(
            apply_prompt_template=False, sampler_config=greedy, max_output_tokens=_ENGINE_TOKENS
        ) as session:
            session.run_prefill([_ENGINE_PROMPT])
            said = session.run_decode().texts[0]
        first = [] if engine.bos_token_id is None else [engine.bos_token_id]
        read, tokens = begin(), np.array([first + engine.tokenize(_ENGINE_PROMPT)], np.int64)
        written = list[int]()
        for _ in range(_ENGINE_TOKENS):
            tokens = read(tokens)[:, -1:].argmax(axis=-1)
            written.append(int(tokens[0, 0]))
        # LiteRT-LM's text stops before an end token.
        texts = [engine.detokenize(written[:count]) for count in range(1, len(written) + 1)]
    if said not in texts:
        sys.exit(f"LiteRT-LM wrote {said!r}, and the model in the file writes {texts[-1]!r}")
    return begin


def _executorch(path: str, threads: int) -> Callable[[], Reader]:
    """Run ExecuTorch, whose program keeps its cache; a text that begins at position 0 starts anew."""
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(path).load_method("forward")
    most = int(method.metadata.input_tensor_meta(0).sizes()[1])

    def begin() -> Reader:
        """Return a reader that has read nothing."""
        before = 0

        def read(tokens: npt.NDArray[np.int64]) -> Logits:
            """Return the logits of the next tokens."""
            nonlocal before
            found = []
            for part in np.split(tokens, range(most, tokens.shape[1], most), axis=1):
                given = method.execute([torch.from_numpy(np.ascontiguousarray(part)), torch.tensor([before])])
                found.append(given[0].numpy().copy())
                before += part.shape[1]
            return np.concatenate(found, axis=1)

        return read

    return begin


_RUNTIMES = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "pt2": _pt2,
    "aoti": _aoti,
    "litert": _litert,
    "litert-codes": _litert,
    "litertlm": _litertlm,
    "executorch": _executorch,
}


def _chosen(logits: Logits, tokens: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], Logits]:
    """Return the likeliest token at each place but the first, and the negative log-likelihood of the one there."""
    logits = logits[:-1]
    top = logits.max(axis=-1)
    total = top + np.log(np.exp(logits - top[:, None], dtype=np.float64).sum(axis=-1))
    there = np.take_along_axis(logits, tokens[1:, None], -1)[:, 0]
    return logits.argmax(axis=-1).astype(np.int32), (total - there).astype(np.float32)


def main(settings: dict[str, Any]) -> None:
    """Write tokens after the prompt from the first sequence, then read all sequences, and store the outputs.

    Args:
        settings: "runtime", one of `_RUNTIMES`; "path" of the file; "tokens", an .npy file of sequences; "out", the
            .npz file to write; "threads"; "prompt" and "written", numbers of tokens to read and to write.
    """
    begin = _RUNTIMES[settings["runtime"]](settings["path"], settings["threads"])
    sequences = np.load(settings["tokens"], allow_pickle=False).astype(np.int64)
    read, tokens = begin(), sequences[:1, : settings["prompt"]]
    written, times, used = list[int](), [time.perf_counter()], list[float]()
    for _ in range(settings["written"]):
        tokens = read(tokens)[:, -1:].argmax(axis=-1)
        written.append(int(tokens[0, 0]))
        times.append(time.perf_counter())
        used.append(time.process_time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = [_chosen(begin()(row[None])[0], row) for row in sequences]
    loaded = sorted(name for name in ("transformers", "autodistill") if name in sys.modules)
    assert not loaded, f"{loaded} was loaded"
    top1, nll = (np.stack(part) for part in zip(*found, strict=True))
    np.savez(
        settings["out"],
        top1=top1,
        nll=nll,
        written=np.array(written, np.int64),
        first_ms=1e3 * (times[1] - times[0]),
        tokens_per_second=(len(written) - 1) / (times[-1] - times[1]),
        cpu_ms=1e3 * (used[-1] - used[0]) / (len(written) - 1),
        peak_bytes=peak,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
