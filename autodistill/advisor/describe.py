"""Describe a model for estimates: from a folder, a GGUF file, a hub id, or a shape in numbers."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autodistill.distillation.teacher.resolve import hub_config, locate
from autodistill.distillation.teacher.stored_grids import quantization_schemes, stored_types, storing
from autodistill.errors import InputError
from autodistill.models import latent_attention as latent
from autodistill.models.config import spec_from_config
from autodistill.models.config_fields import check_config
from autodistill.models.families import FAMILIES, GGUF_WHOLE, TRAINED
from autodistill.models.gguf_reader import GgufFile, read_gguf
from autodistill.models.model_folder import check_files, read_config, weight_files
from autodistill.models.spec import ModelSpec
from autodistill.models.stored_tensors import check_stored, stored_tensors
from autodistill.models.tensors import Role, TensorSpec
from autodistill.quantization.formats import FORMATS
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.strategy.deployment import Deployment, serving

_MIXTRAL = "mixtral"  # a mixture of experts that is not trained; without experts it resembles a Llama
_SHAPE = ("layers", "width", "heads", "ffn", "vocab")
_SHAPE_CONTEXT = 2**24  # context of a described shape, in tokens: more than any model on the market
_MIXTURE = re.compile(r"\b(q[2-6]-k)-(?:s|m|l|xl)\b")  # llama.cpp's mixtures of types, like "Q4_K_M"
_I_QUANT = re.compile(r"\biq[1-4]-")
_UNLISTED_SHARE = 0.1  # share of weights, such as biases, that a file may have beyond the sizes in its header or config


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model description. No weights were loaded.

    Attributes:
        name: Name for a person.
        spec: Its shape.
        weights_bytes: Bytes of a GGUF file's own tensors, or None if a format decides.
        format_name: The format of a GGUF file's tensors, or else of most of its bytes. For a folder, the packed format
            that its config states. None if the format is not known here.
    """

    name: str
    spec: ModelSpec
    weights_bytes: int | None = None
    format_name: str | None = None


def describe(reference: str) -> Described:
    """Describe the model that a reference names, from its config or headers only.

    Args:
        reference: A folder with a config.json, a .gguf file, "smollm2", or a hub id.

    Raises:
        InputError: The model does not exist, is damaged, or has an unknown architecture.
    """
    kind, path = locate(reference)
    if kind == "folder":
        check_files(path)
    if kind != "gguf":
        name, config = (path.name, read_config(path)) if kind == "folder" else (reference, hub_config(reference))
        spec = spec_of(config)
        if kind == "folder":
            _check_weights(path, config, spec)
        return Described(name=name, spec=spec, format_name=_stated_format(config))
    file = read_gguf(path)
    spec = spec_of(file.outline())
    _check_tensors(file, spec)
    return Described(
        name=path.stem,
        spec=spec,
        weights_bytes=sum(tensor.size for tensor in file.tensors),
        format_name=_gguf_format(file, spec),
    )


def _check_tensors(file: GgufFile, spec: ModelSpec) -> None:
    """Refuse a file whose header and tensors disagree on the number of weights. Unknown biases are tolerated."""
    stored = sum(math.prod(tensor.shape) for tensor in file.tensors)
    if abs(stored - spec.parameters) > _UNLISTED_SHARE * spec.parameters:
        raise InputError(
            f"{file.path} is damaged: its tensors have {stored:,} weights, where the sizes in its header make "
            f"{spec.parameters:,}: get the file again"
        )


