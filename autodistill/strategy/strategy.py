"""`Strategy` and its parts: how one student is made, what each field means, and which values may be combined."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby

from autodistill.quantization.grids import Grid
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.strategy.recipe import Distillation
from autodistill.utils.hashing import content_hash
from autodistill.utils.plain_dataclass import PlainDataclass, check, check_choice, left_out

# Choices of layers that depend on measured activations of the teacher.
_BY_INFLUENCE = ("influence", "block-influence")


@dataclass(frozen=True, kw_only=True)
class Init(PlainDataclass):
    """How the student's weights begin.

    Fractions are relative to the teacher's sizes; `autodistill.distillation.student.shapes` rounds them.

    Attributes:
        source: "teacher" copies parts of the teacher. "scratch" draws random weights for a model with these fractions
            of the teacher's sizes. "pretrained" takes `model` as it is, with its own chat template if that differs from
            the teacher's.
        model: Reference of a smaller pretrained model with the teacher's vocabulary, in the form used for a teacher.
            Empty for other sources.
        depth: Fraction of the teacher's layers that are kept, rounded down, at least one layer.
        layers: "even" keeps layers that are spread evenly from the first to the last. "contiguous" keeps the first ones
            and the last, and drops one block of late layers. "influence" drops the block of neighbouring layers that
            changes the direction of the hidden states least (Gromov et al., arXiv 2403.17887). "block-influence" drops
            the layers between the first and the last that change it least, each by itself (Men et al., arXiv
            2403.03853). The last three need `source` "teacher".
        ffn: Fraction of each layer's FFN neurons.
        ffn_widths: Number of FFN neurons of each kept layer, from the first on. It replaces `ffn` and needs `source`
            "teacher". () if `ffn` applies.
        heads: Fraction of each layer's attention heads, in whole groups that share keys and values.
        width: Fraction of the hidden channels.
        dropped: One block of the teacher's layers to leave out: its first layer, and the number of layers. It replaces
            the choice by `layers`; else empty. Layers count from 0. The first and the last layer are always kept.
        repair: Whether the last matrix of each cut FFN, and of each attention without some heads, is fitted by least
            squares on some of the training text, to reproduce the output of the whole part. Neurons and heads are then
            chosen by their effect on this output.
    """

    source: str = "teacher"
    model: str = ""
    depth: float = 0.8
    layers: str = "even"
    ffn: float = 1.0
    heads: float = 1.0
    width: float = 1.0
    ffn_widths: tuple[int, ...] = left_out(())
    dropped: tuple[int, ...] = left_out(())
    repair: bool = left_out(False)

    def __post_init__(self) -> None:
        check_choice("init.source", self.source, ("teacher", "scratch", "pretrained"))
        check_choice("init.layers", self.layers, ("even", "contiguous", *_BY_INFLUENCE))
        check(0 < self.depth <= 1, f"init.depth is a fraction of the teacher's layers above 0, not {self.depth}")
        for name in ("ffn", "heads", "width"):
            value = getattr(self, name)
            check(0 < value <= 1, f"init.{name} is a fraction of the teacher's above 0, not {value}")
        pretrained = self.source == "pretrained"
        check(pretrained == (self.model != ""), "init.model names a model where init.source is pretrained, else none")
        whole = (self.depth, self.ffn, self.heads, self.width) == (1, 1, 1, 1)
        check(whole or not pretrained, "a pretrained model is taken whole: set init.depth (and every fraction) to 1")
        chosen = self.layers != "even"
        check(self.source == "teacher" or not chosen, 'init.layers is "even" where they are not the teacher\'s')
        self._check_widths()
        self._check_cut()

    def _check_cut(self) -> None:
        if self.dropped:
            first, count = self.dropped if len(self.dropped) == 2 else (0, 0)
            check(
                first >= 1 and count >= 1,
                "init.dropped is the first layer that is left out, 1 or more, and how many are, like [12, 4], not "
                f"{list(self.dropped)}",
            )
            check(
                (self.source, self.depth, self.layers) == ("teacher", 1, "even"),
                "init.dropped names the layers that are left out of the teacher's: leave init.source and init.layers "
                "out, and give init.depth 1",
            )
        check(
            not self.repair or (self.source == "teacher" and (min(self.ffn, self.heads) < 1 or self.ffn_widths != ())),
            "init.repair fits FFNs and attention that were cut from the teacher's: give init.ffn or init.heads below "
            "1, or init.ffn_widths, or leave repair out",
        )

    def _check_widths(self) -> None:
        widths = self.ffn_widths
        check(
            self.source == "teacher" or not widths,
            "init.ffn_widths says how much of the teacher's layers is kept: leave it out where init.source is "
            f"{self.source}",
        )
        check(
            self.ffn == 1 or not widths,
            f"init.ffn {self.ffn:g} and init.ffn_widths both say how many FFN neurons are kept: leave one of them out",
        )
        least = min(widths, default=1)
        check(least >= 1, f"init.ffn_widths are numbers of FFN neurons of 1 and more, and one of them is {least}")

    @property
    def whole(self) -> bool:
        """Whether the student begins as the whole teacher, with its weights."""
        return self == Init(depth=1.0)

    @property
    def by_influence(self) -> bool:
        """Whether the choice of layers depends on the teacher's activations."""
        return self.layers in _BY_INFLUENCE

    @property
    def selective(self) -> bool:
        """Whether the choice of layers, neurons, heads or channels depends on the teacher's activations."""
        whole = (self.ffn, self.heads, self.width) == (1, 1, 1)
        return self.source == "teacher" and (not whole or self.by_influence or self.ffn_widths != ())

    def describe(self) -> str:
        """Return the init in a few words, for a table."""
        if self.source == "pretrained":
            return f"from {self.model}"
        if self.whole:
            return "whole teacher"
        kept = f"{_percent(self.depth)} {self.layers if self.source == 'teacher' else 'from scratch'}"
        if self.dropped:
            first, count = self.dropped
            kept = f"without layer {first}" if count == 1 else f"without layers {first} to {first + count - 1}"
        elif (self.source, self.depth, self.layers) == ("teacher", 1, "even"):
            kept = ALL_LAYERS
        fractions = {name: getattr(self, name) for name in ("ffn", "heads", "width")}
        words = [kept, *(f"{name} {_percent(value)}" for name, value in fractions.items() if value < 1)]
        words += [_describe_widths(self.ffn_widths)] if self.ffn_widths else []
        return " ".join([*words, *(["repaired"] if self.repair else [])])


