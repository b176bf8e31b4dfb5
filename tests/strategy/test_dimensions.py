"""Each dimension of the default space changes loss, gradient or packed bytes as a float64 computation says.

The expected values never come from the engine. Students are cut from the teacher's file by name. Losses and gradients
come from float64 autograd through transformers' own model, and packed bytes from other tools or a format's definition.
The trainer's gradient is read from its checkpoint: after one step, AdamW's first moment is a tenth of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from autodistill.distillation.student.build import same_depth
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training.trainer import Trainer
from autodistill.models.config import resized, spec_from_config
from autodistill.quantization import formats
from autodistill.quantization.grids import Grid
from autodistill.quantization.packing import pack
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Temperature
from autodistill.strategy.strategy import Finishing, Init, Strategy

K = 64
ALL = 256  # tokens of the tiny data; a step over all of them does not depend on their order
GRID = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
EVEN, CONTIGUOUS = {0.5: (0, 2, 5), 0.8: (0, 2, 3, 5)}, {0.5: (0, 1, 5), 0.8: (0, 1, 2, 5)}


@dataclass
class Truth:
    """Teacher and data in float64."""

    folder: Path
    ids: torch.Tensor
    logits: torch.Tensor
    states: list[torch.Tensor]

    def student(self, kept, weights=None):
        """Return a float64 model of the teacher's layers `kept`, with the embedding frozen."""
        source = weights or load_file(self.folder / "model.safetensors")
        config = AutoConfig.from_pretrained(self.folder)
        config.num_hidden_layers = len(kept)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
        renamed = {}
        for name, tensor in source.items():
            parts = name.split(".")
            if parts[1] == "layers":
                if int(parts[2]) not in kept:
                    continue
                parts[2] = str(kept.index(int(parts[2])))
            renamed[".".join(parts)] = tensor.double()
        missing, unexpected = model.load_state_dict(renamed, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], [])
        model.model.embed_tokens.weight.requires_grad_(False)
        return model

    def divergence(self, logits, temperature):
        """Return T^2 KL over the K likeliest tokens and the rest, with logits rounded as in the cache."""
        top = self.logits.topk(K, dim=-1)
        highest = top.values[..., :1].float().double()
        stored = highest + (top.values - highest).half().double()
        log_p = stored / temperature - torch.logsumexp(self.logits / temperature, dim=-1, keepdim=True)
        p = log_p.exp()
        p_rest = 1 - p.sum(dim=-1)
        log_all = functional.log_softmax(logits / temperature, dim=-1)
        log_q = log_all.gather(-1, top.indices)
        inside = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, top.indices, True)
        log_q_rest = torch.logsumexp(log_all.masked_fill(inside, -math.inf), dim=-1)
        each = (p * (log_p - log_q)).sum(dim=-1) + p_rest * (p_rest.log() - log_q_rest)
        return temperature**2 * each.mean()

    def terms(self, model, weight=0.5, temperature=1.0, pairs=(), maps=None, distance="cosine"):
        """Return divergence, cross-entropy, alignment and logit loss, with gradients for the model's parameters.

        A function in `maps` for one of a pair's matrices is applied between them.
        """
        raw = {}
        hooks = [
            layer.register_forward_hook(lambda module, arguments, output, index=index: raw.update({index: output}))
            for index, layer in enumerate(model.model.layers)
        ]
        logits = model(self.ids).logits[:, :-1]
        for hook in hooks:
            hook.remove()
        divergence = self.divergence(logits, temperature)
        cross_entropy = functional.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten())
        losses = []
        for number, (layer, state) in enumerate(pairs):
            mapped = raw[layer][:, :-1]
            for step in maps[number] if maps else ():
                mapped = step(mapped) if callable(step) else mapped @ step.T
            losses.append(_distance(mapped, self.states[state][:, :-1], distance))
        alignment = sum(losses) / len(losses) if losses else torch.zeros(())
        return divergence, cross_entropy, alignment, weight * divergence + (1 - weight) * cross_entropy


def _distance(student, teacher, distance):
    """Return the mean squared difference of states.

    For "cosine", both sides have a root mean square of 1; otherwise both are divided by the teacher's root mean square.
    The teacher's states are rounded to float16.
    """
    size = teacher.square().mean(dim=-1, keepdim=True).sqrt()
    by = student.square().mean(dim=-1, keepdim=True).sqrt() if distance == "cosine" else size
    return (student / by - (teacher / size).half().double()).square().mean()


@pytest.fixture(scope="module")
def truth(workshop):
    model = AutoModelForCausalLM.from_pretrained(workshop.teacher, dtype=torch.float64, attn_implementation="eager")
    states = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, arguments, output, index=index: states.update({index: output}))
    ids = torch.from_numpy(workshop.data.tokens.astype(np.int64))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return Truth(workshop.teacher, ids, logits, [states[index] for index in range(6)])


