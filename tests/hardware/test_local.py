"""This machine as a device."""

from __future__ import annotations

from pathlib import Path

import pytest

from autodistill.hardware import local as module
from autodistill.hardware.background_load import Noise
from autodistill.hardware.catalog import devices
from autodistill.hardware.local import choose_device, known_devices, local_device
from autodistill.hardware.lookup import find_device
from autodistill.hardware.machine import Gpu, Machine, computes_bf16

BOX = Machine(cpus=1, memory_bytes=8 * 10**9)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        noisy(patch)
        local_device(folder, BOX)
    return folder


def noisy(patch: pytest.MonkeyPatch, *doubts: str) -> None:
    """Make the machine seem busy with these doubts, or quiet if there are none, whatever its state."""
    found = Noise(load_average=1.0, others=0.0, steal=0.0, doubts=doubts)
    patch.setattr(module.Watch, "__exit__", lambda self, *_: setattr(self, "noise", found))


def test_what_a_busy_machine_gave_is_warned_of_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_bandwidth", lambda kind: 1e9)
    monkeypatch.setattr(module, "_rates", lambda kind: {"fp32": 1e9})
    noisy(monkeypatch, "other work took 1.9 of 2 cores")
    device = local_device(tmp_path, BOX)
    assert "other work took 1.9 of 2 cores" in device.sources["bandwidth"]
    err = capfd.readouterr().err
    assert "other work took 1.9 of 2 cores" in err
    assert "devices --local --again" in err
    assert not list((tmp_path / "devices").glob("*.json"))
    # Within the process, the device stays the same.
    assert local_device(tmp_path, BOX) == device
    assert capfd.readouterr().err == ""
    noisy(monkeypatch)
    monkeypatch.setattr(module, "_bandwidth", lambda kind: 2e9)
    assert local_device(tmp_path, BOX, again=True).bandwidth == 2e9
    assert len(list((tmp_path / "devices").glob("*.json"))) == 1
    monkeypatch.setattr(module, "_bandwidth", lambda kind: 3e9)
    assert local_device(tmp_path, BOX).bandwidth == 2e9
    assert local_device(tmp_path, BOX, again=True).bandwidth == 3e9


def test_bandwidth_and_rates_are_measured(cache: Path) -> None:
    device = local_device(cache, BOX)
    # Any machine that runs this reads 0.5 GB and computes a thousand million operations per second.
    assert 5e8 < device.bandwidth < 1e13
    # A machine that only emulates bfloat16 has no rate for it.
    assert set(device.rates) == {"fp32", *(["bf16"] if computes_bf16("cpu") else [])}
    assert min(device.rates.values()) > 1e9
    assert device.measured
    assert device.kind.name == "cpu"
    assert (device.memory_bytes, device.usable_bytes) == (8 * 10**9, 6 * 10**9)


def test_it_is_measured_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = local_device(cache, BOX)
    monkeypatch.setattr(module, "_measured", lambda *_: pytest.fail("measured again"))
    assert local_device(cache, BOX) == first


@pytest.mark.parametrize("text", ["", "[]", '{"bandwidth": -1, "rates": {"fp32": 1}, "load": 0}', '{"bandwidth": 1}'])
def test_a_damaged_measurement_is_made_anew(text: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (cache / "devices").glob("*.json")
    whole = path.read_text()
    path.write_text(text)
    monkeypatch.setattr(module, "_measured", lambda *_: {"bandwidth": 7e9, "rates": {"fp32": 1e9}, "load": 0.0})
    assert local_device(cache, BOX).bandwidth == 7e9
    path.write_text(whole)


def test_of_apples_memory_metal_itself_says_what_is_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like the described device, whose usable memory is three quarters of its 64 GiB."""
    described = find_device("m1 max 64gb", devices())
    mac = Machine(cpus=10, memory_bytes=2**36, gpus=(Gpu(name="Apple GPU", memory_bytes=3 * 2**34),))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(module, "_measured", lambda *_: {"bandwidth": 4e11, "rates": {"fp16": 1e13}, "load": 0.0})
    device = local_device(tmp_path, mac)
    assert (device.memory_bytes, device.usable_bytes) == (2**36, 3 * 2**34)
    assert (described.memory_bytes, described.usable_bytes) == (2**36, 3 * 2**34)
    assert "Metal" in device.sources["usable"]


def test_this_machine_is_chosen_as_local(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "detect", lambda: BOX)
    assert choose_device("Local", cache) == local_device(cache, BOX)
    assert choose_device("t4", cache).name == "NVIDIA T4"
    assert known_devices((), cache)[0].measured
    assert not any(device.measured for device in known_devices())
