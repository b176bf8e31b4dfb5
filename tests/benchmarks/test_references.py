"""The reference pages match the code and are complete; the site has every page, and no link is broken."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

import autodistill as ad
from autodistill.cli.app import app
from benchmarks.documents import references, site

ROOT = Path(__file__).parents[2]


def test_no_reference_page_is_stale():
    assert references.stale() == [], "python -m benchmarks.documents.references --write"


def test_every_option_of_every_command_is_on_the_page():
    page = (references.FOLDER / "command-line.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    commands = typer.main.get_command(app).commands
    assert set(parts) == set(commands)
    for name, command in commands.items():
        for param in command.params:
            for option in param.opts if param.param_type_name == "option" else ():
                assert re.search(rf"`{re.escape(option)}[ `]", parts[name]), f"{name} {option}"


def test_every_public_name_and_option_of_a_search_is_on_the_page():
    page = (references.FOLDER / "python.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^### ad\.(\S+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(parts) == {name for name in ad.__all__ if not name.startswith("__")}
    assert all(re.search(r"\w", text) for text in parts.values())
    for name in inspect.signature(ad.search).parameters:
        assert f"- `{name}`: " in parts["search"]
    for member in ("resume", "log", "students", "to_dataframe"):
        assert f"`{member}" in parts["Run"]


def test_an_example_in_a_docstring_is_shown_as_code():
    page = (references.FOLDER / "python.md").read_text(encoding="utf-8")
    found = re.search(r"^### ad\.register_divergence\n.*?```python\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    assert found
    assert found[1].startswith('>>> @register_divergence("total_variation", nonnegative=True)\n... def')


def test_a_page_that_is_stale_is_named_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "FOLDER", tmp_path)
    (tmp_path / "python.md").write_text("old")
    assert references.stale() == ["command-line.md", "python.md"]
    assert references.stale(write=True) == ["command-line.md", "python.md"]
    assert references.stale() == []


def test_the_site_has_every_page_of_docs():
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    decisions = {page for page in pages if page.startswith("docs/decisions/")}
    assert pages - decisions <= set(site.navigation())
    assert len(site.navigation()) == len(set(site.navigation()))


def test_no_link_of_a_page_leads_nowhere(tmp_path):
    assert site.stage(tmp_path / "source") == []
    staged = {path.relative_to(tmp_path / "source").as_posix() for path in (tmp_path / "source").rglob("*")}
    assert {"README.md", "docs/start.md", "benchmarks/reports/2026-11-25-claims.md"} <= staged
    assert "search_spaces/strategies/index.md" in staged, "a folder that is linked to has a page"


def test_a_link_that_leads_nowhere_is_named(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(
        "[over two\nlines](b.md) [away](https://example.org/x)\n```\n[c](c.md)\n```\n"
    )
    (tmp_path / "mkdocs.yml").write_text("nav: [{A: docs/a.md}, {B: [{C: docs/gone.md}]}]")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "CONFIG", tmp_path / "mkdocs.yml")
    assert site.stage(tmp_path / "source") == [
        "mkdocs.yml names docs/gone.md, which is not there",
        "docs/a.md leads to b.md, which is not there",
    ]


class Links(HTMLParser):
    """The links of a page, the files that it loads, and the ids that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self.loaded += [found[name] for name in ("href", "src") if found.get(name) and tag in ("link", "script", "img")]
        self.links += [found[name] for name in ("href", "src") if found.get(name) and tag in ("a", "img")]


@pytest.mark.slow
def test_the_site_is_built_strictly_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "benchmarks.documents.site", "--out", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in (tmp_path / "site").rglob("*.html")}
    assert (tmp_path / "site" / "index.html") in pages
    assert len(pages) > len(site.navigation())

    @cache
    def aim_of(folder: Path, name: str) -> tuple[Path, bool]:
        """Return where a link of a page in a folder leads, and whether something is there."""
        aim = (folder / unquote(name)).resolve()
        aim = aim / "index.html" if aim.is_dir() else aim
        return aim, aim.exists()

    broken = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("/"):
                continue
            aim, exists = aim_of(path.parent, parts.path) if parts.path else (path, True)
            if not exists or (parts.fragment and aim in pages and unquote(parts.fragment) not in pages[aim].ids):
                broken.append(f"{path.relative_to(tmp_path)}: {link}")
    assert broken == []
    away = {link for page in pages.values() for link in page.loaded if urlsplit(link).netloc}
    assert away == set(), "a page asks nothing of another server"
