"""Odd things in place of a file: pipes that nobody writes to, endless devices, sockets, folders, loops."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.hostile.cases import Case, Kit

_KINDS = ("pipe", "socket", "folder", "loop", "nowhere", "long", "unreadable-name")
_DEVICES = ("/dev/zero", "/dev/stdin", "/dev/full", "/proc/self/mem", "/dev/tty")


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    teacher, text = str(kit.teacher), str(kit.text)
    search = ("search", "--budget", "1kB", "--plan", *kit.small)
    known = ("--teacher", teacher, "--data", text)
    places = {
        "teacher": (".gguf", (*search, "--data", text, "--teacher")),
        "teacher-folder": ("", (*search, "--data", text, "--teacher")),
        "data-jsonl": (".jsonl", (*search, "--teacher", teacher, "--data")),
        "data-txt": (".txt", (*search, "--teacher", teacher, "--data")),
        "data-parquet": (".parquet", (*search, "--teacher", teacher, "--data")),
        "space": (".yaml", (*search, *known, "--space")),
        "baseline": (".yaml", (*search, *known, "--baseline")),
        "task": (".yaml", (*search, *known, "--task")),
        "devices": (".yaml", (*search, *known, "--device", "4090", "--devices")),
        "cache": ("", (*_less(search, "--cache"), *known, "--cache")),
        "runs": ("", (*_less(search, "--runs"), *known, "--runs")),
        "estimate": (".gguf", ("estimate",)),
        "estimate-strategy": (".yaml", ("estimate", teacher, "--strategy")),
        "estimate-cache": ("", ("estimate", teacher, "--device", "local", "--cache")),
        "solve": (".gguf", ("solve", "--budget", "1kB")),
        "solve-data": (".txt", ("solve", teacher, "--budget", "1GB", "--data")),
        "solve-candidate": (".gguf", ("solve", teacher, "--budget", "1GB", "--candidate")),
        "measure": (".gguf", ("measure",)),
        "measure-result": ("", ("measure", teacher, "--result")),
        "measure-script": ("", ("measure", str(kit.gguf), "--script")),
        "measure-ssh": ("", ("measure", str(kit.gguf), "--on", "ssh://127.0.0.1:1", "--ssh-config")),
        "prompts-jsonl": (".jsonl", (*_less(kit.write(teacher), "--prompts"), "--prompts")),
        "prompts-txt": (".txt", (*_less(kit.write(teacher), "--prompts"), "--prompts")),
        "write-out": (".jsonl", (*_less(kit.write(teacher), "--out"), "--out")),
        "write-teacher": (".gguf", (*_less(kit.write(teacher), "--teacher"), "--teacher")),
        "distill": (".yaml", ("distill", "--budget", "1kB", "--plan", *_less(kit.small, "--trials"), *known)),
        "devices-list": (".yaml", ("devices", "box", "--devices")),
        "leaderboard-runs": ("", ("leaderboard", "--runs")),
        "pick-runs": ("", ("pick", "--budget", "1GB", "--runs")),
        "doctor-cache": ("", ("doctor", "--cache")),
        "export-out": ("", ("export", "none", "--to", "gguf", "--out")),
    }
    # These take a folder, make what does not exist yet, or have nothing to read.
    right = {
        "cache",
        "runs",
        "estimate-cache",
        "leaderboard-runs",
        "pick-runs",
        "doctor-cache",
        "export-out",
        "measure-script",
        "write-out",
        "measure-ssh",
    }
    for place, (suffix, argv) in places.items():
        for kind in _KINDS:
            name = "x" * 300 + suffix if kind == "long" else f"x{suffix}"
            # doctor reports a cache that cannot be written, together with what is ready.
            codes = (0, 1, 2, 3) if place == "measure-ssh" else (0, 2, 3) if place in right else (2, 3)
            given = f"./{name}" if place in ("distill", "estimate-strategy", "space", "baseline") else name
            yield Case(
                area="odd_files",
                name=f"{place}-{kind}",
                argv=(*argv, given),
                make=partial(_make, name=name, kind=kind),
                codes=codes,
            )
        for device in dice.sample(_DEVICES, 2):
            codes = (0, 1, 2, 3) if place == "measure-ssh" else (0, 2, 3) if place in right else (2, 3)
            link = f"x{suffix}"
            given = f"./{link}" if place in ("distill", "estimate-strategy", "space", "baseline") else link
            yield Case(
                area="odd_files",
                name=f"{place}-{device.replace('/', '-')}",
                argv=(*argv, given),
                make=partial(_link, name=link, to=device),
                codes=codes,
            )


def _less(argv: tuple[str, ...], option: str) -> tuple[str, ...]:
    place = argv.index(option)
    return argv[:place] + argv[place + 2 :]


def _link(folder: Path, name: str, to: str) -> None:
    (folder / name).symlink_to(to)


def _make(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 108 characters
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "nowhere":
        path.symlink_to("nothing/there")
    elif kind == "unreadable-name":
        path.write_bytes(b"\x00\xff" * 50)
