"""Holds an exported student to what was evaluated: the same weights on disk, the same choices in its runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from autodistill.data.tokenization import load_tokenizer
from autodistill.errors import VerificationError
from autodistill.evaluation.statistics import binomial_interval, binomial_tail
from autodistill.export.base import Artifact, Exporter
from autodistill.export.gguf_tokenizer import spaces
from autodistill.export.student_reader import StudentFiles
from autodistill.export.tokenizer_check import agreement, comparable
from autodistill.quantization.grids import Floats
from autodistill.serving.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment

MIN_AGREEMENT = 0.97
"""Least share of the clear positions at which the runtime must choose the simulation's token."""
CLEAR_SHARE = 0.8
"""Share of positions that count as clear: those where the simulation's choice leads by most. llama.cpp quantises
activations on CPUs, so that near-ties fall either way by design: they are reported, and prove nothing."""
POSITIONS = 2000
"""Positions that are compared where the data has as many."""
ENOUGH_POSITIONS = 500
"""From so many on a share is held to its limit as it is; of fewer it must be shown to lie below: `falls_short`."""
MIN_SAME_CUT = 0.99
"""Least share of the tokens of validation text that the runtime cuts it into as the tokenizer does. Of rare characters
llama.cpp's tables may differ (of tekken's, capitals beyond ASCII), which proves nothing; a wrong kind of cut shows in
every sentence."""

