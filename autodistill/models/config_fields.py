"""Checks that each field that is read from a model's config.json has the right type, and reads sizes from it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from autodistill.errors import InputError
from autodistill.models.families import FAMILIES
from autodistill.models.spec import MOST_LAYERS, MOST_OF_A_SIZE

MOST_EXPERTS = 10_000
"""Highest number of experts of a layer; a larger one is a slip or an attack."""

MOST_LABELS = 100_000
"""Highest number of labels of a classifier. No teacher is one, but transformers makes a name for each label."""

Check = Callable[[Any], bool]

_LAYER = re.compile(r"[0-9]{1,9}")

FFN = "intermediate_size"
"""The only property that a layer may have of its own in transformers' `per_layer_config`."""


def _whole(least: int, most: int) -> Check:
    """Return a check that a value is a whole number in a range; true and false do not count."""
    return lambda value: type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    # A whole number beyond the largest float cannot be used in computations.
    return type(value) in (int, float) and 0 < value < 1e300 and math.isfinite(value)


def _share(value: Any) -> bool:
    return _number(value) and value <= 1


def _fraction(value: Any) -> bool:
    return (value == 0 and type(value) in (int, float)) or (_share(value) and value < 1)


def _token(value: Any) -> bool:
    # Some configs give a negative number if the model has no such token.
    return type(value) is int and -MOST_OF_A_SIZE <= value <= MOST_OF_A_SIZE


def _tokens(value: Any) -> bool:
    return _token(value) or (isinstance(value, list | tuple) and all(map(_token, value)))


def _numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_number, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _layers(value: Any) -> bool:
    """Return whether a value gives single layers an FFN width of their own, and nothing else."""
    return isinstance(value, Mapping) and all(
        isinstance(layer, str) and _LAYER.fullmatch(layer) and isinstance(own, Mapping) and set(own) == {FFN}
        for layer, own in value.items()
    )


def _own_sizes(value: Any) -> bool:
    """Return whether a value gives single layers sizes of their own."""
    return isinstance(value, Mapping) and all(
        isinstance(layer, str)
        and _LAYER.fullmatch(layer)
        and isinstance(own, Mapping)
        and all(map(_SIZE[0], own.values()))
        for layer, own in value.items()
    )


def _switch(value: Any) -> bool:
    return type(value) is bool or (type(value) is int and value in (0, 1))


def _kinds(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


_SIZE = (_whole(0, MOST_OF_A_SIZE), "a whole number that is not negative")

_SWITCH = (_switch, "true or false")

_TEXT = (_text, "text")

_NUMBER = (_number, "a number above 0")

_SHARE = (_share, "a number above 0, 1 at the most")

_FRACTION = (_fraction, "a number from 0, below 1")

_TOKEN = (_token, "the number of a token")

_NUMBERS = (_numbers, "a list of numbers above 0")

_ABSENT = (lambda value: False, "nothing")

_MAPPING = (lambda value: isinstance(value, Mapping), "a mapping")

_EXPERTS = (_whole(0, MOST_EXPERTS), f"a whole number, {MOST_EXPERTS:,} at the most")

_TOKENS: Mapping[str, tuple[Check, str]] = {
    "bos_token_id": _TOKEN,
    "eos_token_id": (_tokens, "the number of a token, or a list of these"),
    "pad_token_id": _TOKEN,
}

_FIELDS: Mapping[str, tuple[Check, str]] = {
    **_TOKENS,
    "rms_norm_eps": _NUMBER,
    "layer_norm_eps": _NUMBER,
    "query_pre_attn_scalar": _NUMBER,
    "initializer_range": _FRACTION,
    "attention_dropout": _FRACTION,
    "hidden_dropout": _FRACTION,
    "use_parallel_residual": _SWITCH,
    "use_cache": _SWITCH,
    "num_labels": (_whole(0, MOST_LABELS), f"a whole number, {MOST_LABELS:,} at the most"),
    # These would make transformers read other files, make other modules or return outputs of another kind.
    "transformers_weights": _ABSENT,
    "fusion_config": _ABSENT,
    "per_layer_config": (_layers, f'a mapping like {{"0": {{"{FFN}": 128}}}}, from layers to their FFN width alone'),
    "return_dict": (lambda value: value is True, "true"),
    "is_encoder_decoder": (lambda value: value is False, "false"),
    "output_attentions": (lambda value: value is False, "false"),
    "sliding_window": _SIZE,
    "sliding_window_pattern": (_whole(0, MOST_LAYERS), "a whole number of layers"),
    "max_window_layers": (_whole(0, MOST_LAYERS), "a whole number of layers"),
    "layer_types": (_kinds, "a list of texts"),
    "use_sliding_window": _SWITCH,
    "tie_word_embeddings": _SWITCH,
    "attention_bias": _SWITCH,
    "mlp_bias": _SWITCH,
    "attention_k_eq_v": _SWITCH,
    "use_double_wide_mlp": _SWITCH,
    "enable_moe_block": _SWITCH,
    "final_logit_softcapping": _NUMBER,
    "dtype": _TEXT,
    "torch_dtype": _TEXT,
    "hidden_act": _TEXT,
    "hidden_activation": _TEXT,
    "rope_theta": _NUMBER,
    "rope_local_base_freq": _NUMBER,
    "rotary_emb_base": _NUMBER,
    "rotary_pct": _SHARE,
    "rope_scaling": _MAPPING,
    "rope_parameters": _MAPPING,
    "quantization_config": _MAPPING,
    "n_routed_experts": _EXPERTS,
    "n_shared_experts": _EXPERTS,
    "num_experts_per_tok": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "num_experts": _EXPERTS,
    "q_lora_rank": _SIZE,
    "first_k_dense_replace": (_whole(0, MOST_LAYERS), "a whole number of layers"),
}

_ROTARY: Mapping[str, tuple[Check, str]] = {
    "rope_type": _TEXT,
    "type": _TEXT,
    "rope_theta": _NUMBER,
    "partial_rotary_factor": _SHARE,
    "original_max_position_embeddings": _NUMBER,
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "attention_factor"), _NUMBER),
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _NUMBER),
    **dict.fromkeys(("short_factor", "long_factor"), _NUMBERS),
}

