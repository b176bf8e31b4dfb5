"""Exporter to LiteRT-LM's container: model, tokenizer, chat template and end tokens in one file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from autodistill.data.tokenization import load_tokenizer
from autodistill.export.phones.cached_decoder import CachedDecoder
from autodistill.export.phones.litert import LiteRtCodesExporter
from autodistill.export.phones.phone import CHUNK
from autodistill.export.phones.stored import Stored
from autodistill.export.student_reader import read_json
from autodistill.strategy.deployment import Deployment

_TOKENIZER = "tokenizer.json"
_MODEL, _METADATA = "model.tflite", "metadata.pb"


class LiteRtLmExporter(LiteRtCodesExporter):
    """Writes `student.litertlm` with the model of `litert-codes`; LiteRT-LM itself verifies it too."""

    name = "litertlm"
    file = "student.litertlm"
    runs_in = "LiteRT-LM"
    packages = ("litert-torch", "ai-edge-litert", "litert-lm-api")
    modules = ("litert_torch", "ai_edge_litert", "litert_lm_builder", "litert_lm")

    def refuses(self, student: Path, deployment: Deployment) -> str:
        """Return as `PhoneExporter.refuses` does, or that the student has no tokenizer for the container.

        Raises:
            MissingDependencyError: A package that converts or runs it is not installed.
        """
        if reason := super().refuses(student, deployment):
            return reason
        if (student / _TOKENIZER).is_file():
            return ""
        return f"{self.name} needs the tokenizer as {_TOKENIZER}, which the student does not have: export to litert"

    def write(self, decoder: CachedDecoder, stored: Mapping[str, Stored], out: Path) -> None:
        """Convert the model, and put it into one file with everything else that LiteRT-LM needs."""
        from litert_lm_builder import litertlm_builder as building

        container, self_file = building.LitertLmFileBuilder(), out / self.file
        super().write(decoder, stored, out)
        model, metadata = self_file.rename(out / _MODEL), out / _METADATA
        metadata.write_bytes(_metadata(out, decoder.context))
        kind = building.TfLiteModelType.PREFILL_DECODE
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            author = building.Metadata(key="Authors", value="AutoDistill", dtype=building.DType.STRING)
            container.add_system_metadata(author)
            container.add_llm_metadata(str(metadata))
            container.add_hf_tokenizer(str(out / _TOKENIZER))
            container.add_tflite_model(str(model), kind, prefer_activation_type="fp32")
            with self_file.open("wb") as file:
                container.build(file)
        model.unlink()
        metadata.unlink()


def _metadata(folder: Path, context: int) -> bytes:
    """Return LiteRT-LM's metadata of a model: its first token, end tokens, chat template, and length.

    LiteRT-LM reads prompts in whole chunks. The length therefore leaves room in the cache to pad the last chunk.
    """
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, llm_model_type_pb2

    made, tokenizer = llm_metadata_pb2.LlmMetadata(), load_tokenizer(folder)
    made.max_num_tokens = context - min(CHUNK, context) + 1
    first = tokenizer("a")["input_ids"][:1]
    if first and first[0] == tokenizer.bos_token_id:
        made.start_token.token_ids.ids.append(first[0])
    path = folder / "generation_config.json"
    ends = (read_json(path) if path.is_file() else {}).get("eos_token_id", tokenizer.eos_token_id)
    for one in ends if isinstance(ends, list) else [ends]:
        if one is not None:
            made.stop_tokens.add().token_ids.ids.append(one)
    if isinstance(tokenizer.chat_template, str):
        made.jinja_prompt_template = tokenizer.chat_template
    made.llm_model_type.CopyFrom(llm_model_type_pb2.LlmModelType(generic_model=llm_model_type_pb2.GenericModel()))
    return bytes(made.SerializeToString(deterministic=True))
