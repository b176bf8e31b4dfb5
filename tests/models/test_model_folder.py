"""A model's folder is identified by the files that transformers reads, and its tokenizer by what decides tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from autodistill.errors import InputError
from autodistill.models.model_folder import folder_fingerprint, stated_license, tokenizer_fingerprint
from autodistill.testing import save_tiny_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("model") / "tiny", layers=2)


def test_another_vocabulary_or_end_token_is_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = save_tiny_teacher(tmp_path / "other", layers=1, vocabulary=290)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    text = (copy / "tokenizer_config.json").read_text()
    (copy / "tokenizer_config.json").write_text(text.replace('"eos_token": "</s>"', '"eos_token": "<pad>"'))
    assert tokenizer_fingerprint(copy) != tokenizer_fingerprint(folder)
    with pytest.raises(InputError, match="no tokenizer"):
        tokenizer_fingerprint(tmp_path)


def test_shards_are_known_by_their_index(folder: Path, tmp_path: Path) -> None:
    sharded = shutil.copytree(folder, tmp_path / "sharded")
    stored = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(stored)
    for shard, chosen in (("one", names[::2]), ("two", names[1::2])):
        save_file({name: stored[name] for name in chosen}, sharded / f"model-{shard}.safetensors")
    places = {name: f"model-{'one' if place % 2 == 0 else 'two'}.safetensors" for place, name in enumerate(names)}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    first = folder_fingerprint(sharded)
    (sharded / "consolidated.safetensors").write_bytes(b"anything")
    assert folder_fingerprint(sharded) == first
    stored[names[1]] += 1
    save_file({name: stored[name] for name in names[1::2]}, sharded / "model-two.safetensors")
    assert folder_fingerprint(sharded) != first


@pytest.mark.parametrize(
    ("license", "said"),
    [
        ("Apache-2.0", "Apache-2.0"),
        (" mit\n---\ntags: [a]\t\x1b[31m", "mit --- tags: [a] [31m"),
        (["mit", "apache-2.0", 3, ["x"]], "mit, apache-2.0, x"),
        (("mit",), "mit"),
        ("x" * 5000, "x" * 200),
        *((nothing, None) for nothing in (None, "", " \n", 3, 2.5, True, {"name": "mit"}, [], [3], b"mit")),
    ],
)
def test_of_a_licence_what_is_legible_is_kept_in_one_line(license: object, said: str | None) -> None:
    assert stated_license(license) == said
