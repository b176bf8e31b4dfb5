"""The commands of a service, and their output: `serve`, `chat`, `monitor`, `load` and `drafts`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from autodistill.api.parameters import takes
from autodistill.cli.streams import quiet_libraries
from autodistill.cli.summary import table
from autodistill.cli.tables import printable
from autodistill.errors import InputError
from autodistill.options import RUNS, Option, Runs, counts_tokens
from autodistill.service.request import DraftsRequest, KeyFile, LoadRequest, ServeRequest
from autodistill.units import format_bytes, format_duration, format_rate, parse_duration
from autodistill.utils.json_files import strict_json

if TYPE_CHECKING:
    from rich.table import Table

    from autodistill.service.client import Client
    from autodistill.service.launch import Service
    from autodistill.service.monitor import Report
    from autodistill.service.window import Times

BROKEN = 4
"""Exit code of `monitor` and `load` if the promise is broken."""


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


@takes(ServeRequest, "serve")
def serve(**options: Any) -> dict[str, Any]:
    """Serve a student over HTTP, with a key, until Ctrl-C or SIGTERM."""
    request = ServeRequest(**options)
    quiet_libraries()
    # Import now, not when the server is told to stop.
    from autodistill.service.drafts import record_served
    from autodistill.service.launch import Service, settle

    setting = settle(request, _say)
    service = Service(setting, _say)
    try:
        with service:
            _announce(service, request)
            try:
                service.watch()
            except KeyboardInterrupt:
                done = service.summary()
                record_served(setting, Path(request.runs), done, _say)
                return done
    except KeyboardInterrupt:
        pass
    return {"url": setting.url, "restarts": service.restarts}


def _announce(service: Service, request: ServeRequest) -> None:
    setting = service.setting
    served = setting.served
    _say(f"{served.name} is served at {setting.url} by {served.runtime}, process {service.pid}")
    _say(f"{served.streams} x {served.context} tokens, cache in {' and '.join(dict.fromkeys(served.cache_types))}")
    if setting.draft is not None:
        _say(f"draft: {setting.draft.name}")
    key = f"key: {setting.key}" if request.key_file is None else f"key: in {request.key_file}"
    _say(f"{key} (AUTODISTILL_API_KEY of a client; `Authorization: Bearer KEY` of any other)")
    if served.runtime == "llama.cpp" and not setting.is_socket:
        _say(f"web page: {setting.url}/ (it asks for the key); API: {setting.url}/v1; metrics: {setting.url}/metrics")
    if request.public:
        _say("other machines reach it, and what they send is not encrypted: put a proxy with TLS before it")


def served_text(document: Mapping[str, Any]) -> str:
    """Return text about what a server did until it was stopped."""
    if "answer_tokens" not in document:
        return f"{document['url']} is stopped"
    told = [
        f"{document['url']} is stopped after {format_duration(document['seconds'])}: {document['prompt_tokens']:,} "
        f"tokens read, {document['answer_tokens']:,} written"
    ]
    if document.get("acceptance") is not None:
        told.append(
            f"{document['accepted']:,} of {document['drafted']:,} drafted tokens accepted "
            f"({document['acceptance']:.0%})"
        )
    told += [f"started again {document['restarts']} times"] if document["restarts"] else []
    return ", ".join(told)


@takes(DraftsRequest, "drafts")
def drafts(**options: Any) -> dict[str, Any]:
    """Measure smaller students as drafts of a model in llama.cpp: how many tokens it accepts, and how fast it gets."""
    request = DraftsRequest(**options)
    quiet_libraries()
    from autodistill.service.drafts import drafts as tried

    return tried(request, _say)


def drafts_text(document: Mapping[str, Any]) -> str:
    """Return text about drafts: those that were tried now, or the recorded ones."""
    found = document["drafts"]
    name = Path(document["target"]).name
    if not found:
        return f"No draft of {name} is recorded: name students to try, or serve one with --draft."
    titles = ("draft", "size", "taken", "of", "a pass", "tokens/s", "speed", "expected", "the same")

    def cells(one: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the cells of a record. A server's record only has its acceptance."""
        share = one["accepted"] / one["drafted"] if one["drafted"] else 0.0
        if one["how"] != "drafts":
            return (Path(one["draft"]).name, "-", f"{share:.1%}", f"{one['drafted']:,}", *"-----")
        error = "" if one["speed_stderr"] is None else f" ± {one['speed_stderr']:.2f}"
        return (
            Path(one["draft"]).name,
            format_bytes(one["size_bytes"]),
            f"{share:.1%}",
            f"{one['drafted']:,}",
            f"{one['tokens_per_pass']:.2f}",
            format_rate(one["tokens_per_second"]),
            f"{one['speed']:.2f}x{error}",
            f"{one['expected']:.2f}x",
            f"{one['same']} of {one['answers']}",
        )

    shown = table([titles, *map(cells, found)], left=1)
    if document["tokens_per_second"] is None:
        return f"Recorded drafts of {name}, the last one first\n{shown}"
    best = found[0]
    doubt = best["speed_stderr"] or 0.0
    verdict = (
        f"The best draft is {Path(best['draft']).name}."
        if best["speed"] - doubt > 1
        else "None is faster than the model alone by more than its error."
    )
    rate = document["tokens_per_second"]
    return f"{name} alone: {format_rate(rate)} tokens/s\n{shown}\n{verdict}\nStored in {document['kept_in']}."


