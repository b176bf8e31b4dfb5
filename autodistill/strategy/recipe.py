"""How a student is trained: losses and their weights, what the teacher supplies, which weights learn."""

from __future__ import annotations

from dataclasses import dataclass

from autodistill.strategy.divergence import known_divergence
from autodistill.utils.plain_dataclass import PlainDataclass, check, check_choice, left_out


@dataclass(frozen=True, kw_only=True)
class Temperature(PlainDataclass):
    """The temperature of the divergence over the plan's tokens.

    A step uses the value at the middle of its tokens: with N steps, the first and the last are 1/(2N) of the plan from
    the ends.

    Attributes:
        shape: "constant" (at `start`), "linear", "cosine" or "exponential" from `start` to `end`.
        start: Temperature before the first token.
        end: Temperature at the plan's last token and after it. Equal to `start` if the shape is constant.
    """

    shape: str = "constant"
    start: float = 1.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_choice("temperature.shape", self.shape, ("constant", "linear", "cosine", "exponential"))
        for name in ("start", "end"):
            value = getattr(self, name)
            check(0.5 <= value <= 8, f"temperature.{name} must lie in 0.5 to 8, not {value}")
        constant = self.shape == "constant"
        check(
            not constant or self.start == self.end,
            "a constant temperature has temperature.end equal to its start: leave the end out, in a space by "
            "`when: {distillation.temperature.shape: [linear, cosine, exponential]}`",
        )


@dataclass(frozen=True, kw_only=True)
class Alignment(PlainDataclass):
    """Which hidden states of student and teacher are compared, and how.

    If student layer j was copied from teacher layer g(j), its target is the input of the teacher's layer g(j+1). The
    target of the last student layer is the teacher's last state. If the student was not copied from the teacher, the
    target is the state at the same relative depth.

    Attributes:
        layers: "last" for the last `count` student layers, "even" for `count` layers spread evenly, including the last
            one, or "all".
        count: Number of aligned student layers; 1 if `layers` is "all".
        distance: "cosine": 2 - 2 cos of the angle, which is the mean squared difference of states with a root mean
            square of 1. "l2": the mean squared difference divided by the mean square of the teacher's state, so that
            the magnitude counts too.
        projection: Map from the student's states to the teacher's width: "none" (equal widths only), "linear" (also
            called a 1x1 convolution over the sequence), "low-rank" (two linear maps through `rank` channels), "mlp"
            (linear, GELU, linear).
        rank: Inner width of the low-rank projection; 0 for the others.
        weight: Factor of the alignment loss, whose value is about 1 at the start.
        balance: Whether the alignment loss is first scaled to the value of the logit loss. Both values are taken from
            the previous step.
        projection_rate: Learning rate of the projections, as a multiple of the student's.
    """

    layers: str = "last"
    count: int = 1
    distance: str = "cosine"
    projection: str = "none"
    rank: int = 0
    weight: float = 1.0
    balance: bool = False
    projection_rate: float = 5.0

    def __post_init__(self) -> None:
        check_choice("alignment.layers", self.layers, ("last", "even", "all"))
        check_choice("alignment.distance", self.distance, ("cosine", "l2"))
        check_choice("alignment.projection", self.projection, ("none", "linear", "low-rank", "mlp"))
        check(self.count >= 1, f"alignment.count must be at least 1, not {self.count}")
        check(self.layers != "all" or self.count == 1, 'alignment.layers "all" counts by itself: leave count at 1')
        low_rank = self.projection == "low-rank"
        check(low_rank == (self.rank > 0), "alignment.rank is above 0 for the low-rank projection and 0 for others")
        check(self.weight > 0, f"alignment.weight must be above 0, not {self.weight}: for none, leave alignment out")
        check(self.projection_rate > 0, f"alignment.projection_rate must be above 0, not {self.projection_rate}")

    @property
    def name(self) -> str:
        """Short readable name of the layers, like "last", "last-2", "even-4" or "all"."""
        return self.layers if self.count == 1 and self.layers != "even" else f"{self.layers}-{self.count}"


