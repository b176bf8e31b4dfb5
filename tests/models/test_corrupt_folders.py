"""A model's folder that is damaged in any way is refused in one line, before any of its weights are read."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autodistill.advisor.describe import describe
from autodistill.distillation.teacher.resolve import resolve_teacher
from autodistill.errors import InputError
from autodistill.models.families import FAMILIES
from autodistill.models.loading import load_model
from autodistill.models.stored_tensors import stored_type
from autodistill.testing import save_tiny_teacher
from tests.hostile.folders import Fault, faults

# Only one of the many values of each field. `tests.hostile` has all of them.
FAULTS = [one for one in faults() if not one.name.startswith("config-") or one.name.endswith("-0")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny", layers=2)


@pytest.fixture
def model(teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(teacher, tmp_path / "model"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_spoilt_folder_is_refused_in_one_line(fault: Fault, model: Path) -> None:
    fault.spoil(model)
    for read in (resolve_teacher, describe) if fault.described else (resolve_teacher,):
        with pytest.raises(InputError) as caught:
            read(str(model))
        said = str(caught.value)
        assert said
        assert "\n" not in said
        assert len(said) < 900


@pytest.mark.parametrize("kind", [{"a": 1}, ["llama"], 7, None])
def test_a_type_that_is_no_name_is_refused_where_any_model_is_taken(kind: object, model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind}))
    with pytest.raises(InputError, match=r"the architecture|model_type"):
        resolve_teacher(str(model), trained=False)


def test_there_are_many_ways_to_spoil_a_folder() -> None:
    names = [fault.name for fault in faults()]
    assert len(set(names)) == len(names) > 400
    assert len(FAULTS) > 60


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_whole_folder_of_every_family_is_taken(architecture: str, tied: bool, tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "model", architecture=architecture, tied=tied, layers=2)
    assert resolve_teacher(str(folder)).config["model_type"] == architecture
    assert describe(str(folder)).spec.tied == tied
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = load_model(folder, torch.float32).state_dict()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_what_is_missing_and_what_is_unexpected_is_named(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    renamed = {name.replace(".mlp.", ".feed_forward."): values for name, values in weights.items()}
    save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        resolve_teacher(str(model))
    lacks, _, has = str(caught.value).partition(", and has ")
    assert "lacks model.layers.0.mlp.gate_proj.weight, " in lacks
    assert " and 3 more" in lacks
    assert "model.layers.0.feed_forward.down_proj.weight, " in has
    assert " and 3 more, for which it has no place" in has
    with pytest.raises(InputError, match=r"lacks model\.layers\.0\.mlp"):
        load_model(model, torch.float32)


def test_what_transformers_itself_passes_over_is_taken(model: Path, tmp_path: Path) -> None:
    """Constants that older versions saved, and a tied head that is stored a second time, are accepted."""
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert resolve_teacher(str(model)).kind == "folder"
    load_model(model, torch.float32)
    neox = save_tiny_teacher(tmp_path / "neox", architecture="gpt_neox", layers=2, tied=False)
    weights = {name: values.half() for name, values in load_file(neox / "model.safetensors").items()}
    for layer in range(2):
        part = f"gpt_neox.layers.{layer}.attention"
        weights[f"{part}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        weights[f"{part}.masked_bias"] = torch.tensor(-1e9)
        weights[f"{part}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(weights, neox / "model.safetensors", metadata={"format": "pt"})
    assert resolve_teacher(str(neox)).kind == "folder"
    assert stored_type(neox) == "float16"
    load_model(neox, torch.float32)


def test_what_transformers_reports_is_refused_whatever_was_checked(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autodistill.models.loading.check_stored", lambda *_: None)
    weights = load_file(model / "model.safetensors")
    part = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(model, torch.float32)
    weights["model.layers.1.mlp.up_proj.weight"] = part[:64].clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"mismatched: .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(model, torch.float32)


def _cached(model: Path, root: Path, files: Path | None = None) -> Path:
    """Make the model as it is in the hub's cache: a snapshot of links to blobs."""
    snapshot, blobs = (
        root / "models--owner--tiny" / "snapshots" / ("0123456789" * 4),
        root / "models--owner--tiny/blobs",
    )
    snapshot.mkdir(parents=True)
    if files is None:
        blobs.mkdir()
    else:
        blobs.symlink_to(files)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", f"{number:040x}"))
    return snapshot


def test_the_links_of_the_hubs_cache_are_followed_and_no_others(model: Path, tmp_path: Path) -> None:
    snapshot = _cached(model, tmp_path / "hub")
    assert resolve_teacher(str(snapshot)).kind == "folder"
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert resolve_teacher(str(linked)).path == snapshot
    (tmp_path / "secret").write_text("a key\n", encoding="utf-8")
    blob = snapshot.parent.parent / "blobs" / "secret"
    blob.symlink_to(tmp_path / "secret")
    (snapshot / "LICENSE").symlink_to("../../blobs/secret")
    with pytest.raises(InputError, match=r"LICENSE is a link to \.\./\.\./blobs/secret, outside"):
        resolve_teacher(str(snapshot))
    # A folder with the cache's names is not a cache if `blobs` leads elsewhere.
    (tmp_path / "keys").mkdir()
    with pytest.raises(InputError, match="is a link to"):
        resolve_teacher(str(_cached(model, tmp_path / "forged", tmp_path / "keys")))


def test_a_link_within_the_folder_is_followed(model: Path) -> None:
    (model / "weights.safetensors").hardlink_to(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("weights.safetensors")
    assert resolve_teacher(str(model)).kind == "folder"


def test_the_cut_of_a_file_at_any_place_is_found(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    dice = random.Random(0)
    for length in [*range(0, 64, 7), *(dice.randrange(64, len(whole)) for _ in range(30)), len(whole) - 1]:
        (model / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
            resolve_teacher(str(model))
