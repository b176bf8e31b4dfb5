"""How machines are divided among trials: workers side by side, or one trial over several GPUs or nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autodistill.errors import InputError
from autodistill.hardware.machine import Machine, detect_for_training

# On a CPU, more workers than this did not train more tokens in total.
_MOST_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class Share:
    """What the user wants each trial to have.

    Attributes:
        processes: Processes that train it together.
        gpus: GPUs of each process; a fraction if several trials share one GPU.
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
        machines: The machines that trials run on: this one, or the nodes of a cluster.
        share: What each trial gets of them.
    """

    here: Machine
    machines: tuple[Machine, ...]
    share: Share

    @classmethod
    def local(cls) -> Place:
        """Return this machine, with one process for each trial."""
        here = detect_for_training()
        return cls(here=here, machines=(here,), share=Share())


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How machines are divided among trials.

    Attributes:
        count: Trials that train at the same time.
        threads: CPU threads of each process.
        bf16: Whether training computes in bfloat16.
        device: Where trials train.
        processes: Processes of one trial.
        gpus: GPUs of each process.
        side_by_side: Processes that share a GPU, or a machine's cores; None for all.
        alone: CPU threads of a worker that trains while no other does; 0 if trials run on GPUs or on several machines.
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
    def processes_sharing(self) -> int:
        """Number of processes that share a GPU, or a machine's cores."""
        return self.count if self.side_by_side is None else self.side_by_side


def train_in_bf16(machines: Sequence[Machine]) -> bool:
    """Return whether trials compute in bfloat16: if all machines that train support it.

    If any machine has GPUs, only machines with GPUs train.
    """
    return all(machine.bf16 for machine in [one for one in machines if one.gpus] or machines)


def check_share(
    machines: Sequence[Machine], gpus_per_trial: float | None, cpus_per_trial: int | None, runner: str
) -> Share:
    """Return what each trial gets, if these machines have that much.

    Several processes train a trial that needs more than one GPU, or more cores than any machine has.

    Args:
        machines: Nodes of a cluster, or this machine alone.
        gpus_per_trial: A fraction of one, or a whole number; None for one.
        cpus_per_trial: On machines without GPUs, cores of a trial. With GPUs, threads for each of its processes.
        runner: "inline" has one process.

    Raises:
        InputError: The request exceeds what there is, or is no valid number, or there is no machine at all.
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
    held = sum(_gpu_processes(machine, share, threads) for machine in machines)
    if runner != "inline" and held < share.processes:
        raise InputError(
            f"a trial takes {share.processes} x {threads} cores, each {threads} next to a GPU of one machine, and only "
            f"{held} x {threads} are available: lower --gpus-per-trial, or --cpus-per-trial"
        )
    return share


def _share_of_cores(machines: Sequence[Machine], asked: int | None, runner: str) -> Share:
    total, smallest = sum(machine.cpus for machine in machines), min(machine.cpus for machine in machines)
    if asked is None or asked <= smallest:
        return Share(threads=asked)
    if asked > total:
        raise InputError(f"--cpus-per-trial {asked}: there are {total} cores; ask for no more")
    _check_runner(asked, runner, "--cpus-per-trial")
    # Find the fewest processes of equal size that these machines can hold.
    for processes in range(2, asked):
        threads = asked // processes
        held = sum(machine.cpus // threads for machine in machines)
        if asked % processes == 0 and threads <= smallest and held >= processes:
            return Share(processes=processes, threads=threads)
    return Share(processes=asked, threads=1)


def _check_runner(asked: float, runner: str, option: str) -> None:
    if runner == "inline":
        raise InputError(
            f"{option} {asked:g} needs several processes, which --runner inline does not have: use --runner ray"
        )


def share_out(machines: Sequence[Machine], main_bytes: int, runner: str, share: Share | None = None) -> Workers:
    """Return the workers for some machines, as many as cores and main memory allow.

    There is one for each GPU, or as many as share it, or one for each core. On CPUs, single-threaded workers side by
    side train more tokens in total than one trial over all cores.

    Args:
        machines: Machines with their cores, memory and GPUs.
        main_bytes: Main memory that one process of a trial takes.
        runner: "inline" has one worker.
        share: What a trial gets.
    """
    share, bf16 = share or Share(), train_in_bf16(machines)
    graphic = [machine for machine in machines if machine.gpus]
    if graphic:
        each = _each(share)
        # Threads for each process on the machine that has the fewest cores for each.
        dense = min(machine.cpus // (len(machine.gpus) * each) for machine in graphic)
        threads = share.threads or max(1, graphic[0].cpus if runner == "inline" else dense)
        held = sum(min(_gpu_processes(one, share, threads), _processes_in_memory(one, main_bytes)) for one in graphic)
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
    """Return the memory that each process of a trial may take next to the other processes that `share_out` puts there.

    Args:
        machines: As `share_out` takes them.
        limit_bytes: Bytes that it could take alone: of the smallest machine, or of its part of a GPU.
        main_bytes, runner, share: As `share_out` takes them.
    """
    if runner == "inline" or any(machine.gpus for machine in machines):
        return limit_bytes
    threads = share.threads if share else None
    return min(machine.usable_bytes // _places(machine, main_bytes, threads) for machine in machines)


def _each(share: Share) -> int:
    """Return how many processes share a GPU."""
    return int(1 / share.gpus) if share.processes == 1 else 1


def _gpu_processes(machine: Machine, share: Share, threads: int) -> int:
    """Return how many processes can have their part of a machine's GPUs and their cores at the same time."""
    return min(len(machine.gpus) * _each(share), machine.cpus // threads)


def _processes_in_memory(machine: Machine, main_bytes: int) -> int:
    """Return how many processes a machine's main memory holds at the same time, with a reserve."""
    return max(1, int(0.8 * machine.usable_bytes // main_bytes))


def _places(machine: Machine, main_bytes: int, threads: int | None) -> int:
    """Return how many processes train on a machine's cores at the same time."""
    held = _processes_in_memory(machine, main_bytes)
    if threads is not None:
        return min(machine.cpus // threads, held)
    return min(machine.cpus, held, _MOST_WORKERS)
