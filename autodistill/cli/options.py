"""Options of the command line, made from the declarations of the Python API's functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import typer

from autodistill.cli import completion
from autodistill.errors import InputError
from autodistill.options import Option, options_of

SECTIONS = ("Budget", "Model and data", "Scores", "Search", "Training", "Run", "Workers", "Storage", "Output")
"""Section headings in the help of a command with many options."""

Json = Annotated[bool, Option(help="Print the result as JSON.", section="Output")]


def parameters(
    declared: Callable[..., Any], command: str = "", sections: Collection[str] = ()
) -> list[inspect.Parameter]:
    """Return the options that a function or a dataclass declares, as parameters that Typer understands.

    Args:
        declared: The function or the dataclass.
        command: Return only the options of this command.
        sections: Headings that are shown. Options of other sections are shown under Typer's default heading.
    """
    given = inspect.signature(declared).parameters
    return [
        _parameter(name, option, given[name].default, command, sections)
        for name, option in options_of(declared, command).items()
        if not option.python
    ]


def _parameter(name: str, option: Option, default: Any, command: str, sections: Collection[str]) -> inspect.Parameter:
    shown: dict[str, Any] = {
        "help": option.helps.get(command, option.help),
        "metavar": option.metavar,
        # Typer prints the default value, unless the help text already has it.
        "show_default": "(default" not in option.helps.get(command, option.help),
        "rich_help_panel": option.section if option.section in sections else None,
    }
    if option.complete:
        shown["autocompletion"] = getattr(completion, option.complete)
    if option.typed is int and option.parse is not None:
        shown["parser"] = _reader(option)
    elif option.minimum is not None:
        shown["min"] = option.minimum
    made = typer.Argument(**shown) if option.argument else typer.Option(f"--{name.replace('_', '-')}", **shown)
    if option.typed is bool:
        default = bool(default)
    typed = option.typed if default is not None or option.required else option.typed | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if option.required else default,
        annotation=Annotated[typed, made],
    )


def _reader(option: Option) -> Callable[[Any], Any]:
    """Return a function that parses an option's number. It raises Typer's error, which names the option."""

    def read(text: Any) -> Any:
        """Parse the text and check it against the minimum. Typer also passes defaults, which are numbers already."""
        if option.parse is None or not isinstance(text, str):
            return text
        try:
            value = option.parse(text)
        except InputError as error:
            raise typer.BadParameter(str(error)) from error
        if option.minimum is not None and value < option.minimum:
            raise typer.BadParameter(f"it must be at least {option.minimum}, not {value}")
        return value

    return read


def typed(ctx: typer.Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a command's values that were typed. For the others the declared defaults apply.

    Args:
        ctx: Knows what was typed. Its own values are texts where older versions of Typer make paths only for the call.
        given: The values that Typer calls the command with.
    """
    sources = {name: ctx.get_parameter_source(name) for name in given}
    return {name: given[name] for name, source in sources.items() if source and source.name != "DEFAULT"}
