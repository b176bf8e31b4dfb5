"""Causal language models of transformers in memory: loaded from a folder, or made from a model and new weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from autodistill.errors import InputError
from autodistill.models.config import spec_from_config, uniform
from autodistill.models.config_fields import check_tokens
from autodistill.models.families import FAMILIES, WHOLE_FAMILIES, names_of
from autodistill.models.layer_widths import model_class, padded
from autodistill.models.model_folder import check_files, read_config, read_json, weight_files
from autodistill.models.spec import ModelSpec
from autodistill.models.stored_tensors import check_stored
from autodistill.models.tensors import stacked
from autodistill.models.whole.experts import EXPERTS
from autodistill.models.whole.mixtures import stored_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_GENERATION = "generation_config.json"

ATTENTION = "sdpa_of_equal_heads"
"""Name under which transformers knows this attention; it is in no folder that is written."""


def check_model(folder: Path) -> None:
    """Refuse a folder if transformers makes no model from it, or a model that differs from what its files describe.

    Args:
        folder: transformers' folder of a model of a supported family.

    Raises:
        InputError: As by `check_files`, `spec_from_config` and `check_stored`, or if transformers rejects its configs.
    """
    check_files(folder)
    config = read_config(folder)
    spec = spec_from_config(config)
    check_stored(folder, spec)
    _check_made(folder, config, spec)
    if (folder / _GENERATION).is_file():
        check_tokens(read_json(folder / _GENERATION), _GENERATION)
        _check_generation(folder)


def _check_made(folder: Path, content: Mapping[str, Any], spec: ModelSpec) -> None:
    """Let transformers build the model of a folder without memory for weights, and run it on two tokens."""
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        taken = [name for name in content if callable(getattr(type(config), name, None))]
        with torch.device("meta"):
            kind = model_class(config)
            options = implementations(kind) | {"attn_implementation": "sdpa"}
            model = kind._from_config(config, dtype=torch.float32, **options).eval()
            shapes = {name: stacked(name, tensor.shape) for name, tensor in held(model).items()}
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits
    except Exception as error:  # whatever transformers and torch raise over a field that they cannot use
        raise InputError(
            f"transformers cannot make the model that {path} describes ({one_line(error)}): check that file"
        ) from error
    if taken:
        raise InputError(f"{path} sets {taken[0]}, which is not a field of a model's config: remove it")
    if shapes != {tensor.name: tensor.shape for tensor in spec.tensors} or logits.shape != (1, 2, spec.vocabulary):
        raise InputError(f"{path} describes no plain {spec.architecture}: take out what makes it another model")


def _check_generation(folder: Path) -> None:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True).validate()
    except Exception as error:  # whatever transformers raises over a field that it cannot use
        raise InputError(
            f"transformers cannot read {folder / _GENERATION} ({one_line(error)}): check or remove that file"
        ) from error


def load_model(folder: Path, dtype: torch.dtype, device: str = "cpu", *, divided: int = 1) -> PreTrainedModel:
    """Load a causal language model for inference: from safetensors only, without remote code, without network.

    Args:
        folder: transformers' folder.
        dtype: Type of the weights, whatever type the file has.
        device: Where the model goes.
        divided: Number of processes that share the model; all of them call this. Each reads its part of the weights as
            distributed tensors, by transformers' own plan.

    Raises:
        InputError: The weights are not those of the model that the folder's config describes.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.distributed.configuration_utils import DistributedConfig

    check_stored(folder, spec_from_config(read_config(folder)))
    plan = {"distributed_config": DistributedConfig(tp_size=divided, tp_plan="auto")} if divided > 1 else {}
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            kind = model_class(config)
            loaded: Any = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                **implementations(kind),
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # such weights are in the report
                output_loading_info=True,
                **plan,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"transformers cannot load {folder} ({one_line(error)}): get the folder again") from error
    model, report = loaded
    _check_report(report, folder)
    model.to(device)
    model.eval()
    return cast("PreTrainedModel", model)


def implementations(kind: Any) -> dict[str, str]:
    """Return transformers' options that say how attention and experts of a class of models are computed here."""
    experts = {"experts_implementation": EXPERTS} if kind._can_set_experts_implementation() else {}
    return {"attn_implementation": ATTENTION, **experts}