@takes(LoadRequest, "load")
def load(**options: Any) -> dict[str, Any]:
    """Load a server with more and more sequences at once, up to a limit. Exits with 4 if its promise breaks."""
    request = LoadRequest(**options)
    quiet_libraries()
    from autodistill.service.load import load as loaded

    return loaded(request, _say)


def loaded_text(document: Mapping[str, Any]) -> str:
    """Return text about the result of a load test. Each level was already printed when it was done."""
    doubts = "".join(f"\nDoubtful: {doubt}." for doubt in document["measured"]["doubts"])
    if document["streams"] is None:
        kept = "Even one sequence alone breaks a limit."
    else:
        rate, many = f"{document['capacity']:.3g} answers/s", f"{document['streams']} at once"
        met = document["levels"][-1]["broken"]  # if no limit was broken, the server's true capacity is unknown
        kept = (
            f"It keeps to the limits with {many}: {rate}." if met else f"It gives {rate} with {many}, the most tried."
        )
    held = document["promise"]
    told = "" if held is None else "\n" + _held(held)
    return f"{kept}{told}\nStored in {document['kept_in']}.{doubts}"


def _held(held: Mapping[str, Any]) -> str:
    """Return text that says whether a promise is kept under load."""
    figures = [f"{one['figure']} {_VERDICT_WORDS[one['kept']]}: {one['said']}" for one in held["promise"]]
    return f"The promise of {held['of']} is {held['verdict']}: {'; '.join(figures)}."


def promised(document: Mapping[str, Any]) -> int:
    """Return the exit code of a load test: `BROKEN` if a promise was broken, else 0."""
    return BROKEN if document["promise"] is not None and document["promise"]["verdict"] == "BROKEN" else 0


Url = Annotated[str, Option(help="Address of the server, like http://127.0.0.1:8080.", metavar="URL", argument=True)]


def chat(
    to: Annotated[
        str,
        Option(
            help="Address of a server (default: http://127.0.0.1:8080), or what to serve meanwhile: a .gguf file, an "
            "exported folder, a run, or a row's id.",
            metavar="URL|EXPORT",
            argument=True,
        ),
    ] = "http://127.0.0.1:8080",
    system: Annotated[
        str, Option(help="System message, which the student reads before everything else.", metavar="TEXT")
    ] = "",
    max_tokens: Annotated[int | None, counts_tokens("Most tokens of an answer.", minimum=1)] = None,
    temperature: Annotated[
        float | None, Option(help="0 for the likeliest answer (default: as the server has it).", metavar="X")
    ] = None,
    key_file: KeyFile = None,
    runs: Runs = RUNS,
) -> int:
    """Talk with a student in the terminal: /new begins anew, /quit or Ctrl-D ends. From a pipe, a line is a turn."""
    from autodistill.service.chat import Conversation, turns

    if temperature is not None and not 0 <= temperature <= 100:
        raise InputError(f"--temperature must be 0 to 100, not {temperature}")
    given = {"max_tokens": max_tokens, "temperature": temperature}
    quiet_libraries()
    with _reached(to, key_file, Path(runs)) as client:
        _say(f"{client.model()} at {client.url}")
        conversation = Conversation(client, system, {name: one for name, one in given.items() if one is not None})
        typing = sys.stdin.isatty()
        try:
            for told in turns(_typed() if typing else sys.stdin, conversation, _write):
                _write("\n")
                if typing:
                    _say(f"({told})")
        except KeyboardInterrupt:
            _write("\n")
    return 0


@contextmanager
def _reached(to: str, key_file: str | Path | None, runs: Path) -> Iterator[Client]:
    """Yield a client of a running server, or of one that is started for this client and stopped after it."""
    from autodistill.service.client import Client
    from autodistill.service.keys import client_key

    if "://" in to or to.startswith("unix:"):
        with Client(to, client_key(None if key_file is None else Path(key_file))) as client:
            yield client
        return
    from autodistill.service.launch import Service, settle

    with (
        Service(settle(ServeRequest(to, port=0, streams=1, runs=runs), _say), _say) as service,
        service.client() as client,
    ):
        yield client


def _typed() -> Iterator[str]:
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _write(text: str) -> None:
    print(text, end="", flush=True)


