"""Federated distillation: clients train on text of their own, and share predictions on a public text alone."""

from autodistill.federated.client import Client, join
from autodistill.federated.predictions import Predictions, pool
from autodistill.federated.server import serve

__all__ = ["Client", "Predictions", "join", "pool", "serve"]
