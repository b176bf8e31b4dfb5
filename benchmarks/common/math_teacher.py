"""Train the math teacher of `claims.py`: a small Llama that learns sums from nothing, on a task of reasoning-gym.

    python -m benchmarks.common.math_teacher [--time 5m]

Questions are chains of three terms of two digits ("57 - 87 + 70 ="). Answers are the sums from left to right and the
result. A token is a digit, a sign with its spaces, or the instruction. Training stops at the end of the time budget and
continues when the program is called again. The teacher and the data are kept in the cache of AutoDistill.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autodistill.data.dataset import TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import build_student, save_student
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.trainer import Trainer
from autodistill.evaluation.base import Subject
from autodistill.evaluation.evaluate import Evaluation, evaluate
from autodistill.hardware.budget import Budget
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model, save_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.models.spec import ModelSpec
from autodistill.options import cache_folder
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Init, Strategy
from autodistill.utils.hashing import content_hash
from benchmarks.common.plans import straight_plan
from benchmarks.common.program import parse, parser_of

TASK = "reasoning-gym:chain_sum?size=150000&seed=11&min_terms=3&max_terms=3&min_digits=2&max_digits=2"
# The longest record has 39 tokens, so a sequence holds one record.
LENGTH = 40
BATCH = 64 * LENGTH
TOKENS = 2500 * BATCH
SHAPE = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 384}
RECIPE = Strategy(
    init=Init(depth=1.0), distillation=Distillation(divergence_weight=0.0, learning_rate=2e-3, train_embeddings=True)
)
DEPLOYMENT = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
BUDGET = Budget(memory_bytes=10**9)
_PIECES = [
    "State the final answer to the following arithmetic problem: ",
    "#### ",
    " + ",
    " - ",
    " = ",
    " =",
    "\n",
    "-",
]
_END, _UNKNOWN = "</s>", "<unk>"


@dataclass(frozen=True, kw_only=True)
class MathTeacher:
    """The trained teacher, and the data on which it and its students are trained and tested."""

    folder: Path
    spec: ModelSpec
    data: Path
    data_fingerprint: str
    train: TokenSet
    validation: TokenSet
    test: TokenSet


def make_small(steps: int = 20) -> None:
    """Train a teacher with few steps and questions in this process, for programs that need one at once."""
    global TASK, TOKENS
    TASK, TOKENS = TASK.replace("size=150000", "size=4000"), steps * BATCH
    math_teacher(questions=10)


def math_plan(tokens: int, *, batch: int = BATCH, warmup: int = 100 * BATCH, decay: float = 0.2) -> Plan:
    """Return a plan of this many training tokens on one core. The plan's other fields are not read here."""
    fields = {"warmup_tokens": warmup, "decay": decay, "micro_batch": batch // LENGTH}
    return straight_plan(tokens, sequence_length=LENGTH, batch_tokens=batch, **fields)


def math_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each digit, each sign with its spaces, and the instruction."""
    pieces = [_UNKNOWN, _END, *_PIECES, *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(pieces)}, unk_token=_UNKNOWN))
    pattern = "|".join(piece.replace("+", r"\+") for piece in _PIECES) + r"|\d"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, unk_token=_UNKNOWN, model_max_length=LENGTH * 2
    )


def new_model(folder: Path, shape: Mapping[str, int] = SHAPE) -> Path:
    """Write the untrained teacher, or one of another shape."""
    tokenizer = math_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    torch.manual_seed(0)
    save_model(LlamaForCausalLM(config), folder)
    tokenizer.save_pretrained(folder)
    return folder


def ask(model: object, spec: ModelSpec, data: TokenSet, deployment: Deployment = DEPLOYMENT) -> Evaluation:
    """Measure exact match and next-token accuracy on held-out questions, one in each sequence."""
    names = ("accuracy", "exact_match")
    return evaluate(model, Subject(spec=spec, deployment=deployment, budget=BUDGET), data, None, evaluators=names)[0]


def teacher_folder() -> Path:
    """Return the folder of the cache that the trained teacher is kept in, whether it is trained or not."""
    key = content_hash([SHAPE, RECIPE.to_json(), TASK, LENGTH, BATCH, TOKENS])
    return cache_folder() / "teachers" / f"math-{key}"


def math_teacher(limit_seconds: float = float("inf"), questions: int = 500) -> MathTeacher | None:
    """Return the teacher, trained if it is not yet, or None if the time was too short.

    Args:
        limit_seconds: Time that training may take now. The next call continues it.
        questions: Number of unseen questions that the trained teacher is asked.
    """
    cache, folder = cache_folder(), teacher_folder()
    start = new_model(folder.with_name(f"{folder.name}-start"))
    source = resolve_data(TASK)
    prepared = prepare(source, start, tokenizer_fingerprint(start), LENGTH, cache)
    train, validation, test = (load_split(prepared.folder, split) for split in prepared.splits)
    if not folder.exists() and not _train(start, folder, train, test.head(questions * LENGTH), limit_seconds):
        return None
    return MathTeacher(
        folder=folder,
        spec=spec_from_config(LlamaConfig.from_pretrained(folder).to_dict()),
        data=prepared.folder,
        data_fingerprint=prepared.fingerprint,
        train=train,
        validation=validation,
        test=test,
    )


def _train(start: Path, folder: Path, data: TokenSet, test: TokenSet, limit_seconds: float) -> bool:
    """Continue training from the last checkpoint; return whether the teacher is trained now."""
    model, kept = build_student(start, RECIPE.init)
    spec = spec_from_config(model.config.to_dict())
    trainer = Trainer(
        model,
        teaching=Teaching(kept_layers=kept, layers=spec.layers, width=spec.width),
        strategy=RECIPE,
        plan=math_plan(TOKENS),
        data=data,
        seed=0,
    )
    checkpoint = folder.with_suffix(".partial")
    if checkpoint.exists():
        trainer.load(checkpoint)
    began = time.monotonic()
    branch = branch_point(TOKENS, 0.2, BATCH)
    for record in trainer.train_stable(branch):
        if record.tokens // BATCH % 100 == 0:
            spent = time.monotonic() - began
            loss = f"loss {record.loss:.4f}"
            print(f"{record.tokens:,} of {TOKENS:,} tokens, {loss}, {spent:.0f} s", file=sys.stderr, flush=True)
            if spent > limit_seconds:
                trainer.save(checkpoint)
                found = ask(model, spec, test).measurements["exact_match"]
                print(f"exact match {found.value:.3f} ± {found.stderr:.3f}", file=sys.stderr)
                return False
    trainer.save(checkpoint)
    for _ in trainer.train_decay(TOKENS):
        pass
    found = ask(model, spec, test).measurements["exact_match"]
    print(f"exact match {found.value:.4f} ± {found.stderr:.4f} after {TOKENS:,} tokens", file=sys.stderr)
    save_student(model, start, folder)
    return True


def main() -> None:
    """Train the teacher as far as the time allows, and print how well it answers its questions."""
    parser = parser_of(__doc__, time=True)
    parser.add_argument("--questions", type=int, default=2000, help="that the trained teacher is asked")
    arguments = parse(parser, questions=50)
    if arguments.smoke:
        make_small()
    torch.set_num_threads(1)
    keep_freed_memory()
    teacher = math_teacher(arguments.time)
    if teacher is None:
        sys.exit("not trained yet: call again")
    model = load_model(teacher.folder, torch.float32)
    for name, data in (("validation", teacher.validation), ("test", teacher.test)):
        measured = ask(model, teacher.spec, data.head(arguments.questions * LENGTH)).measurements
        exact, accuracy = measured["exact_match"], measured["accuracy"]
        print(f"{name}: exact match {exact.value:.4f} ± {exact.stderr:.4f}, next token {accuracy.value:.5f}")


if __name__ == "__main__":
    main()