_CHANCE = 0.005  # of refusing an export whose true share is no less than the limit, where positions are few
_PROMPT_TOKENS = 8
_WRITTEN_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the bytes on disk were found to be.

    Attributes:
        tensors: Stored tensors, all equal to what was evaluated.
        weights: Weights in them.
    """

    tensors: int
    weights: int


@dataclass(frozen=True, kw_only=True)
class RuntimeCheck:
    """What the student did in its runtime.

    Attributes:
        agreement: Share of the clear positions at which it chose the simulation's token; this is what is required.
        raw_agreement: The same over all positions, near-ties included.
        positions: Number of clear positions.
        interval: Between what the true share of `agreement` lies, with a confidence of 95%: Clopper and Pearson's
            interval of positions that are independent of each other. Few of them make it wide.
        text: What it wrote after the first tokens of the first sequence.
        same_cut: Share of the tokens of these sequences' text that it cuts as the student's tokenizer does, which
            transformers runs itself.
    """

    agreement: float
    raw_agreement: float
    positions: int
    interval: tuple[float, float]
    text: str
    same_cut: float = 1.0


def verify(exporter: Exporter, artifact: Artifact, student: Path, deployment: Deployment) -> Verification:
    """Compares every weight read back from an artifact with the weights that were evaluated.

    Args:
        exporter: The one that wrote the artifact.
        artifact: What it wrote.
        student: The folder of float32 weights that it was made of.
        deployment: How it was to be packed.

    Raises:
        VerificationError: A tensor is missing, surplus, or differs in any weight.
    """
    weights, seen = 0, set()
    with StudentFiles(student, deployment) as files:
        for name, found in exporter.unpack(artifact.path):
            if name not in files.specs or name in seen:
                raise VerificationError(f"{artifact.path} holds a tensor too many: {name}")
            _compare(name, found, files.deployed(name))
            seen.add(name)
            weights += found.size
        missing = sorted(set(files.specs) - seen)
    if missing:
        raise VerificationError(f"{artifact.path} lacks {len(missing)} tensors, {missing[0]} among them")
    return Verification(tensors=len(seen), weights=weights)


def _compare(name: str, found: Floats, expected: Floats) -> None:
    if found.shape != expected.shape:
        raise VerificationError(f"{name} was exported as {list(found.shape)}, not as {list(expected.shape)}")
    if not np.array_equal(found, expected):
        differs = found != expected
        largest = float(np.abs(found - expected)[differs].max())
        raise VerificationError(
            f"{name} differs from the evaluated weights in {int(differs.sum())} of {found.size}, by up to {largest:.3g}"
        )


def verify_runtime(
    artifact: Artifact,
    deployment: Deployment,
    simulated: tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.floating[Any]]],
    sequences: npt.NDArray[np.integer[Any]],
    threads: int,
    student: Path,
) -> RuntimeCheck:
    """Loads an artifact in its runtime, compares its choices with the simulation's, and lets it write.

    Its weights were compared one by one already (`verify`): what is asked here is whether the runtime computes with
    them what was evaluated, which a wrong layout, rotation or norm spoils at most positions. Small data gives few
    positions, and they are held to less, by `falls_short`: a right export is not refused for a near-tie or two, and one
    that is wrong at most positions is still found. An error of a few in a hundred shows in many positions alone, so
    that the record has their count and interval.

    Args:
        artifact: The exported file or folder.
        deployment: llama.cpp runs GGUF; folders are run by transformers, also where vLLM will serve them.
        simulated: int and float [sequences, tokens], the most likely next token after each token of each sequence and
            the lead of its logit, computed in float32 from the packed weights.
        sequences: int [sequences, tokens].
        threads: CPU threads of the runtime. Beside other work, one is the fastest in llama.cpp.
        student: The folder that the artifact was made of; it has the tokenizer.

    Raises:
        VerificationError: Less than 97% agreement at the clear positions, a runtime that does not load the student or
            does not write, or one that cuts text into other tokens.
        ValueError: No positions, or those of other sequences than were simulated.
    """
    expected, leads = simulated
    if not expected.size or sequences.shape != expected.shape or leads.shape != expected.shape:
        raise ValueError(f"{list(sequences.shape)} tokens, and choices of {list(expected.shape)}")
    clear = leads >= np.quantile(leads, 1 - CLEAR_SHARE)
    if deployment.runtime == "llama.cpp":
        top1, text, same_cut = _run_llama_cpp(artifact.path, sequences, threads, student, deployment)
    else:
        top1, text, same_cut = _run_transformers(artifact.path, sequences, threads)
    same = top1 == expected
    alike, positions = int(same[clear].sum()), int(clear.sum())
    if falls_short(alike, positions, MIN_AGREEMENT):
        raise VerificationError(
            f"{artifact.path} chose the evaluated student's token in {alike / positions:.1%} of {positions} clear "
            f"positions in {deployment.runtime}; {MIN_AGREEMENT:.0%} is the least"
        )
    return RuntimeCheck(
        agreement=alike / positions,
        raw_agreement=float(same.mean()),
        positions=positions,
        interval=binomial_interval(alike, positions),
        text=text,
        same_cut=same_cut,
    )


def falls_short(hits: int, count: int, least: float) -> bool:
    """Whether what was found so often is less than it must be.

    From 500 observations on, the share itself says so. Of fewer, one miss may be a large share and tell nothing, so
    that it falls short where so few hits would come less than once in 200 times if the true share were the least: an
    exact binomial test of independent observations. Of 20 positions and 97% that is 16 hits or fewer, of 5 it is 2.
    """
    if count >= ENOUGH_POSITIONS:
        return hits < least * count
    return binomial_tail(hits, count, least) < _CHANCE


_Run = tuple[npt.NDArray[np.int64], str, float]


def _run_llama_cpp(
    path: Path, sequences: npt.NDArray[np.integer[Any]], threads: int, student: Path, deployment: Deployment
) -> _Run:
    keys, values = deployment.cache_types
    context = sequences.shape[1] + _WRITTEN_TOKENS
    with LlamaServer(path, context, threads, cache_type_k=keys, cache_type_v=values, whole_cache=True) as server:
        # Each prompt is the one before and a token more, so that only that token is computed.
        top1 = [[server.next_token(row[: end + 1]) for end in range(len(row))] for row in sequences.tolist()]
        written = server.complete(sequences[0, :_PROMPT_TOKENS].tolist(), _WRITTEN_TOKENS, ignore_end=True)
        same_cut = _check_cut(path, server, sequences, student)
    _check_written(path, len(written.tokens))
    return np.array(top1), written.text, same_cut


def _check_cut(path: Path, server: LlamaServer, sequences: npt.NDArray[np.integer[Any]], student: Path) -> float:
    """The share of the text's tokens that are cut as the student's tokenizer does, if it is large enough."""
    tokenizer, put = load_tokenizer(student), spaces(student)
    texts = [tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in sequences.tolist()]
    found = agreement(tokenizer, server, [comparable(text, tokenizer, put) for text in texts])
    if falls_short(found.same, found.tokens, MIN_SAME_CUT):
        raise VerificationError(
            f"llama.cpp cuts the text of {path} into other tokens than the student's tokenizer does, of which only "
            f"{found.share:.1%} are the same: {found.first}; export to huggingface or compressed-tensors instead"
        )
    return found.share


def _run_transformers(path: Path, sequences: npt.NDArray[np.integer[Any]], threads: int) -> _Run:
    tokens = torch.from_numpy(sequences.astype(np.int64))
    with _torch_threads(threads), torch.inference_mode():
        model = load_in_transformers(path)
        top1 = torch.stack([model(row[None]).logits[0].argmax(-1) for row in tokens])
        prompt = tokens[:1, :_PROMPT_TOKENS]
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_WRITTEN_TOKENS,
            min_new_tokens=_WRITTEN_TOKENS,
            do_sample=False,
        )
    written = output[0, prompt.shape[1] :]
    _check_written(path, len(written))
    text = load_tokenizer(path).decode(written, skip_special_tokens=True)
    return top1.numpy(), str(text), 1.0


def load_in_transformers(path: Path) -> Any:
    """Loads an exported folder with the weights it serves, to compute in float32.

    A compressed-tensors folder is dequantised in bfloat16, as served, and widened afterwards: in bfloat16 itself equal
    logits are so frequent that the most likely token would often be a matter of order.

    Raises:
        VerificationError: transformers cannot load it, or finds weights missing or surplus.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            config.quantization_config["dequantize"] = True
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise VerificationError(f"transformers could not load {path}: {error}") from error
    model, report = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise VerificationError(f"transformers loaded {path} with {what}: {sorted(map(str, report[what]))[:3]}")
    return model.float().eval()


def _check_written(path: Path, count: int) -> None:
    if count != _WRITTEN_TOKENS:
        raise VerificationError(f"{path} wrote {count} tokens of the {_WRITTEN_TOKENS} that it was asked for")


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