def _check_weights(folder: Path, config: Mapping[str, Any], spec: ModelSpec) -> None:
    """Refuse a folder whose config and weights disagree. A folder without weights is accepted.

    The tensors' names are not known for packed weights, and for models that can only be described. For packed weights,
    only the headers are read. For described models, the total number of weights is compared.
    """
    if not weight_files(folder):
        return
    tensors = stored_tensors(folder)
    if config.get("quantization_config"):
        return
    if config["model_type"] in FAMILIES:
        check_stored(folder, spec)
        return
    # The folder may also hold a vision model, which the description does not cover.
    within = {name: one for name, one in tensors.items() if ".language_model." in name or name == "lm_head.weight"}
    within = within if len(within) > 1 else tensors
    stored, head = sum(math.prod(tensor.shape) for tensor in within.values()), spec.vocabulary * spec.width
    if (
        not (1 - _UNLISTED_SHARE) * spec.parameters
        <= stored
        <= (1 + _UNLISTED_SHARE) * spec.parameters + head * spec.tied
    ):
        raise InputError(
            f"{folder} has {stored:,} weights in its safetensors, where its config.json makes {spec.parameters:,}: get "
            "the folder again"
        )


def _gguf_format(file: GgufFile, spec: ModelSpec) -> str | None:
    """Return the format that stores each tensor as the file does; if there is none, the format of most of the bytes.

    Looking at most bytes is not enough. In a K-quant file, most bytes may be of the stand-in type for rows that are no
    whole super-blocks, although the file was not packed in that type. Looking at each tensor is not enough either: some
    of the mixtures of types that llama.cpp's tools make are not known here.
    """
    if scheme := storing(stored_types(file, spec)):
        return scheme.name
    name = f"gguf-{file.main_type().lower()}"
    return name if name in FORMATS else None


def _stated_format(config: Mapping[str, Any]) -> str | None:
    """Return the format of quantised weights that a folder's config states, or None if it states no known format."""
    stated = config.get("quantization_config") or {}
    groups = list((stated.get("config_groups") or {}).values())
    if stated.get("format") != "pack-quantized" or len(groups) != 1:
        return None
    weights = (groups[0] or {}).get("weights") or {}
    grid = (weights.get("num_bits"), weights.get("group_size") or 0, weights.get("symmetric", True))
    known = quantization_schemes().items()
    held = (name for name, one in known if one.format == "compressed-tensors" and _grid(one) == grid)
    return next(held, None)


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """Describe a config as `spec_from_config` does, and for estimates also models that it does not know.

    These are Mixtral, models with latent attention, and models that are only written as whole GGUF files.

    Raises:
        InputError: For the same reasons as `spec_from_config`, or because the architecture cannot be estimated.
    """
    name = str(config.get("model_type"))
    if name in latent.ARCHITECTURES:
        return latent.describe_latent(config)
    if name in GGUF_WHOLE and name not in TRAINED:
        from autodistill.distillation.teacher.any_model import any_spec  # needs transformers, and with it torch

        return any_spec(config)
    if name != _MIXTRAL:
        if name not in TRAINED:
            known = ", ".join([*FAMILIES, _MIXTRAL, *latent.ARCHITECTURES, *GGUF_WHOLE])
            raise InputError(f"the architecture {name[:60]!r} cannot be estimated; these can: {known}")
        return spec_from_config(config)
    check_config(config)
    experts, active = config.get("num_local_experts"), config.get("num_experts_per_tok")
    if type(experts) is not int or type(active) is not int or not 1 <= active <= experts:
        raise InputError(f"a config of {name} must give num_local_experts and num_experts_per_tok, at most as many")
    dense = spec_from_config(dict(config) | {"model_type": "llama"})
    tensors = tuple(_mixed(tensor, experts) for tensor in dense.tensors)
    # The router has the precision of vectors: float32 in GGUF.
    routers = tuple(
        TensorSpec(name=f"model.layers.{layer}.mlp.router.weight", role=Role.NORM, shape=(experts, dense.width))
        for layer in range(dense.layers)
    )
    return replace(dense, tensors=tensors + routers, experts=experts, active_experts=active)


def _mixed(tensor: TensorSpec, experts: int) -> TensorSpec:
    """Return the matrices of all experts as one matrix, stacked by rows. It takes the same number of bytes."""
    found = re.fullmatch(r"(model\.layers\.\d+\.mlp)\.(\w+\.weight)", tensor.name)
    if found is None:
        return tensor
    rows, columns = tensor.shape
    return replace(tensor, name=f"{found[1]}.experts.{found[2]}", shape=(experts * rows, columns))


