from __future__ import annotations

from pathlib import Path

import pytest

from autodistill.errors import InputError
from autodistill.plugins import load, names


def _install(folder: Path, distribution: str, entry: str, code: str = "") -> None:
    """Lays out a distribution as an installer would, with one evaluator."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[autodistill.evaluators]\n{entry}\n")


def test_finds_what_this_distribution_declares() -> None:
    assert {"accuracy", "agreement", "latency", "memory", "perplexity", "size"} <= set(names("evaluators"))
    assert {"compressed-tensors", "gguf", "huggingface"} <= set(names("exporters"))
    assert names("evaluators") == tuple(sorted(names("evaluators")))


def test_makes_an_instance_with_the_name_it_was_asked_for() -> None:
    evaluator = load("evaluators", "size")
    assert evaluator.name == "size"
    assert evaluator.needs == "spec"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"no evaluator 'akkuracy'; the evaluators are .*accuracy, agreement"):
        load("evaluators", "akkuracy")
    with pytest.raises(InputError, match=r"no exporter 'zip'; the exporters are .*gguf"):
        load("exporters", "zip")


def test_a_third_party_s_evaluator_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "warmth-meter", "warmth = warmth_meter:Warmth", 'class Warmth:\n    name = "warmth"\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert "warmth" in names("evaluators")
    assert load("evaluators", "warmth").name == "warmth"


def test_a_name_of_two_distributions_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, "first-meter", "glow = first_meter:Glow")
    _install(tmp_path, "second-meter", "glow = second_meter:Glow")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"'glow' is declared by first-meter 1\.0 and second-meter 1\.0"):
        load("evaluators", "glow")


@pytest.mark.parametrize("code", ["import a_module_that_is_not_there", "x = 1"])
def test_one_that_cannot_be_imported_is_named(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution = f"broken-meter-{len(code)}"
    _install(tmp_path, distribution, f"frost = {distribution.replace('-', '_')}:Frost", code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"'frost' of {distribution} 1\.0 cannot be loaded"):
        load("evaluators", "frost")
