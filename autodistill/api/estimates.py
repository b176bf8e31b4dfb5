"""`estimate`: the memory and speed of a model, predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from autodistill.api.paths import cache_folder, device_files
from autodistill.api.searches import Strategies
from autodistill.errors import InputError
from autodistill.hardware.budget import check_streams
from autodistill.objects.answers import Estimate
from autodistill.options import RUNS, Batch, Cache, Context, Devices, Option, Out
from autodistill.strategy.strategy import Strategy

if TYPE_CHECKING:
    from autodistill.advisor.describe import Described

RUN_SHAPE = "A shape in the place of MODEL"
_SIZES = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "experts", "active_experts", "window")


def _size(help: str, metavar: str = "N") -> Option:
    """Return an option that gives a number of a shape."""
    return Option(help=help, metavar=metavar, typed=int, section=RUN_SHAPE)


def estimate(
    model: Annotated[
        str | Path | None,
        Option(help="A transformers folder, a .gguf file, a hub id, or smollm2.", metavar="MODEL", argument=True),
    ] = None,
    *,
    format: Annotated[
        str | None,
        Option(
            help="Format of the weights, like gguf-q4_0 (default: the grid of --strategy or of a packed MODEL, else "
            "gguf-q8_0).",
            metavar="NAME",
            complete="formats",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        Option(help="Another runtime that serves the format, or onnxruntime (memory only).", metavar="NAME"),
    ] = None,
    context: Context = None,
    batch: Batch = None,
    kv_type: Annotated[str, Option(help="Type of the KV cache: f16, q8_0 or q4_0.", metavar="TYPE")] = "f16",
    prompt: Annotated[
        int | None,
        Option(help="Length of the prompt before the first token (default: 512).", metavar="TOKENS", typed=int),
    ] = None,
    training: Annotated[
        int | None,
        Option(
            help="Estimate the memory of training too, with passes of this many tokens (default: 1024 with "
            "--strategy, else no training).",
            metavar="TOKENS",
            typed=int,
        ),
    ] = None,
    strategy: Annotated[
        Strategies | None,
        Option(
            help="Estimate the student that this strategy makes of MODEL, and training it: a name, or a .yaml file.",
            metavar="STRATEGY",
            complete="strategies",
        ),
    ] = None,
    device: Annotated[
        str | None,
        Option(help="Device to estimate the speed on, like 4090 or local.", metavar="NAME", complete="devices"),
    ] = None,
    all_devices: Annotated[bool, Option(help="Estimate the speed on every known device.", typed=bool)] = False,
    devices: Devices = None,
    layers: Annotated[int | None, _size("Number of layers.")] = None,
    width: Annotated[int | None, _size("Width of the hidden states.")] = None,
    heads: Annotated[int | None, _size("Number of attention heads.")] = None,
    kv_heads: Annotated[int | None, _size("Number of key-value heads (default: as --heads).")] = None,
    head_dim: Annotated[int | None, _size("Width of each head (default: width / heads).")] = None,
    ffn: Annotated[int | None, _size("Feed-forward neurons of a layer, or of an expert.")] = None,
    vocab: Annotated[int | None, _size("Size of the vocabulary.")] = None,
    experts: Annotated[int | None, _size("Number of experts of a mixture.")] = None,
    active_experts: Annotated[int | None, _size("Number of experts used for each token.")] = None,
    window: Annotated[
        int | None, _size("Window of sliding attention in all layers, which GGUF cannot hold.", "TOKENS")
    ] = None,
    tied: Annotated[
        bool, Option(help="The output layer shares the embedding table.", typed=bool, section=RUN_SHAPE)
    ] = False,
    out: Out = RUNS,
    cache: Cache = None,
) -> Estimate:
    """Predict the memory and speed of a model without loading it. Measurements stored in --out correct it.

    Raises:
        InputError: No such model, format or device, or arguments that contradict each other.
    """
    numbers = (layers, width, heads, kv_heads, head_dim, ffn, vocab, experts, active_experts, window)
    sizes = dict(zip(_SIZES, numbers, strict=True))
    asked = device is not None or all_devices
    _check(model, sizes, tied=tied, device=device, all_devices=all_devices, prompt=prompt)
    load: dict[str, Any] = {"batch": 1 if batch is None else check_streams(batch, "--batch"), "context": context}
    load |= {"kv_type": kv_type, "runtime": runtime, "prompt": prompt}
    files = device_files(devices, asked)
    from autodistill.advisor.candidates import recalibrated
    from autodistill.advisor.describe import deployment_named, describe, shape
    from autodistill.advisor.estimate import appraise
    from autodistill.hardware.local import choose_device, known_devices

    found = known_devices(files) if all_devices else ()
    if device is not None:
        found = (choose_device(device, cache_folder(cache), files),)
    described = shape(sizes, tied=tied) if model is None else describe(str(model))
    load |= {"devices": found, "overheads": recalibrated(Path(out))}
    if strategy is not None:
        return Estimate(_student_estimated(described, strategy, format, training, load))
    if format:
        described = replace(described, weights_bytes=None)
    deployment = deployment_named(format or described.format_name or "gguf-q8_0")
    return Estimate(appraise(described, deployment, training=training, **load))


def _check(
    model: str | Path | None,
    sizes: Mapping[str, int | None],
    *,
    tied: bool,
    device: str | None,
    all_devices: bool,
    prompt: int | None,
) -> None:
    """Refuse arguments that contradict each other."""
    if (model is None) == all(size is None for size in sizes.values()):
        raise InputError("estimate takes either a MODEL or a shape, like --layers 22 --width 2048 --heads 32 ...")
    if tied and model is not None:
        raise InputError("--tied applies to a shape given in numbers; a MODEL says itself whether its head is tied")
    if device is not None and all_devices:
        raise InputError("--device names one device and --all-devices all of them: give one of the two")
    if prompt is not None and device is None and not all_devices:
        raise InputError(
            "--prompt sets the time to the first token, which depends on the device: name one with --device"
        )


def _student_estimated(
    teacher: Described, strategy: Strategies, format_name: str | None, training: int | None, load: Mapping[str, Any]
) -> dict[str, Any]:
    """What the student that a strategy makes takes, served on its own grid or a named one, and trained."""
    from autodistill.advisor.describe import deployment_named
    from autodistill.advisor.estimate import TOKENS, appraise, strategy_training, student_of
    from autodistill.distillation.student.check import own_deployment
    from autodistill.strategy.named import load_strategy

    recipe = strategy if isinstance(strategy, Strategy) else load_strategy(strategy)
    student = student_of(teacher, recipe, recipe.id if isinstance(strategy, Strategy) else str(strategy))
    named = None if format_name is None else deployment_named(format_name)
    deployment = named or own_deployment(recipe) or deployment_named("gguf-q8_0")
    trained = strategy_training(teacher, student, recipe, tokens=TOKENS if training is None else training)
    return appraise(student, deployment, **load) | {"training": trained}
