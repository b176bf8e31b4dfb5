"""What a search tells a person while it runs."""

from __future__ import annotations

from autodistill.search.campaign.campaign import Campaign


class Observer:
    """What a search tells a person while it runs; the default tells nothing."""

    def phase(self, name: str) -> None:
        """A phase began."""

    def line(self, text: str) -> None:
        """Something worth a line happened."""

    def campaign(self, campaign: Campaign, best: float | None, baseline: float | None) -> None:
        """Trials changed."""
