"""Exporter to an onnxruntime-genai folder, with exactly the codes with which a student was evaluated."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError, MissingDependencyError, VerificationError
from autodistill.export.base import Artifact, Label, Ran, TokenIds
from autodistill.export.graphs.child import run_alone
from autodistill.export.graphs.onnx_decoder import Decoder, unsupported
from autodistill.export.graphs.onnx_graph import ACCURACY_LEVELS, DATA, Blocks, Graph, Weights
from autodistill.export.proof import deployed_model
from autodistill.export.student_reader import StudentFiles, copy_tokenizer, no_graph, read_json, replacing
from autodistill.hardware.runtime import Runtime
from autodistill.models.config import spec_from_config
from autodistill.models.layer_widths import model_class
from autodistill.models.llama_cpp_graphs import FULL, SLIDING
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import Format, as_held
from autodistill.quantization.grids import Floats, Grid, Scales
from autodistill.quantization.packing import from_bf16_bits
from autodistill.strategy.deployment import GRAPH, STORED_AS, Deployment
from autodistill.utils.json_files import write_json

if TYPE_CHECKING:
    from onnx import TensorProto

INSTALL = "pip install 'autodistill-search[onnx]'"
_BLOCKS, _PLUS_1 = "autodistill.blocks", "autodistill.plus_1"  # metadata properties of the graph
_SIZES = (16, 32, 64, 128, 256)  # block sizes of MatMulNBits
_CACHE_TOLERANCE = 0.05  # of keys and values, relative to their norm; rounding activations to 8 bits moves them less
_GENAI_TYPES = {"gpt_neox": "decoder"}  # onnxruntime-genai's names of families that differ from transformers'


class OnnxExporter:
    """Writes `model.onnx`, its weights in a file next to it, genai's config and the tokenizer; computes in float32."""

    name = "onnx"
    half = False
    formats: tuple[Format, ...] = ()
    runtimes: tuple[Runtime, ...] = ()
    runs_in = "ONNX Runtime"
    is_code = False
    packages: tuple[str, ...] = ("onnx", "onnxruntime")
    notes: Mapping[str, Any] = {f"accuracy_level of {bits}-bit codes": level for bits, level in ACCURACY_LEVELS.items()}

    def refuses(self, student: Path, deployment: Deployment) -> str:
        """Return which tensor, or which setting of the config, is not supported, or "".

        Raises:
            MissingDependencyError: onnx or onnxruntime is not installed.
        """
        self.check_installed()
        if reason := no_graph(student):
            return reason
        config = read_json(student / "config.json")
        if reason := unsupported(config):
            return (
                f"{self.name} cannot hold this {config['model_type']}: {reason}; export to torchscript or pt2 instead"
            )
        for tensor in as_held(spec_from_config(config), deployment).tensors:
            storage = deployment.storage(tensor)
            if not isinstance(storage, Grid) or (storage.container == "gguf" and storage.group_size in _SIZES):
                continue
            return (
                f"{self.name} cannot hold {tensor.name} as {storage.name}, whose products are rounded once more: "
                "export to compressed-tensors instead, or to torchscript or pt2 without its codes"
            )
        return ""

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Write the student into the folder `out`, one tensor in memory at a time; the card names its teacher.

        Raises:
            InputError: The student cannot be read or cannot be held, or `out` cannot be written.
            MissingDependencyError: onnx or onnxruntime is not installed.
        """
        self.check_installed()
        with StudentFiles(student, deployment) as files:
            if reason := self.refuses(student, deployment):
                raise InputError(reason)
            with replacing(out) as partial, (partial / DATA).open("wb") as data:
                graph = Graph(data, half=self.half)
                weights = Weights(graph)
                above = []
                for tensor in files.spec.tensors:
                    storage = deployment.storage(tensor)
                    weights.add(tensor, storage, files.pack(tensor.name))
                    above += [tensor.name] if storage == "f32_plus_1" else []
                decoder = Decoder(graph, weights, files.spec, files.config, rotary_of(files.config))
                blocks = {one: [form.bits, form.block, form.shift] for one, form in graph.blocks.items()}
                model = decoder.build({_BLOCKS: json.dumps(blocks), _PLUS_1: json.dumps(above)})
                (partial / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
                copy_tokenizer(student, partial)
                write_json(partial / "config.json", {**files.config, STORED_AS: served(deployment).to_json()})
                write_json(partial / "genai_config.json", genai_config(files.spec, files.config, student))
        return Artifact(path=out, size_bytes=sum((out / file).stat().st_size for file in (GRAPH, DATA)))

    def check_installed(self) -> None:
        """Refuse to continue without the packages.

        Raises:
            MissingDependencyError: A package is missing; the message has the command that installs it.
        """
        if missing := [one for one in self.packages if importlib.util.find_spec(one) is None]:
            raise MissingDependencyError(f"{self.name} needs {' and '.join(missing)}, not installed here: {INSTALL}")

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor, dequantised from its codes.

        Raises:
            VerificationError: The graph cannot be read, or its description of the data is wrong.
        """
        import onnx

        try:
            model = onnx.load(artifact / GRAPH, load_external_data=False)
            properties = {one.key: json.loads(one.value) for one in model.metadata_props}
            blocks, above = dict(properties[_BLOCKS]), set(properties[_PLUS_1])
        except Exception as error:  # protobuf has several exception classes
            raise VerificationError(f"{artifact / GRAPH} cannot be read: {error}") from error
        data = np.memmap(artifact / DATA, np.uint8, "r")
        stored = {
            one.name: one for one in model.graph.initializer if one.name.startswith(("model.", "gpt_neox.", "lm_"))
        }
        for name, tensor in stored.items():
            if name.endswith((".scales", ".minima")):
                continue
            values = _read(tensor, data)
            if not name.endswith(".codes"):
                yield name, values - np.float32(1) if name in above else values
                continue
            plain = name.removesuffix(".codes")
            bits, block, shift = blocks[plain]
            minima = stored.get(f"{plain}.minima")
            form = Blocks(bits=bits, block=block, shift=shift, offset=minima is not None)
            scales = Scales(_read(stored[f"{plain}.scales"], data), None if minima is None else _read(minima, data))
            yield plain, form.weights(form.unpack(values), scales)

    def run(self, artifact: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
        """Run the folder in ONNX Runtime, in a process of its own; see `Exporter.run`."""
        self.check_installed()
        return run_alone("onnx", artifact / GRAPH, artifact, sequences, threads)

    def first_difference(self, artifact: Path, tokens: TokenIds, student: Path, deployment: Deployment) -> str:
        """Return the first layer whose keys or values differ; see `NamesLayers`."""
        import torch
        from onnxruntime import InferenceSession
        from transformers import DynamicCache

        session = InferenceSession(str(artifact / GRAPH), providers=["CPUExecutionProvider"])
        count, ids = len(tokens), tokens[None].astype(np.int64)
        dtype = np.float16 if self.half else np.float32
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(count)[None]}
        given |= {
            one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), dtype)
            for one in session.get_inputs()
            if one.name not in given
        }
        found = dict(zip([one.name for one in session.get_outputs()], session.run(None, given), strict=True))
        with StudentFiles(student, deployment) as files:
            model = deployed_model(student, files)
        cache: Any = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(ids), cache=cache, use_cache=True)
        for place, layer in enumerate(cache.layers):
            for what, expected in (("values", layer.values.numpy()), ("keys", layer.keys.numpy())):
                off = np.linalg.norm(found[f"present.{place}.{what[:-1]}"].astype(np.float32) - expected)
                if not off <= _CACHE_TOLERANCE * np.linalg.norm(expected):
                    return f"the {what} of layer {place} are the first that differ"
        return f"over {count} tokens, the keys and values of all {len(cache.layers)} layers are as evaluated"


