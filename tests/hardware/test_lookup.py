"""Devices by the spelling of a user, and by what a machine's system reports."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.hardware.catalog import devices
from autodistill.hardware.device import Device
from autodistill.hardware.lookup import class_of_machine, device_of_system, find_device, is_machine, matching

TABLE = devices()


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
    with pytest.raises(InputError, match="is an amount of memory, not a device: give it as --budget"):
        find_device(text, TABLE)


def test_a_slip_of_a_key_is_near_to_what_was_meant_alone() -> None:
    with pytest.raises(InputError) as refusal:
        find_device("4O90", TABLE)
    assert str(refusal.value) == "there is no device '4O90'; near to it are NVIDIA GeForce RTX 4090"


@pytest.mark.parametrize(
    ("name", "memory_kb", "mode", "device"),
    [
        # As in /proc/device-tree/model, MemTotal, nvpmodel and /proc/cpuinfo.
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
        # Three quarters of 64 GiB do not count as 64 GiB, because a 48 GiB model is sold.
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
    with pytest.raises(InputError, match="is a kind of device, not a device: name one that autodistill devices"):
        find_device(text, TABLE)
    assert find_device("orin nano 4gb 7w cpu", TABLE).name == "Jetson Orin Nano 4GB 7W CPU"


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
        # Its name does not say whether these are all of its cores.
        ("Intel(R) Xeon(R) Platinum 8480+, 2 cores", "xeon 8480+", False),
    ],
)
def test_figures_under_a_machine_s_own_name_are_of_the_device(machine: str, name: str, same: bool) -> None:
    assert is_machine(find_device(name, TABLE), machine) == same


@pytest.mark.parametrize(
    ("machine", "memory", "name", "same"),
    [
        # Speed does not depend on the memory size, which the machine's name lacks.
        ("Apple M2 Max, 12 cores", None, "m2 max 96gb", True),
        ("Apple M2 Max, 12 cores", None, "m2 max 64gb", True),
        ("Raspberry Pi 5 Model B Rev 1.0, 4 cores", None, "pi 5 16gb", True),
        ("Raspberry Pi 5 Model B Rev 1.0, 4 cores", None, "pi 4 4gb", False),
        # This one has fewer cores and less bandwidth, and is a different product.
        ("Apple M3 Max, 14 cores", None, "m3 max 36gb", False),
        ("Apple M2 Max, 12 cores", None, "m2 pro", False),
        ("Apple M2 Max 96GB", None, "m2 max 64gb", False),
        # If the memory size is known, it decides.
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


def test_devices_match_by_words_of_their_names_and_of_their_class() -> None:
    boards = {device.name for device in TABLE if device.kind.name == "board"}
    assert {device.name for device in matching("board", TABLE)} == boards
    assert {device.name for device in matching("a100 sxm", TABLE)} == {"NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"}
    # If no device has all of the words, a device that is named in another way is found.
    assert [device.name for device in matching("4090 24 gb", TABLE)] == ["NVIDIA GeForce RTX 4090"]
    with pytest.raises(InputError, match="near to it are NVIDIA GeForce RTX 4090"):
        matching("409", TABLE)
