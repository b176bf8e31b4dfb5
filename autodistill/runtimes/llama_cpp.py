"""Run an exported GGUF file in llama.cpp, in a child process, and read the memory use from its log."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.hardware.process_memory import peak_memory
from autodistill.runtimes.json_child import JsonChild

_CHILD = Path(__file__).with_name("llama_cpp_child.py")
_LIBRARY_CHILD = Path(__file__).with_name("llama_cpp_logits_child.py")
_BUFFER = re.compile(r": +(\S+) +(model|KV|RS|compute|output) buffer size = +([\d.]+) MiB")
# The last buffers that llama.cpp logs.
_COMPUTED = re.compile(r"compute buffer size")
# Both parts begin at the start of a line: otherwise the time would grow with the square of a line's length.
_TROUBLE = re.compile(r"^(?:[\d.]+ E (?P<said>.*)|(?P<abort>.*(?:GGML_ASSERT|GGML_ABORT).*))", re.MULTILINE)
# The types of keys and values in a context.
_CACHE_TYPES_LOGGED = re.compile(r"\b([KV]) \((\w+)\): ")
_LOG_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The text that llama.cpp wrote after a prompt, and its tokens.

    Attributes:
        tokens: Ids of the written tokens, including an end token.
        text: The same as text, without special tokens.
        prompt_tokens: Tokens of the prompt that were computed, without those that were already in the context.
    """

    tokens: tuple[int, ...]
    text: str
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Bytes of the buffers that llama.cpp reports, over all devices, with a precision of a hundredth of a MiB.

    Recurrent states count as part of the KV buffers.
    """

    model_bytes: int
    kv_bytes: int
    compute_bytes: int
    output_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum of the buffers."""
        return self.model_bytes + self.kv_bytes + self.compute_bytes + self.output_bytes