class OnnxHalfExporter(OnnxExporter):
    """The same with float16 activations and cache, for GPUs; weights stay as they were evaluated."""

    name = "onnx-f16"
    half = True


def served(deployment: Deployment) -> Deployment:
    """Return a deployment's counterpart in ONNX Runtime, with the same weights; other cache types are not available."""
    return replace(deployment, runtime="onnxruntime", cache_type_k="f16", cache_type_v="f16")


def rotary_of(config: Mapping[str, Any]) -> dict[str, tuple[Floats, float]]:
    """Return transformers' rotary frequencies by kind of layer, with the factor of sine and cosine.

    Args:
        config: Content of a supported family's config.json.

    Returns:
        Frequencies are float32 [rotated channels / 2]. If all layers are alike, only full attention has an entry.
    """
    import torch
    from transformers import AutoConfig

    own = AutoConfig.for_model(**config)
    with torch.device("meta"):
        kind = type(model_class(own)._from_config(own, dtype=torch.float32).base_model.rotary_emb)
    made = kind(own)
    found = {}
    for layers in (FULL, SLIDING):
        if hasattr(made, f"{layers}_inv_freq"):
            factor = getattr(made, f"{layers}_attention_scaling")
            found[layers] = (getattr(made, f"{layers}_inv_freq").float().numpy(), float(factor))
    return found or {FULL: (made.inv_freq.float().numpy(), float(made.attention_scaling))}


