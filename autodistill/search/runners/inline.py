"""Run a campaign's trials one after another in this process: for tests, debugging and machines without Ray."""

from __future__ import annotations

from autodistill.hardware.process_memory import killed_for_memory
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.worker.attempt import attempted, step_guard
from autodistill.search.worker.context import Workbench
from autodistill.search.worker.messages import TrialSetting
from autodistill.utils.clock import Moment


def run_inline(campaign: Campaign, setting: TrialSetting, deadline: Moment | None) -> None:
    """Drive the campaign until it is finished.

    Args:
        campaign: Decides what runs.
        setting: What all trials have in common.
        deadline: When a running trial is given back, or None.
    """
    bench, guard = Workbench(setting), step_guard(deadline)
    while (assignment := campaign.next()) is not None:
        # If the work kills this process, it ends the search. A resumed search must not begin with the same work for
        # ever.
        campaign.begin(assignment, killed_for_memory())
        try:
            outcome = attempted(bench, assignment, guard, deadline)
        except KeyboardInterrupt:
            campaign.abandon(assignment)
            raise
        campaign.take(assignment, outcome)
