"""Chooses the FFN width of each layer and the types of all matrices together, by one knapsack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from autodistill.distillation.student.shapes import cut_spec
from autodistill.models.families import Axis, get_family
from autodistill.search.solve.knapsack import Knapsack, undominated
from autodistill.search.solve.library import Library
from autodistill.search.solve.options import Options
from autodistill.search.solve.shapes import Shapes
from autodistill.search.solve.solver import cost_of, room_of
from autodistill.strategy.strategy import Init

Choices = Mapping[str, tuple[int, float]]
"""Bytes and cost of each choice."""

_STEPS = (4, 2, 1)  # distances, in places of the list of widths, between those that are tried for the widest layer


class Widths:
    """Finds the widths of least cost for any limit.

    The FFN of a layer is one item; its options are a width with a type for each of its matrices. Every other matrix is
    an item too. Every choice of table and cache types is tried.

    Args:
        options: The options of the teacher and the budget.
        library: The costs of types. A narrower matrix has the cost of the whole one, times the share that is kept.
        shapes: The costs of widths.
        widths: Widths that a layer may have, the widest first; None for all.
    """

    def __init__(
        self, options: Options, library: Library, shapes: Shapes, widths: tuple[int, ...] | None = None
    ) -> None:
        self._options, self._library, self._shapes = options, library, shapes
        self._widths = widths or shapes.widths
        family = get_family(options.spec.architecture)
        parts = {f"{one.name}.weight" for one in family.linears if Axis.FFN in (one.outputs, one.inputs)}
        self._ffns: dict[int, list[str]] = {}
        for name in options.matrices:
            part = family.layer_part(name)
            if part is not None and part[1] in parts:
                self._ffns.setdefault(part[0], []).append(name)
        self._families = options.families()
        self._least = sum(self._bytes(name, kind) for name, kind in options.smallest_types().items())
        self._least -= sum(self._bytes(name, options.smallest_types()[name]) for name in options.tables)

    def _bytes(self, name: str, kind: str) -> int:
        return self._options.size((self._options.matrices | self._options.tables)[name], kind)

    def best(self, limit: int, count: int = 1) -> list[tuple[int, ...]]:
        """Return choices of the widths of all layers within a limit, the least sum of costs first.

        The first is the best of all. The others are the best for other widths of the widest layer.

        Args:
            limit: Bytes of the whole process.
            count: Number of choices at the most. There are none if nothing fits.
        """
        caps = self._widths
        solved: dict[int, tuple[float, tuple[int, ...]] | None] = {}

        def cost(index: int) -> float:
            if index not in solved:
                solved[index] = self._within(limit, caps[index]) if 0 <= index < len(caps) else None
            found = solved[index]
            return math.inf if found is None else found[0]

        # A cap on the widths makes the compute buffer of the widest layer smaller, but costs quality. The best cap lies
        # between the extremes, so it is searched for in ever smaller steps.
        best = min(range(0, len(caps), _STEPS[0]), key=cost)
        for step in _STEPS[1:]:
            best = min((best, best - step, best + step), key=cost)
        found = sorted(one for one in solved.values() if one is not None)
        return list(dict.fromkeys(widths for _, widths in found))[:count]

    def _within(self, limit: int, cap: int) -> tuple[float, tuple[int, ...]] | None:
        """Return the least sum of costs, and its widths, if no layer is wider than `cap`.

        The memory that the smaller compute buffer frees is available for weights.
        """
        knapsack = Knapsack(self._items(cap))
        freed = self._compute_bytes(self._options.spec.ffn_width) - self._compute_bytes(cap)
        solved = []
        for family in self._families:
            best = knapsack.best(room_of(family, limit + freed, self._options.file_bytes, self._least))
            if best is not None:
                solved.append((best[0] + cost_of(family, self._library), best[1]))
        if not solved:
            return None
        cost, chosen = min(solved, key=lambda one: one[0])
        return cost, tuple(int(chosen[_item(layer)].partition(":")[0]) for layer in self._ffns)

    def _compute_bytes(self, width: int) -> int:
        init = Init(depth=1.0, ffn_widths=(width,) * self._options.spec.layers)
        cut = replace(self._options, spec=cut_spec(init, self._options.spec))
        estimate = cut.memory(cut.deployment(cut.smallest_types(), ("f16", "f16")))
        return estimate.compute_bytes + estimate.overhead_bytes

    def _items(self, cap: int) -> dict[str, Choices]:
        options = self._options
        inside = {name for names in self._ffns.values() for name in names}
        items: dict[str, Choices] = {
            name: {
                kind: (self._bytes(name, kind), self._library.score(name, kind).kl) for kind in options.kinds(tensor)
            }
            for name, tensor in options.matrices.items()
            if name not in inside
        }
        for layer in self._ffns:
            found: dict[str, tuple[int, float]] = {}
            for width in self._widths:
                if width <= cap:
                    found |= self._ffn(layer, width)
            items[_item(layer)] = undominated(found)
        return items

    def _ffn(self, layer: int, width: int) -> Choices:
        """Return the undominated combinations of types for a layer's FFN matrices at a width."""
        whole = self._options.spec.ffn_width
        axes = get_family(self._options.spec.architecture).axes
        found: Choices = {f"{width}:": (0, self._shapes.ffn(layer, width).kl)}
        for name in self._ffns[layer]:
            tensor = self._options.matrices[name]
            sizes = zip(axes(name), tensor.shape, strict=True)
            narrow = replace(tensor, shape=tuple(width if axis is Axis.FFN else size for axis, size in sizes))
            kinds = [kind for kind in self._options.kinds(narrow) if kind in self._options.kinds(tensor)]
            added = {
                kind: (
                    self._options.size(narrow, kind),
                    width / whole * self._library.score(name, kind).kl,
                )
                for kind in kinds
            }
            found = undominated(
                {
                    f"{before},{kind}": (size + more, cost + loss)
                    for before, (size, cost) in found.items()
                    for kind, (more, loss) in added.items()
                }
            )
        return found


def _item(layer: int) -> str:
    return f"ffn {layer}"
