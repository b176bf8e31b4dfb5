"""Our own exporters pass the conformance suite that authors of plug-ins subclass."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from autodistill.export.base import load_exporter
from autodistill.export.phones.phone import PhoneExporter
from autodistill.plugins import names
from autodistill.testing import ExporterConformance
from tests.export.phones.test_phone import installed

for _name in names("exporters"):
    _title = "Test" + _name.title().replace("-", "")
    _marks = []
    if _name == "aoti":  # compiles for half a minute each time
        _marks = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")]
    if isinstance(_made := load_exporter(_name), PhoneExporter):  # converts for half a minute each time
        _why = f"{' and '.join(_made.packages)} is not installed"
        _marks = [pytest.mark.slow, pytest.mark.skipif(not installed(_made), reason=_why)]
    _members: dict[str, Any] = {"__module__": __name__, "exporter": _name, "pytestmark": _marks}
    if _name == "pt2":  # traces for seconds each time; torchscript, which packs in the same way, is tested completely
        _members["deployments"] = lambda self: ExporterConformance.deployments(self)[:1]
        _marks.append(pytest.mark.slow)
    globals()[_title] = type(_title, (ExporterConformance,), _members)
