"""The child process that serves a folder with transformers, vLLM or ONNX Runtime: it loads it, then times requests.

Requests come from stdin, one line of JSON each. The program is run by path and not as a module, so that this package is
not imported. Its memory is therefore the runtime's alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_MOST_SHARE, _LEAST_SHARE = 0.9, 0.02  # shares of a GPU's memory; the first is vLLM's own default
_CONTEXT_BYTES = 10**9  # GPU memory that vLLM's engine takes in addition to what it counts itself


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
        """Return the peak GPU memory, or None on a CPU, where the memory of the process counts."""
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
        """Return None. vLLM takes all the GPU memory that it is given, so its size does not show what it needs."""
        return None


class OnnxRuntime:
    """A graph whose inputs and outputs include the cache, run by ONNX Runtime, on a GPU if its build supports one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import numpy as np
        import onnxruntime

        self._np, self._value = np, onnxruntime.OrtValue.ortvalue_from_numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings["threads"]
        options.log_severity_level = 3
        # Memory plans are made for one shape. Each pass has another shape, so all these plans would be kept.
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
        # Arrays in the runtime's own memory are not copied.
        feeds = {name: self._value(array) for name, array in given.items()} | self._cache
        found = dict(zip(self._outputs, self._session.run_with_ort_values(None, feeds), strict=True))
        self._cache = {name: found[name.replace("past_key_values.", "present.")] for name in self._cache}
        self._next = found["logits"].numpy()[:, -1:].argmax(-1)
        self._read = total

    def peak_bytes(self) -> int | None:
        """Return None: the memory of the process counts, and the runtime reports none for a GPU."""
        return None


def gpu_share(total: int, used: int) -> float:
    """Return the share of GPU memory for vLLM: what is free, less the memory of a context, up to a maximum.

    By default vLLM takes nine tenths, and fails if other processes, such as the caller, hold more than a tenth.

    Args:
        total: Bytes of GPU memory.
        used: Bytes used by all processes.

    Raises:
        SystemExit: Almost nothing is free.
    """
    share = min(_MOST_SHARE, (total - used - _CONTEXT_BYTES) / total)
    if share < _LEAST_SHARE:
        raise SystemExit(f"of the GPU's {total:,} bytes {used:,} are in use, which leaves vLLM no room: free the GPU")
    return share


def _free_share() -> float:
    """Return `gpu_share` of the first GPU, from its driver. A CUDA context would take memory and prevent a fork."""
    import torch
    from vllm.platforms import current_platform

    return gpu_share(int(current_platform.get_device_total_memory(0)), int(torch.cuda.device_memory_used(0)))


def main() -> None:
    """Load the folder, report that in one line, and answer JSON requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the runtime prints goes to the log
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