def monitor(
    url: Url,
    promise: Annotated[
        str | None,
        Option(
            help="Compare it with what was promised for this: a .gguf file, an exported folder, a run, or a row's id.",
            metavar="EXPORT",
            complete="runs",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        Option(
            help="Share by which a measured figure may be exceeded, if no limit was asked for (default: 0.25).",
            metavar="X",
        ),
    ] = None,
    window: Annotated[str, Option(help="Time over which figures are averaged (default: 5m).", metavar="TIME")] = "5m",
    every: Annotated[
        str, Option(help="Least time between two small requests of its own (default: 5s).", metavar="TIME")
    ] = "5s",
    time: Annotated[str | None, Option(help="Stop after this long (default: at Ctrl-C).", metavar="TIME")] = None,
    json: Annotated[bool, Option(help="Print a line of JSON after each look.")] = False,
    prometheus: Annotated[
        int | None,
        Option(
            help="Also serve the figures to Prometheus on this port of 127.0.0.1; 0 takes a free one.",
            metavar="PORT",
            minimum=0,
        ),
    ] = None,
    key_file: KeyFile = None,
    runs: Runs = RUNS,
) -> int:
    """Watch a server: latency, throughput, memory, queue, and whether it keeps its promise. Exits with 4 if not."""
    quiet_libraries()
    from autodistill.service.client import Client
    from autodistill.service.keys import client_key
    from autodistill.service.monitor import Monitor
    from autodistill.service.promise import asked_promise

    held = asked_promise(promise, Path(runs), margin)
    seconds = None if time is None else parse_duration(time)
    last: Report | None = None
    with ExitStack() as opened:
        client = opened.enter_context(
            Client(url, client_key(None if key_file is None else Path(key_file)), timeout=30.0, longest=300.0)
        )
        watched = Monitor(client, held, window=parse_duration(window), every=parse_duration(every))
        endpoint = None
        if prometheus is not None:
            from autodistill.service.prometheus import Endpoint

            endpoint = opened.enter_context(Endpoint(prometheus))
            _say(f"for Prometheus: http://127.0.0.1:{endpoint.port}/metrics")
        _say(f"a request of {watched.prompt} tokens every {every}, and for a tenth of the time at most; Ctrl-C ends")
        show = _as_json if json else opened.enter_context(_view())
        try:
            for report in watched.watch(seconds):
                last = report
                if endpoint is not None:
                    endpoint.show(report)
                show(report)
        except KeyboardInterrupt:
            pass
    return BROKEN if last is not None and last.broken else 0


def _as_json(report: Report) -> None:
    print(dumps(strict_json(report.to_json()), allow_nan=False), flush=True)


@contextmanager
def _view() -> Iterator[Callable[[Report], None]]:
    """Yield a function that shows a report: it redraws the figures on a terminal, else it prints a line."""
    environ = os.environ
    if not sys.stdout.isatty() or environ.get("TERM", "dumb") in ("", "dumb", "unknown") or environ.get("NO_COLOR"):
        yield lambda report: print(report_line(report), flush=True)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=sys.stdout), auto_refresh=False, redirect_stderr=False) as live:
        yield lambda report: live.update(report_table(report), refresh=True)


def report_facts(report: Report) -> dict[str, str]:
    """Return a report as text by title. Figures that are not known are left out."""
    figures = report.figures

    def times(found: Times) -> str:
        """Return mean and percentiles in words, or "" if nothing was timed."""
        if not found.count:
            return ""
        shares = (("mean", found.mean), ("p50", found.p50), ("p95", found.p95), ("p99", found.p99))
        told = ", ".join(f"{name} {format_duration(value)}" for name, value in shares if value is not None)
        return f"{told} ({found.count})"

    facts = {
        "server": f"{report.runtime or 'not known'}, {'up' if report.up else f'no answer: {report.why}'}",
        "window": f"{format_duration(figures.seconds)}, {figures.probes} probes, {figures.failed} without an answer",
        "first token": times(figures.first_token),
        "per token": times(figures.token),
        "throughput": "" if figures.tokens_per_second is None else f"{format_rate(figures.tokens_per_second)} tokens/s",
        "memory": "" if figures.memory_bytes is None else format_bytes(figures.memory_bytes),
        "queue": "" if figures.waiting is None else f"{figures.running:.2g} answered, {figures.waiting:.2g} waiting",
        "draft": "" if figures.acceptance is None else f"{figures.acceptance:.0%} of its tokens accepted",
    }
    if report.verdict is not None:
        facts["promise"] = report.verdict
        facts |= {f"  {one.figure}": f"{_VERDICT_WORDS[one.kept]}: {one.comparison}" for one in report.judged}
    return {title: printable(told) for title, told in facts.items() if told}


_VERDICT_WORDS = {True: "kept", False: "BROKEN", None: "not judged"}


def report_table(report: Report) -> Table:
    """Return a report as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for title, told in report_facts(report).items():
        grid.add_row(Text(title, style="bold cyan"), Text(told, style="bold red" if "BROKEN" in told else ""))
    return grid


def report_line(report: Report) -> str:
    """Return a report in one line."""
    facts = report_facts(report)
    verdict = facts.pop("promise", None)
    parts = [f"{title} {told}" for title, told in facts.items() if not title.startswith("  ") and title != "window"]
    if verdict is None:
        return "; ".join(parts)
    by = ", ".join(f"{one.figure} ({one.comparison})" for one in report.broken)
    return "; ".join([f"{verdict} by {by}" if by else verdict, *parts])
