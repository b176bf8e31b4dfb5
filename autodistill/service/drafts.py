"""Try students as drafts of a model in llama.cpp's server, by its own counters and clock, and record the results."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from autodistill.data.general_text import resolve_general
from autodistill.errors import AutoDistillError, InputError
from autodistill.evaluation.speculative import PROPOSED, time_of
from autodistill.evaluation.statistics import clustered_bootstrap
from autodistill.options import parsed
from autodistill.service.client import Answer, Client
from autodistill.service.launch import Service, Setting, settle
from autodistill.service.request import DraftsRequest, ServeRequest
from autodistill.service.served import find_served
from autodistill.units import count_of
from autodistill.utils.durable import make_folder
from autodistill.utils.event_log import EventLog
from autodistill.utils.typed_data import check_typed

FILE = "drafts.jsonl"


class _StoredDraft(TypedDict):
    """The fields that are read of every record."""

    target: str
    draft: str
    how: Literal["drafts", "serve"]
    drafted: int
    accepted: int
    time: str


class _Figures(_StoredDraft):
    """The fields that are read of a record of a draft that was tried."""

    size_bytes: int
    tokens_per_pass: float
    tokens_per_second: float
    speed: float
    speed_stderr: float | None
    expected: float
    same: int
    answers: int


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The result of one model on the beginnings that all models continue.

    Attributes:
        answers: One answer for each beginning.
    """

    answers: tuple[Answer, ...]

    @property
    def seconds(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Seconds of each answer after its first token."""
        return np.array([sum(one.token_seconds) for one in self.answers])

    @property
    def steps(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Tokens of each answer after the first."""
        return np.array([one.tokens - 1.0 for one in self.answers])

    @property
    def token_seconds(self) -> float:
        """Mean time of a token after the first."""
        return float(self.seconds.sum() / self.steps.sum())


def drafts(request: DraftsRequest, notify: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Let a model answer alone and with each draft, and record the share of accepted tokens and the speed.

    Args:
        request: What is asked for.
        notify: Called with a line about each draft when it is done.

    Returns:
        Plain data: the "target" with its "tokens_per_second" alone, "drafts" with the fastest first, and the file that
        they are "kept_in". If the request names no drafts, "drafts" has the target's earlier records, the latest first,
        and the speed is None.

    Raises:
        InputError: A model or text does not exist, or the models have different tokenizers.
        ServiceError: llama.cpp cannot serve one of them.
    """
    path = Path(request.runs) / FILE
    if not request.drafts:
        target = find_served(request.target, Path(request.runs)).path
        return {"target": str(target.resolve()), "tokens_per_second": None, "drafts": recorded(target, path)}
    # All impossible requests are refused before any server starts.
    alone = settle(_asked(request, request.target))
    if alone.served.runtime != "llama.cpp":
        raise InputError(
            f"{alone.served.path} is a folder, and drafts are tried in llama.cpp: export it with --to gguf"
        )
    together = [settle(_asked(request, request.target, one)) for one in request.drafts]
    source = resolve_general(request.text)
    decoded = parsed(request.decoded)
    texts = [str(one) for one in source.documents[: request.prompts]]
    ends = time.monotonic() + float(parsed(request.time) or 0)
    left = 1 + 2 * len(together)

    def share() -> float:
        """Return the time for the next measurement: an equal share of what is left."""
        nonlocal left
        left -= 1
        return (ends - time.monotonic()) / (left + 1)

    with Service(_free(alone), notify) as service, service.client() as client:
        prompts = _prompts(client, texts, request)
        whole = _answer_prompts(client, prompts, decoded, share())
    notify(f"alone: {1 / whole.token_seconds:.4g} tokens/s over {count_of(len(whole.answers), 'beginning')}")
    found = []
    for setting in together:
        assert setting.draft is not None
        small = replace(alone, served=replace(alone.served, path=setting.draft), draft=None)
        with Service(_free(small), notify) as service, service.client() as client:
            by_itself = _answer_prompts(client, prompts[: len(whole.answers)], decoded, share())
        with Service(_free(setting), notify) as service, service.client() as client:
            with_draft = _answer_prompts(client, prompts[: len(whole.answers)], decoded, share())
        one = _draft_figures(whole, with_draft, by_itself) | {"size_bytes": setting.draft.stat().st_size}
        found.append(record(setting, path, "drafts", one))
        notify(f"{setting.draft.name}: {one['acceptance']:.0%} taken, {one['speed']:.3g} times as fast")
    found.sort(key=lambda one: -float(one["speed"]))
    return {
        "target": str(alone.served.path.resolve()),
        "tokens_per_second": 1 / whole.token_seconds,
        "drafts": found,
        "kept_in": str(path),
    }


def _asked(request: DraftsRequest, target: str | Path, draft: str | None = None) -> ServeRequest:
    return ServeRequest(target, port=0, streams=1, threads=request.threads, draft=draft, runs=request.runs)


def _free(setting: Setting) -> Setting:
    """Return the setting with any free port, since the port found earlier may be taken by now."""
    with socket.socket() as probe:
        probe.bind((setting.host, 0))
        return replace(setting, port=int(probe.getsockname()[1]))


def _prompts(client: Client, texts: Sequence[str], request: DraftsRequest) -> list[list[int]]:
    """Return the beginnings as ids, each short enough that it and its answer fit into the context."""
    room, length, decoded = client.room(), parsed(request.prompt), parsed(request.decoded)
    length = length if room is None else min(length, room[0] - decoded - PROPOSED - 1)
    if length < 1:
        raise InputError(f"a context of {room and room[0]} tokens has no room for --decoded {decoded}: give less")
    # 64 characters for each token are more than enough.
    return [ids for text in texts if (ids := client.tokenize(text[: 64 * length])[:length])]


def _answer_prompts(client: Client, prompts: Sequence[Sequence[int]], decoded: int, seconds: float) -> Tried:
    """Answer the prompts in turn until the time is over, but at least one."""
    ends = time.monotonic() + seconds
    client.complete(prompts[0], 3)
    answers: list[Answer] = []
    for prompt in prompts:
        if answers and time.monotonic() > ends:
            break
        answers.append(client.complete(prompt, decoded))
    return Tried(answers=tuple(answers))


def _draft_figures(whole: Tried, with_draft: Tried, by_itself: Tried) -> dict[str, Any]:
    """Return a draft's figures on the beginnings that both answered. Errors are bootstrapped by beginning."""
    count = len(with_draft.answers)
    alone = replace(whole, answers=whole.answers[:count])
    counts = np.array([(one.accepted, one.drafted) for one in with_draft.answers], float)
    accepted, drafted = counts.sum(axis=0)
    parts = np.stack([alone.seconds, with_draft.seconds], axis=1)
    written = with_draft.steps.sum()
    passes = written - accepted
    return {
        "answers": count,
        "same": sum(a.text == b.text for a, b in zip(alone.answers, with_draft.answers, strict=True)),
        "drafted": int(drafted),
        "accepted": int(accepted),
        "acceptance": float(accepted / drafted) if drafted else 0.0,
        "acceptance_stderr": clustered_bootstrap(lambda sums: sums[:, 0] / np.maximum(1, sums[:, 1]), counts),
        "tokens_per_pass": float(written / passes),
        "tokens_per_second": 1 / with_draft.token_seconds,
        "speed": float(alone.seconds.sum() / with_draft.seconds.sum()),
        "speed_stderr": clustered_bootstrap(lambda sums: sums[:, 0] / sums[:, 1], parts),
        "cost": by_itself.token_seconds / alone.token_seconds,
        "expected": float(written / passes) / time_of(by_itself.token_seconds / alone.token_seconds),
    }


def record(setting: Setting, path: Path, how: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Append the figures of a draft to the records next to the runs, and return the new record.

    Args:
        setting: Setting of the server, with its draft.
        path: File of the records.
        how: "drafts", or "serve" for figures from the users' requests to a server.
        figures: The figures, with "drafted" and "accepted".
    """
    assert setting.draft is not None
    kept = {
        "target": str(setting.served.path.resolve()),
        "draft": str(setting.draft.resolve()),
        "how": how,
        **figures,
        "threads": setting.threads,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    make_folder(path.parent)
    EventLog(path).append({"event": "drafted", **kept})
    return kept


def record_served(setting: Setting, out: Path, done: Mapping[str, Any], notify: Callable[[str], None]) -> None:
    """Record the acceptance over the requests of a server that was stopped, if anything was drafted."""
    if setting.draft is None or not done.get("drafted"):
        return
    figures = {name: done[name] for name in ("drafted", "accepted", "acceptance", "answer_tokens")}
    # The server has already stopped, so a failure to write is only reported.
    try:
        record(setting, out / FILE, "serve", figures)
    except (AutoDistillError, OSError) as error:
        notify(f"the acceptance was not recorded: {error}")


def recorded(target: Path, path: Path) -> list[dict[str, Any]]:
    """Return what a file records about the drafts of a target, the latest first.

    Raises:
        InputError: A record is incomplete.
    """
    found = []
    for event in EventLog(path).read() if path.is_file() else ():
        check_typed(event, _Figures if event.get("how") == "drafts" else _StoredDraft, f"a record in {path}")
        if event["target"] == str(target.resolve()):
            found.append({name: value for name, value in event.items() if name != "event"})
    return found[::-1]
