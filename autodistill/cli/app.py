"""The command line: parse, call the function that a library user calls, print its result."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from importlib import import_module
from operator import attrgetter
from typing import Annotated, Any

import typer

from autodistill import api
from autodistill.cli import commands, serving
from autodistill.cli.help import PlainCommand, PlainGroup, SectionedCommand
from autodistill.cli.options import SECTIONS, Json, parameters, typed
from autodistill.cli.printing import bundle_text, line_width, lines, packaged_text, rows, show, table_width, tables
from autodistill.cli.solve import solve_text
from autodistill.cli.streams import quiet_libraries
from autodistill.cli.summary import budgets_text, planned_text, search_summary, written_summary
from autodistill.cli.tables import open_view, printable
from autodistill.errors import AutoDistillError, InputError, shortened
from autodistill.hardware.budget import parse_price
from autodistill.objects.budgets import BudgetSearch, run_budgets
from autodistill.objects.run import SearchResult, run_search
from autodistill.options import Option
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import leaderboard_of
from autodistill.search.budgets.request import BudgetsRequest
from autodistill.search.request.request import SearchRequest
from autodistill.utils.process_exit import INTERRUPTED, ended_by, error_document, sigterm_as_interrupt
from autodistill.utils.timeouts import calls_left

# The base class of all of Typer's usage errors. Typer does not export it by name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
app = typer.Typer(cls=PlainGroup, add_completion=True, pretty_exceptions_enable=False)


def _version(shown: bool) -> None:
    if shown:
        from importlib.metadata import version

        print(version("autodistill-search"))
        raise typer.Exit


@app.callback(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version)] = False,
) -> None:
    """Finds the distilled and quantised student with the highest measured accuracy that fits your hardware."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)


# The headings of the help, and the commands under each.
_PURPOSES = {
    "Find a student": ("search", "distill", "solve", "write"),
    "See what was found": (
        "leaderboard",
        "explain",
        "show",
        "report",
        "compare",
        "cascade",
        "reproduce",
        "study",
        "log",
    ),
    "Take it to its users": ("export", "verify", "bundle", "serve", "chat", "monitor", "load", "drafts", "dashboards"),
    "Ask of hardware": ("pick", "estimate", "measure", "profile", "devices", "doctor"),
    "Read what ships": ("strategies", "spaces"),
}
_PANELS = {name: purpose for purpose, names in _PURPOSES.items() for name in names}


def _command(
    name: str, help: str, declared: Sequence[inspect.Parameter], body: Callable[..., None], cls: type[Any]
) -> None:
    """Add a command with the declared options. Its body takes the context, and the values that were typed."""

    def call(ctx: typer.Context, **given: Any) -> None:
        """Run the body."""
        body(ctx, typed(ctx, given))

    first = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    call.__signature__ = inspect.Signature([first, *declared])  # type: ignore[attr-defined]
    call.__annotations__ = {}
    app.command(name, cls=cls, help=help, rich_help_panel=_PANELS[name])(call)


def _verb(
    function: Callable[..., Any],
    document: Callable[[Any], Any],
    text: Callable[[Any], str],
    *,
    quiet: Callable[[dict[str, Any]], Iterable[str | None]] | None = None,
    sections: Collection[str] = (),
    after: Callable[[Any], None] = lambda result: None,
) -> None:
    """Add the command of a function, with the options that the function declares.

    Args:
        function: The function to call with the options that were typed.
        document: Turns the result into plain data.
        text: Turns the result into text for a person.
        quiet: Takes the options, and returns references of everything that will be read. If given, libraries are
            silenced before they are imported.
        sections: Headings of the help.
        after: Called with the result after it is printed.
    """

    def body(ctx: typer.Context, given: dict[str, Any]) -> None:
        """Call the function and show its result."""
        as_json = given.pop("json", False)

        def work() -> Any:
            """Call the function with the typed options, and with a view for its lines if it takes `notify`."""
            if quiet is not None:
                quiet_libraries(*quiet(given))
            with open_view() if "notify" in inspect.signature(function).parameters else nullcontext() as view:
                return function(**given, **({"notify": view.log} if view else {}))

        after(show(as_json, work, document, text))

    declared = [*parameters(function, sections=sections), *parameters(_printed)]
    _command(function.__name__, _first_line(function), declared, body, PlainCommand)


def _streaming(function: Callable[..., int]) -> None:
    """Add the command of a function that prints while it runs and returns the exit code."""

    def body(ctx: typer.Context, given: dict[str, Any]) -> None:
        """Call the function and exit with its code."""
        if code := function(**given):
            raise typer.Exit(code)

    _command(function.__name__, _first_line(function), parameters(function), body, PlainCommand)


