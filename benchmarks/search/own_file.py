"""Does a search ever end with less than the GGUF file that its user brought?

    python -m benchmarks.search.own_file [--text FILE] [--time 4m]

Trains two small models on eight tenths of a text: one like Gemma 3, with most weights in its table, and one like Qwen
2. Each is stored as llama.cpp's Q4_K_M would be. Searches begin with that file, on another tenth of the text: with a
budget that holds the file, and with 90% of what it needs. What is exported and the file itself then read the last tenth
in llama.cpp. Without `--text`, the text is PostgreSQL's documentation, from Debian.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.export.gguf import GgufExporter
from autodistill.models.config import spec_from_config
from autodistill.models.tensors import Role
from autodistill.options import cache_folder
from autodistill.quantization.scheme import scheme_by_tensor
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from benchmarks.common import program, report
from benchmarks.common.debian_texts import debian_texts

SHAPES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 768, "num_attention_heads": 4},
    "qwen2": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024, "num_attention_heads": 4},
}
LENGTH, READ = 256, 32  # tokens of a sequence, and sequences of held-out text
PARTS = {"learned": range(8), "searched": (8,), "held out": (9,)}  # tenths of the documents
TARGETS = "Where the file fits: never a higher loss by more than a standard error, never larger for the same loss."


def apart() -> Iterator[str]:
    """Yield the documents of PostgreSQL's documentation."""
    folder = debian_texts(("postgresql-doc-17",)).folder
    yield from (path.read_text(encoding="utf-8") for path in sorted(folder.glob("postgresql*/*.txt")))


def read(path: Path) -> list[str]:
    """Return the documents of a file of JSON lines."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def stand_in(family: str, tokens: np.ndarray, tokenizer: Path, seconds: float, out: Path) -> Path:
    """Train a model of a family from scratch on int tokens [tokens], and return its folder."""
    torch.manual_seed(0)
    from transformers import AutoConfig

    sizes = {**SHAPES[family], "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048}
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = AutoConfig.for_model(family, vocab_size=len(words), tie_word_embeddings=True, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rates = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rows = torch.from_numpy(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64))
    began, step = time.monotonic(), 0
    while (share := (time.monotonic() - began) / seconds) < 1:
        for group in rates.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20, 2 * (1 - share))
        batch = rows[torch.randint(len(rows), (4,))]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        rates.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rates.step()
        step += 1
    model.save_pretrained(out)
    words.save_pretrained(out)
    return out


def as_q4_k_m(folder: Path, out: Path) -> Path:
    """Store a model in Q4_K, with values, down projections and the table in Q6_K, and return the file."""
    spec = spec_from_config(json.loads((folder / "config.json").read_text()))
    wide = ("v_proj", "down_proj", "embed_tokens")
    matrices = [one for one in spec.tensors if one.role in (Role.LINEAR, Role.EMBEDDING, Role.HEAD)]
    scheme = scheme_by_tensor({one: "q6_k" if any(part in one.name for part in wide) else "q4_k" for one in matrices})
    deployment = Deployment.from_json({**scheme.to_json(), "runtime": "llama.cpp"})
    return GgufExporter().export(folder, deployment, out).path


def losses(file: Path, rows: np.ndarray, cache: tuple[str, str]) -> np.ndarray:
    """Return what a file loses of each sequence in llama.cpp, in nats a token."""
    server = LlamaServer(file, LENGTH + 1, 1, cache_type_k=cache[0], cache_type_v=cache[1], whole_cache=True)
    return server.read(rows.tolist())[1].mean(axis=1)


def searched(file: Path, text: Path, budget: int, given: str, folder: Path) -> dict[str, Any]:
    """Search from a file, and return the JSON document, or the error with its exit code."""
    command = [sys.executable, "-m", "autodistill", "search", "--json", "--budget", f"{budget}B", "--time", given]
    command += ["--teacher", str(file), "--data", str(text), "--runs", str(folder), "--context", "512"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {**json.loads(done.stdout or "{}"), "code": done.returncode}


def compared(family: str, budget: str, file: Path, found: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """Return a line of the report: the exported file beside the user's own, on the same held-out text."""
    line = {"family": family, "budget": budget, "code": found["code"], "own MB": file.stat().st_size / 1e6}
    if found["code"]:
        return line | {"exported": found.get("error", {}).get("message", "")}
    best, path = found["best"], Path(found["paths"]["gguf"])
    cache = best["deployment"].get("cache_type_k", "f16"), best["deployment"].get("cache_type_v", "f16")
    own, made = losses(file, rows, ("f16", "f16")), losses(path, rows, cache)
    gap = made - own
    return line | {
        "exported": f"{best['kind']} as {best['row_id']}",
        "MB": path.stat().st_size / 1e6,
        "own loss": float(own.mean()),
        "loss": float(made.mean()),
        "more": float(gap.mean()),
        "error": float(gap.std(ddof=1) / math.sqrt(len(gap))),
    }


def main() -> None:
    """Make both files, search from each under two budgets, and write the report."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--text", type=Path, help="a file of JSON lines with a `text` for each document")
    parser.add_argument("--time", default="4m", help="of each search")
    parser.add_argument("--train", type=float, default=150.0, help="seconds of training each stand-in")
    given = program.parse(parser, train=5.0, time="3m")
    documents = read(given.text) if given.text else list(apart())
    tokenizer = materialize(resolve_teacher("smollm2"), cache_folder()).folder
    words = AutoTokenizer.from_pretrained(tokenizer)
    parts = {name: [one for place, one in enumerate(documents) if place % 10 in which] for name, which in PARTS.items()}
    learned, held_out = (np.array(words("\n".join(parts[name]))["input_ids"]) for name in ("learned", "held out"))
    held_out = held_out[: READ * LENGTH].reshape(-1, LENGTH)
    found = []
    for family in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder, "text.jsonl")
            text.write_text("".join(json.dumps({"text": one}) + "\n" for one in parts["searched"]))
            made = stand_in(family, learned, tokenizer, given.train, Path(folder, "model"))
            file = as_q4_k_m(made, Path(folder, "file"))
            asked = 2 * file.stat().st_size + 60 * 10**6
            whole = searched(file, text, asked, given.time, Path(folder, "runs"))
            found.append(compared(family, "holds the file", file, whole, held_out))
            rows = [one for one in whole.get("rows", ()) if one["deployment"].get("format") == "gguf-file"]
            need = int(0.9 * rows[0]["memory_bytes"]) if rows else asked // 2
            part = searched(file, text, need, given.time, Path(folder, "runs"))
            found.append(compared(family, "90% of its need", file, part, held_out))
            print(found[-2:], flush=True)
    lines = [[f"{value:.4f}" if isinstance(value, float) else str(value) for value in one.values()] for one in found]
    titles = max((list(one) for one in found), key=len)
    print(
        report.write(
            "own-file", "A search beside the file that its user brought", [TARGETS, report.table(titles, lines)]
        )
    )


if __name__ == "__main__":
    main()
