"""Helpers for the tests of a plug-in, and for ours: tiny models and texts, and a suite for each kind of plug-in."""

from autodistill.testing.divergences import DivergenceConformance
from autodistill.testing.evaluators import EvaluatorConformance, tiny_subject
from autodistill.testing.exporters import ExporterConformance
from autodistill.testing.models import save_tiny_teacher, small_plan, tiny_config, tiny_text, tiny_tokenizer

__all__ = [
    "DivergenceConformance",
    "EvaluatorConformance",
    "ExporterConformance",
    "save_tiny_teacher",
    "small_plan",
    "tiny_config",
    "tiny_subject",
    "tiny_text",
    "tiny_tokenizer",
]
