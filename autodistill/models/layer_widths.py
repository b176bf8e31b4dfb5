"""Models of transformers whose layers have FFNs of different widths, as `per_layer_config` describes them.

transformers' own classes refuse such a config: an FFN asks it for the one width of all layers. Padded with zeros to the
widest, the layers are alike, compute the same, and are stock models.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from autodistill.models.families import FAMILIES, Axis, get_family

_DIFFERS = "_heterogeneity_spec"  # where transformers keeps what `per_layer_config` gives

_Values = TypeVar("_Values", bound=np.generic)


def model_class(config: Any) -> Any:
    """Return the class that makes the model of a config of transformers, with layers that differ where it says so.

    Args:
        config: Of a causal language model. In a family that is cut here layers may have an FFN width of their own;
            other architectures tell layers apart by themselves.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    plain = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return _differing(plain) if config.is_heterogeneous and config.model_type in FAMILIES else plain


@cache
def _differing(plain: Any) -> Any:
    """Return a class of transformers with FFNs of each layer's own width; it has the name that files know."""

    class Differing(plain):
        """The model with an FFN width for each layer."""

        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            given = vars(config).pop(_DIFFERS)
            try:
                super().__init__(config, *arguments, **options)
            finally:
                vars(config)[_DIFFERS] = given
            name = get_family(config.model_type).reading(Axis.FFN).rpartition(".")[0]
            for layer, own in zip(self.base_model.layers, config.per_layer_config, strict=True):
                setattr(layer, name, type(layer.get_submodule(name))(own))

    for name in ("__name__", "__qualname__", "__module__"):
        setattr(Differing, name, getattr(plain, name))
    return Differing


def padded(values: npt.NDArray[_Values], shape: tuple[int, ...], fill: float = 0) -> npt.NDArray[_Values]:
    """Return an array with as much of `fill` behind each of its dimensions as the larger shape asks for."""
    if values.shape == shape:
        return values
    behind = [(0, wanted - length) for wanted, length in zip(shape, values.shape, strict=True)]
    return np.pad(values, behind, constant_values=fill)