def _printed(json: Json = False) -> None:
    """Declare the option that every command has."""


def _planned(
    plan: Annotated[
        bool,
        Option(help="Print the planned trials, tokens, disk, time and hours without training anything.", section="Run"),
    ] = False,
    price: Annotated[
        str | None,
        Option(
            help="With --plan: the price of an hour of a GPU (or of the machine if it has none), like 2.5/h.",
            metavar="PRICE",
            section="Run",
        ),
    ] = None,
) -> None:
    """Declare the options of `search` and `distill` that are not part of their request."""


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _searches(verb: str, function: Callable[..., Any], asks: type[SearchRequest] = SearchRequest) -> None:
    """Add a command that trains what its request asks for, or plans it if `--plan` is given."""

    def body(ctx: typer.Context, given: dict[str, Any]) -> None:
        """Search, or plan what a search would do, and show the result."""
        started = time.monotonic()
        as_json, plan, price = (given.pop(name, None) for name in ("json", "plan", "price"))

        def asked() -> SearchRequest:
            """Return the checked request that the typed options make."""
            from autodistill.search.request.early_checks import check_early
            from autodistill.trackers.writing import Live

            if price is not None and not plan:
                raise InputError("--price is for what a plan would cost: give it with --plan")
            request = asks(**given, command=ctx.obj or ctx.command_path, started=started)
            quiet_libraries(given.get("teacher"), given.get("data"), *commands.hub_references(given))
            # Check that everything named exists before the engines are imported, which takes seconds.
            check_early(request)
            Live(request.log or ())
            return request

        if plan:
            width = line_width()
            show(bool(as_json), lambda: _plan(asked(), price), dict, lambda document: planned_text(document, width))
        else:
            show(bool(as_json), lambda: _search(asked()), attrgetter("document"), _summary)

    declared = [
        *parameters(asks, verb, SECTIONS),
        *parameters(_planned, sections=SECTIONS),
        *parameters(_printed, sections=SECTIONS),
    ]
    _command(verb, _first_line(function), declared, body, SectionedCommand)


def _plan(request: SearchRequest, price: str | None) -> dict[str, Any]:
    hourly = None if price is None else parse_price(price)
    from autodistill.cli.live import SearchView
    from autodistill.search.preview import plan_search

    with open_view() as view:
        if isinstance(request, BudgetsRequest) and request.several:
            from autodistill.search.budgets.run import plan_budgets

            return plan_budgets(request, SearchView(view), hourly)
        return plan_search(request, SearchView(view), hourly)


def _search(request: SearchRequest) -> SearchResult | BudgetSearch:
    from autodistill.cli.live import SearchView

    with open_view() as view:
        if isinstance(request, BudgetsRequest) and request.several:
            return run_budgets(request, SearchView(view))
        return run_search(request, SearchView(view))


def _summary(result: SearchResult | BudgetSearch) -> str:
    if isinstance(result, BudgetSearch):
        return budgets_text(result.document, line_width())
    run = RunFolder.open(result.path.parent, result.name)
    return search_summary(result.document, *leaderboard_of(run), line_width())


def _imported_on_call(module: str, name: str, *more: Callable[[], Any]) -> Callable[[Any], Any]:
    """Return a function that imports `name` when it is called, and passes it the result and the values of `more`."""
    return lambda result: getattr(import_module(f"autodistill.{module}"), name)(result, *(one() for one in more))


def _of(show: Callable[[dict[str, Any]], str]) -> Callable[[Any], str]:
    return lambda result: show(result.document)


def _ready(found: Any) -> None:
    from autodistill.cli.doctor import ready

    if not ready(found):
        raise typer.Exit(2)


def _promised(found: dict[str, Any]) -> None:
    if code := serving.promised(found):
        raise typer.Exit(code)


def _models(given: dict[str, Any]) -> list[str | None]:
    """Return the model that is estimated, and the model from which the strategy's student is initialised."""
    return [given.get("model"), *commands.hub_references({"strategy": given.get("strategy")})]


