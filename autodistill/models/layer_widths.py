"""Models of transformers whose layers have FFNs of different widths, as `per_layer_config` describes them.

transformers' own classes refuse such a config, because an FFN reads the single width of all layers. If the FFNs are
padded with zeros to the widest, all layers are alike. The padded model computes the same and is a stock model.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from autodistill.models.families import FAMILIES, Axis, get_family

_PER_LAYER_FIELD = "_heterogeneity_spec"  # where transformers keeps the content of `per_layer_config`

_Values = TypeVar("_Values", bound=np.generic)


def model_class(config: Any) -> Any:
    """Return the class that makes the model of a transformers config, with layers that differ if the config says so.

    Args:
        config: Config of a causal language model. In families that can be pruned, layers may have an FFN width of their
            own. Other architectures handle differing layers themselves.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    plain = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return _differing(plain) if config.is_heterogeneous and config.model_type in FAMILIES else plain


@cache
def _differing(plain: Any) -> Any:
    """Return a transformers class whose layers have FFN widths of their own; its name is the one that files know."""

    class Differing(plain):
        """The model with its own FFN width in each layer."""

        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            given = vars(config).pop(_PER_LAYER_FIELD)
            try:
                super().__init__(config, *arguments, **options)
            finally:
                vars(config)[_PER_LAYER_FIELD] = given
            name = get_family(config.model_type).reading(Axis.FFN).rpartition(".")[0]
            for layer, own in zip(self.base_model.layers, config.per_layer_config, strict=True):
                setattr(layer, name, type(layer.get_submodule(name))(own))

    for name in ("__name__", "__qualname__", "__module__"):
        setattr(Differing, name, getattr(plain, name))
    return Differing


def padded(values: npt.NDArray[_Values], shape: tuple[int, ...], fill: float = 0) -> npt.NDArray[_Values]:
    """Return an array of the given larger shape, with `fill` appended along each dimension."""
    if values.shape == shape:
        return values
    behind = [(0, wanted - length) for wanted, length in zip(shape, values.shape, strict=True)]
    return np.pad(values, behind, constant_values=fill)
