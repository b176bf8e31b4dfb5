"""Classes of transformers' models, for two things that its own lack: FFNs of different widths, and heads that cap.

transformers' own classes refuse a `per_layer_config` with FFN widths, because an FFN reads the single width of all
layers. If the FFNs are padded with zeros to the widest, all layers are alike. The padded model computes the same and is
a stock model.

They also cap logits behind the head, and everything here computes logits with the head alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from autodistill.models.families import FAMILIES, Axis, get_family

if TYPE_CHECKING:
    from torch import Tensor

_CAP = "final_logit_softcapping"
_PER_LAYER_FIELD = "_heterogeneity_spec"  # where transformers keeps the content of `per_layer_config`

_Values = TypeVar("_Values", bound=np.generic)


def model_class(config: Any) -> Any:
    """Return the class that makes the model of a transformers config, with layers that differ if the config says so.

    Args:
        config: Config of a causal language model. In families that can be pruned, layers may have an FFN width of their
            own. Other architectures handle differing layers themselves. If its logits are capped, the class returns a
            head that caps them.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    plain = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if config.is_heterogeneous and config.model_type in FAMILIES:
        return _differing(plain)
    return plain if cap_of(config) is None else _capping(plain)


def cap_of(config: Any) -> float | None:
    """Return the number that a model's logits never reach, or None if they are not capped.

    Args:
        config: transformers' config, or the content of its file.
    """
    found = config.get(_CAP) if isinstance(config, Mapping) else getattr(config, _CAP, None)
    return float(found) if found else None


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return logits as a model with this cap has them; None changes nothing."""
    return logits if cap is None else cap * (logits / cap).tanh()


@cache
def _capping(plain: Any) -> Any:
    """Return a transformers class whose head caps logits as the model does; its name is the one that files know."""
    from torch import nn

    class CappedHead(nn.Module):
        """The head of a model that caps its logits, for states [..., width]."""

        def __init__(self, head: nn.Linear, cap: float) -> None:
            super().__init__()
            self._head, self._cap = head, cap

        @property
        def weight(self) -> Tensor:
            """The head's weight, [vocab, width]."""
            return self._head.weight

        @property
        def out_features(self) -> int:
            """Number of logits."""
            return self._head.out_features

        def forward(self, states: Tensor) -> Tensor:
            """Return the logits."""
            return capped(self._head(states), self._cap)

    class Capping(plain):
        """The model, which returns its head together with the cap."""

        def get_output_embeddings(self) -> Any:
            """Return the head, as a module that caps its logits."""
            head, cap = super().get_output_embeddings(), cap_of(self.config)
            return head if head is None or cap is None else CappedHead(head, cap)

    return _named_like(Capping, plain)


def _named_like(made: Any, plain: Any) -> Any:
    for name in ("__name__", "__qualname__", "__module__"):
        setattr(made, name, getattr(plain, name))
    return made


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

    return _named_like(Differing, plain)


def padded(values: npt.NDArray[_Values], shape: tuple[int, ...], fill: float = 0) -> npt.NDArray[_Values]:
    """Return an array of the given larger shape, with `fill` appended along each dimension."""
    if values.shape == shape:
        return values
    behind = [(0, wanted - length) for wanted, length in zip(shape, values.shape, strict=True)]
    return np.pad(values, behind, constant_values=fill)
