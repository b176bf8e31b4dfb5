"""All that takes an export to a service that others run: image, manifests, monitoring, smoke test, sums, a card."""