def _describe_widths(widths: tuple[int, ...]) -> str:
    """Describe FFN widths by layer, as in "ffn 512x3+1536x2", or by their smallest, their largest and a hash.

    The second form is used if there are more than `_MOST_RUNS_LISTED` runs of equal widths.
    """
    runs = [(width, len(list(alike))) for width, alike in groupby(widths)]
    if len(runs) > _MOST_RUNS_LISTED:
        return f"ffn {min(widths)}-{max(widths)} ({content_hash(list(widths), 6)})"
    return "ffn " + "+".join(f"{width}x{count}" if count > 1 else str(width) for width, count in runs)


ALL_LAYERS = "all layers"
"""How a description says that no layer of the teacher is left out, though each may be narrower."""

_MOST_RUNS_LISTED = 4
"""The most runs of layers with equal FFN width that a description lists."""


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"


WHOLE = Init(depth=1.0)
"""The init of a student that begins as the whole teacher."""


@dataclass(frozen=True, kw_only=True)
class Finishing(QuantizationScheme, PlainDataclass):
    """The grid to which weights are rounded in the forward pass (QAT), in the last stage of training or in all stages.

    The fields of `QuantizationScheme` say which grid, and which weights are not on it.

    Attributes:
        scales: "absmax" computes each group's scale from its weights in every step, as the tools of its container do,
            or by least squares for K-quants and grids with a codebook. "learned" trains the scales (LSQ,
            arXiv:1902.08153), and the export uses the learned scales; scales of a codebook cannot be learned. "alone"
            trains only scales and minima of these weights, from the first step, and their codes stay as they were first
            rounded (EfficientQAT's second phase, arXiv:2407.11062). This achieves more in a few steps, since a weight
            on a grid needs many steps to reach the next code. It also saves memory: neither these weights nor their
            moments are held.
        start: Share of the decay, 0 to below 1, after which the weights are rounded to the grid.
        rounding: How the fixed codes are found if scales alone are trained. "nearest" takes each weight's nearest code.
            "compensated" is GPTQ (arXiv:2210.17323) on 4,096 tokens of training text: scales are searched for by the
            importance of each column, and weights that are not yet rounded make up for the errors of those that are.
    """

    scales: str = "absmax"
    start: float = 0.0
    rounding: str = left_out("nearest")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            isinstance(self.linear, Grid),
            "finishing trains on a quantised grid: for a 16-bit student, leave finishing out",
        )
        check_choice("finishing.scales", self.scales, ("absmax", "learned", "alone"))
        uneven = [one.name for one in self.grids if one.codebook]
        check(
            self.scales != "learned" or not uneven,
            f"scales can be learned for grids with even steps only, and the steps of {' and '.join(uneven)} are not "
            "even: leave finishing.scales out",
        )
        check(0 <= self.start < 1, f"finishing.start is a share of the decay, 0 to below 1, not {self.start}")
        check(
            self.scales != "alone" or self.scalable,
            f"the scales of {self.name} are powers of two, which are not trained: leave finishing.scales out",
        )
        check(
            self.scales != "alone" or self.start == 0,
            "finishing.start has no meaning where scales alone are trained, from the first step: leave it out",
        )
        check_choice("finishing.rounding", self.rounding, ("nearest", "compensated"))
        check(
            self.rounding == "nearest" or self.scales == "alone",
            "finishing.rounding says which codes stay where scales alone are trained: give finishing.scales alone, or "
            "leave rounding out",
        )

    @property
    def scalable(self) -> bool:
        """Whether there are scales that can be trained alone; scales that are powers of two cannot."""
        return any(one.scale_dtype != "e8m0" for one in self.grids)


