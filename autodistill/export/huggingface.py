"""Exporter to a 16-bit folder of transformers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import torch

from autodistill.data.tokenization import load_tokenizer
from autodistill.errors import VerificationError
from autodistill.export.base import (
    PROMPT_TOKENS,
    WRITTEN_TOKENS,
    Artifact,
    Label,
    Pace,
    Ran,
    TokenIds,
    check_written,
)
from autodistill.export.student_reader import WEIGHTS, StudentFiles, bf16_config, read_arrays, write_folder
from autodistill.hardware.runtime import Runtime
from autodistill.inference.tensor_parallel import is_divided
from autodistill.models.whole.mixtures import stored_parts
from autodistill.quantization.formats import formats_of
from autodistill.quantization.grids import Floats
from autodistill.quantization.packing import unpack
from autodistill.strategy.deployment import Deployment


class HuggingFaceExporter:
    """Writes bfloat16 safetensors, config, tokenizer and generation config."""

    name = "huggingface"
    formats = formats_of("huggingface")
    runtimes: tuple[Runtime, ...] = ()

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Write the student into the folder `out`; only the model card names its teacher and licence.

        Raises:
            InputError: The student cannot be read, or `out` cannot be written.
        """
        with StudentFiles(student, deployment) as files:
            tensors = {
                name: as_bf16(files.pack(tensor))[rows]
                for tensor in files.specs
                for name, rows in _stored(files, tensor).items()
            }
            return write_folder(out, student, bf16_config(files.config), tensors)

    def file_tensors(self, files: StudentFiles) -> Mapping[str, Callable[[], Floats]]:
        """Return what `unpack` yields of a student's folder; see `Rearranges`."""

        # The two tensors of a layer's experts: a folder holds an expert's parts of both beside each other.
        deployed = lru_cache(2)(files.deployed)

        def values(tensor: str, rows: slice) -> Floats:
            return deployed(tensor)[rows]

        return {
            name: partial(values, tensor, rows)
            for tensor in files.specs
            for name, rows in _stored(files, tensor).items()
        }

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor, widened to float32."""
        for name, tensor in read_arrays(artifact / WEIGHTS):
            yield name, unpack({"data": tensor.view(torch.uint16).numpy()}, "bf16", tuple(tensor.shape))

    def run(self, artifact: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
        """Run the folder in transformers; see `Exporter.run`."""
        return run_in_transformers(artifact, sequences, threads)


def _stored(files: StudentFiles, tensor: str) -> Mapping[str, slice]:
    """Return the tensors of a folder that hold one of the student's, by name, with their rows in it."""
    return stored_parts(files.specs[tensor], files.spec) or {tensor: slice(None)}


def as_bf16(arrays: Mapping[str, Any]) -> torch.Tensor:
    """Return the bfloat16 bits from `packing.pack` as a torch tensor."""
    return torch.from_numpy(arrays["data"]).view(torch.bfloat16)


def run_in_transformers(path: Path, sequences: TokenIds, threads: int) -> Ran:
    """Run an exported folder in transformers; see `Exporter.run`.

    Raises:
        VerificationError: As by `load_in_transformers`, or the model does not write.
    """
    return run_model(load_in_transformers(path), path, sequences, threads)


def run_model(model: Any, path: Path, sequences: TokenIds, threads: int) -> Ran:
    """Run a model of transformers; see `Exporter.run`.

    Args:
        model: A float32 model.
        path: The model's folder, with its tokenizer.
        sequences, threads: As for `Exporter.run`.

    Raises:
        VerificationError: The model does not write.
    """
    tokens = torch.from_numpy(sequences.astype(np.int64))
    with torch_threads(threads), torch.inference_mode():
        found = [chosen(model, row) for row in tokens]
        times = [(time.perf_counter(), time.process_time())]
        written = greedy(model, tokens[:1, :PROMPT_TOKENS], times)
    check_written(path, len(written))
    text = load_tokenizer(path).decode(written, skip_special_tokens=True)
    top1, nll, _ = (np.stack(part) for part in zip(*found, strict=True))
    seconds, used = (last - first for first, last in zip(times[1], times[-1], strict=True))
    later = len(written) - 1
    pace = Pace(1e3 * (times[1][0] - times[0][0]), later / seconds, 1e3 * used / later)
    return Ran(top1, nll, str(text), written=written, pace=pace)


def chosen(model: Any, tokens: torch.Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return `top1`, `nll` and `leads` of int64 tokens [tokens], as in `Expected`."""
    logits = model(tokens[None]).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    return logits.argmax(-1).int().numpy(), nll.numpy(), (best - second).numpy()


def greedy(model: Any, prompt: torch.Tensor, times: list[tuple[float, float]] | None = None) -> tuple[int, ...]:
    """Return the `WRITTEN_TOKENS` tokens that a model writes greedily after a prompt; no token ends them early.

    Args:
        model: A transformers model. If it is divided over processes, which keep no cache, it reads all tokens again
            for each one.
        prompt: int64 [1, tokens].
        times: If given, receives the wall-clock time and the process's CPU time of each token.
    """
    from transformers import DynamicCache

    cache = None if is_divided(model) else DynamicCache(config=model.config)
    read, written = prompt, list[int]()
    for _ in range(WRITTEN_TOKENS):
        kept = {"use_cache": False} if cache is None else {"cache": cache, "use_cache": True}
        token = model(input_ids=read, **kept).logits[:, -1:].argmax(-1)
        read = torch.cat([read, token], dim=1) if cache is None else token
        written.append(int(token))
        if times is not None:
            times.append((time.perf_counter(), time.process_time()))
    return tuple(written)


def load_in_transformers(path: Path) -> Any:
    """Load an exported folder with the weights that it serves, to compute in float32.

    A compressed-tensors folder is dequantised in bfloat16, as it is served, and then widened. In bfloat16 itself, equal
    logits are so frequent that the most likely token would often depend on order alone. If the folder has several
    grids, transformers 5.24 would dequantise all of them by one grid during loading. In that case, the first forward
    pass dequantises.

    Raises:
        VerificationError: transformers cannot load the folder, or finds missing or surplus weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        stated = getattr(config, "quantization_config", None)
        mixed = stated is not None and len(stated.get("config_groups", ())) > 1
        if stated is not None and not mixed:
            stated["dequantize"] = True
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise VerificationError(f"transformers could not load {path}: {error}") from error
    model, report = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise VerificationError(f"transformers loaded {path} with {what}: {sorted(map(str, report[what]))[:3]}")
    if mixed:
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64))
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict({name: one for name, one in model.state_dict().items() if name in plain.state_dict()})
        model = plain
    return model.float().eval()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute with this number of threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