# These fields are restricted further in families that can be pruned (`_FIELDS`).
_FIELDS_OF_OTHER_FAMILIES: Mapping[str, tuple[Check, str]] = {
    "per_layer_config": (_own_sizes, 'a mapping like {"0": {"head_dim": 64}}, from layers to sizes of their own')
}

_PACKED: Mapping[str, tuple[Check, str]] = {"format": _TEXT, "config_groups": _MAPPING}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config in which a field that is read has the wrong type.

    A field that is missing or null has its default. The description of each architecture checks which sizes are
    required.

    Args:
        config: Content of `config.json`.

    Raises:
        InputError: A field has the wrong type; the message says what it should be.
    """
    others: Mapping[str, tuple[Check, str]] = (
        {} if str(config.get("model_type")) in FAMILIES else _FIELDS_OF_OTHER_FAMILIES
    )
    _check(config, {**_FIELDS, **others}, "")
    for name in ("rope_scaling", "rope_parameters"):
        rotary = config.get(name) or {}
        _check(rotary, _ROTARY, f"{name}.")
        # Gemma nests these parameters under the name of each kind of layer.
        for kind in ("full_attention", "sliding_attention"):
            _check(rotary, {kind: _MAPPING}, f"{name}.")
            _check(rotary.get(kind) or {}, _ROTARY, f"{name}.{kind}.")
    packed = config.get("quantization_config") or {}
    _check(packed, _PACKED, "quantization_config.")
    for name, group in (packed.get("config_groups") or {}).items():
        where = "quantization_config.config_groups"
        _check({name: group}, {name: _MAPPING}, f"{where}.")
        _check(group or {}, {"weights": _MAPPING}, f"{where}.{name}.")


def value_of(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a field of a config, or the default if it is missing or null."""
    value = config.get(name)
    return default if value is None else value


def size_of(config: Mapping[str, Any], name: str, default: int | None = None, *, least: int = 1) -> int:
    """Return a size from a config, or the default if it is missing or null.

    Raises:
        InputError: It is no whole number from `least` on, or one that no model has.
    """
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or value < least:
        found = "is missing from it" if value is None else f"is {value!r}"
        kind = "a positive whole number" if least else "a whole number that is not negative"
        raise InputError(f"the model's config must give {name} as {kind}, but it {found}")
    if value > (MOST_LAYERS if name == "num_hidden_layers" else MOST_OF_A_SIZE):
        raise InputError(f"the model's config gives {name} as {value}, which no model has: check it")
    return value


def check_tokens(settings: Mapping[str, Any], file: str) -> None:
    """Refuse generation settings in which a special token is not a token id.

    Args:
        settings: Content of a JSON file.
        file: Name of that file.

    Raises:
        InputError: A field has the wrong type; the message says what it should be.
    """
    _check(settings, _TOKENS, "", file)


def _check(
    found: Mapping[str, Any], fields: Mapping[str, tuple[Check, str]], where: str, file: str = "config.json"
) -> None:
    for name, (check, kind) in fields.items():
        value = found.get(name)
        if value is not None and not check(value):
            shown = repr(value) if isinstance(value, str | float | bool) else type(value).__name__
            if type(value) is int:
                shown = str(value) if abs(value) < 10**12 else "a far larger number"
            raise InputError(f"the model's config must give {where}{name} as {kind}, not {shown[:60]}: check {file}")