class LlamaServer:
    """A GGUF file loaded in llama.cpp, for use in a `with` statement.

    llama.cpp runs in a child process: a crash does not reach the caller, its memory is freed, and its log can be read
    completely. The child ends with the `with` block, or with the caller, however the caller ends. Its threads spin
    while they wait for each other. So measure a latency with nothing else running and as many cores as threads. Next to
    other work, one thread is fastest.

    Args:
        path: The file.
        context: Tokens of context of each sequence. llama.cpp rounds it up to a multiple of 256.
        threads: CPU threads.
        parallel: Number of sequences that it has room for.
        cache_type_k, cache_type_v: Types of keys and values in the cache: "f16", "q8_0" or "q4_0".
        flash_attention: "on", "off", or "auto" for llama.cpp's default.
        whole_cache: Whether layers with a sliding window keep the keys and values of all tokens. Otherwise, a prompt
            that continues the one before is read again from its beginning while it is shorter than the window.

    Raises:
        MissingDependencyError: xllamacpp is not installed.
        VerificationError: On entry, the file could not be loaded; later, the runtime died or refused a request. The
            message has llama.cpp's own words.
    """

    def __init__(
        self,
        path: Path,
        context: int,
        threads: int,
        parallel: int = 1,
        *,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        flash_attention: str = "auto",
        whole_cache: bool = False,
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise MissingDependencyError("running a GGUF file needs xllamacpp: pip install xllamacpp")
        for name, value in (("context", context), ("threads", threads), ("parallel", parallel)):
            if value < 1:
                raise InputError(f"llama.cpp needs {name} of at least 1, not {value}")
        self._path = path
        self._settings: dict[str, Any] = {
            "path": str(path.resolve()),
            "context": context,
            "threads": threads,
            "parallel": parallel,
            "cache_type_k": cache_type_k,
            "cache_type_v": cache_type_v,
            "flash_attention": flash_attention,
            "whole_cache": whole_cache,
        }

    def __enter__(self) -> Self:
        failure = f"llama.cpp could not load {self._path.name}"
        self._child = JsonChild(_CHILD, self._settings, _environment(), failure, _last_words)
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    def complete(
        self, tokens: Sequence[int], max_tokens: int, *, reuse: bool = False, ignore_end: bool = False
    ) -> Completion:
        """Continue a prompt with the most likely tokens.

        Args:
            tokens: The prompt's ids.
            max_tokens: Most tokens to write. An end token stops earlier.
            reuse: Whether the part of the prompt that the context already has may be reused, so that only the rest is
                computed.
            ignore_end: Whether end tokens are never chosen.
        """
        (result,) = self._ask(tokens, max_tokens, cache_prompt=reuse, ignore_eos=ignore_end, return_tokens=True)
        written, computed = result["__verbose"], result["timings"]["prompt_n"]
        return Completion(tokens=tuple(written["tokens"]), text=written["content"], prompt_tokens=computed)

    def next_token(self, tokens: Sequence[int]) -> int:
        """Return the most likely token after a prompt.

        If a prompt begins like the one before, only the rest is computed.
        """
        return self.complete(tokens, 1, reuse=True).tokens[0]

    def read(self, sequences: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
        """Return what llama.cpp predicts at each place of some sequences, and what they lose there.

        Its library reads a whole sequence at once, in a process of its own, which loads the file too. So call this
        before the `with` block, and the file is in memory only once.

        Args:
            sequences: Sequences of equal length, of at least two tokens.

        Returns:
            The likeliest token at each place but the first, and the negative log-likelihood in nats of the token that
            stands there: int32 and float64 [sequences, tokens - 1].

        Raises:
            VerificationError: The library has an unknown layout, or fails. `choices` still works without the library.
        """
        failure = f"llama.cpp's library did not read {self._path.name}"
        child = JsonChild(_LIBRARY_CHILD, self._settings, _environment(), failure, _last_words)
        try:
            found = [child.ask({"sequence": [int(token) for token in row]}, failure) for row in sequences]
            held = dict(_CACHE_TYPES_LOGGED.findall(child.log()))
        finally:
            child.stop()
        if held != {"K": self._settings["cache_type_k"], "V": self._settings["cache_type_v"]}:
            raise VerificationError(f"{failure} with the cache that was asked for")
        top1, nll = zip(*found, strict=True)
        return np.array(top1, np.int32), np.array(nll, np.float64)

    def choices(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the likeliest tokens of `read` by asking the server for one after another, which takes much longer.

        Args:
            sequences: Sequences of equal length. As many are read together as the server has slots.
        """
        found: list[list[int]] = []
        slots: int = self._settings["parallel"]
        for first in range(0, len(sequences), slots):
            rows = sequences[first : first + slots]
            # Each prompt is the one before plus one token, so that only that token is computed.
            columns = [self.next_tokens([row[: end + 1] for row in rows]) for end in range(len(rows[0]) - 1)]
            found += map(list, zip(*columns, strict=True))
        return found

    def next_tokens(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Return the most likely token after each of some prompts, which are read together.

        If a prompt begins like an earlier one, only the rest is computed. When several prompts grow by one token, they
        share the reading of the weights, which is most of the time of a token.

        Args:
            prompts: At most as many as the server has slots.
        """
        asked = [[int(token) for token in prompt] for prompt in prompts]
        options = {"n_predict": 1, "temperature": 0, "cache_prompt": True, "return_tokens": True}
        (answer,) = self._exchange({"prompt": asked, "together": {"prompt": asked, **options}})
        # For a single prompt the answer is not a list.
        found = {int(one["index"]): one["tokens"] for one in (answer if isinstance(answer, list) else [answer])}
        return [int(found[index][0]) for index in range(len(asked))]

    def write(self, tokens: Sequence[int], count: int) -> Completion:
        """Continue a prompt with the most likely tokens; an end token does not stop it.

        Each token is a request of its own. The server dies when it writes several tokens whose text is not UTF-8, which
        happens with a random model.
        """
        found: list[Completion] = []
        prompt = list(tokens)
        while len(found) < count:
            found.append(self.complete(prompt, 1, reuse=True))
            if not found[-1].tokens:
                break
            prompt += found[-1].tokens
        return Completion(
            tokens=tuple(prompt[len(tokens) :]),
            text="".join(one.text for one in found),
            prompt_tokens=sum(one.prompt_tokens for one in found),
        )

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Return llama.cpp's token ids of a text, including the tokens that begin it. Special tokens are recognised."""
        (answer,) = self._exchange({"prompt": text, "text": text})
        return tuple(answer["tokens"])

    def begin(self, prompts: Sequence[Sequence[int]]) -> float:
        """Read prompts that arrive at once, in an empty context.

        Args:
            prompts: At most as many as the server has slots.

        Returns:
            Seconds until the last prompt has its first token.
        """
        self._streams = [[int(token) for token in prompt] for prompt in prompts]
        began = time.perf_counter()
        self._post(max_tokens=1, cache_prompt=False)
        return time.perf_counter() - began

    def step(self, *, grow: bool = True) -> float:
        """Add a token to each stream that was begun. Which token it is does not change the time.

        A request that extends the context by one token costs as much as a decoding step. (A stream of tokens would
        report the same times, but it ends at a token that is not valid text.)

        Args:
            grow: Whether the streams keep the token. Otherwise their last token is computed again.

        Returns:
            Seconds that the step took, by llama.cpp's own clock.
        """
        for stream in self._streams if grow else ():
            stream.append(stream[-1])
        return float(self._post(max_tokens=1, cache_prompt=True)["timings"]["prompt_ms"]) / 1e3

    def _post(self, **options: Any) -> dict[str, Any]:
        """Send all streams in one request, each in its own slot."""
        prompts = self._streams if len(self._streams) > 1 else self._streams[0]
        (result,) = self._exchange({"prompt": prompts, "temperature": 0, "ignore_eos": True, **options})
        return result

    @property
    def accelerated(self) -> bool:
        """Whether a GPU holds weights."""
        devices = {device for device, kind, _ in _BUFFER.findall(self._child.log()) if kind == "model"}
        return any(map(_of_gpu, devices))

    @property
    def pid(self) -> int:
        """Id of the process that runs llama.cpp."""
        return self._child.pid

    def used_seconds(self) -> float:
        """Return the CPU seconds that llama.cpp and this process have used."""
        return self._child.used_seconds()

    def peak_bytes(self) -> int:
        """Return the peak memory of llama.cpp's process, without what its interpreter had used before loading."""
        return peak_memory(self._child.pid) - int(self._child.ready["interpreter_bytes"])

    def buffers(self, *, on_gpu: bool | None = None) -> Buffers:
        """Return the buffer sizes from the log.

        Args:
            on_gpu: As for `parse_buffers`.

        Raises:
            VerificationError: The log names no model or compute buffer.
        """
        # llama.cpp writes its log in a thread, which may lag behind the model.
        ends, before = time.monotonic() + _LOG_SECONDS, ""
        while (log := self._child.log()) != before or not _COMPUTED.search(log):
            if time.monotonic() > ends:
                break
            before = log
            time.sleep(0.05)
        found = parse_buffers(log, on_gpu=on_gpu)
        if found.compute_bytes == 0:
            raise VerificationError(f"llama.cpp's log names no compute buffer for {self._path.name}")
        return found

    def _ask(self, tokens: Sequence[int], max_tokens: int, **options: Any) -> list[dict[str, Any]]:
        prompt = [int(token) for token in tokens]
        return self._exchange({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options})

    def _exchange(self, request: dict[str, Any]) -> list[Any]:
        chunks: list[Any] = self._child.ask(request, f"llama.cpp died while it ran {self._path.name}")
        for chunk in chunks:
            if "error" in chunk:
                count = len(request["prompt"])
                raise VerificationError(f"llama.cpp refused a prompt of {count}: {chunk['error']['message']}")
        return chunks


def _of_gpu(device: str) -> bool:
    """Return whether a buffer lies in GPU memory; main memory that a GPU reads is called CUDA_Host or similar."""
    return not device.startswith(("CPU", "AMX")) and not device.endswith("_Host")


def parse_buffers(log: str, *, on_gpu: bool | None = None) -> Buffers:
    """Read the buffer sizes from llama.cpp's log.

    A model may have several model and KV buffers, which are added up. Compute and output buffers may be reserved again,
    so the last line of each device counts.

    Args:
        log: The whole log.
        on_gpu: Whether only buffers on GPUs count, or only those in main memory; None counts all.

    Raises:
        VerificationError: The log has no size of a model buffer.
    """
    sums: dict[str, float] = defaultdict(float)
    last: dict[tuple[str, str], float] = {}
    stated = _BUFFER.findall(log)
    for device, kind, size in stated:
        if on_gpu is not None and _of_gpu(device) != on_gpu:
            continue
        if kind in ("model", "KV", "RS"):
            sums["KV" if kind == "RS" else kind] += float(size)
        else:
            last[kind, device] = float(size)
    if not any(kind == "model" for _, kind, _ in stated):
        raise VerificationError("llama.cpp's log states no buffer sizes: install the xllamacpp version that this needs")
    for (kind, _), size in last.items():
        sums[kind] += size
    sizes = {kind: round(sums[kind] * 2**20) for kind in ("model", "KV", "compute", "output")}
    return Buffers(
        model_bytes=sizes["model"],
        kv_bytes=sizes["KV"],
        compute_bytes=sizes["compute"],
        output_bytes=sizes["output"],
    )


def _environment() -> dict[str, str]:
    """Return the variables of a child process, without the OpenMP settings of the caller's torch or scheduler."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}


def _last_words(log: str) -> str:
    """Return the errors that llama.cpp logged, or the last line of the log if there are none."""
    errors = [(match["said"] or match["abort"]).strip() for match in _TROUBLE.finditer(log)]
    if errors:
        return "; ".join(errors[:2])
    lines = log.strip().splitlines()
    return lines[-1].strip() if lines else "it left no log"
