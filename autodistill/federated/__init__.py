"""Federated distillation: clients train on their own text, and share only predictions on a public text."""

from autodistill.federated.client import Client, join
from autodistill.federated.on_ray import run
from autodistill.federated.predictions import Predictions, pool
from autodistill.federated.server import serve

__all__ = ["Client", "Predictions", "join", "pool", "run", "serve"]
