"""Write the site's reference pages: every command with its options, and every public name of the Python API.

    python -m benchmarks.documents.references [--write]

They are made from the help texts of the command line and the docstrings of the package. Without `--write`, stale pages
are named, and the program ends with 1. A test does the same.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.program import ROOT, parse, parser_of

FOLDER = ROOT / "docs" / "reference"
_MADE = "<!-- Written by `python -m benchmarks.documents.references --write`: change the code, and not this page. -->"
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Example):\Z")
_ENTRY = re.compile(r"( {4})([\w.*, ]+): (.*)\Z")


def pages() -> dict[Path, str]:
    """Return the content of each page, by its file."""
    return {FOLDER / "command-line.md": command_line(), FOLDER / "python.md": python_names()}


def command_line() -> str:
    """Return the page of all commands with their options."""
    import typer

    from autodistill.cli.app import app

    group: Any = typer.main.get_command(app)
    context = group.make_context("autodistill", [], resilient_parsing=True)
    verbs = {name: group.get_command(context, name) for name in group.list_commands(context)}
    parts = [
        "# Command line",
        _MADE,
        "`autodistill COMMAND --help` shows the same. An option that is given in Python has the same name with "
        "underscores. Every command prints one JSON document with `--json`, and ends with the [exit "
        "codes](../searches.md#what-a-run-leaves) that are documented.",
        "\n".join(
            [
                "| command | |",
                "| --- | --- |",
                *(f"| [{name}](#{name}) | {_cell(one.help)} |" for name, one in verbs.items()),
            ]
        ),
    ]
    for name, one in verbs.items():
        inner = one.make_context(name, [], parent=context, resilient_parsing=True)
        usage = " ".join(one.collect_usage_pieces(inner))
        parts += [f"## {name}", _text(one.help), f"`autodistill {name} {usage}`", *_options(one, inner)]
    return "\n\n".join(parts) + "\n"


def _options(command: Any, context: Any) -> Iterator[str]:
    sections: dict[str, list[str]] = {}
    for param in command.get_params(context):
        if getattr(param, "hidden", False):
            continue
        if param.param_type_name == "argument":
            shown, told = param.metavar or param.name.upper(), getattr(param, "help", "") or ""
        else:
            shown, told = (
                " ".join([", ".join(sorted(param.opts, key=len)), *([_metavar(param)] if _metavar(param) else [])]),
                param.help or "",
            )
        needed = " Needed." if param.required else ""
        panel = getattr(param, "rich_help_panel", None) or ""
        sections.setdefault(panel, []).append(f"| {_code(shown)} | {_cell(told)}{needed} |")
    for panel, rows in sections.items():
        yield "\n".join([*([f"**{panel}**", ""] if panel else []), "| option | |", "| --- | --- |", *rows])


def _metavar(param: Any) -> str:
    if getattr(param, "is_flag", False):
        return ""
    return str(param.metavar or "VALUE")


def python_names() -> str:
    """Return the page of all public names."""
    import autodistill as ad

    names = [name for name in ad.__all__ if not name.startswith("__")]
    found = {name: getattr(ad, name) for name in names}
    kinds = {
        "Functions": [name for name, one in found.items() if not inspect.isclass(one)],
        "Classes": [name for name, one in found.items() if inspect.isclass(one) and not issubclass(one, Exception)],
        "Errors": [name for name, one in found.items() if inspect.isclass(one) and issubclass(one, Exception)],
    }
    parts = [
        "# Python API",
        _MADE,
        "The names of `autodistill`, with `import autodistill as ad`. What is not here is internal. [From "
        "Python](../python.md) shows how they are used together.",
    ]
    for kind, members in kinds.items():
        parts.append(f"## {kind}")
        for name in members:
            parts += [f"### ad.{name}", *_described(name, found[name])]
    return "\n\n".join(parts) + "\n"


def _described(name: str, one: Any) -> Iterator[str]:
    if not inspect.isclass(one) or not issubclass(one, Exception):
        yield _code(f"ad.{name}{_signature(one)}")
    yield from _docstring(inspect.getdoc(one) or "")
    if not inspect.isclass(one):
        return
    rows = []
    for member, value in vars(one).items():
        target = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        is_property = isinstance(target, property)
        if member.startswith("_") or not (is_property or inspect.isfunction(target)):
            continue
        told = inspect.getdoc(target)
        if told:
            shown = member if is_property else f"{member}{_signature(target)}"
            rows.append(f"| {_code(shown)} | {_cell(told.split(chr(10) * 2)[0])} |")
    if rows:
        yield "\n".join(["| member | |", "| --- | --- |", *rows])


def _signature(one: Any) -> str:
    """Return the names of the parameters, with `name=...` for defaults.

    A long list is cut, because the parameters are described below it.
    """
    try:
        given = [*inspect.signature(one).parameters.values()]
    except (TypeError, ValueError):
        return ""
    words, star = [], False
    for param in given:
        if param.name == "self":
            continue
        if param.kind is param.KEYWORD_ONLY and not star:
            words.append("*")
        star = star or param.kind in (param.KEYWORD_ONLY, param.VAR_POSITIONAL)
        prefix = {param.VAR_POSITIONAL: "*", param.VAR_KEYWORD: "**"}.get(param.kind, "")
        words.append(f"{prefix}{param.name}{'' if param.default is param.empty else '=...'}")
    return f"({', '.join(words) if len(words) <= 12 else ', '.join([*words[:3], '...'])})"


def _docstring(text: str) -> Iterator[str]:
    """Yield a Google-style docstring as Markdown: prose, then a list for each section, and an example as code."""
    prose: list[str] = []
    section, entries = "", []
    for line in [*text.splitlines(), "End:"]:
        if (found := _SECTION.match(line)) or line == "End:":
            if section == "Example":
                code = "\n".join(line.removeprefix("    ") for line in prose).rstrip()
                yield f"**Example**\n\n```python\n{code}\n```"
            elif section and entries:
                yield f"**{section}**"
                yield "\n".join(f"- {one}" for one in entries)
            elif prose:
                yield _text("\n".join(prose).strip())
            section, entries, prose = found[1] if found else "", [], []
        elif section in ("", "Example"):
            prose.append(line)
        elif entry := _ENTRY.match(line):
            entries.append(f"{_code(entry[2])}: {_text(entry[3])}")
        elif line.strip() and entries:
            entries[-1] += f" {_text(line.strip())}"
        elif line.strip():
            entries.append(_text(line.strip()))


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _text(text: str | None) -> str:
    """Return prose with the characters escaped that Markdown would read as a tag or a link."""
    parts = re.split(r"(`[^`]*`)", text or "")
    return "".join(part if part.startswith("`") else re.sub(r"([<>\[\]*_])", r"\\\1", part) for part in parts)


def _cell(text: str | None) -> str:
    return " ".join(_text(text).split()).replace("|", "\\|")


def stale(write: bool = False) -> list[str]:
    """Return the stale pages. With `write`, they are written."""
    found = []
    for path, text in pages().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            found.append(path.name)
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    return found


def main() -> None:
    """Name the stale reference pages and exit with 1, or write them."""
    parser = parser_of(__doc__)
    parser.add_argument("--write", action="store_true", help="write the pages that are stale")
    arguments = parse(parser)
    found = stale(arguments.write)
    if found and not arguments.write:
        sys.exit(f"stale: {', '.join(found)}; python -m benchmarks.documents.references --write writes them")
    print(f"written: {', '.join(found)}" if found else "the references are what the code says")


if __name__ == "__main__":
    main()
