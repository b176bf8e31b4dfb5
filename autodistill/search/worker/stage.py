"""The stage of a trial: where its decays branch off, and the checkpoints that it continues from and leaves."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from autodistill.distillation.training.checkpoint import read_metadata
from autodistill.distillation.training.fsdp import Sharding, agreed
from autodistill.distillation.training.learning_rate import branch_point, end_of
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import DamagedError
from autodistill.runs.checkpoints import Checkpoint, open_stages
from autodistill.search.worker.messages import TrialSetting, TrialTask
from autodistill.utils.checksums import check_seal


class TrialStage:
    """The stable training that a trial continues and that others may share.

    Args:
        setting: The search's setting.
        task: The trial.
        sharding: The processes that train it together; None if this one trains it alone.

    Attributes:
        decay: Share of its tokens over which the rate falls.
        damaged: Which checkpoint was lost, in words; None if none was.
    """

    def __init__(self, setting: TrialSetting, task: TrialTask, sharding: Sharding | None) -> None:
        self.decay = setting.plan.decay if task.decay is None else task.decay
        self.damaged: str | None = None
        self._plan, self._task, self._sharding = setting.plan, task, sharding
        self._store = open_stages(setting.checkpoints, setting.storage)
        self._name = task.stage or task.id

    def points(self, rung: int, start: int) -> list[int]:
        """Return the tokens after `start` at which decays branch off, up to the branch of a rung.

        A trial that passes rungs without stopping leaves a checkpoint at each. Other trials can be judged there, and so
        can this one if its time ends early.
        """
        passes = self._task.stage or (self._task.straight and self._task.length == 1)
        branches = self.branches(rung)
        return [point for point in (branches if passes else branches[-1:]) if point > start]

    def is_between(self, tokens: int) -> bool:
        """Return whether no decay branches off a checkpoint at so many tokens."""
        plan = self._plan
        targets = (*plan.rungs, *(plan.tokens_of(length) for length in plan.lengths))
        branches = [branch_point(target, plan.decay, plan.batch_tokens) for target in targets]
        return tokens not in (0, *branches, self.branches(len(plan.rungs) - 1)[-1])

    def targets(self, rung: int) -> tuple[int, ...]:
        """Return the tokens of the rungs up to a given one, and of a longer trial's own end beyond the last rung."""
        plan, length = self._plan, self._task.length
        return (*plan.rungs[: rung + 1], *((plan.tokens_of(length),) if length > 1 else ()))

    def end_of(self, branch: int) -> int:
        """Return the tokens at the end of a decay that branches off at `branch` tokens."""
        return end_of(branch, self.decay, self._plan.batch_tokens)

    def branches(self, rung: int) -> list[int]:
        """Return the tokens at which the decays to these targets branch off.

        A longer trial's own decay may have another share.
        """
        plan, targets = self._plan, self.targets(rung)
        decays = [plan.decay] * (len(targets) - 1) + [self.decay]
        return [branch_point(tokens, decay, plan.batch_tokens) for tokens, decay in zip(targets, decays, strict=True)]

    def restore(self, trainer: Trainer, rung: int) -> tuple[int, int]:
        """Continue from the furthest checkpoint up to a rung's branch.

        Return the tokens of this segment that other trials had trained, and those that this trial had trained before it
        was interrupted.

        A checkpoint that cannot be read or is damaged is removed, and the previous one is used. If the run has a
        storage, this machine's copy is fetched again first.
        """
        tokens, sharding = self.branches(rung), self._sharding
        fetched: set[Checkpoint] = set()
        while (found := self._furthest(tokens[-1])) is not None:
            path, checkpoint = found
            try:
                # This comes before any weight changes: without a checkpoint, the trial begins with its first weights.
                check_seal(path)
                trainer.load(path)
            except FileNotFoundError:
                if sharding is not None:
                    raise  # the other processes wait in `load`: all end, and are tried again
                continue  # it was removed meanwhile
            except (DamagedError, SafetensorError, OSError) as error:
                if checkpoint in fetched or sharding is not None or not self._store.drop_copy(checkpoint):
                    self.damaged = f"the checkpoint at {checkpoint.tokens:,} tokens is lost: {error}"
                    self._store.remove(checkpoint)
                fetched.add(checkpoint)
                if sharding is not None:
                    raise
                continue
            before = tokens[-2] if rung > 0 and not self._task.straight else 0
            if checkpoint.tokens <= before:
                return 0, 0
            notes, reached = read_metadata(path), checkpoint.tokens - before
            if notes["trial"] != self._task.id:
                return reached, 0
            # The checkpoint is this trial's own, from this segment: the worker was killed before it could report.
            shared = int(notes["shared"])
            return shared, max(0, reached - shared)
        return 0, 0

    def _furthest(self, tokens: int) -> tuple[Path, Checkpoint] | None:
        """Return the stage's furthest checkpoint up to so many tokens; the first of several processes chooses."""
        found = self._store.find(self._name, tokens)
        chosen = agreed(self._sharding, found[1].tokens if found else -1)
        if chosen < 0:
            return None
        if found is None or found[1].tokens != chosen:
            found = self._store.find(self._name, chosen)
        if found is None or found[1].tokens != chosen:
            raise FileNotFoundError(f"this node has no checkpoint of {self._name} at {chosen} tokens")
        return found

    def save(self, trainer: Trainer, shared: int, in_place_of: int | None) -> str | None:
        """Keep the stable part for any trial that continues from it. Return the reason if that is impossible.

        The trial goes on without it, and a later segment trains the lost part again.

        Args:
            trainer: Trainer at the point to keep.
            shared: Tokens of this segment that other trials had trained.
            in_place_of: Tokens of a checkpoint that this one makes useless, or None.
        """
        if agreed(self._sharding, self._store.holds(self._name, trainer.tokens)):
            return None
        # This comes before anything that can fail in the first process alone, because each process gives its shards.
        write = trainer.checkpoint({"trial": self._task.id, "shared": str(shared)})
        if write is None:
            return None
        try:
            self._store.save(self._name, trainer.tokens, write)
        except (OSError, SafetensorError) as error:
            return f"the checkpoint at {trainer.tokens:,} tokens could not be written: {error}"
        for checkpoint in self._store.checkpoints() if in_place_of else ():
            if (checkpoint.stage, checkpoint.tokens) == (self._name, in_place_of):
                self._store.remove(checkpoint)
        return None
