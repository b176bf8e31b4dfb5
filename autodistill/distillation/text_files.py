"""A model's config and tokenizer as a folder of transformers, for which none of its weights are obtained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from autodistill.distillation.gguf_conversion import convert_text
from autodistill.distillation.gguf_file import read_gguf
from autodistill.distillation.teacher import TeacherRef, hub_texts


@contextmanager
def text_files(ref: TeacherRef) -> Iterator[Path]:
    """The folder, which of a GGUF file lasts as long as the block: its tokenizer is the one that it is converted with.

    Args:
        ref: The model; one of a hub gives these files alone, into the hub's own cache.

    Raises:
        InputError: A GGUF file whose tokenizer cannot be read, or whose tensors are not those of its architecture.
    """
    if ref.path is None:
        yield hub_texts(ref)
    elif ref.kind == "folder":
        yield ref.path
    else:
        with TemporaryDirectory() as folder:
            convert_text(read_gguf(ref.path), Path(folder))
            yield Path(folder)