def _check_report(report: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model if transformers filled in or left out a weight; this is the last check after `check_stored`."""
    faults = {what.removesuffix("_keys"): found for what, found in report.items() if what.endswith("_keys") and found}
    if faults:
        what, found = next(iter(faults.items()))
        named = ", ".join(sorted(map(str, found))[:3])
        raise InputError(f"{folder} does not hold the weights of its model ({what}: {named}): get the folder again")


def one_line(error: Exception) -> str:
    """Return the message of a library's error as part of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_head(folder: Path) -> torch.Tensor:
    """Load the output head [vocab, width] in its stored type, and nothing else.

    Raises:
        InputError: No file in the folder has it.
    """
    from safetensors import safe_open

    spec = spec_from_config(read_config(folder))
    family = names_of(spec.architecture)
    name = f"{family.body}.{family.embedding}" if spec.tied else family.stored_head
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            if f"{name}.weight" in file.keys():  # noqa: SIM118 - the file is no mapping
                return cast("torch.Tensor", file.get_tensor(f"{name}.weight"))
    raise InputError(f"{folder} has no {name}.weight: get its safetensors files again")


def held(model: Any) -> dict[str, Tensor]:
    """Return each tensor in a model's files once, by name: its parameters and its stored buffers."""
    parameters = dict(model.named_parameters())
    known = {id(one) for one in parameters.values()}
    stored = model.state_dict(keep_vars=True)
    return parameters | {name: one for name, one in stored.items() if id(one) not in known}


def token_tables(model: Any) -> list[Tensor]:
    """Return the tables that tokens are looked up in: the embedding table, and in some families a further one."""
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


def model_from_weights(model: Any, changes: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """Make a float32 model of the family of `model` from another config and other weights, as transformers does.

    Args:
        model: Provides config and generation config; it is not changed.
        changes: Fields of the config that differ.
        weights: Weights by name, without a tied head; the tensors themselves become the parameters.
    """
    config = type(model.config).from_dict(model.config.to_dict() | dict(changes))
    stored = dict(weights)
    if "lm_head.weight" in stored:
        # Use the name in files. Otherwise, transformers would save the head under another name than it read.
        stored[f"{names_of(config.model_type).stored_head}.weight"] = stored.pop("lm_head.weight")
    with quiet():
        kind = model_class(config)
        made = kind.from_pretrained(
            None, config=config, state_dict=stored, dtype=torch.float32, **implementations(kind)
        )
    made.generation_config = model.generation_config
    made.config._name_or_path = model.config._name_or_path
    return made.eval()


def stock_model(model: Any) -> Any:
    """Return a float32 model that transformers' own class loads: the model itself, or one whose layers are zero-padded.

    Args:
        model: A float32 model of a supported family.
    """
    if not model.config.is_heterogeneous or model.config.model_type not in FAMILIES:
        return model
    spec = uniform(spec_from_config(model.config.to_dict()))
    own = {name: parameter.detach().cpu().numpy() for name, parameter in model.named_parameters()}
    weights = {one.name: torch.from_numpy(padded(own[one.name], one.shape)) for one in spec.tensors}
    return model_from_weights(model, {"per_layer_config": None, "intermediate_size": spec.ffn_width}, weights)


def save_model(model: Any, folder: Path) -> None:
    """Write the weights and the configuration of a model of transformers into a folder, without a progress bar.

    A matrix of each expert gets the name that released folders have. transformers would use it only for a model that it
    loaded from such a folder.
    """
    options = {}
    if parts := _parts_of_experts(model):
        held = model.state_dict()
        rows = {name: held.pop(name).flatten(0, 1) for name in parts}
        split = {part: rows[name][which].clone() for name, own in parts.items() for part, which in own.items()}
        options = {"state_dict": held | split, "save_original_format": False}
    with quiet():
        model.save_pretrained(folder, **options)


def _parts_of_experts(model: Any) -> dict[str, dict[str, slice]]:
    """Return the parts in a folder of each parameter that holds experts, if the model's family has a description."""
    if model.config.model_type not in WHOLE_FAMILIES:
        return {}
    spec = spec_from_config(model.config.to_dict())
    return {tensor.name: parts for tensor in spec.tensors if (parts := stored_parts(tensor, spec))}


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """Compute transformers' SDPA, but repeat key heads for the query heads if a GPU computes in float32.

    On CUDA, only kernels of 16-bit types accept fewer key heads than query heads. In float32, torch would compute
    [heads, tokens, tokens] at a third of the speed of the kernel for equal heads (pytorch/pytorch#181528).
    """
    groups, kind = query.shape[1] // key.shape[1], query.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if groups > 1 and query.shape[2] > 1 and computed == torch.float32 and kind != "cpu":
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        # This stand-in omits the number of groups, by which transformers would repeat the heads again.
        module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    found: tuple[Tensor, Any] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return found


def register(name: str, function: Any) -> None:
    """Register a function in transformers as an attention that uses the masks of SDPA."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


register(ATTENTION, attention_forward)


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the model's list of transformer blocks.

    Raises:
        InputError: The model has no such list, for example because its family is not supported.
    """
    layers = getattr(getattr(model, "base_model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"{type(model).__name__} has no list of layers: this family is not supported")
    return layers


@contextmanager
def watched_layers(model: Any, layers: Iterable[int], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the context, call `see` with the index of each of these layers and its output at each pass.

    In every supported family that output is a tensor, [sequences, tokens, width].
    """
    with ExitStack() as hooks:
        for index in layers:

            def hook(module: nn.Module, arguments: Any, output: Tensor, index: int = index) -> None:
                see(index, output)

            hooks.callback(decoder_layers(model)[index].register_forward_hook(hook).remove)
        yield
