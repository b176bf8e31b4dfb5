"""Reads the shape, matrices and weights of any causal model of transformers, whether or not it can be trained here.

`autodistill solve` finds types for all of them. Models outside `models.families` are neither cut nor trained, and those
of its whole families are trained but not cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.config_fields import MOST_EXPERTS, check_config
from autodistill.models.families import FAMILIES, graph_named
from autodistill.models.layer_widths import model_class
from autodistill.models.llama_cpp_graphs import SLIDING, WINDOWED_GRAPHS
from autodistill.models.loading import ATTENTION, held, load_model, one_line, quiet
from autodistill.models.model_folder import check_files, read_config
from autodistill.models.spec import MOST_LAYERS, MOST_OF_A_SIZE, ModelSpec
from autodistill.models.tensors import Role, TensorSpec

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ANY_CONTEXT = 2**24  # context of a model that states no longest one
_PROBE = 4  # number of tokens at which a model's logits are compared with its head's
_CLOSE = 1e-3
_TEXT_WITHIN = {r"^model\.language_model\.": "model."}  # names of the text layers in models that also read images
_RECURRENT = "linear_attention"
_STATE = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers with keys and values


def is_known(config: Mapping[str, Any]) -> bool:
    """Return whether a config is of a family that can be cut, and whose layers can be read one after another."""
    return str(config.get("model_type")) in FAMILIES


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """Describe a causal model of any architecture.

    Raises:
        InputError: As for `spec_from_config` or `any_spec`.
    """
    return spec_from_config(config) if is_known(config) else any_spec(config)


def holds_cache(config: Mapping[str, Any]) -> bool:
    """Return whether a KV cache of fewer than 16 bits can be simulated.

    The attention must be replaceable, and all layers must have keys and values of one size.
    """
    if is_known(config):
        return True
    made = _on_meta(config)
    sizes = made.config.get_text_config()
    alike = not sizes.is_heterogeneous and {*(getattr(sizes, "layer_types", None) or ())} <= _ATTENDING
    return has_attention(type(made)) and alike and not getattr(sizes, "kv_lora_rank", None)


def any_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Describe a causal model by what transformers builds from its config, without memory for weights.

    If transformers holds the experts of a layer in one tensor, they become one matrix, stacked by rows, with one type.
    A GGUF file could not store them in several types.

    Args:
        config: Content of `config.json`, of a model that is in no family.

    Raises:
        InputError: transformers builds no causal model from it, or the model has no KV cache, or each expert has
            matrices of its own.
    """
    made = _on_meta(config)
    sizes = made.config.get_text_config()
    table, head = made.get_input_embeddings(), made.get_output_embeddings()
    layers, width, heads = (_size(sizes, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    experts = next((found for name in _EXPERTS if (found := _size(sizes, name, 0))), 0)
    own_ffn = _size(sizes, "intermediate_size", 4 * width)
    tensors = tuple(_tensors(made, experts))
    widest = max([own_ffn, *(one.shape[0] for one in tensors if one.name.endswith(".mlp.gate_proj.weight"))])
    rank = _size(sizes, "kv_lora_rank", 0)
    return ModelSpec(
        architecture=str(config["model_type"]),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=_size(sizes, "num_key_value_heads", heads),
        head_dim=_size(sizes, "head_dim", width // heads),
        ffn_width=_size(sizes, "moe_intermediate_size", own_ffn) if experts else widest,
        vocabulary=int(table.weight.shape[0]),
        max_context=_size(sizes, "max_position_embeddings", _ANY_CONTEXT),
        tied=head.weight is table.weight,
        tensors=tensors,
        experts=experts,
        active_experts=min(experts, _size(sizes, "num_experts_per_tok", 1)) if experts else 0,
        shared_experts=_size(sizes, "n_shared_experts", 0) if experts else 0,
        latent=rank + _size(sizes, "qk_rope_head_dim", 0) if rank else 0,
        **_cached(made, sizes),
    )


def _cached(model: Any, sizes: Any) -> dict[str, Any]:
    """Return the fields of a `ModelSpec` that describe the caches and states of layers that differ from the usual."""
    kinds = list(getattr(sizes, "layer_types", None) or ())
    widths = tuple(map(_key_width, getattr(model.base_model, "layers", ())))
    found: dict[str, Any] = {}
    usual = _size(sizes, "num_key_value_heads", 0) * _size(sizes, "head_dim", 0)
    if any(widths) and usual and {*widths} != {usual}:
        found["kv_widths"] = widths
    if graph_named(str(sizes.model_type)) in WINDOWED_GRAPHS and SLIDING in kinds:
        windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)
        found |= {"window": _size(sizes, "sliding_window"), "windowed": windowed}
    if recurrent := kinds.count(_RECURRENT):
        keys, values, key, value, kernel = (_size(sizes, f"linear_{name}") for name in _STATE)
        # The state holds products of keys and values of each head, and the inputs that its convolution still needs.
        each = values * key * value + (kernel - 1) * (2 * keys * key + values * value)
        found["recurrent"] = recurrent * each
    return found


def _key_width(layer: nn.Module) -> int:
    """Return how many numbers a layer's keys have per token, or 0 if it has no keys of its own or no `k_proj`."""
    made = getattr(getattr(layer, "self_attn", None), "k_proj", None)
    return made.out_features if isinstance(made, nn.Linear) else 0


def _size(sizes: Any, name: str, default: int | None = None) -> int:
    if name in (sizes.per_layer_attributes or ()):
        value = max(getattr(one, name) for one in sizes.per_layer_config)  # the largest value over the layers
    else:
        value = getattr(sizes, name, None)
    value = default if value is None else value
    least = 0 if default == 0 else 1
    if type(value) is not int or not least <= value <= MOST_OF_A_SIZE:
        found = "is missing from it" if value is None else f"is {value!r}"[:60]
        raise InputError(
            f"types are solved for models with a cache of keys and values, whose config gives {name} as a whole "
            f"number, but it {found}"
        )
    return value


def _on_meta(config: Mapping[str, Any]) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, __version__

    check_config(config)
    # Checked first, because a model with that many modules would take very long to build.
    for key, value in config.items():
        layers = "layer" in str(key) and "per_layer" not in str(key)
        most = MOST_LAYERS if layers else MOST_EXPERTS if "expert" in str(key) else MOST_OF_A_SIZE
        if type(value) is int and value > most:
            raise InputError(f"the model's config gives {key} as {value if value < 10**12 else 'far more'}: check it")
    name = str(config.get("model_type"))
    try:
        read = AutoConfig.for_model(**dict(config))
    except Exception as error:  # transformers raises many types for a field that it cannot use
        raise InputError(
            f"transformers {__version__} cannot read the config of the architecture {name[:60]!r} "
            f"({one_line(error)}): check it"
        ) from error
    if type(read) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"the architecture {name[:60]!r} is no causal language model of transformers {__version__}")
    try:
        with torch.device("meta"):
            made = model_class(read)._from_config(read, dtype=torch.float32).eval()
        usable = made.get_output_embeddings() is not None and isinstance(made.base_model, nn.Module)
    except Exception as error:  # many types, as above
        raise InputError(
            f"transformers cannot make the model that the config describes ({one_line(error)}): check it"
        ) from error
    if not usable or made.base_model is made or not isinstance(made.get_input_embeddings(), nn.Embedding):
        raise InputError(f"a {name[:60]!r} has no table and head of its own, which solving types needs: not supported")
    return made


def _tensors(model: Any, experts: int) -> Iterator[TensorSpec]:
    """Yield each stored tensor once. Only linear layers, tables and heads are matrices; all others count as vectors."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    turned = transposed(model)
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name, shape = f"{path}.{own}" if path else own, tuple(parameter.shape)
            if names.get(id(parameter)) != name:
                continue
            role = Role.BIAS if own.endswith("bias") else Role.NORM
            if parameter is table or (isinstance(module, nn.Embedding) and len(parameter) == len(table)):
                role = Role.EMBEDDING  # Gemma 4 also has a table for each layer, all in one tensor
            elif parameter is head:
                role = Role.HEAD
            elif _is_matrix(module, own, parameter, experts):
                role = Role.LINEAR
                shape = (*shape[:-2], shape[-1], shape[-2]) if name in turned else shape
                shape = (parameter.numel() // shape[-1], shape[-1])
                if any(part.isdigit() for part in path.partition(".experts.")[2].split(".")):
                    raise InputError(
                        f"transformers holds each expert of this {model.config.model_type} as matrices of their own, "
                        "and those of a layer have one type: not supported"
                    )
            yield TensorSpec(name=name, role=role, shape=shape)
    for name, buffer in held(model).items():
        if name not in names.values():
            yield TensorSpec(name=name, role=Role.NORM, shape=tuple(buffer.shape))


def _is_matrix(module: nn.Module, own: str, parameter: Tensor, experts: int) -> bool:
    """Return whether a parameter is the matrix of a linear layer or of experts. A router's matrix does not count."""
    if parameter.dim() == 3:
        return "bias" not in own and not isinstance(module, nn.Conv1d)
    if own != "weight" or parameter.dim() != 2 or isinstance(module, nn.Embedding):
        return False
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and not (experts and parameter.shape[0] == experts)


def transposed(model: Any) -> frozenset[str]:
    """Return the names of the matrices, including those of experts, that a model holds as [in, out]."""
    found = set()
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if (parameter.dim() == 3 and getattr(module, "is_transposed", False)) or (
                type(module).__name__ == "Conv1D" and own == "weight"
            ):
                found.add(f"{path}.{own}")
    return frozenset(found)


def check_any(folder: Path) -> None:
    """Check, without reading weights, that transformers can build a causal model from a folder.

    Raises:
        InputError: As for `check_files` and `any_spec`.
    """
    check_files(folder)
    any_spec(read_config(folder))


def load_any(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Load a causal language model of any architecture, from safetensors only and without remote code.

    Experts are computed one after another, so that the inputs of each can be watched.

    Raises:
        InputError: The weights are not those of the model, or its logits are not its head's output for its last states,
            which scoring relies on.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    content = read_config(folder)
    if is_known(content):
        return load_model(folder, dtype, device)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    within = content["model_type"] != config.model_type
    config = AutoConfig.for_model(**content) if within else config
    kind = model_class(config)
    options: dict[str, Any] = {"attn_implementation": ATTENTION} if has_attention(kind) else {}
    if kind._can_set_experts_implementation():
        options["experts_implementation"] = "eager"
    if within:
        options["key_mapping"] = _TEXT_WITHIN
    with quiet():
        try:
            model, report = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"transformers cannot load {folder} ({one_line(error)}): get the folder again") from error
    faults = {what: found for what, found in report.items() if what in ("missing_keys", "mismatched_keys") and found}
    if faults:
        what, found = next(iter(faults.items()))
        named = ", ".join(sorted(map(str, found))[:3])
        raise InputError(f"{folder} does not hold the weights of its model ({what}: {named}): get the folder again")
    model.to(device).eval()
    _check_head(model, device)
    return cast(Any, model)


def has_attention(kind: Any) -> bool:
    """Return whether a class of transformers lets its attention be replaced, as a quantised cache needs."""
    return bool(getattr(kind, "_supports_attention_backend", False) and getattr(kind, "_supports_sdpa", False))


def _check_head(model: Any, device: str) -> None:
    """Check that a model's logits are its head's output for its last states."""
    tokens = torch.arange(_PROBE, device=device)[None]
    with torch.no_grad():
        found = model(input_ids=tokens, use_cache=False).logits.float()
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        made = model.get_output_embeddings()(states).float()
    if found.shape != made.shape or not torch.allclose(found, made, atol=_CLOSE, rtol=_CLOSE):
        raise InputError(
            f"the logits of {model.config.model_type} are not computed by its head from its last states, which scoring "
            "types needs: not supported"
        )
