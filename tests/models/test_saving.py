"""A model is written as a transformers folder."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig
from transformers.utils import logging

from autodistill.models.loading import save_model


def test_a_model_is_saved_without_a_progress_bar(tmp_path: Path) -> None:
    """Transformers' progress bar is off while a model is saved. If it was on, it is on again afterwards."""
    seen = []

    class Model:
        config = LlamaConfig()

        def save_pretrained(self, folder: Path) -> None:
            seen.append((folder, logging.is_progress_bar_enabled()))

    before = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        save_model(Model(), tmp_path)
        assert seen == [(tmp_path, False)]
        assert logging.is_progress_bar_enabled()
    finally:
        if not before:
            logging.disable_progress_bar()
