"""Uses a smaller pretrained model as the student, with its embedding tables in the teacher's token order."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodistill.data.tokenization import load_tokenizer
from autodistill.distillation.teacher.resolve import resolve_teacher
from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.families import WHOLE_FAMILIES
from autodistill.models.loading import held, load_model, model_from_weights, token_tables
from autodistill.models.model_folder import read_config
from autodistill.models.spec import ModelSpec

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@cache
def pretrained_spec(reference: str) -> ModelSpec:
    """Return the shape of a model from its reference. Only its config or header is read.

    Raises:
        InputError: There is no such model, or its family is not supported.
    """
    return spec_from_config(resolve_teacher(reference).config)


def token_rows(model: Path, teacher: Path, name: str | None = None) -> Tensor:
    """Return, for each row of the teacher's embedding table, the row of the model's table for the same token.

    Tokens are the same if their texts are. A row without a counterpart is -1: the table may have more rows than there
    are tokens, and the teacher may have special tokens that the model does not know.

    Args:
        model, teacher: Transformers folders, whose configs and tokenizers are read.
        name: The model's name for people, or None to use its folder.

    Returns:
        int64 [the teacher's vocabulary].

    Raises:
        InputError: The model lacks ordinary tokens of the teacher, so it has another tokenizer.
    """
    wanted, known = load_tokenizer(teacher), load_tokenizer(model)
    rows = torch.full((spec_from_config(read_config(teacher)).vocabulary,), -1, dtype=torch.int64)
    held = spec_from_config(read_config(model)).vocabulary
    own = {text: row for text, row in known.get_vocab().items() if row < held}
    vocabulary, special = wanted.get_vocab(), wanted.get_added_vocab()
    missing = [text for text in vocabulary if text not in own and text not in special]
    if missing:
        name = name or str(model)
        raise InputError(
            f"logit distillation needs one vocabulary: {name} lacks {len(missing)} of the teacher's {len(vocabulary)} "
            f"tokens, {missing[0]!r} among them; choose a model with the teacher's tokenizer, or train this one on "
            "text that the teacher writes (sequence-level distillation): `autodistill write --prompts ... --out "
            f"answers.jsonl`, and then `autodistill distill sequence_level --data answers.jsonl --teacher {name}`"
        )
    for text, row in vocabulary.items():
        if row < len(rows) and text in own:
            rows[row] = own[text]
    return rows


def load_pretrained(model: Path, teacher: Path) -> Any:
    """Load a pretrained model in float32 that takes and returns the teacher's token ids.

    Rows are put in the teacher's order. A row without a counterpart becomes the mean of all rows, so its logit is the
    mean logit. By Jensen's inequality, n such rows of V then take at most n / V of the probability. If the model has
    the teacher's shape and token ids, its tables stay as they are.

    Raises:
        InputError: As for `token_rows`.
    """
    rows = token_rows(model, teacher)
    known = torch.nonzero(rows >= 0).flatten()
    alike = _shapes(model) == _shapes(teacher) and rows[known].equal(known)
    loaded = load_model(model, torch.float32)
    tables = {*token_tables(loaded), loaded.get_output_embeddings().weight}
    weights = {}
    for name, parameter in held(loaded).items():  # a tied table once
        weight = parameter.detach()
        if not alike and any(parameter is table for table in tables):
            table = weight[rows.clamp(min=0)]
            table[rows < 0] = weight.mean(dim=0)
            weight = table
        weights[name] = weight
    config = read_config(teacher)
    whole = WHOLE_FAMILIES.get(loaded.config.model_type)
    sizes = ("vocab_size", *(whole.vocabularies if whole else ()))
    changes = dict.fromkeys(sizes, len(rows)) | {name: config.get(name) for name in _SPECIAL_TOKENS}
    return model_from_weights(loaded, changes, weights)


def _shapes(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    return [(tensor.name, tensor.shape) for tensor in spec_from_config(read_config(folder)).tensors]


def describe_tokens(model: Any, text: Path) -> None:
    """Set the begin and end tokens in a model's configs as `student_template.write_text` wrote them.

    The generation config is replaced by the one in `text`. A changed config could not be saved if, for example, it
    names a temperature that greedy decoding does not use.

    Args:
        model: A transformers model. Its weights stay as they are.
        text: The folder that `write_text` wrote.
    """
    from transformers import GenerationConfig

    found = GenerationConfig.from_pretrained(text, local_files_only=True)
    model.generation_config = found
    for name in _SPECIAL_TOKENS:
        setattr(model.config, name, getattr(found, name))