def shape(sizes: Mapping[str, int | None], *, tied: bool = False, family: str = "llama") -> Described:
    """Describe a model from numbers.

    Args:
        sizes: "layers", "width", "heads", "ffn" and "vocab", and optionally "kv_heads" (default: "heads"), "head_dim"
            (default: width / heads), "experts", "active_experts" and "window" (default: none).
        tied: Whether the head is the embedding table.
        family: The `model_type` in transformers that the model resembles.

    Raises:
        InputError: A size is missing or not positive, or sizes do not fit each other.
    """
    missing = [f"--{name}" for name in _SHAPE if sizes.get(name) is None]
    if missing:
        raise InputError(f"a described shape needs {', '.join(missing)} as well")
    wrong = next(((name, size) for name, size in sizes.items() if size is not None and size < 1), None)
    if wrong is not None:
        raise InputError(f"--{wrong[0].replace('_', '-')} must be at least 1, not {wrong[1]}")
    experts, active = sizes.get("experts"), sizes.get("active_experts")
    if active is not None and active > (experts or 0):
        of = "there are no --experts" if experts is None else f"there are {experts} --experts"
        raise InputError(f"a token cannot take {active} --active-experts where {of}")
    config: dict[str, Any] = {
        "model_type": family,
        "num_hidden_layers": sizes["layers"],
        "hidden_size": sizes["width"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes.get("kv_heads") or sizes["heads"],
        "intermediate_size": sizes["ffn"],
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": _SHAPE_CONTEXT,
        "tie_word_embeddings": tied,
        "sliding_window": sizes.get("window"),
    }
    heads, width, kv_heads = (config[name] for name in ("num_attention_heads", "hidden_size", "num_key_value_heads"))
    if sizes.get("head_dim") is not None:
        config["head_dim"] = sizes["head_dim"]
    elif width % heads:
        raise InputError(f"{heads} heads do not divide a width of {width}: give --head-dim")
    if heads % kv_heads:
        raise InputError(f"{kv_heads} --kv-heads do not divide {heads} --heads")
    if experts:
        config |= {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": active or 1}
    spec = spec_of(config)
    return Described(name=f"{spec.parameters / 1e9:.3g}B {family}", spec=spec)


def deployment_named(name: str, runtime: str | None = None) -> Deployment:
    """Return the deployment of a name such as "gguf-q4_0", "compressed-tensors-int4-g64" or "huggingface".

    Raises:
        InputError: There is no deployment of that name, or the runtime does not serve it. The message lists known ones.
    """
    known = quantization_schemes()
    if name not in known:
        raise InputError(f"there is no format {name!r}; {_suggestion(name, known)}")
    scheme = known[name]
    return Deployment(
        runtime=runtime or serving(scheme)[0],
        format=scheme.format,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
    )


def _suggestion(name: str, known: Iterable[str]) -> str:
    """Return text that suggests what a user may have meant by an unknown format."""
    asked = name.lower().replace("_", "-")
    plain = {form.lower().replace("_", "-"): form for form in known}
    if (mixture := _MIXTURE.search(asked)) and f"gguf-{mixture[0]}" not in plain:
        kind = mixture[1].replace("-", "_")
        written = " and ".join(form.name for form in FORMATS.values() if form.mixture)
        return (
            f"of llama.cpp's mixtures of types {written} are written; gguf-{kind} has all linear layers in "
            f"{kind.upper()}"
        )
    if _I_QUANT.search(asked):
        return "of llama.cpp's I-quants gguf-iq4_nl alone is supported; gguf-q4_k, gguf-q4_0 and the like are too"
    ends = [form for text, form in plain.items() if asked and asked in text.split("-", 1)[-1]]
    close = [plain[text] for text in difflib.get_close_matches(asked, plain, n=3, cutoff=0.6)]
    meant = list(dict.fromkeys([*ends[:3], *close]))[:3]
    return f"did you mean {' or '.join(meant)}?" if meant else f"there are {', '.join(plain.values())}"


def _grid(scheme: QuantizationScheme) -> tuple[int, int, bool]:
    return scheme.bits, scheme.group_size, scheme.symmetric