def genai_config(spec: ModelSpec, config: Mapping[str, Any], student: Path) -> dict[str, Any]:
    """Return onnxruntime-genai's config: names of inputs and outputs, sizes, end tokens, and sampling."""
    path = student / "generation_config.json"
    settings = {**config, **(read_json(path) if path.is_file() else {})}
    ends = settings.get("eos_token_id")
    known = {"bos_token_id": settings.get("bos_token_id"), "eos_token_id": ends}
    first = ends[0] if isinstance(ends, list) and ends else ends
    known["pad_token_id"] = settings.get("pad_token_id") if settings.get("pad_token_id") is not None else first
    sampling = {key: settings[key] for key in ("temperature", "top_k", "top_p") if settings.get(key) is not None}
    return {
        "model": {
            "type": _GENAI_TYPES.get(spec.architecture, spec.architecture),
            "context_length": spec.max_context,
            "vocab_size": spec.vocabulary,
            **{key: value for key, value in known.items() if value is not None},
            "decoder": {
                "filename": GRAPH,
                "session_options": {"provider_options": []},
                "head_size": spec.head_dim,
                "hidden_size": spec.width,
                "num_attention_heads": spec.heads,
                "num_key_value_heads": spec.kv_heads,
                "num_hidden_layers": spec.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(settings.get("do_sample", False)),
            "max_length": spec.max_context,
            "past_present_share_buffer": False,
            **sampling,
        },
    }


def _read(tensor: TensorProto, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Return an initializer: codes as bytes, everything else in float32.

    Raises:
        VerificationError: It lies outside of the data file, or has a type that no export writes.
    """
    from onnx import TensorProto, numpy_helper

    kinds: dict[int, Any] = {
        TensorProto.UINT8: np.uint8,
        TensorProto.FLOAT: np.float32,
        TensorProto.FLOAT16: np.float16,
        TensorProto.BFLOAT16: np.uint16,
    }
    if tensor.data_type not in kinds:
        raise VerificationError(f"{tensor.name} is of a type that no export writes: export the student again")
    if tensor.data_location == TensorProto.EXTERNAL:
        where = {one.key: one.value for one in tensor.external_data}
        shape, dtype = tuple(tensor.dims), np.dtype(kinds[tensor.data_type])
        offset, length = int(where["offset"]), int(where["length"])
        if where["location"] != DATA or length != dtype.itemsize * int(np.prod(shape)) or offset + length > len(data):
            raise VerificationError(f"{tensor.name} is not in {DATA}: export the student again")
        found = data[offset : offset + length].view(dtype).reshape(shape)
    else:
        found = numpy_helper.to_array(tensor)
    if tensor.data_type == TensorProto.BFLOAT16:
        return from_bf16_bits(found)
    return found if found.dtype == np.uint8 else found.astype(np.float32)
