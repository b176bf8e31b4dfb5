"""Documentation of Debian's packages as plain text: training text for a small language model, and held-out texts.

    python -m benchmarks.common.debian_texts

Packages are downloaded once by `apt-get download`. Nothing of them is installed or run. Their documents become lines of
a training file, `train.jsonl`, and folders of documents that are not in it. `manuals` has every eighth document of the
same packages, and `postgresql` is a package of its own. Both have a part for tests, `-test`. `python` is a general text
on which nobody trains.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autodistill.errors import InputError
from autodistill.options import cache_folder
from autodistill.utils.hashing import content_hash
from benchmarks.common.program import parse, parser_of

# For each package: the kind of document that is read, and the licence that its copyright file names.
PACKAGES = {
    "linux-doc-6.12": ("rst", "GPL-2"),
    "perl-doc": ("pod", "Artistic or GPL-1+"),
    "git-doc": ("txt", "GPL-2"),
    "cmake-doc": ("rst", "BSD-3-clause"),
    "nova-doc": ("rst", "Apache-2"),
    "neutron-doc": ("rst", "Apache-2"),
    "cinder-doc": ("rst", "Apache-2"),
    "keystone-doc": ("rst", "Apache-2"),
    "ironic-doc": ("rst", "Apache-2"),
    "heat-doc": ("rst", "Apache-2"),
    "swift-doc": ("rst", "Apache-2"),
    "python-pandas-doc": ("rst", "BSD-3-clause"),
    "openmpi-doc": ("rst", "BSD-3-clause"),
    "sphinx-doc": ("rst", "BSD-2-clause"),
    "nodejs-doc": ("txt", "MIT"),
    "sqlite3-doc": ("html", "public domain"),
    "python-django-doc": ("html", "BSD-3-clause"),
    "python-sqlalchemy-doc": ("html", "MIT"),
    "erlang-doc": ("html", "Apache-2"),
    "octave-doc": ("html", "GPL-3+ and the documentation's own"),
    "cppreference-doc-en-html": ("html", "CC-BY-SA-3.0 or GFDL-1.3+"),
    "python-numpy-doc": ("html", "BSD-3-clause"),
    "python-scipy-doc": ("html", "BSD-3-clause"),
    "postgresql-doc-17": ("html", "PostgreSQL"),
    "python3.13-doc": ("rst", "PSF-2"),
}
# Packages that no teacher reads: a text for students, and one that no student reads either.
APART = {"postgresql-doc-17": "postgresql", "python3.13-doc": "python"}
_ENDINGS = {
    "rst": re.compile(r"/_sources/.*\.(rst|txt)(\.txt)?(\.gz)?$"),
    "txt": re.compile(r"\.(txt|md)(\.gz)?$"),
    "pod": re.compile(r"\.pod$"),
    "html": re.compile(r"\.html(\.gz)?$"),
}
# Characters: the longest and the shortest document, and the most of a package.
_LONGEST, _SHORTEST, _MOST = 120_000, 600, 40_000_000
_UNSEEN = re.compile(r"<(script|style|nav|head)\b.*?</\1>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(r"</?(p|div|br|li|ul|ol|tr|table|h\d|pre|dt|dd|dl|section|td|th)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]+>")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The folder of the texts. `train.jsonl` has a line with "text" for each document, in reading order.

    Attributes:
        folder: The folder that holds all texts.
        record: Packages with versions and licences, and each text's number of documents and characters.
    """

    folder: Path
    record: dict[str, object]

    @property
    def train(self) -> Path:
        """The training file."""
        return self.folder / "train.jsonl"


def texts_folder(packages: tuple[str, ...] = tuple(PACKAGES), most: int = _MOST) -> Path:
    """Return the folder of the cache that `debian_texts` keeps the texts in, whether they are made or not."""
    return cache_folder() / "benchmarks" / f"debian-texts-{content_hash([sorted(packages), most])}"


