"""Write a run's page, and its charts as pictures, to files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from autodistill.errors import MissingDependencyError
from autodistill.report.charts import INSTALL_PLOTS
from autodistill.report.comparison import comparison
from autodistill.report.contents import Contents, charts_of
from autodistill.report.page import page
from autodistill.runs.run_folder import RunFolder
from autodistill.search.callbacks import Callback, RungReached, SearchStarted, TrialFinished
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import replacing, unwritable

PAGE = "report.html"
_LEAST_SECONDS = 20.0
_SHARE = 0.02  # largest share of a search's time that is spent on its page


def write_page(run: RunFolder, out: Path | None = None) -> Path:
    """Write the page about a run atomically: the whole file or nothing.

    Args:
        run: The run, finished or under way.
        out: The file to write. By default `report.html` in the run's folder.

    Raises:
        InputError: The run's records cannot be read, or the file cannot be written.
    """
    return _write(page(Contents.of(run)), run.path / PAGE if out is None else out)


def write_comparison(runs: Sequence[RunFolder], out: Path) -> Path:
    """Write the page about several runs atomically: the whole file or nothing.

    Raises:
        InputError: There are fewer than two runs, two have the same name, their records cannot be read, or the file
            cannot be written.
    """
    return _write(comparison([Contents.of(run) for run in runs]), out)


def _write(text: str, path: Path) -> Path:
    try:
        make_folder(path.absolute().parent)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(path.parent, error) from error
    return path


def write_charts(run: RunFolder, folder: Path) -> list[Path]:
    """Write each chart of a run as PNG, as SVG and as its Vega-Lite specification.

    Args:
        run: The run, finished or under way.
        folder: Folder to write into. It is created if it does not exist.

    Raises:
        MissingDependencyError: Vega-Altair or vl-convert is not installed.
        InputError: The run's records cannot be read, or a file cannot be written.
    """
    convert = _vl_convert()
    written = []
    for name, chart in charts_of(Contents.of(run)).items():
        specification = chart.to_dict()
        files = {
            "png": convert.vegalite_to_png(specification, scale=2),
            "svg": convert.vegalite_to_svg(specification).encode(),
            "json": json.dumps(specification, indent=1).encode(),
        }
        for kind, held in files.items():
            path = folder / f"{name}.{kind}"
            try:
                make_folder(folder)
                with replacing(path) as temporary:
                    temporary.write_bytes(held)
            except OSError as error:
                raise unwritable(folder, error, "--plots") from error
            written.append(path)
    return written


class Refresher(Callback):
    """Keeps the page of a run that is under way up to date on disk. It uses little time, and never ends a search."""

    def __init__(self) -> None:
        self._run: Path | None = None
        self._next = 0.0
        self._failed = False

    def search_started(self, event: SearchStarted) -> None:
        """Remember the run. A short search writes its page once, at the end."""
        self._run, self._next = event.run, time.monotonic() + _LEAST_SECONDS

    def rung_reached(self, event: RungReached) -> None:
        """Write the page, unless it was written a short while ago."""
        self._refresh()

    def trial_finished(self, event: TrialFinished) -> None:
        """Write the page, unless it was written a short while ago."""
        self._refresh()

    def close(self) -> None:
        """Write the page of a search that has ended for any reason."""
        self._write()

    def _refresh(self) -> None:
        began = time.monotonic()
        if began >= self._next:
            self._write()
            ended = time.monotonic()
            self._next = ended + max(_LEAST_SECONDS, (ended - began) / _SHARE)

    def _write(self) -> None:
        if self._run is None:
            return
        try:
            # Open the run again, to read what is on disk. This takes no lock.
            write_page(RunFolder.open(self._run.parent, self._run.name))
        except Exception as error:  # a failed page must not end hours of training
            if not self._failed:
                told = "report.html was not written, and the search goes on (%s: %s)"
                logging.getLogger("autodistill").warning(told, type(error).__name__, error)
            self._failed = True


def _vl_convert() -> ModuleType:
    try:
        import vl_convert
    except ImportError as error:
        raise MissingDependencyError(f"pictures of charts need vl-convert: {INSTALL_PLOTS}") from error
    return vl_convert