@dataclass(frozen=True, kw_only=True)
class Attention(PlainDataclass):
    """How the attention of the student's last layer is compared with that of one layer of the teacher.

    Attributes:
        kind: "maps" compares the attention maps head by head (equal numbers of heads only). "relations" compares
            queries with queries, keys with keys and values with values (MiniLMv2, arXiv 2012.15828; any numbers of
            heads).
        relation_heads: Number of heads for the relations; it must divide the widths of queries, keys and values of both
            models; 0 for maps.
        teacher_depth: Chooses the teacher's layer: the last one within this fraction of its depth. The paper uses the
            last layer of 12, and layer 19 or 21 of 24 (0.8 or 0.88).
        weight: Factor of the attention loss.
        balance: Whether the attention loss is first scaled to the value of the logit loss. Both values are taken from
            the previous step.
    """

    kind: str = "maps"
    relation_heads: int = 0
    teacher_depth: float = 1.0
    weight: float = 1.0
    balance: bool = False

    def __post_init__(self) -> None:
        check_choice("attention.kind", self.kind, ("maps", "relations"))
        relations = self.kind == "relations"
        check(
            relations == (self.relation_heads > 0), "attention.relation_heads is above 0 for relations and 0 for maps"
        )
        depth = self.teacher_depth
        check(0 < depth <= 1, f"attention.teacher_depth is a fraction of the teacher's layers above 0, not {depth}")
        check(self.weight > 0, f"attention.weight must be above 0, not {self.weight}: for none, leave attention out")


@dataclass(frozen=True, kw_only=True)
class Lora(PlainDataclass):
    """Low-rank changes that are trained instead of the student's weights, and merged into them (arXiv:2106.09685).

    Weights W [out, in] are frozen; the student computes with W + (alpha / rank) B A. Apart from these changes, only the
    embedding table can be trained (`train_embeddings`). If there is a finishing, the merged weight is rounded.

    Attributes:
        rank: Rank of B [out, rank] and A [rank, in]; less than the smaller side of every adapted matrix.
        alpha: Factor of the change, before it is divided by the rank.
        layers: Adapted matrices of each block: "attention", "ffn" or "all".
    """

    rank: int = 16
    alpha: float = 32.0
    layers: str = "all"

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"lora.rank must be at least 1, not {self.rank}: to train all weights, leave lora out")
        check(self.alpha > 0, f"lora.alpha must be above 0, not {self.alpha}")
        check_choice("lora.layers", self.layers, ("attention", "ffn", "all"))


@dataclass(frozen=True, kw_only=True)
class OnPolicy(PlainDataclass):
    """A last phase in which the student also learns from what it writes itself (GKD, arXiv:2306.13649).

    In each step of this phase the student continues the beginnings of the training sequences. The teacher runs next to
    it and scores each token. At the written tokens the loss is a divergence from the teacher at temperature 1, and each
    token has the same weight as a token of the text. At the tokens before them the loss is that of the other steps.

    Attributes:
        share: Share of the decay's steps that the phase takes, at the end. Above 0, at most 1.
        length: The most tokens that the student writes in a sequence. In a text they replace the last tokens. In a
            conversation they replace the last answer, up to its end.
        temperature: Temperature at which the student's tokens are sampled.
        divergence: "reverse_kl", or "same" for the divergence of the other steps.
    """

    share: float = 0.5
    length: int = 64
    temperature: float = 1.0
    divergence: str = "reverse_kl"

    def __post_init__(self) -> None:
        check(0 < self.share <= 1, f"on_policy.share is of the decay's steps, above 0 to 1, not {self.share}")
        check(self.length >= 1, f"on_policy.length must be at least 1 token, not {self.length}")
        check(0 < self.temperature <= 2, f"on_policy.temperature must lie in 0 to 2, above 0, not {self.temperature}")
        check_choice("on_policy.divergence", self.divergence, ("reverse_kl", "same"))


_SPARSE_SIGNALS = ("top-k", "sampled")


_FULL_SIGNALS = ("states", "online")


_WRITTEN = "written"


