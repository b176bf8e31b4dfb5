"""How fast TAID's target moves from the student to the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# Of the paper's experiments: the size of a step, and how much of the earlier change it remembers.
_STEP, _MEMORY = 5e-4, 0.99


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """The teacher's share in the target and what its next step follows from (arXiv 2501.16937, algorithm 1).

    As there, a step has the share that the steps before it led to: the first one the start, and of N steps without a
    falling loss the last one 1 - 1/N of the way. The teacher alone is the target from the plan's end on.

    Attributes:
        share: Of the teacher in the target, from its start to 1.
        momentum: Moving average of the loss's relative fall.
        loss: Of the last step that had one, or None before the first.
    """

    share: float
    momentum: float = 0.0
    loss: float | None = None

    def after(self, loss: float | None, start: float, progress: float) -> Interpolation:
        """The state after a step: at least as far as a line from `start` to 1, further where the loss falls.

        Args:
            loss: Of the step, before its weight; None where nothing of the teacher was heard, which says nothing of
                how fast it falls.
            start: The share at the beginning of training.
            progress: Tokens trained on over the horizon, 0 to 1.
        """
        line = start + (1 - start) * progress
        if loss is None:
            return replace(self, share=min(1.0, max(line, self.share)))
        if not math.isfinite(loss):
            return self
        share, momentum = self.share, self.momentum
        if self.loss is not None:
            fall = (self.loss - loss) / (self.loss + 1e-15)
            momentum = _MEMORY * momentum + (1 - _MEMORY) * fall
            share += _STEP * (1 + math.tanh(momentum / 2)) / 2 * (1 - share)  # a sigmoid of the momentum
        return Interpolation(share=min(1.0, max(line, share)), momentum=momentum, loss=loss)
