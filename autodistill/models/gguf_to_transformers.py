"""Conversion of a GGUF file to a transformers folder with float32 safetensors; transformers reads the same values.

transformers itself dequantises the whole model in memory, through accelerate, and leaves a configuration that cannot be
saved. This module holds only one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.errors import DamagedError, InputError
from autodistill.models.gguf_reader import GgufFile
from autodistill.models.layer_widths import model_class
from autodistill.models.model_folder import linked
from autodistill.models.pretokenizers import pretokenizer_named
from autodistill.utils.hashing import file_hash

ORIGINAL = "original.gguf"
"""The name of the file in the folder."""
_INDEX = "teacher.json"


def convert(file: GgufFile, folder: Path) -> None:
    """Write the folder under a temporary name and rename it; a damaged folder in its place is removed.

    Raises:
        InputError: Tensors are missing or have other shapes than the architecture's, or blocks or the tokenizer cannot
            be read.
    """
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        convert_text(file, temporary)
        digests = {"model.safetensors": _write_weights(file, temporary / "model.safetensors")}
        digests |= {path.name: file_hash(path) for path in temporary.iterdir() if path.name not in digests}
        (temporary / _INDEX).write_text(json.dumps(digests, indent=1, sort_keys=True), encoding="utf-8")
        if folder.exists() and not is_whole(folder):
            shutil.rmtree(folder)
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process may have written the same teacher first.
            if not is_whole(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert_text(file: GgufFile, folder: Path) -> None:
    """Write everything except the weights: the config and the tokenizer.

    Raises:
        InputError: As `convert`.
    """
    _write_config(file, folder)
    _write_tokenizer(file, folder)


def is_whole(folder: Path) -> bool:
    """Return whether `convert` wrote the folder and every file is unchanged."""
    try:
        digests = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return isinstance(digests, dict) and all(file_hash(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def keep_original(file: Path, folder: Path) -> None:
    """Keep a file in the folder that was made from it. It is linked, or copied if linking fails."""
    temporary = folder / f".{ORIGINAL}-{uuid.uuid4().hex}"
    linked(file, temporary)
    os.replace(temporary, folder / ORIGINAL)


def find_original(folder: Path, sha256: str) -> Path:
    """Return the file that a folder was made from, after comparing its bytes with a hash.

    Raises:
        DamagedError: The file is not there, or its bytes were changed.
    """
    path = folder / ORIGINAL
    if not path.is_file():
        raise DamagedError(f"{path} is missing, the GGUF file that was evaluated: run the search again")
    if file_hash(path) != sha256:
        raise DamagedError(
            f"{path} was changed since it was evaluated (its SHA-256 is not {sha256[:12]}...): put the file back where "
            "it was given, and resume the search"
        )
    return path


def _write_config(file: GgufFile, folder: Path) -> None:
    """Write config and generation config, after checking that the tensors are those of the model."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    values = file.config()
    try:
        config = AutoConfig.for_model(**values)
        with torch.device("meta"):
            model = model_class(config)._from_config(config)
    except Exception as error:  # transformers raises various errors if sizes do not fit together
        said = " ".join(str(error).split())
        raise InputError(
            f"transformers makes no model of the header of {file.path} ({said}): take another file"
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    found = {str(file.family.from_gguf_name(tensor.name)): tensor.shape for tensor in file.tensors}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{file.path} has {found.get(name, 'no tensor')} for {name}, where {file.architecture} has "
                f"{wanted.get(name, 'none')}: take another file"
            )
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    config.save_pretrained(folder)
    tokens = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in values}
    if len(ends := file.end_tokens()) > 1:
        tokens["eos_token_id"] = ends
    GenerationConfig(**tokens).save_pretrained(folder)


def _write_tokenizer(file: GgufFile, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    file.check_tokenizer()
    try:
        # AutoTokenizer would give the same, but would read the file twice more for a configuration.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # transformers may look up missing keys, and tokenizers raises Exception itself
        raise InputError(f"the tokenizer in {file.path} cannot be read ({error}): give the model's folder") from error
    tokenizer.save_pretrained(folder)
    if file.metadata.get("tokenizer.ggml.model") == "gpt2":
        _keep_whole(file, folder / "tokenizer.json")
    _cut_as_llama_cpp(file, folder / "tokenizer.json")
    text = json.dumps(file.tokenizer_metadata(), indent=1, sort_keys=True)
    (folder / "gguf_tokenizer.json").write_text(text, encoding="utf-8")


_USER_DEFINED = 4


def _keep_whole(file: GgufFile, path: Path) -> None:
    """Turn tokens that llama.cpp searches for in texts into added tokens, such as GPT-NeoX's runs of spaces.

    transformers maps their characters to byte symbols as in all other tokens, and so would not find them in texts.
    """
    description = json.loads(path.read_text(encoding="utf-8"))
    vocab, added = description["model"]["vocab"], description["added_tokens"]
    known, spelled = {one["id"] for one in added}, {index: name for name, index in vocab.items()}
    kinds = file.metadata.get("tokenizer.ggml.token_type", ())
    for index, kind in enumerate(kinds):
        if kind != _USER_DEFINED or index in known:
            continue
        del vocab[spelled[index]]
        name = file.metadata["tokenizer.ggml.tokens"][index]
        vocab[name] = index
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        added.append({"id": index, "content": name, **flags})
    if len(added) > len(known):
        added.sort(key=lambda one: int(one["id"]))
        path.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")


_SPACE = "\u2581"


def _cut_as_llama_cpp(file: GgufFile, path: Path) -> None:
    """Make the tokenizer split text before the merges as llama.cpp does.

    transformers decides by the architecture. For a Llama it keeps numbers whole, although SmolLM2's are split into
    digits. It puts a space only before the first piece of a text. llama.cpp also puts one before each piece that
    follows a special token. It may add a token of its own, for which the model has no row.
    """
    description = json.loads(path.read_text(encoding="utf-8"))
    tokens = len(file.metadata["tokenizer.ggml.tokens"])
    description["added_tokens"] = [one for one in description["added_tokens"] if one["id"] < tokens]
    cut = pretokenizer_named(file.metadata.get("tokenizer.ggml.pre"))
    if file.metadata.get("tokenizer.ggml.model") == "llama":
        steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
        if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
            steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
        description |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    elif cut is not None:
        description["pre_tokenizer"] = cut.pre_tokenizer
        description["model"]["ignore_merges"] = cut.whole_words
    path.write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")


def _write_weights(file: GgufFile, path: Path) -> str:
    """Write the tensors as float32 to a safetensors file: header length, header, bytes.

    Returns:
        The SHA-256 of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in file.tensors:
        start, end = end, end + 4 * int(np.prod(tensor.shape))
        header[_stored_name(file, tensor.name)] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes begin at a multiple of 8
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for piece in _pieces(text, file):
            out.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def _stored_name(file: GgufFile, name: str) -> str:
    """Return the name that GGUF's tensor `name` has in transformers' files; the name of the head may differ there."""
    found = str(file.family.from_gguf_name(name))
    return f"{file.family.stored_head}.weight" if found == "lm_head.weight" else found


def _pieces(header: bytes, file: GgufFile) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in file.tensors:
        yield file.values(tensor).astype("<f4", copy=False).data.cast("B")
