"""What others need to run an export as a service: image, manifests, monitoring, smoke test, checksums and a card."""
