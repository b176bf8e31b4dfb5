"""Files of devices: the built-in table, and a user's own."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.hardware import catalog as module
from autodistill.hardware.catalog import BUILT_IN, device_classes, device_from_json, devices, read_devices
from autodistill.hardware.device import PRECISIONS
from autodistill.hardware.lookup import find_device, is_machine

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
    # A source that was read can be found again: by an address, or by the string that the listings have.
    read = [source["read"] for source in data.values() if "read" in source]
    assert all(re.search(r"\w\.(com|net|jp)/|string \w+", text) for text in read)


def test_processors_multiply_as_many_integers_a_clock_as_their_instructions_do() -> None:
    # VNNI: two instructions per clock, each with 64 multiply-adds. AMX: 16 x 16 sums of 64 products (32 in 16 bits) in
    # 16 clocks.
    ice_lake, sapphire_rapids = find_device("xeon 8380", TABLE), find_device("xeon 8480", TABLE)
    assert ice_lake.rates["int8"] == pytest.approx(40 * 2.3e9 * 2 * 2 * 64, rel=0.01)
    assert sapphire_rapids.rates["int8"] == pytest.approx(56 * 2.0e9 * 2 * 16 * 16 * 64 / 16, rel=0.01)
    assert sapphire_rapids.rates["bf16"] == pytest.approx(56 * 2.0e9 * 2 * 16 * 16 * 32 / 16, rel=0.01)


def test_the_power_modes_of_a_board_follow_from_multiprocessors_and_clocks() -> None:
    # Online multiprocessors, GPU clock, memory clock and memory bits. In each clock, a line transfers two bits, and a
    # multiprocessor does 2048 operations in either kind of 16 bits and 4096 in 8 bits.
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
    # Float32 rate = CUDA cores x 2 x boost clock. Tensor units with float32 accumulation are twice as fast on GeForce.
    for name, cores, clock in (("4090", 16384, 2.52e9), ("3090", 10496, 1.695e9), ("5090", 21760, 2.407e9)):
        device = find_device(name, TABLE)
        assert device.rates["fp16"] == pytest.approx(2 * 2 * cores * clock, rel=0.01)
        assert device.rates["fp32"] == pytest.approx(2 * cores * clock, rel=0.01)
    # The same of NVIDIA's and AMD's GPUs for servers, whose 16 bits are computed in other units.
    for name, cores, clock in (("a100 80gb pcie", 6912, 1.41e9), ("h100", 16896, 1.98e9), ("mi300x", 19456, 2.1e9)):
        assert find_device(name, TABLE).rates["fp32"] == pytest.approx(2 * cores * clock, rel=0.01), name
    discrete = [device for device in TABLE if device.discrete]
    assert all(device.rates["fp16"] / device.rates["fp32"] > 1.98 for device in discrete)
    # Bus width x transfers per second / 8.
    for name, bits, transfers in (
        ("4090", 384, 21e9),
        ("4060 ti 16gb", 128, 18e9),
        ("5090", 512, 28e9),
        ("3060", 192, 15e9),
    ):
        assert find_device(name, TABLE).bandwidth == pytest.approx(bits / 8 * transfers, rel=0.01)


def test_a_mac_is_sold_with_several_memories_and_each_has_its_own_usable_share() -> None:
    # Metal's working set is two thirds up to 32 GiB and three quarters above that. Fewer cores have less bandwidth.
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
    ("name", "usable"),
    [
        # llama.cpp's recommendedMaxWorkingSetSize in MB, for Macs with 16, 24, 18 and 64 GiB.
        ("m1", 11453.25e6),
        ("m5", 11453.25e6),
        ("m4 pro", 17179.89e6),
        ("m3 pro", 12884.92e6),
        ("m2 max", 51539.62e6),
        # Free memory according to CUDA and ROCm, in GiB.
        ("dgx spark", 101.3 * 2**30),
        ("strix halo", 95.8 * 2**30),
    ],
)
def test_of_memory_that_is_shared_as_much_is_usable_as_drivers_report(name: str, usable: float) -> None:
    assert find_device(name, TABLE).usable_bytes == pytest.approx(usable, rel=1e-4)


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
        ({"rates": {"fp32": 10**18}}, "give tera operations a second"),
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
    # A card with more memory, a board whose bandwidth was measured, and a Mac with the name of all sizes.
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
    # Other built-in devices stay, without the name that is taken.
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
    assert served["m1 max"] == ("llama.cpp", "transformers")
    assert served["i9-13900k"] == ("llama.cpp", "transformers", "onnxruntime")
    assert served["4090"] == served["dgx spark"] == ("llama.cpp", "vllm", "transformers")
    own = find_device("dgx spark", known)
    assert device_from_json(own.to_json()) == own
    path = tmp_path / "own.yaml"
    entry = "class: board, memory: 8GB, bandwidth: 50GB, rates: {fp16: 1}"
    path.write_text(f"devices: {{My board: {{{entry}, runtimes: [llama.cpp, transformers]}}}}")
    assert read_devices(path)[0].runtimes == ("llama.cpp", "transformers")
    path.write_text(f"devices: {{My board: {{{entry}, runtimes: [onnx]}}}}")
    with pytest.raises(InputError, match=r"list some of llama\.cpp, vllm, transformers"):
        read_devices(path)
