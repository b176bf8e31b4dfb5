"""Altered exports, for `verify`, `bundle` and `profile`: records, proofs, launch files, hashes, links and sums."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case, Kit
from tests.hostile.spoils import Spoil, as_folder, as_pipe, change, paths, without, write

_VALUES: tuple[Any, ...] = (None, 7, -1, 10**400, 1e308, "", "x", "../x", "/etc/passwd", [], [[]], {}, {"": None}, True)
_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "object": b"{}",
    "torn": b'{"format": "gguf", ',
    "no-text": b"\xff\xfe\x00",
    "deep": b'{"a":' + b"[" * 100_000,
    "digits": b'{"version": ' + b"9" * 5_000 + b"}",
    "nan": b'{"version": NaN}',
    "twice": b'{"version": 1, "version": 2}',
}
_SUMS: dict[str, bytes] = {
    "empty": b"",
    "words": b"these are no sums\n",
    "outside": b"0" * 64 + b"  ../student.gguf\n",
    "absolute": b"0" * 64 + b"  /etc/passwd\n",
    "missing": b"0" * 64 + b"  nothing\n",
    "wrong": b"0" * 64 + b"  a\n",
    "device": b"0" * 64 + b"  zero\n",
    "no-text": b"\xff\xfe" * 40,
    "large": (b"0" * 64 + b"  " + b"a" * 200 + b"\n") * 20_000,
}


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    def case(name: str, *argv: str, spoil: Spoil, codes: tuple[int, ...] = (2,)) -> Case:
        return Case(area="exports", name=name, argv=argv, make=partial(_make, kit=kit, spoil=spoil), codes=codes)

    verify, bundle = ("verify", "export"), ("bundle", "export", "--out", "bundle")
    for name, spoil in _spoils(kit, dice).items():
        # The change may be in something that no command reads. A proof that does not hold here ends with 1.
        yield case(f"verify-{name}", *verify, spoil=spoil, codes=(0, 1, 2))
        yield case(f"bundle-{name}", *bundle, spoil=spoil, codes=(0, 1, 2))
    for name, content in _SUMS.items():
        yield case(f"check-{name}", "bundle", "--check", "export", spoil=partial(_sums, content=content))
    for name, text in _STRATEGIES.items():
        yield case(
            f"profile-strategy-{name}",
            *("profile", "./s.yaml", "--teacher", str(kit.teacher), "--out", "profile", "--cache", "cache"),
            spoil=lambda folder, text=text: (folder.parent / "s.yaml").write_text(text),
        )


_STRATEGIES: dict[str, str] = {
    "empty": "",
    "list": "- a\n",
    "unknown": "distillation: {color: red}\n",
    "number": "distillation: 7\n",
    "negative": "distillation: {learning_rate: -1}\n",
    "infinite": "distillation: {learning_rate: .inf}\n",
    "nan": "distillation: {temperature: .nan}\n",
    "depth": "init: {depth: 0}\n",
    "width": "init: {width: 1.0e-9}\n",
    "divergence": "distillation: {divergence: nothing}\n",
    "format": "finishing: {format: gguf-q9_0, bits: 9, group_size: 32}\n",
    "model": "init: {source: pretrained, model: ./nowhere}\n",
    "code": "init: !!python/object/apply:os.system ['touch ran']\n",
    "tab": "init:\n\tdepth: 1\n",
}


def _spoils(kit: Kit, dice: random.Random) -> dict[str, Spoil]:
    """Return ways to alter the folder of an export."""
    found: dict[str, Spoil] = {}
    for file in ("export.json", "serve.json", "proof.npz"):
        for name, content in _TEXTS.items():
            found[f"{file}-{name}"] = partial(write, file=file, content=content)
            if file != "export.json":
                found[f"{file}-{name}-told"] = _told(found[f"{file}-{name}"])
        found[f"{file}-none"] = partial(without, file=file)
        found[f"{file}-folder"] = partial(as_folder, file=file)
        found[f"{file}-pipe"] = partial(as_pipe, file=file)
        found[f"{file}-link"] = partial(_as_link, file=file)
    record = json.loads((kit.export / "export.json").read_text())
    for path in sorted(paths(record, 3)):
        name = ".".join(path)
        found[f"without-{name}"] = partial(change, file="export.json", path=path, lost=True)
        found[f"record-{name}"] = partial(change, file="export.json", path=path, value=dice.choice(_VALUES))
    for number in range(4):
        found[f"model-flip-{number}"] = partial(_flip, seed=dice.random())
        found[f"model-flip-{number}-told"] = _told(partial(_flip, seed=dice.random()))
        found[f"proof-flip-{number}-told"] = _told(partial(_flip, seed=dice.random(), file="proof.npz"))
    for name, altered in _PROOFS.items():
        found[f"proof-{name}-told"] = _told(partial(_proof, altered=altered))
    found["model-none"] = lambda folder: _model(folder).unlink()
    found["model-short"] = lambda folder: _model(folder).write_bytes(_model(folder).read_bytes()[:-1])
    found["another-file"] = lambda folder: (folder / "more.txt").write_text("more")
    found["a-pipe-more"] = lambda folder: os.mkfifo(folder / "pipe")
    found["a-loop-more"] = lambda folder: (folder / "loop").symlink_to("loop")
    found["a-device-more"] = lambda folder: (folder / "zero").symlink_to("/dev/zero")
    found["card-none"] = lambda folder: (folder / "README.md").unlink(missing_ok=True)
    for name, card in _CARDS.items():
        found[f"card-{name}-told"] = _told(partial(write, file="README.md", content=card))
    return found


def _make(folder: Path, kit: Kit, spoil: Spoil) -> None:
    shutil.copytree(kit.export, folder / "export")
    spoil(folder / "export")


def _model(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def _flip(folder: Path, seed: float, file: str = "") -> None:
    """Flip bits of a file, by default of the model."""
    dice, path = random.Random(seed), folder / file if file else _model(folder)
    content = bytearray(path.read_bytes())
    for _ in range(20):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def _told(spoil: Spoil) -> Spoil:
    """Return the change together with a matching change of the file's hash in the record."""

    def both(folder: Path) -> None:
        from autodistill.utils.checksums import entries

        spoil(folder)
        change(folder, "export.json", ("files",), entries(folder, without=("export.json",)))

    return both


