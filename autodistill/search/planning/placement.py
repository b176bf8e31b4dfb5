"""How machines are shared out among trials: workers side by side, or one trial over several GPUs or nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autodistill.errors import InputError
from autodistill.hardware.machine import Machine, detect_for_training

# On a CPU more workers than this were not seen to train more tokens in all.
_MOST_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a person asks to be given to each trial.

    Attributes:
        processes: That train it together.
        gpus: Of each process; a fraction where several trials share one GPU.
        threads: CPU threads of each process; None for as many as there are.
    """

    processes: int = 1
    gpus: float = 1.0
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """The machines and devices that a search runs on.

    Attributes:
        here: This machine.
        machines: Those that trials run on: this one, or the nodes of a cluster.
        share: What of them each trial is given.
    """

    here: Machine
    machines: tuple[Machine, ...]
    share: Share

    @classmethod
    def alone(cls) -> Place:
        """This machine, each trial in one process."""
        here = detect_for_training()
        return cls(here=here, machines=(here,), share=Share())


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How machines are shared out among trials.

    Attributes:
        count: Trials that train at once.
        threads: CPU threads of each process.
        bf16: Whether training computes in bfloat16.
        device: Where trials train.
        processes: Of one trial.
        gpus: Of each process.
        side_by_side: Processes that share a GPU, or a machine's cores; all by default.
        alone: CPU threads of a worker that trains with no other beside it; 0 where that is no matter of CPUs, or of one
            machine.
    """

    count: int
    threads: int
    bf16: bool
    device: str
    processes: int = 1
    gpus: float = 1.0
    side_by_side: int | None = None
    alone: int = 0

    @property
    def beside(self) -> int:
        """Processes that share a GPU, or a machine's cores."""
        return self.count if self.side_by_side is None else self.side_by_side


def train_in_bf16(machines: Sequence[Machine]) -> bool:
    """Return whether trials compute in bfloat16: if all machines that train do so themselves, those with GPUs if any
    has.
    """
    return all(machine.bf16 for machine in [one for one in machines if one.gpus] or machines)


def check_share(
    machines: Sequence[Machine], gpus_per_trial: float | None, cpus_per_trial: int | None, runner: str
) -> Share:
    """Return what each trial is given, as far as these machines have it.

    A trial over more GPUs than one, or over more cores than any machine has, is trained by several processes.

    Args:
        machines: Nodes of a cluster, or this machine alone.
        gpus_per_trial: A fraction of one or a whole number; None for one.
        cpus_per_trial: On machines without GPUs, cores of a trial; with them, threads for each of its processes.
        runner: "inline" has one process.

    Raises:
        InputError: More than there are, a number that cannot be given, or no machine at all.
    """
    if not machines:
        raise InputError(
            "no node of the Ray cluster offers CPUs or GPUs: start workers (`ray start` without --num-cpus 0), or wait "
            "until they are up"
        )
    graphic = sum(len(machine.gpus) for machine in machines)
    largest = max(machine.cpus for machine in machines)
    if cpus_per_trial is not None and cpus_per_trial < 1:
        raise InputError(f"--cpus-per-trial must be at least 1, not {cpus_per_trial}")
    if not graphic:
        if gpus_per_trial is not None:
            raise InputError(f"--gpus-per-trial {gpus_per_trial:g}: there is no GPU here; leave it out")
        return _share_of_cores(machines, cpus_per_trial, runner)
    if cpus_per_trial is not None and cpus_per_trial > largest:
        raise InputError(f"--cpus-per-trial {cpus_per_trial}: no machine has more than {largest} cores")
    asked = 1.0 if gpus_per_trial is None else gpus_per_trial
    if asked <= 0 or math.isnan(asked) or (asked > 1 and asked != int(asked)):
        raise InputError(f"--gpus-per-trial takes a fraction of one, or a whole number, not {asked:g}")
    if asked > graphic:
        raise InputError(f"--gpus-per-trial {asked:g}: there are {graphic} GPUs; ask for no more")
    if asked > 1:
        _check_runner(asked, runner, "--gpus-per-trial")
    share = Share(processes=max(1, int(asked)), gpus=min(1.0, asked), threads=cpus_per_trial)
    threads = share.threads or 1
    held = sum(_beside_gpus(machine, share, threads) for machine in machines)
    if runner != "inline" and held < share.processes:
        raise InputError(
            f"a trial takes {share.processes} x {threads} cores, each {threads} beside a GPU of one machine, and here "
            f"are {held} x {threads} of that kind: lower --gpus-per-trial, or --cpus-per-trial"
        )
    return share


