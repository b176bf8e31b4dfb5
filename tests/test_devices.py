"""Devices: the built-in table, a person's own file, and a person's spelling."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autodistill import devices as module
from autodistill.devices import (
    BUILT_IN,
    PRECISIONS,
    Device,
    class_of_machine,
    device_classes,
    device_of_system,
    devices,
    find_device,
    is_machine,
    read_devices,
)
from autodistill.errors import InputError

TABLE = devices()
ENTRY: dict[str, Any] = {"class": "cpu", "memory": "16GiB", "bandwidth": "40GB", "rates": {"fp32": 0.5}}


def write(path: Path, **entries: Any) -> Path:
    path.write_text(yaml.safe_dump({"devices": entries}), encoding="utf-8")
    return path


def test_the_table_covers_every_class_and_names_a_source_for_each_figure() -> None:
    assert len(TABLE) >= 30
    assert {device.kind.name for device in TABLE} == {"discrete-gpu", "unified", "board", "phone", "cpu"}
    for device in TABLE:
        assert set(device.sources) == {"memory", "usable", "bandwidth", "rates"}
        assert all(len(text) > 10 for text in device.sources.values()), device.name
        assert 0 < device.usable_bytes <= device.memory_bytes
        assert set(device.rates) <= set(PRECISIONS)


def test_every_source_that_the_table_names_is_there() -> None:
    data = yaml.safe_load(BUILT_IN.read_text(encoding="utf-8"))
    named = {entry["source"] for entry in data["devices"].values()}
    named |= {text for entry in data["devices"].values() for text in entry.get("sources", {}).values()}
    assert named == set(data["sources"])


def test_a_source_says_where_it_was_read_or_that_it_is_quoted_from_knowledge() -> None:
    data = yaml.safe_load(BUILT_IN.read_text(encoding="utf-8"))["sources"]
    unread = [source for source in data.values() if "read" not in source]
    assert all(re.search(r"quoted from knowledge|assumed|usual configuration", text) for text in unread)
    assert len(unread) < len(data) / 4
    # What was read is named so that a person finds it: by an address, or by the string that the listings have.
    read = [source["read"] for source in data.values() if "read" in source]
    assert all(re.search(r"\w\.(com|net|jp)/|string \w+", text) for text in read)


def test_processors_multiply_as_many_integers_a_clock_as_their_instructions_do() -> None:
    # VNNI: two instructions a clock of 64 multiply-adds. AMX: 16 x 16 sums of 64 (of 16 bits 32) in 16 clocks.
    ice_lake, sapphire_rapids = find_device("xeon 8380", TABLE), find_device("xeon 8480", TABLE)
    assert ice_lake.rates["int8"] == pytest.approx(40 * 2.3e9 * 2 * 2 * 64, rel=0.01)
    assert sapphire_rapids.rates["int8"] == pytest.approx(56 * 2.0e9 * 2 * 16 * 16 * 64 / 16, rel=0.01)
    assert sapphire_rapids.rates["bf16"] == pytest.approx(56 * 2.0e9 * 2 * 16 * 16 * 32 / 16, rel=0.01)


def test_the_power_modes_of_a_board_follow_from_multiprocessors_and_clocks() -> None:
    # Online multiprocessors, GPU clock, memory's clock and its bits. In a clock a line moves two bits, and a
    # multiprocessor does 2048 operations in either kind of 16 bits and 4096 in 8.
    for name, units, clock, memory, bits in (
        ("agx orin 64gb 15w", 6, 408e6, 2133e6, 256),
        ("agx orin 32gb 40w", 14, 816e6, 3200e6, 256),
        ("orin nx 16gb", 8, 918e6, 3200e6, 128),
        ("orin nx 16gb 25w", 8, 408e6, 3200e6, 128),
        ("orin nx 8gb 10w", 4, 612e6, 2133e6, 128),
        ("orin nx super 8gb", 8, 1173e6, 3200e6, 128),
        ("orin nano 8gb 7w", 4, 408e6, 2133e6, 128),
        ("orin nano super 8gb 25w", 8, 918e6, 3199e6, 128),
        ("orin nano 4gb 7w cpu", 4, 306e6, 2133e6, 64),
        ("orin nano super 4gb", 4, 1020e6, 3199e6, 64),
    ):
        device = find_device(name, TABLE)
        wide = 2048 * units * clock
        expected = {"fp16": wide, "bf16": wide, "int8": 2 * wide}
        assert device.rates == pytest.approx(expected, rel=0.005), name
        assert device.bandwidth == pytest.approx(2 * memory * bits / 8, rel=0.005), name


def test_rates_follow_from_the_units_and_clocks_that_makers_state() -> None:
    # Float32 rate = CUDA cores x 2 x boost clock; the tensor units' with float32 accumulation is twice that on GeForce.
    for name, cores, clock in (("4090", 16384, 2.52e9), ("3090", 10496, 1.695e9), ("5090", 21760, 2.407e9)):
        device = find_device(name, TABLE)
        assert device.rates["fp16"] == pytest.approx(2 * 2 * cores * clock, rel=0.01)
    # Bus width x transfers a second / 8.
    for name, bits, transfers in (
        ("4090", 384, 21e9),
        ("4060 ti 16gb", 128, 18e9),
        ("5090", 512, 28e9),
        ("3060", 192, 15e9),
    ):
        assert find_device(name, TABLE).bandwidth == pytest.approx(bits / 8 * transfers, rel=0.01)


@pytest.mark.parametrize("device", TABLE, ids=lambda device: device.name)
def test_a_device_is_found_by_each_of_its_names(device: Device) -> None:
    for name in (device.name, *device.aliases):
        for spelling in (name, name.lower(), name.upper().replace(" ", "-"), name.replace(" ", "")):
            assert find_device(spelling, TABLE) is device


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("rtx 4060 ti 16gb", "NVIDIA GeForce RTX 4060 Ti 16GB"),
        ("RTX4060Ti16GB", "NVIDIA GeForce RTX 4060 Ti 16GB"),
        ("4090 24 GB", "NVIDIA GeForce RTX 4090"),
        ("A100-80GB", "NVIDIA A100-SXM4-80GB"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("m2", "Apple M2 16GB"),
        ("pi 4", "Raspberry Pi 4B 8GB"),
        ("agx orin 30w", "Jetson AGX Orin 64GB 30W"),
        ("8 gen 2", "Snapdragon 8 Gen 2"),
        ("orin nano super", "Jetson Orin Nano Super 8GB"),
        ("orin nx 8gb 20w", "Jetson Orin NX 8GB 20W"),
        ("rtx pro 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ("dgx spark", "NVIDIA DGX Spark"),
        ("4070 ti super", "NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("4070 ti", "NVIDIA GeForce RTX 4070 Ti"),
        ("7900 xt", "AMD Radeon RX 7900 XT"),
        ("6000 ada", "NVIDIA RTX 6000 Ada Generation"),
        ("A100-PCIE-40GB", "NVIDIA A100-PCIE-40GB"),
        ("a100 pcie 80gb", "NVIDIA A100 80GB PCIe"),
        ("H200 141GB", "NVIDIA H200"),
        ("dgx spark 128gb", "NVIDIA DGX Spark"),
        ("A100 80", "NVIDIA A100-SXM4-80GB"),
        ("A100 40", "NVIDIA A100-SXM4-40GB"),
        ("a100 sxm 40", "NVIDIA A100-SXM4-40GB"),
        ("a100 sxm 80gb", "NVIDIA A100-SXM4-80GB"),
        ("a100-sxm4-80gb", "NVIDIA A100-SXM4-80GB"),
        ("v100 sxm 32", "Tesla V100-SXM2-32GB"),
        ("h100 sxm5", "NVIDIA H100 80GB HBM3"),
        ("5060ti 16", "NVIDIA GeForce RTX 5060 Ti 16GB"),
        ("4090 24", "NVIDIA GeForce RTX 4090"),
        ("orin agx 64", "Jetson AGX Orin 64GB"),
        ("orin agx 32", "Jetson AGX Orin 32GB"),
        ("orin nx 16 25w", "Jetson Orin NX 16GB 25W"),
        ("m2 max 96gb", "Apple M2 Max 96GB"),
        ("m4 max 128", "Apple M4 Max 128GB"),
        ("m4 max", "Apple M4 Max 64GB"),
        ("m3 max 36gb", "Apple M3 Max 36GB"),
        ("m4 24gb", "Apple M4 24GB"),
    ],
)
def test_a_person_s_spelling(text: str, name: str) -> None:
    assert find_device(text, TABLE).name == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("409", "there is no device '409'; near to it are NVIDIA GeForce RTX 4090"),
        ("mi300", "near to it are AMD Instinct MI300X"),
        ("4060 ti", "'4060 ti' can be NVIDIA GeForce RTX 4060 Ti 8GB, NVIDIA GeForce RTX 4060 Ti 16GB: name one"),
        ("4090 48gb", "there is no device '4090 48gb'"),
        ("jetson", "'jetson' can be Jetson AGX Orin 64GB, Jetson AGX Orin 32GB, Jetson Orin NX 16GB, "),
        ("orin nx 15w", "'orin nx 15w' can be Jetson Orin NX 16GB 15W, Jetson Orin NX 8GB 15W: name one"),
        ("5060 ti", "'5060 ti' can be NVIDIA GeForce RTX 5060 Ti 8GB, NVIDIA GeForce RTX 5060 Ti 16GB: name one"),
        (
            "apple 16gb",
            "'apple 16gb' can be Apple M1 16GB, Apple M2 16GB, Apple M3 16GB, Apple M4 16GB, Apple M5 16GB: name one",
        ),
        ("rtx 2080", "there is no device 'rtx 2080'; near to it are NVIDIA GeForce RTX 2080 Ti"),
        ("rtx 3060 8gb", "there is no device 'rtx 3060 8gb'; near to it are NVIDIA GeForce RTX 3060 Ti"),
        ("rtx 3080 12gb", "near to it are NVIDIA GeForce RTX 3080 Ti"),
        ("5070 16gb", "near to it are NVIDIA GeForce RTX 5070 Ti"),
        ("4070 16gb", "near to it are NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("m4 48gb", "near to it are Apple M4 Pro 48GB, Apple M4 Max 48GB"),
        ("A100 SXM", "'A100 SXM' can be NVIDIA A100-SXM4-40GB, NVIDIA A100-SXM4-80GB: name one"),
        ("a100 pcie", "'a100 pcie' can be NVIDIA A100 80GB PCIe, NVIDIA A100-PCIE-40GB: name one"),
        ("a100 sxm2", "there is no device 'a100 sxm2'"),
        ("7900", "near to it are AMD Radeon RX 7900 XT, AMD Radeon RX 7900 XTX"),
        ("rtx 6000", "near to it are NVIDIA RTX 6000 Ada Generation, NVIDIA RTX PRO 6000 Blackwell"),
        ("", "'' names no device"),
        ("%%%", "names no device"),
    ],
)
def test_what_names_none_or_several_says_which_are_near(text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        find_device(text, TABLE)


@pytest.mark.parametrize(
    "text",
    [
        *("10GB", "10 gb", "10GiB", "10240MiB", "0.5TB", "24g", "64GB 16GB"),
        # Each of these is a word of some device's name.
        *("12", "2", "4", "5", "7", "9", " 10 ", "16"),
    ],
)
def test_an_amount_of_memory_names_no_device(text: str) -> None:
    with pytest.raises(InputError, match="is an amount of memory and no device: give it as --budget"):
        find_device(text, TABLE)


def test_a_slip_of_a_key_is_near_to_what_was_meant_alone() -> None:
    with pytest.raises(InputError) as refusal:
        find_device("4O90", TABLE)
    assert str(refusal.value) == "there is no device '4O90'; near to it are NVIDIA GeForce RTX 4090"


def test_a_mac_is_sold_with_several_memories_and_each_has_its_own_usable_share() -> None:
    # Metal's working set is two thirds up to 32 GiB and three quarters above; fewer cores have less bandwidth.
    for name, memory, usable, bandwidth in (
        ("m1 8gb", 8, 8 * 2 / 3, 68.3e9),
        ("m4 32gb", 32, 32 * 2 / 3, 120e9),
        ("m2 max 96gb", 96, 72, 400e9),
        ("m4 max 36gb", 36, 27, 410e9),
        ("m3 ultra 512gb", 512, 384, 819e9),
    ):
        device = find_device(name, TABLE)
        assert device.memory_bytes == memory * 2**30
        assert device.usable_bytes == pytest.approx(usable * 2**30)
        assert device.bandwidth == bandwidth


def test_an_entry_with_several_memories_is_as_many_devices(tmp_path: Path) -> None:
    several = {"memory": ["16GiB", "8GB", "96GiB"], "aliases": ["Crate"]}
    path = write(tmp_path / "own.yaml", **{"My box": ENTRY | several})
    known = read_devices(path)
    assert [device.name for device in known] == ["My box 16GB", "My box 8GB", "My box 96GB"]
    assert [device.memory_bytes for device in known] == [16 * 2**30, 8 * 10**9, 96 * 2**30]
    assert find_device("mybox", known) is find_device("crate", known) is known[0]
    assert find_device("crate 96gb", known) is known[2]


@pytest.mark.parametrize(
    ("memory", "sizes"),
    [
        (["24564MiB", "8188MiB"], ["24GB", "8GB"]),
        (["512MiB", "1GiB"], ["512MB", "1GB"]),
        (["0.5GB", "1.5GB", "2GB"], ["500MB", "1.5GB", "2GB"]),
        (["1.5GiB", "16GB", "128GB", "0.5TB"], ["1.5GB", "16GB", "128GB", "500GB"]),
    ],
)
def test_a_device_is_named_with_the_size_that_is_sold(memory: list[str], sizes: list[str], tmp_path: Path) -> None:
    known = read_devices(write(tmp_path / "own.yaml", box=ENTRY | {"memory": memory, "class": "unified"}))
    assert [device.name for device in known] == [f"box {size}" for size in sizes]
    for device in known:
        assert find_device(device.name.lower(), known) is device


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": []}, "lists no memory"),
        ({"memory": ["16GiB", 8]}, "write a number and a unit"),
        ({"memory": ["16GiB", "8GiB"], "usable": "4GiB"}, "has one usable amount of several memories"),
        ({"memory": ["16GiB", "16GiB"]}, "to two devices"),
    ],
)
def test_impossible_lists_of_memory_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        read_devices(write(tmp_path / "own.yaml", box=ENTRY | changes))


@pytest.mark.parametrize(
    ("name", "memory_kb", "mode", "device"),
    [
        # As /proc/device-tree/model, MemTotal, nvpmodel and /proc/cpuinfo have them.
        ("Raspberry Pi 5 Model B Rev 1.0", 8_245_148, "ondemand", "Raspberry Pi 5 8GB"),
        ("Raspberry Pi 5 Model B Rev 1.0", 4_140_000, "ondemand", "Raspberry Pi 5 4GB"),
        ("Raspberry Pi 5 Model B Rev 1.1", 16_600_000, "ondemand", "Raspberry Pi 5 16GB"),
        ("Raspberry Pi 4 Model B Rev 1.4", 7_999_932, "ondemand", "Raspberry Pi 4B 8GB"),
        ("Raspberry Pi 4 Model B Rev 1.2", 3_884_320, "ondemand", "Raspberry Pi 4B 4GB"),
        ("Raspberry Pi 4 Model B Rev 1.2", 1_890_000, "ondemand", None),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", 900_000, "ondemand", None),
        ("NVIDIA Jetson Orin Nano Developer Kit", 7_802_188, "15W", "Jetson Orin Nano 8GB"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 7_802_188, "7W", "Jetson Orin Nano 8GB 7W"),
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            7_727_104,
            "MAXN_SUPER",
            "Jetson Orin Nano Super 8GB",
        ),
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            7_727_104,
            "25W",
            "Jetson Orin Nano Super 8GB 25W",
        ),
        ("NVIDIA Jetson AGX Orin Developer Kit", 64_349_184, "MODE_30W", "Jetson AGX Orin 64GB 30W"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 31_500_000, "MAXN", "Jetson AGX Orin 32GB"),
        ("12th Gen Intel(R) Core(TM) i5-12400", 65_000_000, "powersave", "Intel Core i5-12400 DDR4-3200 2 channels"),
        ("Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz", None, "", "Intel Xeon Platinum 8380 DDR4-3200 8 channels"),
        ("AMD Ryzen 7 5800X 8-Core Processor", None, "", "AMD Ryzen 7 5800X DDR4-3200 2 channels"),
        ("AMD EPYC 7763 64-Core Processor", None, "", "AMD EPYC 7763 DDR4-3200 8 channels"),
        ("AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", 128_000_000, "", "AMD Ryzen AI Max+ 395 128GB"),
        ("NVIDIA GeForce RTX 3060", None, "", "NVIDIA GeForce RTX 3060 12GB"),
        ("Tesla V100-SXM2-32GB", None, "", "Tesla V100-SXM2-32GB"),
        ("Tesla V100-SXM3-32GB", None, "", None),
        ("NVIDIA GeForce RTX 4060 Ti", None, "", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, "", None),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", None, "", None),
        ("Orin", None, "", None),
        ("x86_64", None, "", None),
        # Three quarters of 64 GiB are no 64 GiB, where 48 are sold.
        ("Apple M4 Max", 48 * 2**20, "", "Apple M4 Max 48GB"),
        ("Apple M4 Max", 128 * 2**20, "", "Apple M4 Max 128GB"),
        ("Apple M2 Max", 96 * 2**20, "", "Apple M2 Max 96GB"),
        ("Apple M1", 8 * 2**20, "", "Apple M1 8GB"),
    ],
)
def test_a_device_is_known_by_what_its_system_calls_it(
    name: str, memory_kb: int | None, mode: str, device: str | None
) -> None:
    found = device_of_system(name, TABLE, memory_bytes=memory_kb and 1024 * memory_kb, cores=128, mode=mode)
    assert (found and found.name) == device


@pytest.mark.parametrize(
    ("name", "usable"),
    [
        # llama.cpp's recommendedMaxWorkingSetSize, in MB, of Macs with 16, 24, 18 and 64 GiB.
        ("m1", 11453.25e6),
        ("m5", 11453.25e6),
        ("m4 pro", 17179.89e6),
        ("m3 pro", 12884.92e6),
        ("m2 max", 51539.62e6),
        # CUDA's and ROCm's free memory, in GiB.
        ("dgx spark", 101.3 * 2**30),
        ("strix halo", 95.8 * 2**30),
    ],
)
def test_of_memory_that_is_shared_as_much_is_usable_as_drivers_report(name: str, usable: float) -> None:
    assert find_device(name, TABLE).usable_bytes == pytest.approx(usable, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rpi 5", "Raspberry Pi 5 8GB"),
        ("rpi5 16gb", "Raspberry Pi 5 16GB"),
        ("7900xtx", "AMD Radeon RX 7900 XTX"),
        ("7900xt", "AMD Radeon RX 7900 XT"),
        ("xeon 8480", "Intel Xeon Platinum 8480+ DDR5-4800 8 channels"),
        ("m2 pro", "Apple M2 Pro 16GB"),
        ("m5", "Apple M5 16GB"),
    ],
)
def test_usual_spellings_are_found(text: str, name: str) -> None:
    assert find_device(text, TABLE).name == name


@pytest.mark.parametrize("text", ["cpu", "CPU", "gpu", "phone", "board", "unified", "discrete-gpu"])
def test_a_class_is_no_device(text: str) -> None:
    with pytest.raises(InputError, match="is a kind of devices and no device: name one that autodistill devices"):
        find_device(text, TABLE)
    assert find_device("orin nano 4gb 7w cpu", TABLE).name == "Jetson Orin Nano 4GB 7W CPU"


@pytest.mark.parametrize("changes", [{"aliases": ["Local"]}, {"aliases": ["discrete gpu"]}])
def test_a_name_that_asks_for_something_else_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which asks for something else: take another name"):
        read_devices(write(tmp_path / "own.yaml", box=ENTRY | changes))
    with pytest.raises(InputError, match="'local', which asks for something else"):
        read_devices(write(tmp_path / "own.yaml", local=ENTRY))


@pytest.mark.parametrize("name", ["48GB", "48 gb", "48", "900MiB"])
def test_an_amount_of_memory_is_no_device_s_name(name: str, tmp_path: Path) -> None:
    said = f"is called {name!r}, which is read as an amount of memory: take another name"
    with pytest.raises(InputError, match=said):
        read_devices(write(tmp_path / "own.yaml", **{name: ENTRY}))
    with pytest.raises(InputError, match=said):
        read_devices(write(tmp_path / "own.yaml", box=ENTRY | {"aliases": [name]}))


@pytest.mark.parametrize(
    ("machine", "kind"),
    [
        ("Tesla T4", "discrete-gpu"),
        ("Tesla V100-SXM3-32GB", "discrete-gpu"),
        ("NVIDIA GB10", "unified"),
        ("Apple GPU", "unified"),
        ("Orin", "board"),
        ("Raspberry Pi 5 Model B Rev 1.0, 4 cores", "board"),
        ("AMD EPYC 7763 64-Core Processor, 2 cores", "cpu"),
        ("NVIDIA GeForce RTX 9999", "plain"),
        ("", "plain"),
    ],
)
def test_a_machine_is_of_the_class_that_devices_of_its_name_are_of(machine: str, kind: str) -> None:
    assert class_of_machine(machine, "plain") == kind


@pytest.mark.parametrize(
    ("machine", "name", "same"),
    [
        ("NVIDIA GeForce RTX 3060", "3060", True),
        ("NVIDIA GeForce RTX 3060", "3060 ti", False),
        ("Raspberry Pi 5 Model B Rev 1.0, 4 cores", "pi 5", True),
        ("AMD EPYC 7763 64-Core Processor, 128 cores", "epyc 7763", True),
        ("AMD EPYC 7763 64-Core Processor, 2 cores", "epyc 7763", False),
        # Its name does not say whether this is all of it.
        ("Intel(R) Xeon(R) Platinum 8480+, 2 cores", "xeon 8480+", False),
    ],
)
def test_figures_under_a_machine_s_own_name_are_of_the_device(machine: str, name: str, same: bool) -> None:
    assert is_machine(find_device(name, TABLE), machine) == same


@pytest.mark.parametrize(
    ("machine", "memory", "name", "same"),
    [
        # Speed does not depend on the size, which its name does not tell.
        ("Apple M2 Max, 12 cores", None, "m2 max 96gb", True),
        ("Apple M2 Max, 12 cores", None, "m2 max 64gb", True),
        ("Raspberry Pi 5 Model B Rev 1.0, 4 cores", None, "pi 5 16gb", True),
        ("Raspberry Pi 5 Model B Rev 1.0, 4 cores", None, "pi 4 4gb", False),
        # This one has fewer cores and less bandwidth, and is another product.
        ("Apple M3 Max, 14 cores", None, "m3 max 36gb", False),
        ("Apple M2 Max, 12 cores", None, "m2 pro", False),
        ("Apple M2 Max 96GB", None, "m2 max 64gb", False),
        # Where it is known it decides.
        ("Apple M2 Max, 12 cores", 96 * 2**30, "m2 max 96gb", True),
        ("Apple M2 Max, 12 cores", 96 * 2**30, "m2 max 64gb", False),
    ],
)
def test_of_a_machine_of_unknown_memory_each_size_is_meant(
    machine: str, memory: int | None, name: str, same: bool
) -> None:
    assert is_machine(find_device(name, TABLE), machine, memory_bytes=memory) == same


def test_a_share_of_a_processor_is_not_the_processor() -> None:
    assert device_of_system("AMD EPYC 7763 64-Core Processor", TABLE, cores=2) is None


@given(text=st.text(max_size=40))
def test_any_text_names_a_device_or_is_refused(text: str) -> None:
    with contextlib.suppress(InputError):
        assert find_device(text, TABLE) in TABLE


def test_a_person_s_own_device_is_found_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "own.yaml", **{"My box": ENTRY | {"usable": "10GB", "source": "a scale"}})
    known = devices(path)
    assert len(known) == len(TABLE) + 1
    box = find_device("mybox", known)
    assert (box.usable_bytes, box.bandwidth, box.rate("bf16", "fp32")) == (10**10, 4e10, 5e11)
    assert box.sources["bandwidth"] == "a scale"
    monkeypatch.setattr(module, "USER_FILE", path)
    assert find_device("mybox", devices()) == box


def test_a_class_says_what_is_usable_where_the_device_does_not(tmp_path: Path) -> None:
    (box,) = read_devices(write(tmp_path / "own.yaml", box=ENTRY))
    assert box.usable_bytes == 16 * 2**30 - device_classes()["cpu"].reserve_bytes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"usable": "17GiB"}, "give usable as a part of it"),
        ({"memory": "1GB"}, "give usable as a part of it"),  # less than what the class reserves
        ({"memory": "16"}, "'16' is not an amount of memory"),
        ({"memory": 16}, "write a number and a unit"),
        ({"bandwidth": "40kB"}, "which no memory has"),
        ({"bandwidth": "9000TB"}, "which no memory has"),
        ({"rates": {}}, "map some of fp32"),
        ({"rates": {"fp64": 1}}, "map some of fp32"),
        ({"rates": {"fp32": -1}}, "give tera operations a second"),
        ({"rates": {"fp32": float("inf")}}, "give tera operations a second"),
        ({"rates": {"fp32": 5e11}}, "give tera operations a second"),
        ({"rates": {"fp32": 10**400}}, "give tera operations a second"),
        ({"memory": "900000TB"}, "which no device has"),
        ({"rates": {"fp32": True}}, "give tera operations a second"),
        ({"class": "gpu"}, "the classes are discrete-gpu, unified, board, phone, cpu"),
        ({"cores": 4}, "has no field cores"),
        ({"aliases": "x"}, "give a list of names"),
        ({"sources": {"cores": "x"}}, "has sources"),
        ({"source": 3}, "has a source that is no text"),
    ],
)
def test_an_impossible_device_is_named_with_what_is_wrong(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"own.yaml: the device 'box' .*{re.escape(said)}"):
        read_devices(write(tmp_path / "own.yaml", box=ENTRY | changes))


@pytest.mark.parametrize(
    "text", ["", "- a", "devices: [1]", "devices: {box: 3}", "devices: {3: {}}", "sources: {a: b}"]
)
def test_a_file_that_describes_no_devices_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"own\.yaml"):
        read_devices(path)


def test_a_source_of_one_s_own_may_say_where_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    sources = {"sheet": {"text": "its datasheet", "read": "a.com/b", "unread": "int8"}, "scale": "a scale"}
    entry = ENTRY | {"source": "sheet", "sources": {"bandwidth": "scale"}}
    path.write_text(yaml.safe_dump({"sources": sources, "devices": {"box": entry}}), encoding="utf-8")
    (box,) = read_devices(path)
    assert box.sources["rates"] == "its datasheet (read: a.com/b; unread: int8)"
    assert box.sources["bandwidth"] == "a scale"


@pytest.mark.parametrize(
    "source", [3, None, [], {}, {"read": "a.com"}, {"text": "x", "unread": "y"}, {"text": 3}, {"text": "x", "read": ""}]
)
def test_an_impossible_source_is_named_with_what_is_wrong(source: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"sources": {"sheet": source}, "devices": {"box": ENTRY}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"own\.yaml: the source 'sheet' is .*: write a text, or a text and where"):
        read_devices(path)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "own.yaml", **{"My box": ENTRY})
    with pytest.raises(InputError, match="there is 'My box' already"):
        devices(path, write(tmp_path / "more.yaml", **{"My-Box": ENTRY}))
    with pytest.raises(InputError, match="to two devices"):
        read_devices(write(tmp_path / "own.yaml", box=ENTRY, other=ENTRY | {"aliases": ["BOX"]}))


def test_a_person_s_own_device_goes_before_the_built_in_one_of_its_name(tmp_path: Path) -> None:
    # A card with more memory, a board whose bandwidth was measured, and a Mac by the name of all sizes.
    kinds = {"NVIDIA GeForce RTX-4090": "discrete-gpu", "Raspberry Pi 5 8GB": "board", "Apple M2": "unified"}
    own = {name: ENTRY | {"class": kind} for name, kind in kinds.items()}
    known = devices(write(tmp_path / "own.yaml", **own))
    assert len(known) == len(TABLE) + 1
    for text, name in (
        *[("4090", "NVIDIA GeForce RTX-4090"), ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX-4090")],
        *[("pi 5", "Raspberry Pi 5 8GB"), ("m2", "Apple M2")],
    ):
        found = find_device(text, known)
        assert (found.name, found.bandwidth) == (name, 4e10)
    # What else is built in stays, without the name that is taken.
    assert find_device("m2 16gb", known) == replace(find_device("m2 16gb", TABLE), aliases=())
    assert is_machine(find_device("4090", known), "NVIDIA GeForce RTX 4090")
    assert is_machine(find_device("pi 5", known), "Raspberry Pi 5 Model B Rev 1.0, 4 cores")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["8GB", "cpu"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*PRECISIONS, "x"]), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(["class", "memory", "usable", "bandwidth", "rates", "aliases", "source", "sources", "x"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.text(min_size=1, max_size=10), changes=st.dictionaries(FIELDS, VALUES, max_size=3))
def test_any_entry_is_a_possible_device_or_is_refused(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"devices": {name: ENTRY | changes}}), encoding="utf-8")
    try:
        found = read_devices(path)
    except InputError:
        return
    assert found
    for device in found:
        assert 0 < device.usable_bytes <= device.memory_bytes
        assert device.bandwidth > 0
        assert min(device.rates.values()) > 0


def test_a_device_serves_with_the_runtimes_of_its_class_or_with_its_own(tmp_path: Path) -> None:
    known = devices()
    served = {name: find_device(name, known).runtimes for name in ("pi 5", "m1 max", "i9-13900k", "4090", "dgx spark")}
    assert served["pi 5"] == ("llama.cpp",)
    assert served["m1 max"] == served["i9-13900k"] == ("llama.cpp", "transformers")
    assert served["4090"] == served["dgx spark"] == ("llama.cpp", "vllm", "transformers")
    own = find_device("dgx spark", known)
    assert Device.from_json(own.to_json()) == own
    path = tmp_path / "own.yaml"
    entry = "class: board, memory: 8GB, bandwidth: 50GB, rates: {fp16: 1}"
    path.write_text(f"devices: {{My board: {{{entry}, runtimes: [llama.cpp, transformers]}}}}")
    assert read_devices(path)[0].runtimes == ("llama.cpp", "transformers")
    path.write_text(f"devices: {{My board: {{{entry}, runtimes: [onnx]}}}}")
    with pytest.raises(InputError, match=r"list some of llama\.cpp, vllm, transformers"):
        read_devices(path)
