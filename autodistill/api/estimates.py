"""`estimate`: predict the memory and speed of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from autodistill.api.parameters import takes
from autodistill.api.paths import device_files
from autodistill.api.searches import Strategies
from autodistill.errors import InputError
from autodistill.hardware.budget import check_streams
from autodistill.hardware.device import LOCAL
from autodistill.objects.answers import Estimate
from autodistill.options import (
    RUNS,
    Batch,
    Cache,
    Context,
    Devices,
    Option,
    Runs,
    cache_folder,
    counts_tokens,
    options_of,
    parsed,
    read_texts,
)
from autodistill.strategy.strategy import Strategy

if TYPE_CHECKING:
    from autodistill.advisor.describe import Described

RUN_SHAPE = "A shape in the place of MODEL"


def _size(help: str) -> Option:
    return Option(help=help, metavar="N", section=RUN_SHAPE)


@dataclass(frozen=True, kw_only=True)
class EstimateRequest:
    """The arguments of `estimate`: a model or a shape, how it is served, and on which devices.

    The fields are documented by `Option.help`.
    """

    model: Annotated[
        str | Path | None,
        Option(help="A transformers folder, a .gguf file, a hub id, or smollm2.", metavar="MODEL", argument=True),
    ] = field(default=None, kw_only=False)
    format: Annotated[
        str | None,
        Option(
            help="Format of the weights, like gguf-q4_0 (default: the grid of --strategy or of a packed MODEL, else "
            "gguf-q8_0).",
            metavar="NAME",
            complete="formats",
        ),
    ] = None
    runtime: Annotated[
        str | None, Option(help="Another runtime that serves the format, like onnxruntime.", metavar="NAME")
    ] = None
    context: Context = None
    batch: Batch = None
    kv_type: Annotated[str, Option(help="Type of the KV cache: f16, q8_0 or q4_0.", metavar="TYPE")] = "f16"
    prompt: Annotated[
        str | int | None, counts_tokens("Length of the prompt before the first token (default: 512).")
    ] = None
    training: Annotated[
        str | int | None,
        counts_tokens(
            "Estimate the memory of training too, with passes of this many tokens (default: 1024 with --strategy, "
            "else no training)."
        ),
    ] = None
    gpus: Annotated[
        int | None,
        Option(
            help="Also estimate the memory of each of N GPUs that run or train the model together.",
            metavar="N",
        ),
    ] = None
    strategy: Annotated[
        Strategies | None,
        Option(
            help="Estimate the student that this strategy makes of MODEL, and training it: a name, or a .yaml file.",
            metavar="STRATEGY",
            complete="strategies",
        ),
    ] = None
    device: Annotated[
        str | None,
        Option(help="Device to estimate the speed on, like 4090 or local.", metavar="NAME", complete="devices"),
    ] = None
    all_devices: Annotated[bool, Option(help="Estimate the speed on every known device.")] = False
    devices: Devices = None
    stress: Annotated[
        bool,
        Option(
            help="Also allocate that much on this machine, in a separate process, and say what really fits.",
        ),
    ] = False
    layers: Annotated[int | None, _size("Number of layers.")] = None
    width: Annotated[int | None, _size("Width of the hidden states.")] = None
    heads: Annotated[int | None, _size("Number of attention heads.")] = None
    kv_heads: Annotated[int | None, _size("Number of key-value heads (default: as --heads).")] = None
    head_dim: Annotated[int | None, _size("Width of each head (default: width / heads).")] = None
    ffn: Annotated[int | None, _size("Feed-forward neurons of a layer, or of an expert.")] = None
    vocab: Annotated[int | None, _size("Size of the vocabulary.")] = None
    experts: Annotated[int | None, _size("Number of experts of a mixture.")] = None
    active_experts: Annotated[int | None, _size("Number of experts used for each token.")] = None
    window: Annotated[
        str | int | None,
        counts_tokens("Window of sliding attention in all layers, which GGUF cannot hold.", section=RUN_SHAPE),
    ] = None
    tied: Annotated[bool, Option(help="The output layer shares the embedding table.", section=RUN_SHAPE)] = False
    runs: Runs = RUNS
    cache: Cache = None

    def __post_init__(self) -> None:
        read_texts(self)
        if (self.model is None) == all(size is None for size in self.sizes.values()):
            raise InputError("estimate takes either a MODEL or a shape, like --layers 22 --width 2048 --heads 32 ...")
        if self.tied and self.model is not None:
            raise InputError("--tied applies to a shape given in numbers; a MODEL says itself whether its head is tied")
        if self.device is not None and self.all_devices:
            raise InputError("--device names one device and --all-devices all of them: give one of the two")
        if self.prompt is not None and not self.on_devices:
            raise InputError(
                "--prompt sets the time to the first token, which depends on the device: name one with --device"
            )
        if self.stress and (self.all_devices or (self.device or LOCAL).strip().lower() != LOCAL):
            raise InputError("--stress fills the memory of this machine: name no other device, or --device local")
        if self.batch is not None:
            check_streams(self.batch, "--batch")

    @property
    def sizes(self) -> dict[str, int | None]:
        """The sizes of a shape that is given in place of a model, by option name."""
        shaping = (name for name, one in options_of(type(self)).items() if one.section == RUN_SHAPE and name != "tied")
        return {name: getattr(self, name) for name in shaping}

    @property
    def on_devices(self) -> bool:
        """Whether the caller asks for the speed on one device or on all."""
        return self.device is not None or self.all_devices


@takes(EstimateRequest, "estimate")
def estimate(**options: Any) -> Estimate:
    """Predict the memory and speed of a model without loading it. Measurements stored with the runs correct it.

    Raises:
        InputError: There is no such model, format or device, or arguments contradict each other.
    """
    request = EstimateRequest(**options)
    files = device_files(request.devices, request.on_devices)
    from autodistill.advisor.candidates import recalibrated
    from autodistill.advisor.describe import deployment_named, describe, shape
    from autodistill.advisor.estimate import appraise
    from autodistill.hardware.local import choose_device, known_devices

    found = known_devices(files) if request.all_devices else ()
    if request.device is not None:
        found = (choose_device(request.device, cache_folder(request.cache), files),)
    model = request.model
    described = shape(request.sizes, tied=request.tied) if model is None else describe(str(model))
    load: dict[str, Any] = {
        name: getattr(request, name) for name in ("context", "kv_type", "runtime", "prompt", "gpus")
    }
    load |= {"batch": request.batch or 1, "devices": found, "overheads": recalibrated(Path(request.runs))}
    training = parsed(request.training)
    if request.strategy is not None:
        document = _student_estimated(described, request.strategy, request.format, training, load)
    else:
        if request.format:
            described = replace(described, weights_bytes=None)
        deployment = deployment_named(request.format or described.format_name or "gguf-q8_0")
        document = appraise(described, deployment, training=training, **load)
    running = document["gpus"]
    # Training is divided over any number of GPUs.
    if running and running["not_divided"] and document["training"] is None:
        raise InputError(f"--gpus {running['count']}: {running['not_divided']}: give another number")
    return Estimate(document | {"stress": _stressed(document) if request.stress else None})


def _stressed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Allocate as much memory as the largest estimate, and return which estimates fit in what could be allocated."""
    from autodistill.advisor.estimate import WAYS
    from autodistill.hardware.pressure import stress

    plans = {"serving": int(document["total_bytes"])}
    training = document["training"] or {}
    for way in WAYS if training else ():
        plans[f"training, {way.replace('_', ' ')}"] = int(training[way]["total_bytes"])
    found = stress(max(plans.values()))
    held = found.planned_bytes if found.fits else found.held_bytes
    fits = {name: size <= held for name, size in plans.items()}
    return found.to_json() | {"plans": plans, "fit": fits, "text": found.describe()}


def _student_estimated(
    teacher: Described, strategy: Strategies, format_name: str | None, training: int | None, load: Mapping[str, Any]
) -> dict[str, Any]:
    """Estimate the student of a strategy: served on its own grid or in a named format, and trained."""
    from autodistill.advisor.describe import deployment_named
    from autodistill.advisor.estimate import TOKENS, appraise, strategy_training, student_of
    from autodistill.distillation.student.check import own_deployment
    from autodistill.strategy.named import load_strategy

    recipe = strategy if isinstance(strategy, Strategy) else load_strategy(strategy)
    student = student_of(teacher, recipe, recipe.id if isinstance(strategy, Strategy) else str(strategy))
    named = None if format_name is None else deployment_named(format_name)
    deployment = named or own_deployment(recipe) or deployment_named("gguf-q8_0")
    tokens = TOKENS if training is None else training
    trained = strategy_training(teacher, student, recipe, tokens=tokens, gpus=load["gpus"] or 1)
    return appraise(student, deployment, **load) | {"training": trained}
