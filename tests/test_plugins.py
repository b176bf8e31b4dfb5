from __future__ import annotations

from pathlib import Path

import pytest

from autodistill.errors import InputError
from autodistill.plugins import foreign_names, forget, load, names, register, registered
from autodistill.quantization.formats import all_formats, get_format


def _install(folder: Path, distribution: str, entry: str, code: str = "", kind: str = "evaluators") -> None:
    """Lay out a distribution with one plug-in, as an installer does."""
    module = distribution.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[autodistill.{kind}]\n{entry}\n")


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


def test_what_is_registered_is_given_as_it_is_until_it_is_forgotten() -> None:
    thing = object()
    assert foreign_names("evaluators") == ()
    register("evaluators", "thing", thing, written_as=_install)
    try:
        assert load("evaluators", "thing") is thing
        assert "thing" in names("evaluators")
        assert foreign_names("evaluators") == ("thing",)
        source = registered("evaluators")["thing"].source
        register("evaluators", "thing", thing, written_as=load)
        assert registered("evaluators")["thing"].source != source
    finally:
        forget("evaluators", "thing")
    assert "thing" not in names("evaluators")
    with pytest.raises(InputError, match=r"autodistill-search .* has an evaluator 'kl' already: choose another name"):
        register("evaluators", "kl", thing)
    with pytest.raises(InputError, match="'two words' is no name of an exporter"):
        register("exporters", "two words", thing)


EXPORTER = """
from dataclasses import replace
from autodistill.quantization.formats import FORMATS

class Exporter:
    runtimes = ()
    formats = (replace(FORMATS["huggingface"], name={name!r}, container={container!r}),)
"""


def test_an_exporter_of_a_plug_in_brings_its_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"there is no format 'tarball'; the formats are gguf-f16, .*, huggingface$"):
        get_format("tarball")
    code = EXPORTER.format(name="tarball", container="tar")
    _install(tmp_path, "tar-exporter", "tar = tar_exporter:Exporter", code, "exporters")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_format("tarball").container == "tar"
    assert list(all_formats())[-1] == "tarball"


@pytest.mark.parametrize(
    ("name", "container", "said"),
    [("odd", "gguf", "the container 'gguf'"), ("gguf-f16", "own", "a name that is taken")],
)
def test_a_format_is_its_exporter_s_own(
    name: str, container: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"odd_exporter_{container}"
    code = EXPORTER.format(name=name, container=container)
    _install(tmp_path, module.replace("_", "-"), f"own = {module}:Exporter", code, "exporters")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"the exporter 'own' gives its format '{name}' {said}"):
        get_format("another")
