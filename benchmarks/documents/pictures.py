"""Take the pictures of docs/images: the pages of tracked runs, and the first page of the site.

    python -m benchmarks.documents.pictures [--run results/postgresql/postgresql-175MB]

The run's page is taken on a desktop and a phone, in light and dark. The README has the top of another run's page.
Needs the extras `plots` and `docs`, Debian's `chromium`, `optipng` and a Chinese font (`fonts-wqy-zenhei`), and node
with playwright-core in the folder that AUTODISTILL_NODE_MODULES names. A picture of more than 300 kB ends the program
with 1. A smoke run writes the page, and takes no pictures where these are missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from autodistill.report.writing import write_page
from autodistill.runs.run_folder import RunFolder
from benchmarks.common.program import ROOT, parse, parser_of
from benchmarks.documents import site

IMAGES = ROOT / "docs" / "images"
MOST_BYTES = 300_000
_RUN = ROOT / "results" / "postgresql" / "postgresql-175MB"
# The README shows a run whose budget the teacher does not fit.
_README_RUN = ROOT / "results" / "python-four-budgets" / "python-150MB"
_SCRIPT = Path(__file__).with_suffix(".mjs")
# The width of a screen and its pixels for each of them, and the height of a picture of a report and of the site.
_SCREENS = {"desktop": (1280, 1, 960, 760), "phone": (390, 2, 1320, 960)}
# The same for the picture of the README: as wide as the text of a page, and down to the legend of its first chart.
_README_SCREEN = (1072, 1, 988)


def wanted(report: Path, readme: Path, first: Path | None, out: Path) -> list[dict[str, str | int]]:
    """Return the pictures to take, as `pictures.mjs` reads them.

    Args:
        report: The page of a run.
        readme: The page of the run that the README shows.
        first: The first page of the site, if there is one.
        out: The folder of the pictures.
    """
    shots = [("report-readme", readme, "light", _README_SCREEN)]
    for screen, (width, scale, tall, low) in _SCREENS.items():
        shots += [(f"report-{screen}-{theme}", report, theme, (width, scale, tall)) for theme in ("light", "dark")]
        shots += [] if first is None else [(f"site-{screen}", first, "light", (width, scale, low))]
    return [
        {
            "page": str(page),
            "out": str(out / f"{name}.png"),
            "width": width,
            "height": height,
            "scale": scale,
            "theme": theme,
        }
        for name, page, theme, (width, scale, height) in shots
    ]


def missing() -> list[str]:
    """Return the names of what is needed and not installed."""
    programs = [name for name in ("chromium", "node", "optipng") if shutil.which(name) is None]
    return programs + ([] if (_modules() / "playwright-core").is_dir() else ["playwright-core"])


def take(pictures: list[dict[str, str | int]], folder: Path) -> list[Path]:
    """Take pictures, make their files as small as they can be without a loss, and return them.

    Args:
        pictures: What `wanted` returned.
        folder: A folder for temporary files.
    """
    (asked := folder / "wanted.json").write_text(json.dumps(pictures), encoding="utf-8")
    subprocess.run(["node", _SCRIPT, asked, _modules().absolute(), shutil.which("chromium") or ""], check=True)
    made = [Path(str(one["out"])) for one in pictures]
    subprocess.run(["optipng", "-quiet", "-strip", "all", "-o3", *made], check=True)
    return made


def _modules() -> Path:
    return Path(os.environ.get("AUTODISTILL_NODE_MODULES", "node_modules"))


def main() -> None:
    """Take the pictures and print their sizes, or print what is wrong and exit with 1."""
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, default=_RUN, help=f"folder of a run ({_RUN.relative_to(ROOT)})")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures (docs/images)")
    arguments = parse(parser)
    lacking = missing()
    if lacking and not arguments.smoke:
        sys.exit(f"not installed: {', '.join(lacking)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "images" if arguments.smoke else arguments.out
        out.mkdir(parents=True, exist_ok=True)
        report, readme = (
            write_page(RunFolder.open(run.parent, run.name), folder / f"{name}.html")
            for name, run in (("report", arguments.run), ("readme", _README_RUN))
        )
        first = None
        if not arguments.smoke:
            site.build(folder / "site")
            first = folder / "site" / "index.html"
        made = [] if lacking else take(wanted(report, readme, first, out), folder)
        sizes = {path: path.stat().st_size for path in made}
    for path, size in sizes.items():
        print(f"{path.name}: {size / 1000:.0f} kB")
    if large := [path.name for path, size in sizes.items() if size > MOST_BYTES]:
        sys.exit(f"larger than {MOST_BYTES / 1000:.0f} kB: {', '.join(large)}")


if __name__ == "__main__":
    main()
