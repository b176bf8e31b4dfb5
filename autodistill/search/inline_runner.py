"""Runs a campaign's trials one after another in this process: for tests, debugging and machines without Ray."""

from __future__ import annotations

from functools import partial

from autodistill.search.campaign import Campaign
from autodistill.search.deadline import step_guard
from autodistill.search.trials import attempt, work
from autodistill.trial import Workbench
from autodistill.trial_data import TrialSetting


def run_inline(campaign: Campaign, setting: TrialSetting, deadline: float | None) -> None:
    """Drives the campaign until it is finished.

    Args:
        campaign: Decides what runs.
        setting: What all trials have in common.
        deadline: `time.time()` at which a running trial is given back, or None.
    """
    bench = Workbench(setting)
    while (assignment := campaign.next()) is not None:
        campaign.take(assignment, attempt(partial(work, bench, assignment, step_guard(deadline))))
