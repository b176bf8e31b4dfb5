"""Hostile targets for `doctor`: invalid folders, storages and clusters. Clusters are tried with a search too."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.hostile.arguments import NAMES
from tests.hostile.cases import Case, Kit

_FOLDERS = (
    "/dev/null/x",
    "/dev/zero",
    "/proc/1/root/x",
    "/proc/self/mem",
    "s3://bucket/runs",
    "~nobody",
    "/",
    "a" * 300,
)
_STORAGES = (
    *("s3://", "gs://", "file://", "file:///dev/null/x", "file:///proc/x", "file://relative/x", "file:///a//b"),
    *("s3://key:secret@bucket/runs", "http://127.0.0.1:1/x", "nothing://bucket/runs", "://", "file:///a\x1b[2J"),
    f"file:///{'x' * 300}",
    f"file:///{'x/' * 5_000}",
)
_CLUSTERS = (
    *("auto:1", "host", "host:", ":1", "host:port", "host:0", "host:-1", "host:99999", "host:²", "127.0.0.1:١"),
    *("127.0.0.1:1", "[::1]:1", "::1", "a..b:1", "..:1", ".:1", "a b:1", "a\nb:1", "\x1b[31m:1", "\udcff:1", "é:1"),
    *("ray://127.0.0.1:1", "http://127.0.0.1:1", "127.0.0.1:1:1", "127.0.0.1:1/x", "host:1e3", " :1", "\t"),
    f"{'x' * 64}:1",
    f"{'x.' * 300}:1",
    f"{'é' * 200}:1",
    f"127.0.0.1:{'9' * 20}",
    f"127.0.0.1:{'9' * 5_000}",
)


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    """Each case ends in a report of what is not ready, or in one line."""
    looked = {"--runs": _FOLDERS, "--cache": _FOLDERS, "--storage": _STORAGES, "--ray-address": _CLUSTERS}
    for option, values in looked.items():
        for number, value in enumerate((*values, *NAMES)):
            # Whether a folder can be made there, and everything else is ready, depends on the machine.
            codes = (0, 2) if option in ("--runs", "--cache") or value.startswith("file:") else (2,)
            more = ("--json",) if dice.random() < 0.25 else ()
            yield Case(
                area="doctor", name=f"{option[2:]}-{number:02d}", argv=("doctor", *more, option, value), codes=codes
            )
    known = ("search", "--teacher", str(kit.teacher), "--data", str(kit.text), "--budget", "1GB", "--trials", "1")
    for number, value in enumerate((*_CLUSTERS, *NAMES)):
        argv = (*known, "--tokens", "512", "--runs", "runs", "--cache", "cache", "--ray-address", value)
        yield Case(area="doctor", name=f"search-{number:02d}", argv=argv)
