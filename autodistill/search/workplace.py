"""Where a search runs and what it holds meanwhile: the run's folder, its storage, a cluster; and how to resume it."""

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
"""Drives a campaign until it ends, or until some moment."""


@contextmanager
def disk_faults(folders: str, then: Callable[[], str]) -> Iterator[None]:
    """Say what to do where a file of the search itself finds no room, or its disk does not work.

    One of a trial's is a failure of that trial.
    """
    try:
        yield
    except Exception as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        if is_disk_full(error):
            raise AutoDistillError(f"a file could not be written ({said}): make room in {folders}{then()}") from error
        if is_disk_broken(error):
            raise AutoDistillError(f"a disk failed ({said}): look after that of {folders}{then()}") from error
        raise


def going_on_or_again(checked: SearchConfig, run: RunFolder) -> str:
    """Return how a person goes on, also before the run has its plan."""
    return going_on(checked, run) if run.search_file.exists() else "and start it again"


def going_on(checked: SearchConfig, run: RunFolder) -> str:
    """Return a sentence that nothing is lost, with the command line that goes on."""
    return f"every finished trial is kept. To go on: {resuming(checked, run)}"


def resuming(checked: SearchConfig, run: RunFolder) -> str:
    """The command line that goes on with a run."""
    resume = checked.command if checked.stored is not None else f"{checked.command} --resume"
    return resume if checked.named else f"{resume} --name {run.name}"


def run_folder_of(checked: SearchConfig) -> RunFolder:
    """The run's folder, locked: that which is resumed, or a new one, of another name where the default one is taken."""
    out, name = checked.out, checked.name
    if checked.stored is not None:
        return RunFolder.open(out, name, lock=True)
    return RunFolder.create_free(out, name) if not checked.named else RunFolder.create(out, name)


@contextmanager
def stored_run(checked: SearchConfig, run: RunFolder, observer: Observer) -> Iterator[Storage | None]:
    """The run's storage, which this process alone goes on with, and whose events are the run's from here on."""
    if checked.storage is None:
        yield None
        return
    storage = checked.storage.at(run.name)
    with Lease(storage, observer.line) as lease:
        if checked.stored is None:
            check_free(storage)
        if checked.stored is not None and pull(run.path, storage) and read_json(run.search_file) != checked.stored:
            raise InputError(
                f"another machine went on with the run {run.name!r} while this one began: give the same command again"
            )
        log = StoredLog(run.events.path, storage, lease.check)
        log.sync()
        run.use(log)
        yield storage


@contextmanager
def workplace(checked: SearchConfig) -> Iterator[tuple[Place, Cluster | None]]:
    """Yield where the search runs, and the cluster that it joined for it; what a trial is to be given is there."""
    if checked.dashboard:
        from autodistill.search.runners.ray_dashboard import check_dashboard

        check_dashboard()
    joined = None
    if checked.ray_address is not None:
        from autodistill.search.runners.ray_cluster import join

        # What is kept on a storage is fetched to each node.
        folders = [] if checked.storage else [checked.out, checked.cache]
        joined = join(checked.ray_address, folders, checked.asked.files, checked.storage)
    try:
        here = detect_for_training()
        machines = joined.machines if joined else (here,)
        share = check_share(machines, checked.gpus_per_trial, checked.cpus_per_trial, checked.runner)
        check_scoring(checked.scoring, [here, *machines])
        yield Place(here=here, machines=machines, share=share), joined
    finally:
        if joined is not None:
            joined.leave()


@contextmanager
def runner_of(
    checked: SearchConfig,
    place: Place,
    joined: Cluster | None,
    run: RunFolder,
    tell: Callable[[str], None],
) -> Iterator[Runner]:
    """The function that drives a campaign. Ray starts in the background while the teacher's outputs are cached, and a
    Ray of this search's own is left, whatever fails before the trials; `tell` has lines about its dashboard.
    """
    if checked.runner == "inline":
        yield run_inline
        return
    from autodistill.search.runners.ray import run_ray
    from autodistill.search.runners.ray_dashboard import Dashboard
    from autodistill.search.runners.ray_local import LocalRay

    dashboard = None
    if checked.dashboard:
        gauges = SearchGauges(RunFolder(checked.out, run.name), checked.cache, checked.cache_limit_bytes)
        dashboard = Dashboard(run.path, gauges, tell)
    cluster = joined or LocalRay(place.here, dashboard)
    cluster.to_go_on = lambda: going_on(checked, run)
    try:
        yield partial(run_ray, cluster)
    finally:
        cluster.leave()