_PLAIN = Distillation()


@dataclass(frozen=True, kw_only=True)
class Strategy(PlainDataclass):
    """How one student is made: init, distillation, optional finishing.

    Deployment, token count and seed are not part of it.
    """

    init: Init = Init()
    distillation: Distillation = _PLAIN
    finishing: Finishing | None = None

    def __post_init__(self) -> None:
        check(
            self.init.source != "scratch" or self.distillation.train_embeddings,
            "a student from scratch has a random embedding table: set distillation.train_embeddings",
        )
        check(
            self.init.source != "scratch" or self.distillation.lora is None,
            "a student from scratch has random weights, and lora changes weights only a little: leave it out",
        )
        check(
            not self.scales_alone or self.distillation.lora is None,
            "finishing.scales alone trains no weights, which distillation.lora would change: leave one of them out",
        )
        check(
            not self.scales_alone or self.init.source != "scratch",
            (
                "a student from scratch has random weights, and finishing.scales alone would not train them: give it "
                "another"
            ),
        )

    @property
    def scales_alone(self) -> bool:
        """Whether only the scales of weights on a grid are trained, from the first step."""
        return self.finishing is not None and self.finishing.scales == "alone"

    @property
    def codes(self) -> QuantizationScheme | None:
        """The scheme of the compensated codes that its student begins with and keeps, or None if there are none."""
        if self.finishing is None or self.finishing.rounding == "nearest":
            return None
        return self.finishing.scheme

    def begins_as(self, other: Strategy) -> bool:
        """Return whether both students have the same weights before training, if they have the same seed."""
        return (self.init, self.codes) == (other.init, other.codes)

    def describe(self) -> str:
        """Return the strategy in one line, for a table; strategies that train differently have different lines."""
        return ", ".join(
            [
                self.init.describe(),
                *_describe_outputs(self.distillation),
                *_describe_states(self.distillation),
                *(
                    [f"QAT {self.finishing.name}", *_describe_other_fields(self.finishing, _IN_NAMES)]
                    if self.finishing
                    else []
                ),
            ]
        )

    @cached_property
    def id(self) -> str:
        """Content hash: equal strategies have the same id everywhere."""
        return content_hash(self.to_json())

    @cached_property
    def stable_id(self) -> str:
        """Content hash of the stages before the decay; strategies with the same hash can share a checkpoint."""
        before = replace(self.distillation, on_policy=None)
        stages = {"init": self.init.to_json(), "distillation": before.to_json()}
        if self.scales_alone and self.finishing is not None:
            stages["finishing"] = self.finishing.to_json()
        return content_hash(stages)


