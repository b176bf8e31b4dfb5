"""One trial trained by several Ray actors, one for each GPU or share of cores, which train and end together."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import Any

from autodistill.distillation.training.fsdp import Sharding
from autodistill.inference.torch_memory import freeze_garbage_collection
from autodistill.search.runners.node_files import fetch
from autodistill.search.runners.oom_kills import Kills
from autodistill.search.worker.attempt import Assignment, attempted, step_guard
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.failures import KILLED, death
from autodistill.search.worker.messages import TrialSetting
from autodistill.utils.clock import Moment


class Member:
    """One process of a group.

    Args:
        setting: What all trials have in common.
        deadline: When a running trial is given back, or None.
        rank: Rank of this process.
    """

    def __init__(self, setting: TrialSetting, deadline: Moment | None, rank: int) -> None:
        self._setting = setting
        self._deadline = deadline
        self._rank = rank

    def address(self) -> tuple[str, int]:
        """Return where the group can meet: this node's address and a free port."""
        import ray

        with socket.socket() as found:
            found.bind(("", 0))
            return ray.util.get_node_ip_address(), found.getsockname()[1]

    def join(self, address: tuple[str, int]) -> None:
        """Meet the other processes, and set up the bench."""
        os.environ.update(
            RANK=str(self._rank),
            # Ray shows each process only its own GPU.
            LOCAL_RANK="0",
            WORLD_SIZE=str(self._setting.plan.processes),
            MASTER_ADDR=address[0],
            MASTER_PORT=str(address[1]),
        )
        sharding = Sharding(self._setting.device)
        self._bench = Workbench(fetch(self._setting), sharding)
        freeze_garbage_collection()
        self._guard = step_guard(self._deadline, sharding)

    def work(self, assignment: Assignment) -> dict[str, Any]:
        """Do this process's part of the assignment. The first process returns the report."""
        return attempted(self._bench, assignment, self._guard, self._deadline)


class Group:
    """The processes of one trial, on the placement group of the actor that creates this object.

    Args:
        setting: What all trials have in common.
        deadline: When a running trial is given back, or None.
    """

    def __init__(self, setting: TrialSetting, deadline: Moment | None) -> None:
        self._setting = setting
        self._deadline = deadline
        self._members: list[Any] = []
        self._kills = Kills()

    def work(self, assignment: Assignment) -> dict[str, Any]:
        """Do an assignment in all processes.

        If one process ends, all of them are ended, because they would wait for it for ever. The next assignment starts
        new ones. If a step ran out of memory, new processes continue with it at once, from the last checkpoint.

        Returns:
            The outcome, as `attempted` returns it. Its "trained" has the tokens of all attempts. With a report, "lost"
            has the tokens of the attempts before the last one.
        """
        lost = 0
        while "fewer" in (outcome := self._attempt(assignment)):
            lost += outcome.get("trained", 0)
            assignment = replace(assignment, task=replace(assignment.task, micro_batch=outcome["fewer"]))
        if not lost:
            return outcome
        if "report" in outcome:
            return outcome | {"lost": lost}
        return outcome | {"trained": outcome.get("trained", 0) + lost}

    def _attempt(self, assignment: Assignment) -> dict[str, Any]:
        """Return the outcome of these processes, even if they must restart."""
        import ray

        try:
            if not self._members:
                self._meet()
            pending = {member.work.remote(assignment): rank for rank, member in enumerate(self._members)}
            result: dict[str, Any] = {}
            while pending:
                done, _ = ray.wait(list(pending))
                said, rank = ray.get(done[0]), pending.pop(done[0])
                if "report" not in said:
                    self._end()
                    return said
                if rank == 0:
                    result = said
        except ray.exceptions.RayError as error:
            self._end()
            said, count = str(error), self._setting.plan.processes
            died = isinstance(error, ray.exceptions.RayActorError)
            cause, why = death(said, self._kills.since(said) if died else 0)
            if cause != KILLED:
                why = said.strip().splitlines()[0 if died else -1]
            return {"failure": (cause, f"one of its {count} processes ended: {why}")}
        return result

    def _meet(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        plan, bundles = self._setting.plan, ray.util.get_current_placement_group()
        assert bundles is not None
        actor = ray.remote(Member)
        self._members = [
            actor.options(
                num_cpus=plan.threads,
                num_gpus=plan.gpus if self._setting.device == "cuda" else 0,
                # The actor that makes the group has an empty bundle, which does not count in the index.
                scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=rank),
            ).remote(self._setting, self._deadline, rank)
            for rank in range(plan.processes)
        ]
        address = ray.get(self._members[0].address.remote())
        ray.get([member.join.remote(address) for member in self._members])

    def _end(self) -> None:
        import ray

        # They are killed, not asked to end: an interpreter that exits in order removes gloo while its threads still use
        # it.
        for member in self._members:
            ray.kill(member)
        self._members = []
