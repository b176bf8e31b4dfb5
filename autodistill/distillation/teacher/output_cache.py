"""Reads the teacher's outputs from disk: sparse logits and hidden states, memory-mapped by every trial."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from autodistill.distillation.losses.schedules import GRID, snap
from autodistill.distillation.losses.targets import SampledTarget, TopTarget
from autodistill.errors import DamagedError, InputError
from autodistill.strategy.recipe import Distillation
from autodistill.utils.hashing import content_hash

FILE = "outputs.arrow"
META = "meta.json"
"""File of a cache that a search holds locked while its workers may open the cache."""
# Bytes that Arrow adds to a sequence's values: the record batch's header, padding, and its entry in the footer.
_BATCH_BYTES = 2048


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The teacher outputs that are stored for each predicted token.

    Attributes:
        top_k: Number of likeliest tokens that are stored, 0 for none.
        draws: Numbers of draws. For each number, a separate sample of tokens is stored.
        temperatures: Temperatures of the grid at which the probabilities of stored tokens can be computed.
        final: Whether the last hidden states after the final norm are stored, in float16.
        states: Teacher layers whose outputs are stored, RMS-normalised in float16, with their root mean squares.
        bf16: Whether the teacher computes in bfloat16. The head always computes in float32.
    """

    top_k: int = 64
    draws: tuple[int, ...] = ()
    temperatures: tuple[float, ...] = GRID
    final: bool = False
    states: tuple[int, ...] = ()
    bf16: bool = False

    @classmethod
    def for_recipes(cls, recipes: Iterable[Distillation], states: Iterable[int], bf16: bool) -> CacheSettings:
        """Return the settings for everything that some recipes may read, and nothing else.

        Args:
            recipes: The recipes. All temperatures between their extremes are included.
            states: Teacher layers that the student's states are aligned to.
            bf16: See the attributes.
        """
        recipes = [recipe for recipe in recipes if recipe.weighs_teacher]
        sparse = [recipe for recipe in recipes if recipe.signal in ("top-k", "sampled")]
        ends = [snap(end) for recipe in sparse for end in (recipe.temperature.start, recipe.temperature.end)]
        draws = {recipe.signal_tokens for recipe in sparse if recipe.signal == "sampled"}
        if draws:
            ends.append(1.0)  # tokens are drawn at temperature 1
        return cls(
            top_k=max((recipe.signal_tokens for recipe in sparse if recipe.signal == "top-k"), default=0),
            draws=tuple(sorted(draws)),
            temperatures=tuple(value for value in GRID if ends and min(ends) <= value <= max(ends)),
            final=any(recipe.signal == "states" for recipe in recipes),
            states=tuple(sorted(set(states))),
            bf16=bf16,
        )

    @property
    def empty(self) -> bool:
        """Whether nothing is stored."""
        return not (self.top_k or self.draws or self.final or self.states)

    def lacks(self, needed: CacheSettings) -> list[str]:
        """Return the parts of `needed` that are not stored, in words."""
        found = []
        if needed.top_k > self.top_k:
            found.append(f"the {needed.top_k} likeliest tokens")
        found += [f"the tokens of {draws} draws" for draws in needed.draws if draws not in self.draws]
        found += [f"temperature {value:g}" for value in needed.temperatures if value not in self.temperatures]
        if needed.final and not self.final:
            found.append("the last hidden states")
        return found + [f"the states of layer {layer}" for layer in needed.states if layer not in self.states]

    def bytes_of(self, sequences: int, length: int, vocabulary: int, width: int) -> int:
        """Return the largest possible size on disk for sequences of `length` tokens."""
        return sequences * ((length - 1) * self.bytes_per_token(vocabulary, width) + _BATCH_BYTES)

    def bytes_per_token(self, vocabulary: int, width: int) -> int:
        """Return the most bytes on disk for one predicted token. A token drawn several times is stored once."""
        entry = 2 + id_type(vocabulary).itemsize
        drawn = sum(min(draws, vocabulary) * entry + 4 for draws in self.draws)
        values = min(self.top_k, vocabulary) * entry + drawn + 4 * len(self.temperatures)
        return values + (2 * width + 4) * len(self.states) + 2 * width * self.final


def id_type(vocabulary: int) -> np.dtype[Any]:
    """Return the integer type for the ids of a vocabulary."""
    return np.dtype(np.uint16 if vocabulary <= 65536 else np.uint32)


def part_hashes(data: mmap.mmap, places: Sequence[int]) -> list[str]:
    """Return the hash of each part of a file between two neighbouring places: 16 digits of its SHA-256."""
    with memoryview(data) as view:
        return [hashlib.sha256(view[start:end]).hexdigest()[:16] for start, end in pairwise(places)]