def _proof(folder: Path, altered: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    import numpy as np

    with np.load(folder / "proof.npz") as file:
        arrays = dict(file)
    np.savez_compressed(folder / "proof.npz", **altered(arrays))


def _zeros() -> Any:
    import numpy as np

    return np.zeros((4, 400_000_000), np.int8)


def _all(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: {name: change(values) for name, values in arrays.items()}


_PROOFS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "nothing": lambda arrays: {},
    "fewer": lambda arrays: dict(sorted(arrays.items())[1:]),
    "flat": _all(lambda values: values.reshape(-1)),
    "no-rows": _all(lambda values: values[:0]),
    "short": _all(lambda values: values[:1]),
    "text": _all(lambda values: values.astype(str)),
    "objects": _all(lambda values: values.astype(object)),
    "negative": _all(lambda values: -values - 1 if values.dtype.kind in "if" else values),
    "bomb": lambda arrays: arrays | {"sequences": _zeros()},
    "huge": _all(lambda values: values * 0 + (2**31 - 1)),
    "nan": _all(lambda values: values.astype("f8") * float("nan") if values.dtype.kind in "if" else values),
}
_CARDS: dict[str, bytes] = {
    "no-text": b"\xff\xfe\x00",
    "open": b"---\nlicense: mit\n",
    "list": b"---\n- a\n---\n",
    "licence-list": b"---\nlicense: [a, {b: c}]\n---\n",
    "licence-lines": b'---\nlicense: "a\\nLABEL b=c\\nRUN touch /ran"\n---\n',
    "bomb": b"---\na: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nlicense: *b\n---\n",
    "code": b"---\nlicense: !!python/object/apply:os.system ['touch ran']\n---\n",
}


def _sums(folder: Path, content: bytes) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "a").write_bytes(b"a")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "SHA256SUMS").write_bytes(content)


def _as_link(folder: Path, file: str) -> None:
    (folder / file).rename(folder.parent / file)
    (folder / file).symlink_to(f"../{file}")
