"""The chat template of a pretrained student, if it differs from the teacher's, in the teacher's tokens.

A student reads the teacher's ids, so its own template is written by the teacher's tokenizer, under the names that the
student's own has for the tokens which begin and end a text. Two renderings of a conversation differ between the
answers; of an answer a token is shared where all renderings have it, in the same place of the answer's content. The
tokens that end an answer are one event under two names: they share their place where each follows the content at once,
and what a teacher says of ending an answer, there and before, is read as said of the student's own end.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autodistill.data.chat_template import Rendered, Renderer, Template
from autodistill.data.conversations import ANSWERING, Conversation, Turn
from autodistill.data.tokenization import load_tokenizer, save_tokenizer
from autodistill.errors import InputError
from autodistill.models.model_folder import MORE_TEMPLATES
from autodistill.utils.json_files import replacing

_TEXT_FILES = (".json", ".jinja", ".model", ".txt")

_OWN_FILES = ("config.json", "model.safetensors.index.json", "teacher.json")

_LICENSE_FILES = ("license", "licence", "copying", "notice")  # as these names begin, in small letters

# Of those the ones that say what a template of the student's own says otherwise.
_GENERATION, _GGUF = "generation_config.json", "gguf_tokenizer.json"

_RENAMED = ("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json")

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_GGUF_IDS = ("bos_token_id", "eos_token_id", "eot_token_id", "add_bos_token")

_END = -1  # in the place of the id of whatever ends an answer


def copy_text(teacher: Path, folder: Path) -> None:
    """Copy the tokenizer, other text files of a teacher, and its licence text."""
    for path in teacher.iterdir():
        if path.is_file() and path.suffix in _TEXT_FILES and path.name not in _OWN_FILES:
            shutil.copyfile(path, folder / path.name)
    if (teacher / MORE_TEMPLATES).is_dir():
        shutil.copytree(teacher / MORE_TEMPLATES, folder / MORE_TEMPLATES, dirs_exist_ok=True)
    copy_license(teacher, folder)


def copy_license(model: Path, folder: Path) -> None:
    """Copy a model's licence text and the notices beside it, which accompany the model everywhere."""
    for path in model.iterdir():
        if path.is_file() and path.name.lower().startswith(_LICENSE_FILES):
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)


def write_text(teacher: Path, renderer: Renderer, folder: Path) -> None:
    """Write what `copy_text` does, with a renderer's template and its names for begin and end of text.

    What serves a student of such a folder puts questions as the renderer does, and stops at its ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy_text(teacher, folder)
    for name in _RENAMED:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / MORE_TEMPLATES, ignore_errors=True)
    tokenizer = renderer.tokenizer
    save_tokenizer(tokenizer, folder)
    generation, gguf = folder / _GENERATION, folder / _GGUF
    settings = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    settings |= {name: getattr(tokenizer, name) for name in _IDS}
    stops = renderer.stops
    settings["eos_token_id"] = stops[0] if len(stops) == 1 else list(stops)
    generation.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if gguf.is_file():
        inherited = json.loads(gguf.read_text(encoding="utf-8"))
        kept = {name: value for name, value in inherited.items() if name not in _GGUF_IDS}
        gguf.write_text(json.dumps(kept, indent=1, sort_keys=True), encoding="utf-8")


def own_template(
    model: Path, teacher: Path, conversations: Sequence[Conversation]
) -> tuple[Template | None, str | None]:
    """Return a model's chat template if it renders conversations differently from the teacher's, else None.

    Args:
        model, teacher: Folders that transformers' AutoTokenizer can load.
        conversations: The data.

    Returns:
        The template, and None; or None, and why the model's own template cannot be used. Twice None for a model without
        a template, or whose renderings are the teacher's.
    """
    if not load_tokenizer(model).chat_template:
        return None, None
    theirs = Renderer(teacher)
    try:
        own = Renderer(model)
    except InputError as error:
        return None, str(error)
    template = own.template
    if template is None or template == theirs.template:
        return None, None
    patterns = [_pattern(roles) for roles in dict.fromkeys(tuple(t.role for t in one.turns) for one in conversations)]
    for token in (template.bos, template.eos):
        if token is not None and token not in theirs.tokenizer.get_vocab():
            return None, f"it needs {token!r}, which the teacher's vocabulary lacks"
    renderer = Renderer(teacher, template)
    try:
        for turns in patterns:
            ours, written = (
                one.tokenizer.tokenize(one.text(turns), add_special_tokens=False) for one in (own, renderer)
            )
            if ours != written:
                first = next((a for a, b in zip(ours, written, strict=False) if a != b), ours[-1])
                return None, f"the teacher's tokenizer does not write its {first!r} as that token"
        asked = all(renderer.asking(turns[:-1]) == theirs.asking(turns[:-1]) for turns in patterns)
    except InputError as error:
        return None, f"it does not take these data: {error}"
    same = asked and renderer.end == theirs.end
    if same and all(renderer.text(one.turns) == theirs.text(one.turns) for one in conversations):
        return None, None
    return template, None


def _pattern(roles: Sequence[str]) -> tuple[Turn, ...]:
    return tuple(Turn(role, "b" if role == ANSWERING else "a") for role in roles)


def share(records: Sequence[Rendered], ends: Sequence[int]) -> list[Rendered]:
    """Return the renderings of a conversation with the answer tokens that they share.

    The n-th shared token of one is the n-th of any other: the same token, or each the rendering's own end.

    Args:
        records: Of one conversation.
        ends: The token that each ends an answer with.
    """
    found = [_places(record, end) for record, end in zip(records, ends, strict=True)]
    common = set(found[0]).intersection(*found[1:])
    return [
        replace(record, shared=_mask(record, places, common)) for record, places in zip(records, found, strict=True)
    ]


_Place = tuple[int, int, int, int, int]


def _places(record: Rendered, end: int) -> dict[_Place, int]:
    """Return the predicted answer tokens by turn, place in its content, id and number, with their positions."""
    assert record.spots is not None
    where = np.flatnonzero(record.answers & (record.spots[:, 0] >= 0))
    where = where[where > 0]
    ids, spots = record.tokens[where], record.spots[where].copy()
    ended = ids == end
    spots[ended, 2] = spots[ended, 1]
    met: Counter[tuple[int, int, int, int]] = Counter()
    places: dict[_Place, int] = {}
    for index, (turn, start, stop), token in zip(
        where.tolist(), spots.tolist(), np.where(ended, _END, ids).tolist(), strict=True
    ):
        # The bytes of one character may be several tokens, and equal ones among them.
        key = (turn, start, stop, token)
        places[*key, met[key]] = index
        met[key] += 1
    return places


def _mask(record: Rendered, places: dict[_Place, int], common: set[_Place]) -> npt.NDArray[np.bool_]:
    mask = np.zeros(len(record.tokens), dtype=bool)
    mask[[index for place, index in places.items() if place in common]] = True
    return mask
