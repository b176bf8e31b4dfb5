"""The child process in which transformers, vLLM or ONNX Runtime serves a folder: it loads it, then times requests.

They come from stdin, a line of JSON each.

Run by path and not as a module, so that this package is not imported: its memory is the runtime's alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_MOST_SHARE, _LEAST_SHARE = 0.9, 0.02  # of a GPU's memory; the first is vLLM's own choice
_CONTEXT_BYTES = 10**9  # that its engine takes of a GPU beside what it counts itself


class Transformers:
    """A model run by transformers: on a GPU if there is one, else on the CPU."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        torch.set_num_threads(settings["threads"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_grad_enabled(False)
        model: Any = AutoModelForCausalLM.from_pretrained(settings["path"], dtype="auto", local_files_only=True)
        self._model = model.to(self.device).eval()

    def begin(self, prompts: list[list[int]]) -> None:
        """Read prompts of one length, up to the first token of each."""
        self._cache = None
        self._run(self._torch.tensor(prompts, device=self.device))

    def step(self) -> None:
        """Add one token to each stream."""
        self._run(self._next)

    def _run(self, tokens: Any) -> None:
        found = self._model(tokens, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = found.past_key_values
        self._next = found.logits[:, -1:].argmax(-1)
        if self.device != "cpu":
            self._torch.cuda.synchronize()

    def peak_bytes(self) -> int | None:
        """Return the peak GPU memory; None on a CPU, where the process's memory counts."""
        return self._torch.cuda.max_memory_reserved() if self.device != "cpu" else None


class Vllm:
    """A model run by vLLM's engine, one step at a time."""

    device = "cuda"

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import EngineArgs, LLMEngine, SamplingParams

        arguments = EngineArgs(
            model=settings["path"],
            max_model_len=settings["context"],
            max_num_seqs=settings["parallel"],
            enable_prefix_caching=False,
            disable_log_stats=True,
            gpu_memory_utilization=_free_share(),
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=settings["context"], min_tokens=1)
        self._names: list[str] = []
        self._begun = 0

    def begin(self, prompts: list[list[int]]) -> None:
        """End earlier requests, and read prompts up to the first token of each."""
        if self._names:
            self._engine.abort_request(self._names)
        self._begun += 1
        self._names = [f"{self._begun}-{index}" for index in range(len(prompts))]
        for name, prompt in zip(self._names, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, self._sampling)
        waiting = set(self._names)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}

    def step(self) -> None:
        """Add one token to each stream."""
        self._engine.step()

    def peak_bytes(self) -> int | None:
        """Return the GPU memory; vLLM takes all that it is given, so this is not what it needs."""
        return None


class OnnxRuntime:
    """A graph with its cache among its inputs and outputs, run by ONNX Runtime: on a GPU if its build has one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import numpy as np
        import onnxruntime

        self._np, self._value = np, onnxruntime.OrtValue.ortvalue_from_numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings["threads"]
        options.log_severity_level = 3
        # Plans of memory are made for a shape, and each pass has another one: they would be kept beside each other.
        options.enable_mem_pattern = False
        known = onnxruntime.get_available_providers()
        providers = [one for one in ("CUDAExecutionProvider", "CPUExecutionProvider") if one in known]
        path = os.path.join(settings["path"], "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.device = "cuda" if self._session.get_providers()[0].startswith("CUDA") else "cpu"
        self._outputs = [one.name for one in self._session.get_outputs()]
        self._inputs = self._session.get_inputs()

    def begin(self, prompts: list[list[int]]) -> None:
        """Read prompts of one length, up to the first token of each."""
        np = self._np
        self._cache: dict[str, Any] = {}
        for one in self._inputs:
            if one.name.startswith("past_key_values."):
                dtype = np.float16 if one.type == "tensor(float16)" else np.float32
                empty = np.zeros((len(prompts), one.shape[1], 0, one.shape[3]), dtype)
                self._cache[one.name] = self._value(empty)
        self._read = 0
        self._run(np.array(prompts, np.int64))

    def step(self) -> None:
        """Add one token to each stream."""
        self._run(self._next)

    def _run(self, tokens: Any) -> None:
        np, (batch, count) = self._np, tokens.shape
        total = self._read + count
        given = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.tile(np.arange(self._read, total), (batch, 1)),
        }
        # What stays in the runtime's own memory is copied nowhere.
        feeds = {name: self._value(array) for name, array in given.items()} | self._cache
        found = dict(zip(self._outputs, self._session.run_with_ort_values(None, feeds), strict=True))
        self._cache = {name: found[name.replace("past_key_values.", "present.")] for name in self._cache}
        self._next = found["logits"].numpy()[:, -1:].argmax(-1)
        self._read = total

    def peak_bytes(self) -> int | None:
        """Return None: the process's memory counts, and of a GPU the runtime states none."""
        return None


def gpu_share(total: int, used: int) -> float:
    """Return the share of GPU memory for vLLM: what is free, with room for a context, and not all of it.

    By default it takes nine tenths, and ends where others, such as the process that asks for this, hold more than a
    tenth.

    Args:
        total: Bytes of memory.
        used: By anyone.

    Raises:
        SystemExit: Nearly nothing is free.
    """
    share = min(_MOST_SHARE, (total - used - _CONTEXT_BYTES) / total)
    if share < _LEAST_SHARE:
        raise SystemExit(f"of the GPU's {total:,} bytes {used:,} are in use, which leaves vLLM no room: free the GPU")
    return share


def _free_share() -> float:
    """Return `gpu_share` of the first GPU, from its driver: a CUDA context would take memory and prevent a fork."""
    import torch
    from vllm.platforms import current_platform

    return gpu_share(int(current_platform.get_device_total_memory(0)), int(torch.cuda.device_memory_used(0)))


def main() -> None:
    """Load the folder, report it with a line, and answer JSON requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the runtime prints belongs to the log
    settings = json.loads(sys.argv[1])
    servers = {"transformers": Transformers, "vllm": Vllm, "onnxruntime": OnnxRuntime}
    server: Any = servers[settings["runtime"]](settings)
    print(json.dumps({"device": server.device}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        if request["do"] == "begin":
            server.begin(request["prompts"])
        elif request["do"] == "step":
            server.step()
        taken = time.perf_counter() - began
        print(json.dumps({"seconds": taken, "peak_bytes": server.peak_bytes()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
