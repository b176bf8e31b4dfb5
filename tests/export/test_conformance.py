"""Our own exporters pass the suite that a plug-in's author subclasses."""

from __future__ import annotations

import shutil

import pytest

from autodistill.plugins import names
from autodistill.testing import ExporterConformance

for _name in names("exporters"):
    _title = "Test" + _name.title().replace("-", "")
    _marks = []
    if _name == "aoti":  # compiles for half a minute each time
        _marks = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")]
    _members = {"__module__": __name__, "exporter": _name, "pytestmark": _marks}
    globals()[_title] = type(_title, (ExporterConformance,), _members)
