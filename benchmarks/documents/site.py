"""Build the documentation's site strictly: a broken link ends the program.

    python -m benchmarks.documents.site [--out build/site]

The source of the site is a copy of the pages and the files that they link to, in the same folders as here. So links
work both on disk and on the site. Needs the extra `docs`. `mkdocs.yml` has the order of the pages.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from benchmarks.common.program import ROOT, parse, parser_of

BUILDER = "zensical"
CONFIG = ROOT / "mkdocs.yml"
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
_AWAY = re.compile(r"[a-z][a-z0-9+.-]*:")


def listed(items: object) -> Iterator[str]:
    """Yield the pages that a part of the navigation lists."""
    if isinstance(items, str):
        yield items
    elif isinstance(items, list):
        for item in items:
            yield from listed(item)
    elif isinstance(items, dict):
        yield from listed([*items.values()])


def navigation() -> list[str]:
    """Return the pages that `mkdocs.yml` lists, relative to the repository's root."""
    return [*listed(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["nav"])]


def links(text: str) -> Iterator[re.Match[str]]:
    """Yield the links of a page that lead to files of this repository."""
    plain = _FENCED.sub(lambda found: " " * len(found[0]), text)
    return (found for found in _LINK.finditer(plain) if not _AWAY.match(found[2]))


def stage(folder: Path) -> list[str]:
    """Copy the pages and everything that they link to into a folder.

    Returns:
        Sentences about broken links.
    """
    shutil.rmtree(folder, ignore_errors=True)
    waiting, done, faults = [*navigation()], set(), []
    faults += [f"{CONFIG.name} names {name}, which is not there" for name in waiting if not (ROOT / name).is_file()]
    while waiting:
        name = waiting.pop()
        if name in done or not (ROOT / name).is_file():
            continue
        done.add(name)
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            shutil.copyfile(source, target)
            continue
        text = source.read_text(encoding="utf-8")
        for found in reversed([*links(text)]):
            aim = (source.parent / found[2]).resolve()
            if not aim.is_relative_to(ROOT) or not aim.exists():
                faults.append(f"{name} leads to {found[2]}, which is not there")
                continue
            if aim.is_dir():
                page, others = _page_of(aim.relative_to(ROOT), folder)
                there = Path(*[".."] * len(Path(name).parent.parts), page).as_posix()
                text = text[: found.start(2)] + there + text[found.end(2) :]
                waiting += others
            else:
                waiting.append(aim.relative_to(ROOT).as_posix())
        target.write_text(text, encoding="utf-8")
    return faults


def _page_of(name: Path, folder: Path) -> tuple[Path, list[str]]:
    """Return the page of a repository folder (its own, or a list of its files), and the files that belong to it."""
    own = name / "README.md"
    if (ROOT / own).is_file():
        return own, [own.as_posix()]
    files = sorted(path for path in (ROOT / name).iterdir() if path.is_file() and not path.name.startswith("__"))
    page = name / "index.md"
    (folder / page).parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {name.as_posix()}", "", *(f"- [{path.name}]({path.name})" for path in files)]
    (folder / page).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return page, [(name / path.name).as_posix() for path in files]


def build(out: Path) -> None:
    """Build the site into a folder.

    Raises:
        SystemExit: A link is broken, the builder is not installed, or it reports an error.
    """
    source = out.parent / f"{out.name}-source"
    faults = stage(source)
    if faults:
        sys.exit("\n".join(faults))
    if importlib.util.find_spec(BUILDER) is None:
        sys.exit(f"{BUILDER} is not installed: pip install -e '.[docs]'")
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    settings |= {"docs_dir": source.name, "site_dir": out.name}
    config = out.parent / "mkdocs.yml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", BUILDER, "build", "--clean", "--strict", "--config-file", str(config)],
        capture_output=True,
        text=True,
        cwd=out.parent,
    )
    if done.returncode:
        sys.exit((done.stdout + done.stderr)[-4000:])


def main() -> None:
    """Build the site and print its first page, or print what is wrong and exit with 1."""
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="folder of the site (build/site)")
    arguments = parse(parser)
    out = arguments.out.resolve()
    if arguments.smoke:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            faults = stage(Path(folder) / "site")
        if faults:
            sys.exit("\n".join(faults))
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    build(out)
    print(f"{out / 'index.html'}")


if __name__ == "__main__":
    main()
