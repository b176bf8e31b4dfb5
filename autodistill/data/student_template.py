"""The chat template of a pretrained student, if it differs from the teacher's, in the teacher's tokens.

A student reads the teacher's token ids. Its own template is therefore tokenised by the teacher's tokenizer, with the
student's names for the tokens that begin and end a text. Two renderings of a conversation differ between the answers. A
token of an answer is shared if all renderings have it at the same place in the answer's content. The tokens that end an
answer count as the same token under two names. They are shared if each directly follows the content. The teacher's
probability of its own end token, at each position of an answer, is used as that of the student's end token.
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

_LICENSE_FILES = ("license", "licence", "copying", "notice")  # prefixes of file names, in lower case

# Files of the teacher whose content depends on the template, so that a student's own template changes them.
_GENERATION, _GGUF = "generation_config.json", "gguf_tokenizer.json"

_RENAMED = ("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json")

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

_GGUF_IDS = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "add_bos_token")

_END = -1  # stands for the id of the token that ends an answer, in any rendering


def copy_text(teacher: Path, folder: Path) -> None:
    """Copy a teacher's tokenizer, its other text files and its licence text."""
    for path in teacher.iterdir():
        if path.is_file() and path.suffix in _TEXT_FILES and path.name not in _OWN_FILES:
            shutil.copyfile(path, folder / path.name)
    if (teacher / MORE_TEMPLATES).is_dir():
        shutil.copytree(teacher / MORE_TEMPLATES, folder / MORE_TEMPLATES, dirs_exist_ok=True)
    copy_license(teacher, folder)


def copy_license(model: Path, folder: Path) -> None:
    """Copy a model's licence text and notices, which must accompany the model everywhere."""
    for path in model.iterdir():
        if path.is_file() and path.name.lower().startswith(_LICENSE_FILES):
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)


def write_text(teacher: Path, renderer: Renderer, folder: Path) -> None:
    """Write the files of `copy_text`, but with a renderer's template and its names for begin and end of text.

    A runtime that serves a student from such a folder asks questions as the renderer does, and stops at its end tokens.
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
    """Return a model's chat template if it renders conversations differently from the teacher's.

    Args:
        model, teacher: Folders that transformers' AutoTokenizer can load.
        conversations: The data.

    Returns:
        The template and None, or None and the reason why the model's own template cannot be used. Both are None if the
        model has no template, or if its renderings are the same as the teacher's.
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

    The n-th shared tokens of all renderings correspond: they are the same token, or each is its rendering's end token.

    Args:
        records: The renderings of one conversation.
        ends: The token that ends an answer in each rendering.
    """
    found = [_places(record, end) for record, end in zip(records, ends, strict=True)]
    common = set(found[0]).intersection(*found[1:])
    return [
        replace(record, shared=_mask(record, places, common)) for record, places in zip(records, found, strict=True)
    ]


_Place = tuple[int, int, int, int, int]


def _places(record: Rendered, end: int) -> dict[_Place, int]:
    """Return the positions of the predicted answer tokens, by turn, start and end in its content, id and a number.

    The number tells equal tokens at the same place apart.
    """
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
        # The bytes of one character may be several tokens, some of which may be equal.
        key = (turn, start, stop, token)
        places[*key, met[key]] = index
        met[key] += 1
    return places


def _mask(record: Rendered, places: dict[_Place, int], common: set[_Place]) -> npt.NDArray[np.bool_]:
    mask = np.zeros(len(record.tokens), dtype=bool)
    mask[[index for place, index in places.items() if place in common]] = True
    return mask
