"""The words in names of devices, as users and systems spell them."""

from __future__ import annotations

import re

import pytest

from autodistill.hardware.names import (
    asks_for_a_kind,
    bare,
    built_cores,
    class_words,
    distance,
    has_size,
    is_amount,
    is_another_product,
    joined,
    name_and_cores,
    product_words,
    searched_words,
    size_in_name,
    split,
    without_system_words,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("RTX4060Ti 16 GiB", "rtx 4060 ti 16gb"),
        ("NVIDIA A100-SXM4-80GB", "nvidia a100 sxm4 80gb"),
        ("rpi5 8g", "pi 5 8gb"),
        ("M2-Max", "m2 max"),
        ("7900xtx", "7900 xtx"),
        ("Xeon 8480+, 2.0", "xeon 8480+ 2.0"),
        ("%%", ""),
    ],
)
def test_each_word_is_spelled_in_one_way(text: str, words: str) -> None:
    assert " ".join(split(text)) == words
    assert joined(text) == words.replace(" ", "")


def test_makers_and_lines_of_products_are_left_out_of_a_bare_name() -> None:
    assert bare("NVIDIA GeForce RTX 4090") == bare("4090") == "4090"
    assert bare("Apple") == ""


@pytest.mark.parametrize(
    ("text", "name", "far"),
    [
        ("4090", "NVIDIA GeForce RTX 4090", (0, 0)),
        ("rtx 4090", "NVIDIA GeForce RTX 4090", (0, 0)),
        ("jetson orin", "Orin", (1, 0)),
        ("orin", "Jetson AGX Orin", (0, 1)),
        ("4080", "NVIDIA GeForce RTX 4090", None),
        ("nvidia", "NVIDIA GeForce RTX 4090", (0, 1)),
        ("nvidia", "AMD Radeon RX 7900 XT", None),
        # The device has 12 GB. Only this size may be given, with its unit or next to a word of the name.
        ("box 12gb", "Box", (0, 0)),
        ("box 16gb", "Box", None),
        ("box 12", "Box", None),
        ("12", "Box", None),
        # A socket's generation may be left out, but not replaced by another.
        ("a100 sxm", "A100-SXM4", (0, 0)),
        ("a100 sxm2", "A100-SXM4", None),
    ],
)
def test_a_name_is_as_far_as_words_are_left_out(text: str, name: str, far: tuple[int, int] | None) -> None:
    assert distance(text, name, range(12, 13), bare_amounts=False) == far


def test_a_number_beside_a_name_may_be_an_amount_of_memory() -> None:
    assert distance("box 12", "Box", range(12, 13), bare_amounts=True) == (0, 0)
    assert distance("12", "Box", range(12, 13), bare_amounts=True) is None


def test_some_words_make_another_product_where_they_are_left_out() -> None:
    assert is_another_product("4070", "NVIDIA GeForce RTX 4070 Ti")
    assert not is_another_product("4070 ti", "NVIDIA GeForce RTX 4070 Ti")
    assert not is_another_product("4070 ti", "NVIDIA GeForce RTX 4070")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("16GB", True),
        ("512 MiB", True),
        ("64GB 16GB", True),
        ("16", True),
        ("409", False),
        ("4090", False),
        ("", False),
    ],
)
def test_amounts_of_memory_are_told_from_numbers_of_models(text: str, amount: bool) -> None:
    assert is_amount(text) == amount


def test_a_kind_of_devices_is_asked_for_in_any_spelling() -> None:
    assert asks_for_a_kind("GPU", ())
    assert asks_for_a_kind("Discrete GPU", ("discrete-gpu",))
    assert not asks_for_a_kind("discrete-gpu", ("board",))


@pytest.mark.parametrize(
    ("memory_bytes", "thousand", "size"),
    [
        (16 * 2**30, 1024, "16GB"),
        (16 * 10**9, 1000, "16GB"),
        (24564 * 2**20, 1024, "24GB"),
        (2**29, 1024, "512MB"),
        (3 * 2**29, 1024, "1.5GB"),
        (5 * 10**11, 1000, "500GB"),
    ],
)
def test_a_size_stands_in_a_name_as_it_is_sold(memory_bytes: int, thousand: int, size: str) -> None:
    assert size_in_name(memory_bytes, thousand) == size
    assert has_size(f"Box {size}")
    assert not has_size("Box")
    assert product_words(f"Box {size}") == product_words("Box") == {"box"}


def test_a_socket_is_searched_with_its_generation_and_without() -> None:
    assert searched_words("A100-SXM4-80GB") == {"a100", "sxm", "sxm4", "80gb"}
    assert searched_words("A100-PCIE") == {"a100", "pcie"}


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0", "ondemand", "Raspberry Pi 5"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "MODE_30W", "NVIDIA Jetson AGX Orin 30W"),
        ("12th Gen Intel(R) Core(TM) i5-12400 CPU @ 2.50GHz", "", "Intel Core i5-12400"),
        ("AMD EPYC 7763 64-Core Processor", "", "AMD EPYC 7763"),
    ],
)
def test_of_what_a_system_says_the_product_is_left(name: str, mode: str, words: str) -> None:
    assert re.sub(r"\s+", " ", without_system_words(name, mode)).strip() == words


def test_cores_stand_in_and_behind_a_machine_s_name() -> None:
    assert built_cores("AMD EPYC 7763 64-Core Processor") == 64
    assert built_cores("Intel(R) Xeon(R) Platinum 8480+") is None
    assert name_and_cores("Apple M2, 8 cores") == ("Apple M2", 8)
    assert name_and_cores("Tesla T4") == ("Tesla T4", None)


def test_a_machine_s_class_is_told_without_its_cores_and_its_socket_s_generation() -> None:
    assert class_words("Tesla V100-SXM3-32GB") == {"tesla", "v100", "sxm", "32gb"}
    assert class_words("Apple GPU") == {"apple"}
    assert class_words("Raspberry Pi 5 Model B Rev 1.0, 4 cores") == {"raspberry", "pi", "5"}