def _strategy(init=None, finishing=None, **recipe):
    recipe = {"divergence_weight": 0.5, "learning_rate": 1e-3} | recipe
    return Strategy(init=init or Init(depth=0.5), distillation=Distillation(**recipe), finishing=finishing)


def _trainer(workshop, strategy, **changes):
    return workshop.trainer(strategy, **({"batch_tokens": ALL, "tokens": 4 * ALL} | changes))


def _gradients(trainer, record, folder):
    trainer.save(folder / "checkpoint")
    scale = 10 * max(1.0, record.gradient_norm)
    saved = load_file(folder / "checkpoint")
    return {
        name.removeprefix("exp_avg."): scale * tensor.double()
        for name, tensor in saved.items()
        if name.startswith("exp_avg.")
    }


def _check_gradients(actual, expected, tolerance=1e-4):
    """Compare the gradient of every tensor, relative to its largest entry."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max() / gradient.abs().max()
        assert error < tolerance, (name, float(error))


def _named_gradients(model):
    return {f"student.{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}


def _check_first_step(workshop, truth, tmp_path, strategy, kept=(0, 2, 5), pairs=(), weight=0.5, temperature=1.0):
    """Compare one step with float64: terms, loss and gradients, without projections."""
    trainer = _trainer(workshop, strategy)
    (record,) = trainer.train_stable(ALL)
    model = truth.student(kept)
    recipe = strategy.distillation.alignment
    distance = recipe.distance if recipe else "cosine"
    divergence, cross_entropy, alignment, logit = truth.terms(model, weight, temperature, pairs, distance=distance)
    loss = logit
    if pairs:
        factor = float((logit / alignment).detach()) if recipe.balance else 1.0
        loss = logit + recipe.weight * factor * alignment
    loss.backward()
    terms = {"cross_entropy": cross_entropy, "alignment": alignment, "loss": loss}
    if weight > 0:
        terms["divergence"] = divergence
    for name, value in terms.items():
        assert getattr(record, name) == pytest.approx(float(value.detach()), rel=2e-5), name
    norm = math.sqrt(sum(float(g.square().sum()) for g in _named_gradients(model).values()))
    assert record.gradient_norm == pytest.approx(norm, rel=1e-4)
    _check_gradients(_gradients(trainer, record, tmp_path), _named_gradients(model))
    return record


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_divergence_weight(workshop, truth, tmp_path, weight):
    _check_first_step(workshop, truth, tmp_path, _strategy(divergence_weight=weight), weight=weight)


def test_of_answers_alone_the_losses_are_means(workshop, truth, tmp_path):
    answers = np.random.default_rng(1).random(workshop.data.tokens.shape) < 0.3
    masked = replace(workshop, data=replace(workshop.data, answers=answers))
    strategy = _strategy(alignment=Alignment(layers="last", projection="none", weight=2.0))
    trainer = _trainer(masked, strategy)
    (record,) = trainer.train_stable(ALL)
    model, states, counted = truth.student((0, 2, 5)), {}, torch.from_numpy(answers[:, 1:])
    model.model.layers[2].register_forward_hook(lambda module, arguments, output: states.update(last=output))
    logits = model(truth.ids).logits[:, :-1][counted]
    divergence = replace(truth, logits=truth.logits[counted]).divergence(logits, 1.0)
    cross_entropy = functional.cross_entropy(logits, truth.ids[:, 1:][counted])
    aligned = _distance(states["last"][:, :-1][counted], truth.states[5][:, :-1][counted], "cosine")
    loss = 0.5 * divergence + 0.5 * cross_entropy + 2 * aligned
    loss.backward()
    for name, value in {"divergence": divergence, "cross_entropy": cross_entropy, "alignment": aligned}.items():
        assert getattr(record, name) == pytest.approx(float(value.detach()), rel=2e-5), name
    assert record.loss == pytest.approx(float(loss.detach()), rel=2e-5)
    # The cached states are in float16. Over a third of the tokens, its rounding averages out less.
    _check_gradients(_gradients(trainer, record, tmp_path), _named_gradients(model), 5e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 6.0])
def test_temperature_gradient(workshop, truth, tmp_path, temperature):
    strategy = _strategy(temperature=Temperature(start=temperature, end=temperature))
    record = _check_first_step(workshop, truth, tmp_path, strategy, temperature=temperature)
    assert record.temperature == temperature


SHAPES = {
    "constant": lambda start, end, x: start,
    "linear": lambda start, end, x: start * (1 - x) + end * x,
    "cosine": lambda start, end, x: (start + end) / 2 + (start - end) / 2 * np.cos(np.pi * x),
    "exponential": lambda start, end, x: np.exp(np.log(start) * (1 - x) + np.log(end) * x),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("start", "end"), [(6.0, 0.5), (1.0, 3.0)])
def test_temperature_shape(workshop, truth, shape, start, end):
    end = start if shape == "constant" else end
    # At a rate of 1e-12 the student does not change, so each step's loss depends only on its temperature.
    schedule = Temperature(shape=shape, start=start, end=end)
    strategy = _strategy(temperature=schedule, divergence_weight=1.0, learning_rate=1e-12)
    records = list(_trainer(workshop, strategy).train_stable(4 * ALL))
    model = truth.student((0, 2, 5))
    with torch.no_grad():
        logits = model(truth.ids).logits[:, :-1]
    for step, record in enumerate(records):
        wanted = SHAPES[shape](start, end, (step + 0.5) / 4)
        # If two are equally near, such as 1.5 and 2 for the root of 3, the lower one is taken.
        snapped = GRID[np.abs(np.log(np.array(GRID) / wanted)).round(9).argmin()]
        assert record.temperature == snapped
        assert record.divergence == pytest.approx(float(truth.divergence(logits, snapped)), rel=2e-5)


# For a student of the teacher's layers 0, 2, 3, 5: layer 1 feeds the copy of layer 3, whose input is state 2.
PAIRS = {
    ("last", 1): [(3, 5)],
    ("last", 2): [(2, 4), (3, 5)],
    ("all", 1): [(0, 1), (1, 2), (2, 4), (3, 5)],
    ("even", 2): [(1, 2), (3, 5)],
    ("even", 4): [(0, 1), (1, 2), (2, 4), (3, 5)],
}


@pytest.mark.parametrize(("layers", "count"), PAIRS)
def test_alignment_layers(workshop, truth, tmp_path, layers, count):
    strategy = _strategy(init=Init(depth=0.8), alignment=Alignment(layers=layers, count=count))
    _check_first_step(workshop, truth, tmp_path, strategy, kept=(0, 2, 3, 5), pairs=PAIRS[layers, count])


@pytest.mark.parametrize("weight", [0.03, 3.0])
def test_alignment_weight(workshop, truth, tmp_path, weight):
    _check_first_step(
        workshop, truth, tmp_path, _strategy(alignment=Alignment(weight=weight)), kept=(0, 2, 5), pairs=[(2, 5)]
    )


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("balance", [False, True])
def test_alignment_distance_and_balance(workshop, truth, tmp_path, distance, balance):
    alignment = Alignment(layers="even", count=2, distance=distance, balance=balance, weight=0.7)
    _check_first_step(workshop, truth, tmp_path, _strategy(alignment=alignment), pairs=[(1, 4), (2, 5)])


def test_alignment_by_relative_depth(workshop, truth, tmp_path):
    """A student that was not copied, here with another initialisation: layers 1 and 2 of 3 aim at 4/6 and 6/6."""
    strategy = _strategy(alignment=Alignment(count=2, weight=0.7))
    config = AutoConfig.from_pretrained(truth.folder)
    config.num_hidden_layers = 3
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    trainer = Trainer(
        student,
        teaching=Teaching(kept_layers=same_depth(3, 6), layers=6, width=64, cache=workshop.cache),
        strategy=strategy,
        plan=workshop.plan(batch_tokens=ALL, tokens=ALL),
        data=workshop.data,
        seed=0,
    )
    weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    (record,) = trainer.train_stable(ALL)
    model = truth.student((0, 1, 2), weights)
    _, _, aligned, logit = truth.terms(model, pairs=[(1, 3), (2, 5)])
    (logit + 0.7 * aligned).backward()
    assert record.alignment == pytest.approx(float(aligned.detach()), rel=2e-5)
    _check_gradients(_gradients(trainer, record, tmp_path), _named_gradients(model))


def _rotate(side, config):
    """Apply rotary positions by their formula. The first half of the channels is paired with the second."""
    channels = side.shape[-1]
    rates = config.rope_parameters["rope_theta"] ** (-torch.arange(0, channels, 2).double() / channels)
    angles = torch.arange(side.shape[-2]).double()[:, None] * rates
    first, second = side.chunk(2, dim=-1)
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, dim=-1)


def _attention(layer, states, config, relation_heads):
    """Return the sides, each [sequences, heads, tokens, channels] in float64: a pair for maps, three for relations."""
    size = (states.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt()
    entering = states / size * layer.input_layernorm.weight
    projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    queries, keys, values = (entering @ projection.weight.T for projection in projections)

    def split(side, heads):
        return side.unflatten(-1, (heads, -1)).transpose(1, 2)

    if relation_heads:
        return [(split(side, relation_heads),) * 2 for side in (queries, keys, values)]
    queries, keys = (_rotate(split(side, heads), config) for side, heads in ((queries, 4), (keys, 2)))
    return [(queries, keys.repeat_interleave(2, dim=1))]


def _attention_divergence(student, teacher):
    terms = []
    for one, other in zip(student, teacher, strict=True):
        log_q, log_p = (
            (left @ right.transpose(-1, -2) / left.shape[-1] ** 0.5)
            .masked_fill(torch.ones(left.shape[-2], left.shape[-2]).triu(1).bool(), -1e9)
            .log_softmax(dim=-1)
            for left, right in (one, other)
        )
        terms.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("kind", "relation_heads", "depth", "layer", "balance"),
    [
        (kind, heads, *depth, balance)
        for number, (kind, heads) in enumerate([("maps", 0), ("relations", 4), ("relations", 16)])
        # Each kind at both depths and with both weightings. One depth goes with one weighting, the other with the
        # other.
        for depth, balance in zip([(1.0, 5), (0.7, 3)], [number % 2 == 0, number % 2 == 1], strict=True)
    ],
)
def test_attention(workshop, truth, tmp_path, kind, relation_heads, depth, layer, balance):
    attention = Attention(kind=kind, relation_heads=relation_heads, teacher_depth=depth, weight=0.7, balance=balance)
    trainer = _trainer(workshop, _strategy(attention=attention))
    (record,) = trainer.train_stable(ALL)
    teacher, model = truth.student(tuple(range(6))), truth.student((0, 2, 5))
    entering = []
    model.model.layers[-1].register_forward_pre_hook(lambda module, arguments: entering.append(arguments[0]))
    logit = truth.terms(model)[3]
    state = truth.states[layer - 1][:, :-1]
    size = state.square().mean(dim=-1, keepdim=True).sqrt()
    target = _attention(
        teacher.model.layers[layer], (state / size).half().double() * size, teacher.config, relation_heads
    )
    ours = _attention(model.model.layers[-1], entering[0][:, :-1], model.config, relation_heads)
    expected = _attention_divergence(ours, [[side.detach() for side in pair] for pair in target])
    factor = float((logit / expected).detach()) if balance else 1.0
    loss = logit + 0.7 * factor * expected
    loss.backward()
    assert record.attention == pytest.approx(float(expected.detach()), rel=1e-4)
    assert record.loss == pytest.approx(float(loss.detach()), rel=2e-5)
    _check_gradients(_gradients(trainer, record, tmp_path), _named_gradients(model), tolerance=2e-4)


@pytest.mark.parametrize(("projection", "rank"), [("linear", 0), ("low-rank", 16), ("low-rank", 4), ("mlp", 0)])
def test_alignment_projection(workshop, truth, tmp_path, projection, rank):
    alignment = Alignment(layers="even", count=2, projection=projection, rank=rank, weight=0.7, projection_rate=5.0)
    trainer = _trainer(workshop, _strategy(alignment=alignment))
    trainer.save(tmp_path / "before")
    before = load_file(tmp_path / "before")
    start = {
        name.removeprefix("weight."): tensor.double().requires_grad_()
        for name, tensor in before.items()
        if name.startswith("weight.projection.")
    }
    inner = 128 if projection == "mlp" else rank
    shapes = {(inner, 64), (64, inner)} if inner else {(64, 64)}
    assert {tuple(tensor.shape) for tensor in start.values()} == shapes
    assert len(start) == (4 if inner else 2)
    names = sorted(start)
    maps = [[start[name] for name in names if name.startswith(f"projection.{pair}.")] for pair in (0, 1)]
    if projection == "mlp":
        maps = [[first, lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2, second] for first, second in maps]

    (record,) = trainer.train_stable(ALL)
    model = truth.student((0, 2, 5))
    # Student layer 0 feeds the copy of layer 2. Two of three layers, evenly spaced, are 1 and 2.
    _, _, aligned, logit = truth.terms(model, pairs=[(1, 4), (2, 5)], maps=maps)
    (logit + 0.7 * aligned).backward()
    assert record.alignment == pytest.approx(float(aligned.detach()), rel=2e-5)
    expected = _named_gradients(model) | {name: tensor.grad for name, tensor in start.items()}
    _check_gradients(_gradients(trainer, record, tmp_path), expected)
    # Projections move at 5 times the rate: AdamW's first step is the rate, against the gradient's sign.
    after = load_file(tmp_path / "checkpoint")
    for name, tensor in start.items():
        moved = after[f"weight.{name}"].double() - tensor.detach()
        clear = tensor.grad.abs() > 1e-2 * tensor.grad.abs().max()
        torch.testing.assert_close(moved[clear], -5e-3 * tensor.grad[clear].sign(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("rate", [1e-4, 2e-3])
def test_learning_rate(workshop, truth, rate):
    """Two steps of AdamW in float64.

    The first step is the rate, against the gradient's sign. The second step uses the moments of the first.
    """
    trainer = _trainer(workshop, _strategy(learning_rate=rate))
    model = truth.student((0, 2, 5))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    records = trainer.train_stable(2 * ALL)
    clear = {}
    for step in (1, 2):
        record = next(records)
        assert record.learning_rate == rate
        model.zero_grad()
        loss = truth.terms(model)[3]
        loss.backward()
        assert record.loss == pytest.approx(float(loss.detach()), rel=2e-5)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values()))
        for name, p in parameters.items():
            gradient = p.grad / max(1.0, norm)
            if step == 1:
                # If the gradient is nearly zero, float32 decides its sign.
                clear[name] = gradient.abs() > 1e-2 * gradient.abs().max()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            change = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            p.data -= rate * change
            moved = dict(trainer.model.named_parameters())[name].detach().double() - start[name]
            expected = p.detach() - start[name]
            if step == 1:
                torch.testing.assert_close(moved[clear[name]], -rate * gradient[clear[name]].sign(), rtol=2e-2, atol=0)
            error = (moved - expected)[clear[name]].abs().max()
            assert error < 0.02 * rate, (step, name, float(error))


def test_learning_rate_falls_in_the_decay(workshop, truth):
    records = [
        record
        for trainer in [_trainer(workshop, _strategy(learning_rate=1e-3), warmup_tokens=2 * ALL)]
        for record in [*trainer.train_stable(2 * ALL), *trainer.train_decay(4 * ALL)]
    ]
    np.testing.assert_allclose([record.learning_rate for record in records], [5e-4, 1e-3, 1e-3, 5e-4], rtol=1e-12)


@pytest.mark.parametrize("depth", [0.5, 0.8])
@pytest.mark.parametrize(("layers", "kept"), [("even", EVEN), ("contiguous", CONTIGUOUS)])
def test_init(workshop, truth, tmp_path, depth, layers, kept):
    strategy = _strategy(init=Init(depth=depth, layers=layers))
    _check_first_step(workshop, truth, tmp_path, strategy, kept=kept[depth])
    trainer = _trainer(workshop, strategy)
    linears = formats.get_format("gguf-q8_0").linears[0]
    source = load_file(truth.folder / "model.safetensors")
    for position, layer in enumerate(kept[depth]):
        weight = trainer.model.model.layers[position].mlp.up_proj.weight.detach().numpy()
        original = source[f"model.layers.{layer}.mlp.up_proj.weight"].numpy()
        packed = pack(weight, linears)["data"]
        np.testing.assert_array_equal(packed, quants.quantize(original, GGMLQuantizationType.Q8_0))


def _q8_0(weights):
    groups = weights.astype(np.float64).reshape(len(weights), -1, 32)
    scales = np.abs(groups).max(axis=-1, keepdims=True) / 127
    steps = np.divide(groups, scales, out=np.zeros_like(groups), where=scales > 0)  # the padding token's row is zero
    codes = np.sign(steps) * np.floor(np.abs(steps) + 0.5)
    return codes, scales.astype(np.float16).astype(np.float64), steps, 127


def _q4_0(weights):
    groups = weights.astype(np.float64).reshape(len(weights), -1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    scales = largest / -8
    steps = groups / scales
    return np.clip(np.floor(steps + 0.5), -8, 7), scales.astype(np.float16).astype(np.float64), steps, 7


def _integers(bits, group):
    def quantize(weights):
        groups = weights.astype(np.float64).reshape(len(weights), -1, group)
        scales = np.abs(groups).max(axis=-1, keepdims=True) / ((2**bits - 1) / 2)
        scales = torch.from_numpy(scales).float().bfloat16().double().numpy()
        steps = groups / scales
        highest = 2 ** (bits - 1) - 1
        return np.clip(np.rint(steps), -highest - 1, highest), scales, steps, highest

    return quantize


GRIDS = {
    "gguf-q8_0": (Finishing(format="gguf-q8_0", bits=8, group_size=32), _q8_0),
    "gguf-q4_0": (Finishing(format="gguf-q4_0", bits=4, group_size=32), _q4_0),
    **{
        f"compressed-tensors-{bits}-{group}": (
            Finishing(format="compressed-tensors", bits=bits, group_size=group),
            _integers(bits, group),
        )
        for bits in (8, 4)
        for group in (32, 64)
    },
}


@pytest.mark.parametrize(("finishing", "quantize"), GRIDS.values(), ids=GRIDS)
def test_finishing(workshop, truth, tmp_path, finishing, quantize):
    """Check the first step on a grid: packed bytes, and loss and gradient of the float64 model on the grid."""
    scheme = formats.get_format(finishing.format)
    grid = scheme.linear(finishing.bits, finishing.group_size, finishing.symmetric)

    def storage_of(name):
        if name.endswith("proj.weight"):
            return grid
        return scheme.tables if "embed" in name and finishing.format.startswith("gguf") else None

    trainer = _trainer(workshop, _strategy(finishing=finishing))
    source = load_file(truth.folder / "model.safetensors")
    shown, passes = {}, {}
    for name, tensor in source.items():
        rule = quantize if name.endswith("proj.weight") else _q8_0 if storage_of(name) else None
        if rule is None:
            shown[name] = tensor.double()
            continue
        codes, scales, steps, highest = rule(tensor.numpy())
        values = codes * scales
        if finishing.format == "compressed-tensors":
            values = torch.from_numpy(values).bfloat16().double().numpy()
        shown[name] = torch.from_numpy(values.reshape(tensor.shape))
        passes[name] = torch.from_numpy((steps <= highest + 0.5).reshape(tensor.shape))

    (record,) = trainer.train_decay(ALL, storage_of)
    model = truth.student((0, 2, 5), shown)
    loss = truth.terms(model)[3]
    loss.backward()
    assert record.loss == pytest.approx(float(loss.detach()), rel=2e-5)
    expected = _named_gradients(model)
    for name, gradient in expected.items():
        parts = name.removeprefix("student.").split(".")
        if name.endswith("proj.weight"):
            parts[2] = str((0, 2, 5)[int(parts[2])])
            gradient.mul_(passes[".".join(parts)])
    _check_gradients(_gradients(trainer, record, tmp_path), expected)

    # The current masters, packed: the codes on disk match the float64 rule.
    for name, parameter in trainer.model.named_parameters():
        if name.endswith("proj.weight"):
            weight = parameter.detach().numpy()
            codes, scales, steps, _ = quantize(weight)
            packed = pack(weight, grid)
            # float32 may round a step that is this close to halfway in the other direction.
            clear = (np.abs(steps - np.floor(steps) - 0.5) > 1e-5).reshape(weight.shape)
            assert clear.mean() > 0.999
            on_disk = _codes_on_disk(packed, finishing, weight.shape)
            np.testing.assert_array_equal(on_disk[clear], codes.reshape(weight.shape)[clear])
            np.testing.assert_array_equal(_scales_on_disk(packed, finishing), scales[..., 0])


def _asymmetric(bits, group):
    """The rule of compressed-tensors: codes span the range with 0, and the zero point is rounded to a code."""

    def rule(weights):
        groups = weights.astype(np.float64).reshape(len(weights), -1, group or weights.shape[1])
        low, high = groups.min(axis=-1, keepdims=True, initial=0), groups.max(axis=-1, keepdims=True, initial=0)
        scales = (high - low) / (2**bits - 1)
        zero = np.clip(np.rint(-(2 ** (bits - 1)) - low / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return groups, torch.from_numpy(scales).float().bfloat16().double().numpy(), zero, 0

    return rule


def _symmetric(bits, group):
    def rule(weights):
        _, scales, _, _ = _integers(bits, group or weights.shape[1])(weights)
        return weights.astype(np.float64).reshape(*scales.shape[:2], -1), scales, 0, 0

    return rule


def _q4_1(weights):
    groups = weights.astype(np.float64).reshape(len(weights), -1, 32)
    least = groups.min(axis=-1, keepdims=True)
    return groups, (groups.max(axis=-1, keepdims=True) - least) / 15, 0, least


def _q4_1_stored(weights):
    groups, scales, zero, least = _q4_1(weights)
    return groups, *(np.float16(values).astype(np.float64) for values in (scales, zero, least))


def _q4_0_scales(weights):
    _, scales, steps, _ = _q4_0(weights)
    return weights.astype(np.float64).reshape(steps.shape), scales, 0, 0


INT = {"format": "compressed-tensors"}
FIELDS = {
    "zero points": (Finishing(**INT, bits=4, group_size=32, symmetric=False), _asymmetric(4, 32)),
    "8 bits, zero points, rows": (Finishing(**INT, bits=8, group_size=0, symmetric=False), _asymmetric(8, 0)),
    "minima": (Finishing(format="gguf-q4_1", bits=4, group_size=32, symmetric=False), _q4_1),
    "6 bits": (Finishing(**INT, bits=6, group_size=64), _symmetric(6, 64)),
    "3 bits, rows": (Finishing(**INT, bits=3, group_size=0), _symmetric(3, 0)),
    "2 bits": (Finishing(**INT, bits=2, group_size=32), _symmetric(2, 32)),
    "2 bits, zero points": (Finishing(**INT, bits=2, group_size=64, symmetric=False), _asymmetric(2, 64)),
    "kept attention": (Finishing(**INT, bits=4, group_size=32, keep=("attention",)), _symmetric(4, 32)),
    "kept layer": (Finishing(**INT, bits=3, group_size=32, keep=("layers.1", "up_proj")), _symmetric(3, 32)),
    "learned": (Finishing(format="gguf-q4_0", bits=4, group_size=32, scales="learned"), _q4_0_scales),
    "learned, minima": (
        Finishing(format="gguf-q4_1", bits=4, group_size=32, symmetric=False, scales="learned"),
        _q4_1_stored,
    ),
    "learned, zero points": (
        Finishing(**INT, bits=3, group_size=32, symmetric=False, scales="learned", keep=("down_proj",)),
        _asymmetric(3, 32),
    ),
}


class _Rounded(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, values):
        return values.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _shown(master, scales, zero, least, finishing):
    """Return the weights on a grid in float64, with the clamp's gradient and the identity's for rounding."""
    bits = finishing.bits
    lowest = 0 if finishing.format == "gguf-q4_1" else -(2 ** (bits - 1))
    # A derived scale clips half a step further out. A learned one is clamped and then rounded, as its publication says.
    margin = 0.0 if finishing.scales == "learned" else 0.5
    groups = master.reshape(*scales.shape[:2], -1)
    steps = torch.clamp((groups - least) / scales + zero, lowest - margin, lowest + 2**bits - 1 + margin)
    codes = torch.clamp(_Rounded.apply(steps).detach(), lowest, lowest + 2**bits - 1) - steps.detach() + steps
    if finishing.format.startswith("gguf"):
        # Readers get scale and minimum in float16, while derived codes come from the unrounded ones.
        scales = scales.detach().half().double() - scales.detach() + scales
        least = least.half()
    values = (codes - zero) * scales
    if finishing.format == "compressed-tensors":
        values = values.detach().float().bfloat16().double() - values.detach() + values
    return (values + least).reshape(master.shape)


# Their bits, whole rows and zero points stand in the other cases too, in other combinations.
_COMBINED = ("3 bits, rows", "2 bits, zero points")


@pytest.mark.parametrize(
    ("finishing", "rule"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if name in _COMBINED else ())
        for name, case in FIELDS.items()
    ],
)
def test_finishing_fields(workshop, truth, tmp_path, finishing, rule):
    """Check the first step with asymmetric grids, other bit widths and groups, kept weights, and learned scales."""
    kept = {"attention": "self_attn", "layers.1": "layers.2", "up_proj": "up_proj", "down_proj": "down_proj"}
    source = load_file(truth.folder / "model.safetensors")
    parts = [kept[part] for part in finishing.keep]
    gridded = [n for n in source if n.endswith("proj.weight") and not any(f".{part}." in f".{n}." for part in parts)]
    student = {f"model.layers.{place}.": f"model.layers.{layer}." for place, layer in enumerate((0, 2, 5))}

    def original(name):
        return next((name.replace(ours, theirs) for ours, theirs in student.items() if name.startswith(ours)), name)

    spec = spec_from_config(json.loads((truth.folder / "config.json").read_text()))
    storages = {tensor.name: finishing.storage(tensor) for tensor in resized(spec, range(3)).tensors}
    rate = 1e-2
    trainer = _trainer(workshop, _strategy(finishing=finishing, learning_rate=rate))
    grids = {name: storage for name, storage in storages.items() if isinstance(storage, Grid)}
    assert {original(n) for n in grids if "proj" in n} == {n for n in gridded if n[13] in "025"}
    (record,) = trainer.train_decay(ALL, grids.get, learned=finishing.scales == "learned")

    masters = {name: source[name].double().requires_grad_() for name in gridded}
    found = {name: rule(source[name].numpy()) for name in gridded}
    learned = {name: torch.from_numpy(found[name][1]).requires_grad_() for name in gridded}
    shown = {
        name: _shown(masters[name], learned[name], *(torch.as_tensor(v) for v in found[name][2:]), finishing)
        for name in gridded
    }
    weights = {name: shown[name].detach() if name in shown else tensor.double() for name, tensor in source.items()}
    if finishing.format.startswith("gguf"):
        codes, scales, _, _ = _q8_0(source["model.embed_tokens.weight"].numpy())
        weights["model.embed_tokens.weight"] = torch.from_numpy(
            (codes * scales).reshape(source["model.embed_tokens.weight"].shape)
        )
    model = truth.student((0, 2, 5), weights)
    loss = truth.terms(model)[3]
    loss.backward()
    assert record.loss == pytest.approx(float(loss.detach()), rel=2e-5)
    expected = _named_gradients(model)
    pulled = {}
    for name, gradient in expected.items():
        own = original(name.removeprefix("student."))
        if own in shown:
            leaves = (masters[own], learned[own])
            pulled[own] = torch.autograd.grad(shown[own], leaves, gradient.clone())
            expected[name] = pulled[own][0]
    if finishing.scales == "absmax":
        assert trainer.scales == {}
        # Out of a hundred thousand weights, float32 may round one in the other direction.
        _check_gradients(_gradients(trainer, record, tmp_path), expected, tolerance=2e-3)
        return

    # AdamW's first step moves a scale by the rate, whatever the size of its gradient; the rate is divided by Q_P.
    levels = {"gguf-q4_0": 7, "gguf-q4_1": 15, "compressed-tensors": 2**finishing.bits - 1}[finishing.format]
    dtype = torch.bfloat16 if finishing.format == "compressed-tensors" else torch.float16
    assert {original(name) for name in trainer.scales} == {name for name in gridded if name[13] in "025"}
    total = math.sqrt(
        sum(float(g.square().sum()) for g in expected.values())
        + sum(float((g[1].square().sum()) / (32 * levels)) for g in pulled.values())
    )
    assert record.gradient_norm == pytest.approx(total, rel=1e-4)
    for name, (scales, _) in trainer.scales.items():
        gradient = pulled[original(name)][1][..., 0]
        begun = found[original(name)][1][..., 0]
        clear = gradient.abs() > 1e-2 * gradient.abs().max()
        moved = torch.from_numpy(begun) - rate / levels * gradient.sign()
        found_scales, moved_scales = torch.from_numpy(scales)[clear].double(), moved[clear].to(dtype).double()
        close = torch.isclose(found_scales, moved_scales, rtol=2**-7, atol=rate / levels / 4)
        # A weight that is rounded in the other direction may also flip the gradient of its group's scale.
        assert (~close).sum() <= max(1, len(close) // 200)
        assert (np.sign(scales - begun) == -gradient.sign().numpy())[clear.numpy()].mean() > 0.95
    # No checkpoint contains them.
    assert all(name.startswith(("student", "projection")) for name in _gradients(trainer, record, tmp_path))


@pytest.mark.parametrize(("start", "plain"), [(0.0, 0), (0.25, 1), (0.5, 2), (0.99, 3)])
def test_finishing_start(workshop, truth, start, plain):
    """Before this share of the decay, a step computes with plain weights, and after it with those of the grid."""
    trainer = _trainer(workshop, _strategy(learning_rate=1e-12))
    grid = formats.get_format("compressed-tensors").linear(2, 32, True)
    records = trainer.train_decay(4 * ALL, lambda name: grid if "proj" in name else None, on_grid_after=start)
    losses = [record.loss for record in records]
    source = load_file(truth.folder / "model.safetensors")
    shown = dict(source)
    for name, tensor in source.items():
        if name.endswith("proj.weight"):
            codes, scales, _, _ = _integers(2, 32)(tensor.numpy())
            shown[name] = torch.from_numpy((codes * scales).reshape(tensor.shape)).float().bfloat16()
    with torch.no_grad():
        before, after = (float(truth.terms(truth.student((0, 2, 5), w))[3]) for w in (source, shown))
    assert abs(before - after) > 1e-3
    np.testing.assert_allclose(losses, [before] * plain + [after] * (4 - plain), rtol=2e-5)
    if start == 0.0:
        # This is the default, however long the decay is.
        trainer = _trainer(workshop, _strategy(learning_rate=1e-12))
        first = next(trainer.train_decay(64 * ALL, lambda name: grid if "proj" in name else None))
        assert first.loss == pytest.approx(after, rel=2e-5)


def _codes_on_disk(packed, finishing, shape):
    """Read the codes as the layout's definition says."""
    if finishing.format.startswith("gguf"):
        blocks = packed["data"].reshape(shape[0], shape[1] // 32, -1)[..., 2:]
        if finishing.bits == 8:
            return blocks.view(np.int8).reshape(shape)
        return (np.concatenate([blocks % 16, blocks // 16], axis=-1).astype(int) - 8).reshape(shape)
    words = packed["weight_packed"].astype(np.int64) % 2**32
    per_word = 32 // finishing.bits
    codes = [words >> (finishing.bits * place) & (2**finishing.bits - 1) for place in range(per_word)]
    return np.stack(codes, axis=-1).reshape(shape) - 2 ** (finishing.bits - 1)


def _scales_on_disk(packed, finishing):
    if finishing.format.startswith("gguf"):
        blocks = packed["data"].reshape(len(packed["data"]), -1, 34 if finishing.bits == 8 else 18)
        return np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float64)
    return (packed["weight_scale"].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