def _describe_outputs(recipe: Distillation) -> list[str]:
    """Describe how the teacher's outputs are learned; forward KL is called KD, as in most recipes."""
    told = ("divergence", "mixture", "divergence_weight", "final_divergence_weight", "temperature", "signal")
    described_elsewhere = ("signal_tokens", "learning_rate", "alignment", "attention", "lora", "on_policy")
    rest = [f"lr {recipe.learning_rate:g}", *_describe_other_fields(recipe, (*told, *described_elsewhere))]
    if not recipe.weighs_teacher:
        # The fields about the teacher's outputs have no effect then.
        return ["labels alone", *rest]
    temperature = recipe.temperature
    heat = f"T{temperature.start:g}"
    if temperature.shape != "constant":
        heat += f">{temperature.end:g} {temperature.shape}"
    loss = "KD" if recipe.divergence == "forward_kl" else recipe.divergence.replace("_", " ")
    loss += f"({recipe.mixture:g})" if recipe.mixture else ""
    words = [f"{loss} {_share(recipe.divergence_weight)}"]
    if recipe.final_divergence_weight is not None:
        words[0] += f">{_share(recipe.final_divergence_weight)}"
    words[0] += f" {heat}"
    if (recipe.signal, recipe.signal_tokens) != (Distillation.signal, Distillation.signal_tokens):
        words.append(f"signal {recipe.signal}" + (f" {recipe.signal_tokens}" if recipe.signal_tokens else ""))
    return [*words, *rest]


def _describe_states(recipe: Distillation) -> list[str]:
    """Describe the alignment of hidden states and attention, the low-rank changes, and the on-policy phase."""
    words = []
    if one := recipe.alignment:
        words.append(
            " ".join([f"{one.name} {one.projection} x{one.weight:g}", *_describe_other_fields(one, _IN_ALIGNMENT)])
        )
    if other := recipe.attention:
        words.append(
            " ".join([f"attention {other.kind} x{other.weight:g}", *_describe_other_fields(other, ("kind", "weight"))])
        )
    if recipe.lora:
        lora = recipe.lora
        words.append(" ".join([f"LoRA {lora.rank}", *_describe_other_fields(lora, ("rank",))]))
    if phase := recipe.on_policy:
        told = [
            f"on-policy {_percent(phase.share)} x{phase.length}",
            *_describe_other_fields(phase, ("share", "length")),
        ]
        words.append(" ".join(told))
    return words


_IN_ALIGNMENT = ("layers", "count", "projection", "weight")

_IN_NAMES = tuple(field.name for field in fields(QuantizationScheme))


def _share(value: float) -> str:
    """Format a share with two digits, or as many as it has."""
    return max(f"{value:.2f}", f"{value:g}", key=len)


def _describe_other_fields(part: PlainDataclass, told: Collection[str]) -> list[str]:
    """Describe the fields of a part that are not in `told` and that differ from their defaults."""
    words = []
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if field.name not in told and value != field.default:
            name = field.name.replace("_", " ")
            words.append(name if value is True else f"{name} {value if isinstance(value, str) else format(value, 'g')}")
    return words
