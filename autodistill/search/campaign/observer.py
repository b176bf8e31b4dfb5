"""What a search shows the user while it runs."""

from __future__ import annotations

from autodistill.search.campaign.campaign import Campaign


class Observer:
    """Receives what a search shows the user while it runs. This default shows nothing."""

    def phase(self, name: str) -> None:
        """Take the name of a phase that begins."""

    def line(self, text: str) -> None:
        """Take a line of text about something that happened."""

    def campaign(self, campaign: Campaign, best: float | None, baseline: float | None) -> None:
        """Take the state of the campaign after its trials changed."""
