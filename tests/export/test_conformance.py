"""Our own exporters pass the suite that a plug-in's author subclasses."""

from __future__ import annotations

from autodistill.plugins import names
from autodistill.testing import ExporterConformance

for _name in names("exporters"):
    _title = "Test" + _name.title().replace("-", "")
    globals()[_title] = type(_title, (ExporterConformance,), {"__module__": __name__, "exporter": _name})