@dataclass(frozen=True, kw_only=True)
class Distillation(PlainDataclass):
    """How the student learns from the teacher.

    Attributes:
        divergence: "forward_kl" or "reverse_kl" between teacher and student; "jsd", the generalised Jensen-Shannon
            divergence; "skew_forward_kl" or "skew_reverse_kl", to a mixture that keeps the divergence finite; "taid",
            forward KL from a target that moves from the student to the teacher; or the name of a divergence that a
            plug-in declares or a Python session registers. Unknown names are refused when a space or a strategy is
            loaded, not here: runs must stay readable after the session that registered their divergence.
        mixture: Between 0 and 1 for divergences that mix, 0 for plain KL. For "jsd" it is beta, the teacher's share in
            the mixture. For a skew KL it is alpha, the share of its first distribution. For "taid" it is the teacher's
            share in the target at the start.
        divergence_weight: Share of the divergence in the logit loss, 0 to 1. Cross-entropy has the rest.
        final_divergence_weight: The share at the plan's last token. It is reached linearly, and a step uses the value
            at the middle of its tokens. None if the share does not change.
        temperature: The schedule of the temperature.
        standardise: Whether each row of logits is divided by its standard deviation before the temperature.
        signal: The teacher targets. "top-k": the `signal_tokens` likeliest tokens, from the cache. "sampled": tokens of
            `signal_tokens` draws, from the cache, up to temperature 1. "states": all tokens, from cached last hidden
            states and the teacher's head. "online": all tokens, from the teacher, which runs next to the student.
            "written": the likeliest tokens that the writer of the answers reported (`autodistill write --top-k`), at
            temperature 1 only. Positions without reported tokens use cross-entropy.
        signal_tokens: Above 0 for "top-k" and "sampled", and 0 for the others. With "top-k", a number as large as the
            vocabulary or larger means all tokens.
        positions: The positions whose tokens the student learns to predict. "answers": the tokens that the data mark as
            answers, or all if the data mark none. "all": all. "uncertain": among the tokens of "answers", the share for
            which the student's prediction has the highest entropy (alignments use all tokens of "answers").
        uncertain_share: Share of each sequence's tokens that "uncertain" chooses, below 1. 1 for other positions.
        alignment: Hidden-state alignment, or None.
        attention: Attention alignment, or None.
        learning_rate: Peak rate of AdamW.
        train_embeddings: Whether the embedding table is trained. A frozen table stays the teacher's, and training is
            faster.
        lora: Low-rank changes that are trained instead of the weights, or None.
        on_policy: The last phase, in which the student learns from what it writes itself, or None. It needs the signal
            "online": cached or reported outputs do not cover the tokens that the student writes.
    """

    divergence: str = "forward_kl"
    mixture: float = 0.0
    divergence_weight: float = 0.5
    final_divergence_weight: float | None = None
    temperature: Temperature = Temperature()
    standardise: bool = False
    signal: str = "top-k"
    signal_tokens: int = 64
    positions: str = "answers"
    uncertain_share: float = 1.0
    alignment: Alignment | None = None
    attention: Attention | None = None
    learning_rate: float = 3e-4
    train_embeddings: bool = False
    lora: Lora | None = None
    on_policy: OnPolicy | None = left_out(None)

    def __post_init__(self) -> None:
        self._check_mixture()
        for name in ("divergence_weight", "final_divergence_weight"):
            weight = getattr(self, name)
            check(weight is None or 0 <= weight <= 1, f"distillation.{name} must lie in 0 to 1, not {weight}")
        rate = self.learning_rate
        check(0 < rate < 1, f"distillation.learning_rate must lie between 0 and 1, not {rate}")
        self._check_signal()
        check_choice("distillation.positions", self.positions, ("all", "answers", "uncertain"))
        share, uncertain = self.uncertain_share, self.positions == "uncertain"
        check(
            0 < share < 1 if uncertain else share == 1,
            f"distillation.uncertain_share must lie between 0 and 1 for uncertain positions and be 1 for others, "
            f"not {share}",
        )

    def _check_mixture(self) -> None:
        known = known_divergence(self.divergence)
        mixes = known.mixes if known else 0 < self.mixture < 1
        check(
            0 < self.mixture < 1 if mixes else self.mixture == 0,
            f"distillation.mixture must lie between 0 and 1 for a divergence that mixes and be 0 for one that does "
            f"not, as {self.divergence} {'does' if mixes else 'does not'}, and it is {self.mixture}",
        )

    def _check_signal(self) -> None:
        check_choice("distillation.signal", self.signal, (*_SPARSE_SIGNALS, *_FULL_SIGNALS, _WRITTEN))
        sparse, tokens = self.signal in _SPARSE_SIGNALS, self.signal_tokens
        check(
            tokens > 0 if sparse else tokens == 0,
            f"distillation.signal_tokens must be above 0 for {' and '.join(_SPARSE_SIGNALS)} and 0 for "
            f"{' and '.join(_FULL_SIGNALS)}, which have all tokens, and {_WRITTEN}, which has those that were "
            f"reported, not {tokens} for {self.signal}",
        )
        check(
            self.on_policy is None or self.signal == "online",
            f"distillation.on_policy needs the teacher next to the student, to judge what it writes, and the signal "
            f"{self.signal} is of the text alone: use the signal online (signal_tokens 0), or leave on_policy out, in "
            "a space by `when: {distillation.signal: [online]}`",
        )
        full = f"use the signal {' or '.join(_FULL_SIGNALS)}"
        known = known_divergence(self.divergence)
        check(
            self.signal != "sampled" or known is None or known.unbiased_when_sampled,
            f"distillation.divergence is {self.divergence}, and sampled tokens give no unbiased estimate of it: {full}",
        )
        coldest, hottest = sorted((self.temperature.start, self.temperature.end))
        check(
            self.signal != _WRITTEN or coldest == hottest == 1,
            f"distillation.temperature goes from {self.temperature.start:g} to {self.temperature.end:g}, but "
            f"reported log-probabilities are for 1, and those of other tokens are unknown: leave it at 1, or "
            f"{full}",
        )
        check(
            self.signal != "sampled" or hottest <= 1,
            f"distillation.temperature goes up to {hottest:g}, but tokens are drawn at 1, and above it their weights "
            f"have no bound: {full}, or a temperature of at most 1",
        )
        check(
            not self.standardise or self.signal in _FULL_SIGNALS,
            f"distillation.standardise needs the deviation of all logits, which {self.signal} lacks: {full}",
        )

    @property
    def weighs_teacher(self) -> bool:
        """Whether the teacher's outputs have a weight above 0 at any time."""
        return max(self.divergence_weight, self.final_divergence_weight or 0.0) > 0 or self.on_policy is not None

    @property
    def reads_teacher(self) -> bool:
        """Whether a step needs anything from the teacher: outputs with a weight, hidden states, or attention."""
        return self.weighs_teacher or self.alignment is not None or self.attention is not None

    def approximation(self, vocabulary: int) -> str | None:
        """Return what the logit loss computes instead of the named divergence, or None if it is exactly that.

        The loss is exact with all tokens, and exact in expectation with sampled tokens. With the likeliest tokens only
        it is never exact, at any temperature. In a measurement with forward KL at temperature 1, students of
        SmolLM2-135M lost 1.49 ± 0.34% of perplexity with the 64 likeliest tokens and 0.52 ± 0.12% with 50 sampled
        tokens (benchmarks/reports/2026-11-26-cache-quality.md).

        Args:
            vocabulary: Number of tokens in the vocabulary of teacher and student. Reported tokens always count as fewer
                than that, since their number differs between positions.
        """
        if not self.weighs_teacher or self.signal not in ("top-k", _WRITTEN):
            return None
        if self.signal == "top-k" and self.signal_tokens >= vocabulary:
            return None
        tokens = "the tokens told" if self.signal == _WRITTEN else f"{self.signal_tokens} tokens"
        return f"{self.divergence} of {tokens} and the rest as one outcome: a lower bound"
