"""Resources that a search holds while it runs (the run's folder, its storage, a cluster), and how to resume it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from autodistill.errors import AutoDistillError, InputError
from autodistill.evaluation.precision import check_scoring
from autodistill.hardware.machine import detect_for_training
from autodistill.runs.remote_copy import Lease, StoredLog, check_free, pull
from autodistill.runs.run_folder import RunFolder
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.observer import Observer
from autodistill.search.gauges import SearchGauges
from autodistill.search.planning.placement import Place, check_share
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.runners.inline import run_inline
from autodistill.search.worker.failures import is_disk_broken, is_disk_full
from autodistill.search.worker.messages import TrialSetting
from autodistill.utils.clock import Moment
from autodistill.utils.json_files import read_json
from autodistill.utils.storage import Storage

if TYPE_CHECKING:
    from autodistill.search.runners.ray_session import Cluster


Runner: TypeAlias = Callable[[Campaign, TrialSetting, Moment | None], None]
"""Drives a campaign until it ends, or until a given moment."""


@contextmanager
def disk_faults(folders: str, then: Callable[[], str]) -> Iterator[None]:
    """Explain what to do if the disk has no room for a file of the search itself, or fails.

    A file of a trial is not covered: its failure is a failure of that trial.

    Args:
        folders: The folders to name in the message.
        then: Returns the end of the message: how to go on.

    Raises:
        AutoDistillError: The disk is full or has failed.
    """
    try:
        yield
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        if is_disk_full(error):
            raise AutoDistillError(f"a file could not be written ({said}): make room in {folders}{then()}") from error
        if is_disk_broken(error):
            raise AutoDistillError(f"a disk failed ({said}): check the disk of {folders}{then()}") from error
        raise


def going_on_or_again(config: SearchConfig, run: RunFolder) -> str:
    """Return how the user can go on, even if the run has no plan yet."""
    return going_on(config, run) if run.search_file.exists() else "and start it again"


def going_on(config: SearchConfig, run: RunFolder) -> str:
    """Return a sentence that nothing is lost, with the command line to resume."""
    return f"every finished trial is kept. To go on: {resuming(config, run)}"


def resuming(config: SearchConfig, run: RunFolder) -> str:
    """Return the command line that resumes a run."""
    resume = config.command if config.stored is not None else f"{config.command} --resume"
    return resume if config.named else f"{resume} --name {run.name}"


def run_folder_of(config: SearchConfig) -> RunFolder:
    """Return the run's folder, locked: the resumed one, or a new one. If a default name is taken, it gets another."""
    out, name = config.out, config.name
    if config.stored is not None:
        return RunFolder.open(out, name, lock=True)
    return RunFolder.create_free(out, name) if not config.named else RunFolder.create(out, name)


@contextmanager
def stored_run(config: SearchConfig, run: RunFolder, observer: Observer) -> Iterator[Storage | None]:
    """Lock the run's storage for this process, keep the run's log there, and yield the storage. None if it has none.

    Raises:
        InputError: Another machine continued the run while this one started.
    """
    if config.storage is None:
        yield None
        return
    storage = config.storage.at(run.name)
    with Lease(storage, observer.line) as lease:
        if config.stored is None:
            check_free(storage)
        if config.stored is not None and pull(run.path, storage) and read_json(run.search_file) != config.stored:
            raise InputError(
                f"another machine went on with the run {run.name!r} while this one began: give the same command again"
            )
        log = StoredLog(run.events.path, storage, lease.check)
        log.sync()
        run.use(log)
        yield storage


@contextmanager
def workplace(config: SearchConfig) -> Iterator[tuple[Place, Cluster | None]]:
    """Yield the machines of the search, checked for what a trial needs, and the cluster that it joined or None."""
    if config.dashboard:
        from autodistill.search.runners.ray_dashboard import check_dashboard

        check_dashboard()
    joined = None
    if config.ray_address is not None:
        from autodistill.search.runners.ray_cluster import join

        # With a storage, each node fetches the files itself, so no folder has to be shared.
        folders = [] if config.storage else [config.out, config.cache]
        joined = join(config.ray_address, folders, config.requested.files, config.storage)
    try:
        here = detect_for_training()
        machines = joined.machines if joined else (here,)
        share = check_share(machines, config.gpus_per_trial, config.cpus_per_trial, config.runner)
        check_scoring(config.scoring, [here, *machines])
        yield Place(here=here, machines=machines, share=share), joined
    finally:
        if joined is not None:
            joined.leave()


@contextmanager
def runner_of(
    config: SearchConfig,
    place: Place,
    joined: Cluster | None,
    run: RunFolder,
    tell: Callable[[str], None],
) -> Iterator[Runner]:
    """Yield the function that drives a campaign.

    Ray starts in the background while the teacher's outputs are cached. A Ray that this search started is shut down at
    the end, whatever fails before the trials. `tell` receives lines about Ray's dashboard.
    """
    if config.runner == "inline":
        yield run_inline
        return
    from autodistill.search.runners.ray import run_ray
    from autodistill.search.runners.ray_dashboard import Dashboard
    from autodistill.search.runners.ray_local import LocalRay

    dashboard = None
    if config.dashboard:
        gauges = SearchGauges(RunFolder(config.out, run.name), config.cache, config.cache_limit_bytes)
        dashboard = Dashboard(run.path, gauges, tell)
    cluster = joined or LocalRay(place.here, dashboard)
    cluster.to_go_on = lambda: going_on(config, run)
    try:
        yield partial(run_ray, cluster)
    finally:
        cluster.leave()