def _share_of_cores(machines: Sequence[Machine], asked: int | None, runner: str) -> Share:
    total, smallest = sum(machine.cpus for machine in machines), min(machine.cpus for machine in machines)
    if asked is None or asked <= smallest:
        return Share(threads=asked)
    if asked > total:
        raise InputError(f"--cpus-per-trial {asked}: there are {total} cores; ask for no more")
    _check_runner(asked, runner, "--cpus-per-trial")
    # The fewest processes of one size that machines of this size hold.
    for processes in range(2, asked):
        threads = asked // processes
        held = sum(machine.cpus // threads for machine in machines)
        if asked % processes == 0 and threads <= smallest and held >= processes:
            return Share(processes=processes, threads=threads)
    return Share(processes=asked, threads=1)


def _check_runner(asked: float, runner: str, option: str) -> None:
    if runner == "inline":
        raise InputError(f"{option} {asked:g} takes several processes, which --runner inline has not: use --runner ray")


def share_out(machines: Sequence[Machine], main_bytes: int, runner: str, share: Share | None = None) -> Workers:
    """Workers for machines: one a GPU or as many as share it, or one a core; as many as cores and main memory hold.

    On CPUs, single-threaded workers side by side train more tokens in all than one trial over all cores.

    Args:
        machines: Cores, memory and GPUs of each.
        main_bytes: Main memory that one process of a trial takes.
        runner: "inline" has one worker.
        share: What a trial is given.
    """
    share, bf16 = share or Share(), train_in_bf16(machines)
    graphic = [machine for machine in machines if machine.gpus]
    if graphic:
        each = _each(share)
        # Processes of the machine that has least cores for each.
        dense = min(machine.cpus // (len(machine.gpus) * each) for machine in graphic)
        threads = share.threads or max(1, graphic[0].cpus if runner == "inline" else dense)
        held = sum(min(_beside_gpus(one, share, threads), _held(one, main_bytes)) for one in graphic)
        count = 1 if runner == "inline" else max(1, held // share.processes)
        return Workers(
            count=count,
            threads=threads,
            bf16=bf16,
            device="cuda",
            processes=share.processes,
            gpus=share.gpus,
            side_by_side=min(each, count),
        )
    if runner == "inline":
        threads = share.threads or machines[0].cpus
        return Workers(count=1, threads=threads, bf16=bf16, device="cpu", alone=threads)
    places = [_places(machine, main_bytes, share.threads) for machine in machines]
    threads = share.threads or min(machine.cpus // place for machine, place in zip(machines, places, strict=True))
    return Workers(
        count=max(1, sum(places) // share.processes),
        threads=max(1, threads),
        bf16=bf16,
        device="cpu",
        processes=share.processes,
        side_by_side=max(places),
        alone=places[0] * threads if len(places) == 1 and share.processes == 1 else 0,
    )


def process_bytes(
    machines: Sequence[Machine], limit_bytes: int, main_bytes: int, runner: str, share: Share | None = None
) -> int:
    """Memory that each process of a trial may take beside the others that `share_out` puts there.

    Args:
        machines: As `share_out` takes them.
        limit_bytes: That it may take alone: of the smallest machine, or of a GPU, which is divided already.
        main_bytes, runner, share: As `share_out` takes them.
    """
    if runner == "inline" or any(machine.gpus for machine in machines):
        return limit_bytes
    threads = share.threads if share else None
    return min(machine.usable_bytes // _places(machine, main_bytes, threads) for machine in machines)


def _each(share: Share) -> int:
    """Processes that share a GPU."""
    return int(1 / share.gpus) if share.processes == 1 else 1


def _beside_gpus(machine: Machine, share: Share, threads: int) -> int:
    """Processes that have their part of a machine's GPUs, and cores of it, at once."""
    return min(len(machine.gpus) * _each(share), machine.cpus // threads)


def _held(machine: Machine, main_bytes: int) -> int:
    """Processes that a machine's main memory holds at once, with some to spare."""
    return max(1, int(0.8 * machine.usable_bytes // main_bytes))


def _places(machine: Machine, main_bytes: int, threads: int | None) -> int:
    """Processes that train on a machine's cores at once."""
    held = _held(machine, main_bytes)
    if threads is not None:
        return min(machine.cpus // threads, held)
    return min(machine.cpus, held, _MOST_WORKERS)