class TeacherCache:
    """Reads one cache, memory-mapped. The checksum of each sequence is checked when the sequence is first read.

    A cached sequence of `length` tokens has `length` - 1 predicted tokens: position i predicts token i + 1.

    Args:
        folder: The folder that `ensure_cache` returned.
        data: Fingerprint of the data that the cache must belong to. It covers tokenizer and sequence length. None
            accepts any data.

    Raises:
        DamagedError: The files are not as they were written.
        InputError: The cache belongs to other data.
    """

    def __init__(self, folder: Path, data: str | None = None) -> None:
        self._folder = folder
        try:
            meta = json.loads((folder / META).read_bytes())
            checksum = meta.pop("checksum")
            whole = checksum == content_hash(meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(META) from error
        if not whole:
            raise self._damaged(META)
        if data is not None and meta["data"] != data:
            raise InputError(
                f"the teacher cache in {folder} is of the data {meta['data']}, and these are {data}: they have another "
                "text, tokenizer or sequence length; let the search make the cache from its own data"
            )
        self.sequences: int = meta["sequences"]
        lists = {name: tuple(value) for name, value in meta["settings"].items() if isinstance(value, list)}
        self.settings = CacheSettings(**(meta["settings"] | lists))
        self._places: list[int] = [0, *meta["ends"]]
        self._hashes: list[str] = meta["hashes"]
        self._checked: set[int] = set()
        try:
            with (folder / FILE).open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._damaged(FILE) from error
        if len(self._bytes) != self._places[-1]:
            raise self._damaged(FILE)
        # Before Arrow reads them, check the schema and the places of the batches.
        self._check(self.sequences)
        self._reader = pa.ipc.open_file(pa.py_buffer(self._bytes))

    def check(self) -> None:
        """Check all checksums of the file. This takes about a second per gigabyte, if the disk is fast enough.

        Raises:
            DamagedError: The file is not as it was written.
        """
        for part in range(self.sequences + 1):
            self._check(part)

    def _check(self, part: int) -> None:
        """Check the checksum of a part of the file once: of a sequence, or of the rest after all sequences."""
        if part not in self._checked:
            if part_hashes(self._bytes, self._places[part : part + 2]) != [self._hashes[part]]:
                raise self._damaged(FILE)
            self._checked.add(part)

    def _damaged(self, name: str) -> DamagedError:
        return DamagedError(
            f"{self._folder / name} is not the file of teacher's outputs that was written: a search, or --resume, "
            "makes them again"
        )

    def _batch(self, index: int) -> pa.RecordBatch:
        self._check(index)
        return self._reader.get_batch(index)

    def _column(self, name: str, indices: Iterable[int]) -> npt.NDArray[Any]:
        parts = []
        for index in indices:
            column = self._batch(int(index)).column(name)
            flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
            parts.append(flat.to_numpy(zero_copy_only=True).reshape(len(column), -1))
        return np.concatenate(parts)

    def top(self, indices: Iterable[int], temperature: float, count: int) -> TopTarget:
        """Return the teacher's likeliest tokens for the sequences `indices`, with rows in their order.

        Args:
            indices: Indices of the sequences.
            temperature: A temperature that the cache has.
            count: Number of tokens.

        Raises:
            ValueError: The cache has fewer tokens, or not this temperature.
        """
        if count > self.settings.top_k:
            raise ValueError(f"the cache holds {self.settings.top_k} tokens, not {count}")
        indices = list(indices)
        ids = self._column("ids", indices)[:, :count].astype(np.int64)
        below = self._column("below_maximum", indices)[:, :count].astype(np.float32)
        log_p = below / np.float32(temperature) - self._log_sum(indices, temperature)
        return TopTarget(ids=torch.from_numpy(ids), log_p=torch.from_numpy(log_p), temperature=temperature)

    def sampled(self, indices: Iterable[int], temperature: float, draws: int) -> SampledTarget:
        """Return the sampled tokens of the sequences `indices`, with rows in their order, padded to the longest.

        Args:
            indices: Indices of the sequences.
            temperature: A temperature that the cache has.
            draws: A number of draws that the cache has.

        Raises:
            KeyError, ValueError: The cache does not have this number of draws, or this temperature.
        """
        indices = list(indices)
        lists = [self._batch(int(index)).column(f"drawn_{draws}") for index in indices]
        counts = np.concatenate([np.diff(column.offsets.to_numpy()) for column in lists])
        shape = (len(counts), counts.max())
        filled = np.arange(shape[1]) < counts[:, None]
        ids, below = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for values, name in ((ids, "ids"), (below, "below_maximum")):
            values[filled] = np.concatenate([column.flatten().field(name).to_numpy() for column in lists])
        drawn_at = below - self._log_sum(indices, 1.0)
        log_p = below / np.float32(temperature) - self._log_sum(indices, temperature)
        weights = np.where(filled, 1 / np.minimum(1, draws * np.exp(drawn_at)), 0)
        return SampledTarget(
            ids=torch.from_numpy(ids),
            log_p=torch.from_numpy(log_p),
            weights=torch.from_numpy(weights.astype(np.float32)),
            temperature=temperature,
        )

    def _log_sum(self, indices: list[int], temperature: float) -> npt.NDArray[np.float32]:
        place = self.settings.temperatures.index(temperature)
        return self._column("log_sum", indices)[:, place : place + 1]

    def final(self, indices: Iterable[int]) -> Tensor:
        """Return the last hidden states after the final norm of the sequences `indices`, float16 [tokens, width]."""
        return torch.from_numpy(self._column("final", indices))

    def state(self, indices: Iterable[int], layer: int) -> Tensor:
        """Return the RMS-normalised output of a teacher layer for the sequences `indices`, float16 [tokens, width].

        Raises:
            KeyError: The cache does not have this layer.
        """
        return torch.from_numpy(self._column(f"state_{layer}", indices))

    def state_size(self, indices: Iterable[int], layer: int) -> Tensor:
        """Return the root mean squares of a teacher layer's states, float32 [tokens, 1], as for `state`."""
        return torch.from_numpy(self._column(f"size_{layer}", indices))
