"""Reads a student's folder tensor by tensor, and writes folders that appear only when they are complete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from autodistill.errors import InputError
from autodistill.export.base import PARTIAL, Artifact
from autodistill.models.config import spec_from_config
from autodistill.models.families import TRAINED, WHOLE_FAMILIES, names_of
from autodistill.models.layer_widths import padded
from autodistill.models.model_folder import MORE_TEMPLATES, weight_files
from autodistill.models.stored_tensors import check_stored
from autodistill.models.whole.mixtures import stored_parts
from autodistill.quantization.formats import as_held
from autodistill.quantization.grids import Floats, Grid, Scales
from autodistill.quantization.learned_scales import read_scales
from autodistill.quantization.packing import Arrays, deployed, pack
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.utils.durable import make_folder, sync, sync_below

WEIGHTS = "model.safetensors"
_HEAD = "lm_head.weight"
_HEADS = {f"{family.stored_head}.weight": _HEAD for family in TRAINED.values()}
_COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "gguf_tokenizer.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: The file is missing or unreadable, or holds no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; a student is a folder that transformers saved") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return data


def no_graph(student: Path) -> str:
    """Return why no graph can be written of a student, because its family is trained whole; "" if it is not."""
    name = str(read_json(student / "config.json").get("model_type"))
    if name not in WHOLE_FAMILIES:
        return ""
    return f"no graph is written of a {name}, because {WHOLE_FAMILIES[name].why}: export to gguf"


class StudentFiles:
    """The tensors of a student's folder under a quantisation scheme, read on demand. Use it in a `with` statement.

    Args:
        folder: A folder with config.json and safetensors, in one file or in shards.
        scheme: The student's quantisation scheme.

    Attributes:
        config: Content of config.json.
        spec: Description of the model. If the scheme's format pads narrower layers with zeros, everything here
            describes the padded model, which computes the same.
        specs: Every stored tensor by name, without a tied head; the matrices of a layer's experts are two tensors.

    Raises:
        InputError: Config or weights are missing or unreadable, the architecture is not supported, or the weights are
            not those that the config requires.
    """

    def __init__(self, folder: Path, scheme: QuantizationScheme) -> None:
        self._scheme = scheme
        self._scales: dict[str, Scales] = read_scales(folder, scheme)
        self.config = read_json(folder / "config.json")
        spec = spec_from_config(self.config)
        check_stored(folder, spec)
        self.spec = as_held(spec, scheme)
        if not self.spec.ffn_widths:
            self.config.pop("per_layer_config", None)
            self.config["intermediate_size"] = self.spec.ffn_width
        self.specs = {tensor.name: tensor for tensor in self.spec.tensors}
        self._open = ExitStack()
        self._files: dict[str, tuple[Any, str]] = {}
        try:
            for path in weight_files(folder):
                file = self._open.enter_context(safe_open(path, framework="pt"))
                self._files |= {_HEADS.get(name, name): (file, name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            self._open.close()
            raise InputError(f"cannot read the weights in {folder}: {error}") from error

    def __enter__(self) -> StudentFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def pack(self, name: str) -> Arrays:
        """Return the stored form of one tensor, with the scales that were learned for this scheme if there are any."""
        return pack(self.read(name), self._scheme.storage(self.specs[name]), self.scales(name))

    def deployed(self, name: str) -> Floats:
        """Return the float32 values that the runtime will use for a tensor."""
        return deployed(self.read(name), self._scheme.storage(self.specs[name]), self.scales(name))

    def read(self, name: str) -> Floats:
        """Return the float32 values of a tensor before it is stored."""
        parts = [self._files[part] for part in stored_parts(self.specs[name], self.spec) or (name,)]
        values: Floats = torch.cat([file.get_tensor(stored).to(torch.float32) for file, stored in parts]).numpy()
        return padded(values, self.specs[name].shape)

    def scales(self, name: str) -> Scales | None:
        """Return learned scales, or None. They are extended with scales of 1 for the zeros that pad the matrix."""
        found, storage = self._scales.get(name), self._scheme.storage(self.specs[name])
        if found is None or not isinstance(storage, Grid):
            return found
        rows, columns = self.specs[name].shape
        shape = (rows, columns // storage.group(columns))
        offsets = None if found.offsets is None else padded(found.offsets, shape)
        return Scales(padded(found.scales, shape, fill=1), offsets)


def read_arrays(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of a safetensors file as it is stored, under its name in transformers."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield _HEADS.get(name, name), file.get_tensor(name)


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield an empty folder; its files are moved into `out` if the block succeeds, and are deleted otherwise.

    The config is moved last, because a folder without one is not taken for a model. Remains of processes that were
    killed, or interrupted twice, are removed.

    Raises:
        InputError: `out` cannot be written.
    """
    try:
        make_folder(out)
        _remove_left(out)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=out))
        held = os.open(partial, os.O_RDONLY)
        with suppress(OSError):  # the file system has no locks
            fcntl.flock(held, fcntl.LOCK_EX)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; choose another output folder") from error
    try:
        yield partial
        sync_below(partial)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            if file.is_dir():
                shutil.rmtree(out / file.name, ignore_errors=True)  # a folder cannot replace one that is not empty
            os.replace(file, out / file.name)
        sync(out)
    finally:
        try:
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(held)


def _remove_left(out: Path) -> None:
    """Remove unfinished folders of ended processes; a running process holds a lock on its own folder."""
    for left in out.glob(f"{PARTIAL}*"):
        descriptor = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # locked, or the file system has no locks
            continue
        else:
            shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)


def write_folder(out: Path, student: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Artifact:
    """Write a folder that transformers loads: weights, config, and the student's tokenizer and generation config.

    Raises:
        InputError: `out` cannot be written.
    """
    stored = dict(tensors)
    if _HEAD in stored:
        stored[f"{names_of(config['model_type']).stored_head}.weight"] = stored.pop(_HEAD)
    with replacing(out) as partial:
        save_file(stored, partial / WEIGHTS, metadata={"format": "pt"})
        copy_tokenizer(student, partial)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Artifact(path=out, size_bytes=(out / WEIGHTS).stat().st_size)


def copy_tokenizer(student: Path, out: Path) -> None:
    """Copy a student's files other than weights and config: tokenizer, chat templates, generation config."""
    for name in _COMPANIONS:
        if (student / name).is_file():
            shutil.copyfile(student / name, out / name)
    if (student / MORE_TEMPLATES).is_dir():
        shutil.copytree(student / MORE_TEMPLATES, out / MORE_TEMPLATES)


def bf16_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the same model stored in bfloat16, without its source's quantisation settings."""
    dropped = ("quantization_config", "torch_dtype", "_name_or_path", "_model_name_or_path")
    return {key: value for key, value in config.items() if key not in dropped} | {"dtype": "bfloat16"}
