"""Clients of federated distillation: what they learn from each other, what they send, and clients that vanish."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autodistill.errors import InputError
from autodistill.federated import Predictions, join, pool, serve
from autodistill.models.loading import load_model
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.federated.wire import Wire, check_no_text

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "federate.py"


def predicted(tokens: list[list[int]], probabilities: list[list[float]]) -> Predictions:
    return Predictions(tokens=np.array(tokens, np.int32), probabilities=np.array(probabilities, np.float16))


def test_the_pool_is_the_mean_of_probabilities() -> None:
    """Compare with a dense table of all tokens."""
    dice = np.random.default_rng(0)
    several = []
    for _ in range(3):
        tokens = np.argsort(dice.random((20, 30)), axis=1)[:, :4]
        several.append(predicted(tokens.tolist(), (dice.random((20, 4)) / 4).tolist()))
    dense = np.zeros((20, 30), np.float32)
    for one in several:
        np.add.at(dense, (np.arange(20)[:, None], one.tokens), one.probabilities.astype(np.float32) / 3)
    found = pool(several)
    np.testing.assert_allclose(found.probabilities, -np.sort(-dense, axis=1)[:, :4], rtol=2e-3)
    np.testing.assert_allclose(np.take_along_axis(dense, found.tokens, 1), found.probabilities, rtol=2e-3)
    alone = pool([several[0]])
    assert sorted(alone.tokens[0]) == sorted(several[0].tokens[0])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ([np.zeros((2, 3), np.int32)], "two arrays, not 1"),
        ([np.zeros((2, 3), np.int32), np.zeros((2, 2), np.float16)], "of one shape"),
        ([np.full((2, 3), -1, np.int32), np.zeros((2, 3), np.float16)], "of one shape"),
        ([np.zeros((2, 3), np.int32), np.full((2, 3), np.nan, np.float16)], "has diverged"),
        ([np.zeros((9, 3), np.int32), np.zeros((9, 3), np.float16)], "of 9 positions, and the public text has 2"),
    ],
)
def test_what_is_received_is_not_trusted(arrays: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Predictions.received(arrays, 2)


def test_numbers_that_are_none_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one client"):
        serve(clients=0, rounds=1)
    with pytest.raises(InputError, match="more than 0 seconds"):
        serve(clients=1, rounds=1, round_seconds=0)
    with pytest.raises(InputError, match="positive numbers"):
        serve(clients=1, rounds=1, connect_seconds=-1)
    with pytest.raises(InputError, match="is there already"):
        join("127.0.0.1:1", model=tmp_path, data="x", public="y", out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write into .*file: .*; choose another folder"):
        join("127.0.0.1:1", model=tmp_path, data="x", public="y", out=tmp_path / "file" / "out")


def start(wire: Wire, folder: Path, name: str, steps: int) -> subprocess.Popen[bytes]:
    """Start a client in a separate process, as the example does."""
    given = {
        "model": folder / "model",
        "data": folder / name,
        "public": folder / "public",
        "out": folder / f"{name}.out",
    }
    options = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, str(EXAMPLE), "join", wire.address, *options, "--steps", str(steps), "--length", "32"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_server_ends_where_clients_do_not_come_and_ends_those_that_did(
    tmp_path: Path, wire: tuple[str, Wire]
) -> None:
    pytest.importorskip("flwr", reason="the extra federated is not installed")
    address, between = wire
    save_tiny_teacher(tmp_path / "model", layers=1)
    for seed, name in enumerate(("public", "a")):
        tiny_text(tmp_path / name, documents=2, seed=seed)
    client = start(between, tmp_path, "a", 2)
    with pytest.raises(InputError, match="1 of 2 clients did not connect within 25 s"):
        serve(address, clients=2, rounds=3, connect_seconds=25)
    said, _ = client.communicate(timeout=300)
    assert client.returncode != 0
    assert b"ended before a round" in said
    assert not (tmp_path / "a.out").exists()


@pytest.mark.slow
def test_a_client_whose_server_vanishes_keeps_what_it_has_learned(tmp_path: Path, wire: tuple[str, Wire]) -> None:
    pytest.importorskip("flwr", reason="the extra federated is not installed")
    address, between = wire
    save_tiny_teacher(tmp_path / "model", layers=1)
    for seed, name in enumerate(("public", "a")):
        tiny_text(tmp_path / name, documents=2, seed=seed)
    command = [sys.executable, "-u", str(EXAMPLE), "serve", address, "--clients", "1", "--rounds", "1000"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    client = start(between, tmp_path, "a", 2)
    assert server.stdout is not None
    assert b"round 1: 1 clients" in server.stdout.readline()
    server.kill()
    said, _ = client.communicate(timeout=600)
    assert client.returncode == 0, said
    assert b"has vanished: what was learned up to round" in said
    before, after = (load_model(tmp_path / folder, torch.float32) for folder in ("model", "a.out"))
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.slow
def test_no_text_of_a_client_leaves_it_and_one_that_vanishes_stops_nobody(
    tmp_path: Path, wire: tuple[str, Wire], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flwr", reason="the extra federated is not installed")
    address, between = wire
    save_tiny_teacher(tmp_path / "model", layers=1)
    texts = {name: tiny_text(tmp_path / name, documents=2, seed=seed) for seed, name in enumerate(("public", "a", "b"))}
    secret = "Zanzibar-4711 belongs to nobody else."
    for name in ("a", "b"):
        first = next(texts[name].iterdir())
        first.write_text(f"{secret} {first.read_text()} {secret}")
    clients = [start(between, tmp_path, "a", 2), start(between, tmp_path, "b", 2)]
    lines: list[str] = []

    def on_round(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            clients[1].kill()

    found = serve(address, clients=2, rounds=3, round_seconds=300, on_round=on_round)
    assert clients[0].wait(300) == 0, clients[0].stdout.read()
    assert "round 1: 2 clients" in lines[0]
    assert lines[2].startswith("round 3: 1 clients")
    # The wire carries the predictions, and nothing of the text: neither characters nor tokens.
    size = 3 * found.bytes + found.bytes
    assert size <= len(between.sent) < 1.05 * size + 20_000
    check_no_text(bytes(between.sent), tmp_path / "model", texts["public"], [texts["a"], texts["b"]])
    assert load_model(tmp_path / "a.out", torch.float32)