_searches("search", api.search, BudgetsRequest)
_searches("distill", api.distill)
_verb(api.write, dict, written_summary, quiet=lambda given: [given.get("teacher")])
_verb(commands.leaderboard, rows, tables)
_verb(commands.explain, dict, lambda found: str(found["text"]))
_verb(commands.show, dict, _imported_on_call("advisor.origin", "said"))
_verb(commands.reproduce, dict, lambda found: str(found["text"]))
_verb(commands.report, dict, lines)
_verb(commands.compare, dict, lines)
_verb(commands.study, dict, lines)
_verb(commands.log, dict, lines)
_verb(api.cascade, dict, _imported_on_call("search.cascade", "described"), quiet=lambda given: [])
_verb(commands.export, dict, commands.exported_text)
_verb(commands.verify, dict, commands.verified_text)
_verb(api.bundle, dict, bundle_text, quiet=lambda given: [])
_verb(api.dashboards, dict, lines)
_verb(
    commands.doctor,
    _imported_on_call("cli.doctor", "to_json"),
    _imported_on_call("cli.doctor", "describe"),
    after=_ready,
)
_verb(
    api.devices,
    lambda found: [one.to_json() for one in found],
    _imported_on_call("cli.hardware_summary", "devices_table", table_width),
)
_verb(commands.strategies, dict, packaged_text)
_verb(commands.spaces, dict, packaged_text)
_verb(
    api.estimate,
    attrgetter("document"),
    _of(_imported_on_call("cli.hardware_summary", "appraisal_text", table_width)),
    quiet=_models,
    sections=(api.RUN_SHAPE,),
)
_verb(api.pick, attrgetter("document"), _of(_imported_on_call("cli.hardware_summary", "pick_text", table_width)))
_verb(
    api.measure,
    dict,
    _imported_on_call("cli.hardware_summary", "measured_text"),
    quiet=lambda given: [str(given["student"])],
)
_verb(
    api.profile, dict, _imported_on_call("profiling.request", "described"), quiet=lambda given: [given.get("teacher")]
)
_verb(
    api.solve,
    attrgetter("document"),
    _of(lambda document: solve_text(document, line_width(), table_width())),
    quiet=lambda given: [given.get("teacher"), given.get("data")],
)
_verb(serving.serve, dict, serving.served_text)
_streaming(serving.chat)
_streaming(serving.monitor)
_verb(serving.drafts, dict, serving.drafts_text)
_verb(serving.load, dict, serving.loaded_text, after=_promised)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's own, and return its exit code."""
    try:
        code = _run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:  # a second one, while the first was being handled
        code = _fail("stopped", ended_by(INTERRUPTED))
    if arguments is None and calls_left():
        # A call is still running in a library. A normal exit would wait for it forever, and ignore interrupts.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(given: Sequence[str]) -> int:
    typed = shlex.join(["autodistill", *given])
    with sigterm_as_interrupt():
        try:
            code = app(given, prog_name="autodistill", obj=typed, standalone_mode=False) or 0
        except AutoDistillError as error:
            return _fail(str(error), ended_by(error.exit_code))
        except _UsageError as error:
            if "--json" in given:
                print(error_document(_complaint(error), InputError.exit_code), flush=True)
            return _fail(_complaint(error), InputError.exit_code)
    # Typer turns a Ctrl-C that nothing caught into this code.
    return _fail("stopped", ended_by(code)) if code == INTERRUPTED else int(code)


def _fail(message: str, code: int) -> int:
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    return code


# Messages of Typer's value parser, and the plainer words that replace them.
_PLAINER = {
    "Value error, ": "",
    "Input should be a valid integer, unable to parse string as an integer": "write a whole number",
    "Input should be a valid number, unable to parse string as a number": "write a number",
    "Input should be greater": "it must be greater",
}


# Options that were renamed, by command.
_RENAMED = {("compare", "--to"): "--out", ("study", "--to"): "--out", ("leaderboard", "--to"): "--parquet"}


def _successor(command: Any, typed: str) -> str | None:
    """Return what to write in place of an option that was renamed, or None."""
    if now := _RENAMED.get((command.name, typed)):
        return f"name the file with {now}"
    # In commands that write no other file, --out used to name the folder of the runs.
    if typed == "--out" and any(one.name == "runs" for one in command.params):
        return "the folder that holds the runs is named with --runs"
    return None


def _complaint(error: Any) -> str:
    where = error.ctx.command_path if error.ctx else "autodistill"
    said = error.format_message().rstrip(".")
    typed = getattr(error, "option_name", "")
    if error.ctx and (now := _successor(error.ctx.command, typed)):
        said = f"there is no {typed} any more: {now}"
    for theirs, ours in _PLAINER.items():
        said = said.replace(theirs, ours)
    return shortened(f"{said} See {where} --help" if said.endswith("?") else f"{said}; see {where} --help")