def debian_texts(packages: tuple[str, ...] = tuple(PACKAGES), most: int = _MOST) -> Texts:
    """Return the texts. They are made if they do not exist yet.

    Args:
        packages: The packages to read.
        most: Characters of each package that are kept.

    Raises:
        InputError: A package cannot be downloaded or unpacked.
    """
    folder = texts_folder(packages, most)
    if not folder.exists():
        partial = Path(tempfile.mkdtemp(prefix=".debian-", dir=_made(folder.parent)))
        try:
            record = _write(partial, packages, most)
            (partial / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Texts(folder=folder, record=json.loads((folder / "record.json").read_text(encoding="utf-8")))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(folder: Path, packages: tuple[str, ...], most: int) -> dict[str, object]:
    read, known, counts = [], set[str](), dict[str, dict[str, int]]()
    versions: dict[str, object] = {}
    for package in packages:
        archive = _downloaded(package)
        versions[package] = {"file": archive.name, "license": PACKAGES[package][1]}
        for text in _documents(archive, PACKAGES[package][0], most):
            key = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
            if key in known:
                continue
            known.add(key)
            place = int(key[:8], 16)
            name = APART.get(package) or ("manuals" if place % 8 == 0 else "train")
            if name == "train":
                read.append((key, text))
            else:
                # A fifth is kept for tests. The general text is not split, as it has no other use.
                name += "-test" if name != "python" and place // 8 % 5 == 0 else ""
                (_made(folder / name) / f"{key[:16]}.txt").write_text(text, encoding="utf-8")
            count = counts.setdefault(name, {"documents": 0, "characters": 0})
            count["documents"] += 1
            count["characters"] += len(text)
    read.sort()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for _, text in read)
    return {"packages": versions, "texts": counts}


def _downloaded(package: str) -> Path:
    folder = _made(cache_folder() / "benchmarks" / "debian")
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        print(f"downloading {package}", file=sys.stderr, flush=True)
        done = subprocess.run(["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True)
        found = sorted(folder.glob(f"{package}_*.deb"))
        if done.returncode or not found:
            raise InputError(f"apt-get cannot download {package}: {done.stderr.strip().splitlines()[-1:]}")
    return found[-1]


def _documents(archive: Path, kind: str, most: int) -> Iterator[str]:
    """Yield a package's texts, in an order given by a hash of their names, up to `most` characters."""
    with tempfile.TemporaryFile() as unpacked:
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=unpacked)
        if done.returncode:
            raise InputError(f"{archive} cannot be unpacked: delete it and call again")
        unpacked.seek(0)
        with tarfile.open(fileobj=unpacked) as files:
            members = [one for one in files if one.isfile() and _ENDINGS[kind].search(one.name)]
            members.sort(key=lambda one: hashlib.sha256(one.name.encode()).digest())
            for member in members:
                file = files.extractfile(member)
                if file is None:
                    continue
                raw = file.read()
                text = gzip.decompress(raw) if member.name.endswith(".gz") else raw
                document = _plain(text.decode("utf-8", "ignore"), kind)
                if len(document) < _SHORTEST:
                    continue
                yield document
                most -= len(document)
                if most < 0:
                    return


def _plain(text: str, kind: str) -> str:
    """Return the text without HTML, trailing blanks and rows of empty lines, cut at the longest length."""
    if kind == "html":
        text = html.unescape(_TAG.sub("", _BLOCK.sub("\n", _UNSEEN.sub("", text))))
    lines = [line.replace("\xa0", " ").rstrip() for line in text.splitlines()]
    if kind == "html":  # in HTML, blanks at the beginning of a line are no layout
        lines = [line if line.strip() else "" for line in lines]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return text[: text.rfind("\n", 0, _LONGEST)] if len(text) > _LONGEST else text


def main() -> None:
    """Fetch the packages' texts, and print which packages and versions they are from."""
    arguments = parse(parser_of(__doc__))
    # A smoke run cannot rely on a network, so it shows what would be read.
    record = {"packages": PACKAGES} if arguments.smoke else debian_texts().record
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
