"""The frame of a page: one file with its style, scripts and charts, which sends no request to any server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from autodistill.errors import MissingDependencyError
from autodistill.report.charts import INSTALL_PLOTS
from autodistill.report.html import data, section, text

_CHARTS_ABSENT = f"Charts need Vega-Altair and vl-convert: {INSTALL_PLOTS}"


def specifications(draw: Callable[[], Mapping[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """Return the Vega-Lite specifications of charts by name, or None if the packages that draw them are missing."""
    try:
        _bundle()
        return {name: chart.to_dict(validate=False) for name, chart in draw().items()}
    except MissingDependencyError:
        return None


def document(
    title: str, head: str, sections: Sequence[tuple[str, str, str]], drawn: Mapping[str, Mapping[str, Any]] | None
) -> str:
    """Return a whole page. It needs no other file, and may only run its own scripts.

    Args:
        title: The page's heading.
        head: HTML below the heading.
        sections: Id, title and content of each section. Sections without content are left out.
        drawn: Specifications of its charts: the result of `specifications`.
    """
    held = [(name, said, part) for name, said, part in sections if part]
    links = "".join(f'<li><a href="#{name}">{text(said)}</a></li>' for name, said, _ in held)
    body = "".join(section(name, said, part) for name, said, part in held)
    program = "" if drawn is None else _bundle()
    lacking = f'<p class=note id="no-charts">{text(_CHARTS_ABSENT)}</p>' if drawn is None else ""
    charts, shared = _shared(drawn or {})
    scripts = [*([_harmless(program)] if program else []), _harmless(f"(() => {{{_own('page.js')}}})();")]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}: AutoDistill</title><style>{_own('page.css')}</style></head><body>",
            f"<header><h1>{text(title)}</h1>{head}{lacking}",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main>',
            (
                "<footer>Made by AutoDistill. This page holds all that it shows, and loads nothing from any "
                "server.</footer>"
            ),
            data("charts", charts),
            data("data", shared),
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _shared(drawn: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return specifications that refer to their data by name, and the data by name. Charts with equal data share it."""
    names: dict[str, str] = {}
    shared: dict[str, Any] = {}

    def moved(part: Any) -> Any:
        """Return a part of a specification with its data moved to `shared` and replaced by a name."""
        if isinstance(part, list):
            return [moved(one) for one in part]
        if not isinstance(part, Mapping):
            return part
        values = part.get("data")
        if isinstance(values, Mapping) and "values" in values:
            # Name data by content, so that equal lists are stored once.
            name = names.setdefault(json.dumps(values["values"]), f"d{len(names)}")
            shared[name] = values["values"]
            part = {**part, "data": {"name": name}}
        return {key: one if key == "data" else moved(one) for key, one in part.items()}

    specifications = {}
    for name, chart in drawn.items():
        kept = {key: value for key, value in chart.items() if key not in ("config", "$schema", "width", "datasets")}
        specifications[name] = moved(kept) | {"description": str(chart.get("title", name))}
    return specifications, shared


@cache
def _bundle() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script that defines `embed`.

    Raises:
        MissingDependencyError: vl-convert is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingDependencyError(_CHARTS_ABSENT) from error
    # Wrap it in a function, so that its names do not become the page's.
    return f"(() => {{{vl_convert.javascript_bundle('window.embed = vegaEmbed;')}}})();"


@cache
def _own(name: str) -> str:
    return files("autodistill.report").joinpath(name).read_text(encoding="utf-8")


def _harmless(script: str) -> str:
    """Return a script without text that would end the script element, or hide its end."""
    return script.replace("</script", r"<\/script").replace("<!--", r"<\!--")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
