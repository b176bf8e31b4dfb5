"""Typer commands that refuse empty values, and whose help has plain usage lines, no Python types, and sections."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class PlainCommand(TyperCommand):
    """A command whose usage line shows NAME for a required argument and [NAME] for an optional one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line.

        Raises:
            BadParameter: An option or argument is empty or blank. It would be treated as if it were left out.
        """
        # Read the texts as they were typed: after parsing, an empty path is the folder ".", which is not empty.
        typed, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for param in self.get_params(ctx):
            given = typed.get(param.name)
            texts = given if isinstance(given, list | tuple) else [given]
            if not ctx.resilient_parsing and any(isinstance(text, str) and not text.strip() for text in texts):
                raise typer.BadParameter("it is empty: write a value, or leave it out", ctx=ctx, param=param)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's parameters, shown without details that only a programmer needs."""
        return _plain(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts that follow the command's name in its usage line."""
        arguments = (param for param in self.get_params(ctx) if param.param_type_name == "argument")
        return ["[OPTIONS]", *map(_usage, arguments)]


class SectionedCommand(PlainCommand):
    """A command with so many options that its help shows them in sections."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's parameters, with --help in the section "Output"."""
        params = super().get_params(ctx)
        for param in params:
            if "--help" in param.opts:
                param.rich_help_panel = "Output"
        return params


class PlainGroup(TyperGroup):
    """The program itself: the group of all commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the group's parameters, shown without details that only a programmer needs."""
        return _plain(super().get_params(ctx))


def _plain(params: list[Any]) -> list[Any]:
    """Return the parameters, with flags shown without a value and arguments without a Python type."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
        elif param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: None
    return params


def _usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    shown = name if argument.required else f"[{name}]"
    return f"{shown}..." if argument.nargs != 1 else shown
