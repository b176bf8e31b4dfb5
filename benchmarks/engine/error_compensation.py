"""What does rounding that compensates its errors (GPTQ) gain over plain rounding, in KL to the teacher?

    python -m benchmarks.engine.error_compensation [--teacher smollm2] [--types q4_0,q5_0] [--tokens 2048]

One pass of the teacher over training text gives the second moments of each matrix's inputs. The matrices are rounded
one by one, with scales that follow from the original weights. The embedding table is left to the format in both cases.
Nothing is trained.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autodistill.advisor.describe import deployment_named
from autodistill.data.dataset import TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.evaluation.statistics import clustered_mean
from autodistill.inference.scoring import score, score_teacher
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.options import cache_folder
from autodistill.quantization.error_compensation import compensated
from autodistill.quantization.grids import Grid, Scales
from autodistill.strategy.deployment import Deployment
from benchmarks.common import report
from benchmarks.common.program import parse, parser_of, tiny_data, tiny_teacher, token_count

LENGTH = 256


def moments_of(model: Any, data: TokenSet) -> dict[str, Tensor]:
    """Return the second moments of each linear layer's inputs, by the name of its weight, as a mean over the tokens."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            found[name] = found.get(name, 0) + rows.T @ rows / data.tokens.size

        return hook

    layers = [(name, one) for name, one in model.base_model.named_modules() if isinstance(one, torch.nn.Linear)]
    prefix = f"{model.base_model_prefix}."
    handles = [one.register_forward_pre_hook(watch(f"{prefix}{name}.weight")) for name, one in layers]
    try:
        with torch.no_grad():
            for row in data.tokens:
                model.base_model(input_ids=torch.tensor(row[None]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def rounded(
    model: Any, spec: ModelSpec, deployment: Deployment, moments: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Scales]]:
    """Return every matrix of the layers with compensated errors, and its scales."""
    parameters = dict(model.named_parameters())
    values, scales = {}, {}
    for tensor in spec.tensors:
        grid = deployment.storage(tensor)
        if tensor.role is Role.LINEAR and isinstance(grid, Grid):
            weight = parameters[tensor.name].detach()
            values[tensor.name], scales[tensor.name] = compensated(weight, moments[tensor.name], grid)
    return values, scales


def main() -> None:
    """Round each type plainly and with compensation, and write the report of the KL."""
    parser = parser_of(__doc__)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default="pydoc")
    parser.add_argument("--types", default="q4_0,q5_0", help="of matrices, parted by commas")
    parser.add_argument("--tokens", type=token_count, default=4096, help="of training text, for the moments")
    parser.add_argument("--eval-tokens", type=token_count, default=4096, help="of validation text")
    arguments = parse(parser, tokens=512, eval_tokens=512, types="q4_0")
    if arguments.smoke:
        arguments.teacher, arguments.data = tiny_teacher(layers=2), tiny_data()
    torch.set_num_threads(1)
    keep_freed_memory()
    folder = materialize(resolve_teacher(arguments.teacher), cache_folder()).folder
    prepared = prepare(resolve_data(arguments.data), folder, tokenizer_fingerprint(folder), LENGTH, cache_folder())
    train = load_split(prepared.folder, "train").head(arguments.tokens)
    held_out = load_split(prepared.folder, "validation").head(arguments.eval_tokens)
    model = load_model(folder, torch.float32)
    spec = spec_from_config(model.config.to_dict())
    moments = moments_of(model, train)
    _, reference = score_teacher(model, held_out)
    parameters = dict(model.named_parameters())
    lines = []
    for kind in arguments.types.split(","):
        deployment = deployment_named(f"gguf-{kind}")
        with deployed_weights(model, spec, deployment):
            plain = score(model, held_out, reference)[0]
        began = time.process_time()
        values, scales = rounded(model, spec, deployment, moments)
        seconds = time.process_time() - began
        before = {name: parameters[name].data for name in values}
        for name, value in values.items():
            parameters[name].data = value
        with deployed_weights(model, spec, deployment, scales):
            made_up = score(model, held_out, reference)[0]
        for name, value in before.items():
            parameters[name].data = value
        assert plain.divergence is not None
        assert made_up.divergence is not None
        figures = {}
        for name, one, other in (
            ("kl", plain.divergence, made_up.divergence),
            ("nll", plain.nll, made_up.nll),
            ("accuracy", plain.correct.astype(float), made_up.correct.astype(float)),
        ):
            figures[name] = {
                "plain": float(one.mean()),
                "compensated": float(other.mean()),
                "difference": clustered_mean(other - one, plain.documents),
            }
        report.note(kind, figures | {"seconds": seconds})
        print(kind, figures, file=sys.stderr, flush=True)
        cells = []
        for one in figures.values():
            gap, error = one["difference"]
            told = "" if error is None else f" ± {error:.4f}"
            cells += [f"{one['plain']:.4f}", f"{one['compensated']:.4f}", f"{gap:+.4f}{told}"]
        lines.append([kind, *cells, f"{seconds:.0f}"])
    parts = (", plain", ", made up for", ": difference")
    titles = [f"{name}{part}" for name in ("KL", "NLL", "accuracy") for part in parts]
    documents = len(set(held_out.documents.flatten().tolist()))
    head = (
        f"{arguments.teacher}, moments of {train.tokens.size:,} training tokens, judged on {held_out.predicted:,} "
        f"tokens of {documents} held-out documents. SmolLM2's own file has its matrices in Q4_1, so that these are "
        "rounded twice. Differences are paired by document; seconds are of one core."
    )
    sections = [head, report.table(["matrices in", *titles, "seconds"], lines)]
    print(report.write("error-compensation", "Rounding that makes up for its errors", sections))


if __name__ == "__main__":
    main()
