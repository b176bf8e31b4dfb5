"""Strategies: plain data in both directions, one hash everywhere, and the error of every rule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.models.tensors import Role, TensorSpec
from autodistill.quantization.formats import FORMATS
from autodistill.quantization.grids import Grid
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Lora, OnPolicy, Temperature
from autodistill.strategy.strategy import WHOLE, Finishing, Init, Strategy

fractions = st.floats(0, 1, exclude_min=True)
inits = st.builds(
    Init,
    depth=fractions,
    layers=st.sampled_from(["even", "contiguous", "influence", "block-influence"]),
    ffn=fractions,
    heads=fractions,
    width=fractions,
) | st.just(Init(source="pretrained", model="owner/name", depth=1.0))
degrees = st.floats(0.5, 8)
temperatures = degrees.map(lambda value: Temperature(start=value, end=value)) | st.builds(
    Temperature, shape=st.sampled_from(["linear", "cosine", "exponential"]), start=degrees, end=degrees
)
projections = st.sampled_from([("none", 0), ("linear", 0), ("low-rank", 16), ("mlp", 0)])
positive = st.floats(0, 100, exclude_min=True)
alignments = st.builds(
    lambda layers, distance, projection, weight, balance, rate: Alignment(
        layers=layers[0],
        count=layers[1],
        distance=distance,
        projection=projection[0],
        rank=projection[1],
        weight=weight,
        balance=balance,
        projection_rate=rate,
    ),
    st.just(("all", 1)) | st.tuples(st.sampled_from(["last", "even"]), st.integers(1, 9)),
    st.sampled_from(["cosine", "l2"]),
    projections,
    positive,
    st.booleans(),
    positive,
)
attentions = st.builds(
    lambda kind, depth, weight, balance: Attention(
        kind=kind[0], relation_heads=kind[1], teacher_depth=depth, weight=weight, balance=balance
    ),
    st.just(("maps", 0)) | st.integers(1, 64).map(lambda heads: ("relations", heads)),
    st.floats(0, 1, exclude_min=True),
    positive,
    st.booleans(),
)
shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
signals = st.tuples(st.sampled_from(["top-k", "sampled"]), st.integers(1, 99)) | st.tuples(
    st.sampled_from(["states", "online"]), st.just(0)
)
mixes = st.tuples(st.sampled_from(["forward_kl", "reverse_kl"]), st.just(0.0)) | st.tuples(
    st.sampled_from(["jsd", "skew_forward_kl", "skew_reverse_kl", "taid"]), shares
)
losses = st.builds(
    lambda signal, mix, standardise: (
        {
            "signal": signal[0],
            "signal_tokens": signal[1],
            "divergence": "forward_kl" if signal[0] == "sampled" else mix[0],
            "mixture": 0.0 if signal[0] == "sampled" else mix[1],
            "standardise": standardise and not signal[1],
        }
        | ({"temperature": Temperature()} if signal[0] == "sampled" else {})
    ),
    signals,
    mixes,
    st.booleans(),
)
positions = st.tuples(st.sampled_from(["all", "answers"]), st.just(1.0)) | st.tuples(st.just("uncertain"), shares)
distillations = st.builds(
    lambda loss, position, **rest: Distillation(**(rest | loss), positions=position[0], uncertain_share=position[1]),
    loss=losses,
    position=positions,
    divergence_weight=st.floats(0, 1),
    final_divergence_weight=st.none() | st.floats(0, 1),
    temperature=temperatures,
    alignment=st.none() | alignments,
    attention=st.none() | attentions,
    learning_rate=st.floats(0, 1, exclude_min=True, exclude_max=True),
    train_embeddings=st.booleans(),
    lora=st.none()
    | st.builds(Lora, rank=st.integers(1, 64), alpha=shares, layers=st.sampled_from(["attention", "ffn", "all"])),
)
GRIDS = [(name, grid) for name, held in FORMATS.items() for grid in held.linears if isinstance(grid, Grid)]
finishings = st.builds(
    lambda grid, scales, **more: Finishing(
        format=grid[0],
        bits=grid[1].bits,
        group_size=grid[1].group_size,
        symmetric=grid[1].symmetric,
        scales="absmax" if grid[1].codebook else scales,
        **more,
    ),
    st.sampled_from(GRIDS),
    keep=st.lists(st.sampled_from(["attention", "head", "layers.0", "down_proj"])).map(tuple),
    scales=st.sampled_from(["absmax", "learned"]),
    start=st.floats(0, 1, exclude_max=True),
)
strategies = st.builds(Strategy, init=inits, distillation=distillations, finishing=st.none() | finishings)


def test_scales_on_a_codebook_are_not_learned():
    plain = {"bits": 4, "group_size": 32, "scales": "learned"}
    for more in ({"format": "gguf-mxfp4"}, {"format": "gguf-q4_0", "types": (("attention", "mxfp4"),)}):
        with pytest.raises(InputError, match=r"the steps of gguf-mxfp4 are not even: leave finishing\.scales out"):
            Finishing(**plain | more)


def test_scales_alone_are_trained_from_the_first_step_and_of_all_but_powers_of_two():
    plain = {"bits": 4, "group_size": 32}
    for more in ({"format": "gguf-q4_0"}, {"format": "gguf-mxfp4", "types": (("attention", "q4_0"),)}):
        assert Finishing(**plain, **more, scales="alone").scalable
    assert not Finishing(**plain, format="gguf-mxfp4").scalable
    with pytest.raises(InputError, match=r"the scales of gguf-mxfp4 are powers of two, which are not trained"):
        Finishing(**plain, format="gguf-mxfp4", scales="alone")
    with pytest.raises(InputError, match=r"finishing\.start has no meaning where scales alone are trained"):
        Finishing(**plain, format="gguf-q4_0", scales="alone", start=0.5)
    alone = Strategy(finishing=Finishing(**plain, format="gguf-q4_0", scales="alone"))
    assert alone.scales_alone
    assert not Strategy(finishing=Finishing(**plain, format="gguf-q4_0", scales="learned")).scales_alone
    assert not Strategy().scales_alone
    with pytest.raises(InputError, match=r"finishing\.scales alone trains no weights, which distillation\.lora would"):
        dataclasses.replace(alone, distillation=Distillation(lora=Lora()))


@given(strategies)
def test_json_and_yaml_round_trips(strategy):
    for text, read in (
        (json.dumps(strategy.to_json()), json.loads),
        (yaml.safe_dump(strategy.to_json()), yaml.safe_load),
    ):
        again = Strategy.from_json(read(text))
        assert again == strategy
        assert again.id == strategy.id


@given(strategies, strategies)
def test_ids_are_equal_where_strategies_are(one, other):
    assert (one.id == other.id) == (one == other)
    stages = (one.init, one.distillation) == (other.init, other.distillation)
    assert (one.stable_id == other.stable_id) == stages


@given(strategies)
def test_finishing_is_no_part_of_the_shared_checkpoint(strategy):
    bare = dataclasses.replace(strategy, finishing=None)
    assert bare.stable_id == strategy.stable_id
    assert bare.id != strategy.id or strategy.finishing is None


# Written by hand, so that a changed field, default, order or number format shows. Such a change would orphan every
# stored row.
TEXT = (
    '{"distillation":{"alignment":{"balance":false,"count":4,"distance":"cosine","layers":"even","projection":"linear",'
    '"projection_rate":5.0,"rank":0,"weight":1.0},"attention":null,"divergence":"forward_kl","divergence_weight":0.7,'
    '"final_divergence_weight":null,"learning_rate":0.0003,"lora":null,"mixture":0.0,"positions":"all","signal":"top-k",'
    '"signal_tokens":64,"standardise":false,"temperature":{"end":1.0,"shape":"linear","start":5.0},'
    '"train_embeddings":false,"uncertain_share":1.0},"finishing":{"bits":8,"format":"gguf-q8_0",'
    '"group_size":32,"keep":[],"scales":"absmax","start":0.0,"symmetric":true},"init":{"depth":0.8,"ffn":1.0,"heads":1.0,'
    '"layers":"even","model":"","source":"teacher","width":1.0}}'
)
SAMPLE = Strategy.from_json(json.loads(TEXT))
SAMPLE_ID = "0f0ef5f6741e"


def test_the_id_is_pinned():
    assert hashlib.sha256(TEXT.encode()).hexdigest()[:12] == SAMPLE_ID
    assert SAMPLE.id == SAMPLE_ID


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_the_id_is_the_same_in_another_process(seed):
    program = (
        "import json, sys; from autodistill.strategy.strategy import Strategy;"
        "print(Strategy.from_json(json.load(sys.stdin)).id)"
    )
    shuffled = json.dumps(dict(reversed(list(json.loads(TEXT).items()))))
    environment = os.environ | {"PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", program], input=shuffled, capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == SAMPLE_ID


def test_whole_numbers_are_taken_for_floats():
    data = json.loads(TEXT)
    data["distillation"]["temperature"] |= {"start": 5, "end": 1}
    assert Strategy.from_json(data).id == SAMPLE_ID


def test_what_is_not_written_has_its_default():
    assert Strategy.from_json({}) == Strategy()
    assert Strategy.from_json({"distillation": {"alignment": {}}}).distillation.alignment == Alignment()


def test_it_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SAMPLE.finishing = None
    assert len({SAMPLE, Strategy.from_json(json.loads(TEXT))}) == 1


def test_widths_by_layer_are_left_out_of_plain_data_where_there_are_none():
    assert "ffn_widths" not in Strategy().to_json()["init"]
    strategy = Strategy(init=Init(depth=1.0, ffn_widths=(64, 128)))
    assert strategy.to_json()["init"]["ffn_widths"] == [64, 128]
    assert Strategy.from_json(json.loads(json.dumps(strategy.to_json()))) == strategy
    assert strategy.id != Strategy(init=Init(depth=1.0, ffn_widths=(128, 64))).id


GGUF = {"format": "gguf-q8_0", "bits": 8, "group_size": 32}
RULES = [
    ("init.source", "void", "can be teacher, scratch, pretrained"),
    ("init.source", "scratch", "train_embeddings"),
    ("init.source", "pretrained", "init.model names a model where init.source is pretrained"),
    ("init.model", "owner/name", "init.model names a model where init.source is pretrained"),
    ("init", {"source": "pretrained", "model": "owner/name"}, "taken whole"),
    ("init", {"source": "scratch", "layers": "influence"}, "even"),
    ("init.ffn", 0.0, "init.ffn is a fraction"),
    ("init.heads", 1.5, "init.heads is a fraction"),
    ("init", {"ffn": 0.5, "ffn_widths": [64]}, "init.ffn 0.5 and init.ffn_widths both say"),
    ("init", {"source": "scratch", "ffn_widths": [64]}, "leave it out where init.source is scratch"),
    ("init.ffn_widths", [64, 0], "numbers of FFN neurons of 1 and more, and one of them is 0"),
    ("init.ffn_widths", 64, "init.ffn_widths must be a list, not 64"),
    ("init.ffn_widths", [64, 0.5], "init.ffn_widths must be of type int, not 0.5"),
    ("init.ffn_widths", [True], "init.ffn_widths must be of type int, not True"),
    ("init.repair", True, "init.repair fits FFNs and attention that were cut from the teacher's"),
    ("init", {"source": "scratch", "ffn": 0.5, "repair": True}, "give init.ffn or init.heads below 1, or"),
    ("init", {"dropped": [1, 2]}, "leave init.source and init.layers out, and give init.depth 1"),
    ("init", {"depth": 1.0, "layers": "influence", "dropped": [1, 2]}, "init.dropped names the layers"),
    ("init", {"depth": 1.0, "source": "scratch", "dropped": [1, 2]}, "init.dropped names the layers"),
    ("init.layers", "odd", "even, contiguous"),
    ("init.depth", 0.0, "fraction"),
    ("init.depth", 1.01, "fraction"),
    ("distillation.temperature.shape", "square", "cosine"),
    ("distillation.temperature.start", 0.4, "0.5 to 8"),
    ("distillation.temperature.end", 8.1, "0.5 to 8"),
    ("distillation.temperature", {"start": 2.0, "end": 1.0}, "constant temperature .* in a space by `when"),
    ("distillation.alignment.layers", "first", "last, even, all"),
    ("distillation.alignment.distance", "l1", "cosine, l2"),
    ("distillation.alignment.projection", "conv", "none, linear, low-rank, mlp"),
    ("distillation.alignment.count", 0, "at least 1"),
    ("distillation.alignment", {"layers": "all", "count": 2}, "leave count at 1"),
    ("distillation.alignment", {"projection": "low-rank"}, "rank"),
    ("distillation.alignment", {"projection": "linear", "rank": 4}, "rank"),
    ("distillation.alignment", {"projection": "low-rank", "rank": -4}, "rank"),
    ("distillation.alignment.weight", 0.0, "leave alignment out"),
    ("distillation.alignment.projection_rate", 0.0, "projection_rate"),
    ("distillation.projection", "linear", "distillation has no field projection"),
    ("distillation.attention.kind", "values", "maps, relations"),
    ("distillation.attention", {"kind": "relations"}, "relation_heads is above 0 for relations"),
    ("distillation.attention", {"kind": "maps", "relation_heads": 4}, "relation_heads is above 0 for relations"),
    ("distillation.attention", {"kind": "relations", "relation_heads": -4}, "relation_heads"),
    ("distillation.attention.teacher_depth", 0.0, "above 0"),
    ("distillation.attention.teacher_depth", 1.5, "a fraction of the teacher's layers"),
    ("distillation.attention.weight", 0.0, "leave attention out"),
    ("distillation.divergence", "jsd", "mixture must lie between 0 and 1 for .* jsd does, and it is 0"),
    ("distillation", {"divergence": "taid", "mixture": 1.0}, "mixture must lie between 0 and 1"),
    ("distillation", {"mixture": 0.5}, "be 0 for one that does not, as forward_kl does not, and it is 0.5"),
    ("distillation.signal", "cloud", "top-k, sampled, states, online, written"),
    ("distillation", {"signal": "written"}, "and written, which has those that were reported, not 64 for written"),
    (
        "distillation",
        {"signal": "written", "signal_tokens": 0, "temperature": {"start": 2.0, "end": 2.0}},
        "goes from 2 to 2, but reported log-probabilities are for 1",
    ),
    (
        "distillation",
        {"signal": "written", "signal_tokens": 0, "standardise": True},
        "which written lacks: use the signal states or online",
    ),
    ("distillation.signal", "online", "signal_tokens must be above 0 for top-k and sampled and 0 for states"),
    ("distillation.signal_tokens", 0, "signal_tokens must be above 0"),
    ("distillation", {"signal": "sampled", "divergence": "reverse_kl"}, "no unbiased estimate of it: use the signal"),
    (
        "distillation",
        {"signal": "sampled", "temperature": {"shape": "linear", "start": 2.0, "end": 1.0}},
        "temperature goes up to 2, but tokens are drawn at 1",
    ),
    ("distillation", {"standardise": True}, "which top-k lacks: use the signal states or online"),
    ("distillation.positions", "hard", "all, answers, uncertain"),
    ("distillation.positions", "uncertain", "uncertain_share must lie between 0 and 1"),
    ("distillation.uncertain_share", 0.5, "be 1 for others, not 0.5"),
    ("distillation.final_divergence_weight", 1.1, "0 to 1"),
    ("distillation.divergence_weight", -0.1, "0 to 1"),
    ("distillation.divergence_weight", 1.1, "0 to 1"),
    ("distillation.learning_rate", 0.0, "between 0 and 1"),
    ("distillation.learning_rate", 1.0, "between 0 and 1"),
    ("distillation.lora.rank", 0, "leave lora out"),
    ("distillation.lora.alpha", 0.0, "above 0"),
    ("distillation.lora.layers", "head", "attention, ffn, all"),
    ("finishing", {"format": "gguf-f16", "bits": 16, "group_size": 0}, "leave finishing out"),
    ("finishing", GGUF | {"group_size": 64}, "gguf-q8_0"),
    ("finishing", GGUF | {"bits": 4}, "gguf-q8_0"),
    ("finishing", GGUF | {"format": "gguf-q9"}, "no format 'gguf-q9'"),
    ("finishing", {"format": "gguf-q8_0", "bits": 8}, "lacks the field group_size"),
    ("finishing", "gguf-q8_0", "must be a mapping"),
    ("init", None, "must be a mapping"),
    ("init.colour", 3, "no field colour; its fields are source, model, depth, layers, ffn, heads, width"),
    ("init.depth", "0.8", "of type float"),
    ("init.depth", True, "of type float"),
    ("init.depth", float("nan"), "finite"),
    ("init.layers", 1, "of type str"),
    ("distillation.alignment.count", 2.0, "of type int"),
    ("distillation.alignment.count", True, "of type int"),
    ("distillation.train_embeddings", 1, "of type bool"),
    ("distillation.learning_rate", None, "of type float"),
]


@pytest.mark.parametrize(("path", "value", "said"), RULES)
def test_every_rule_has_its_error(path, value, said):
    data: dict = {}
    node = data
    *parents, leaf = path.split(".")
    for name in parents:
        node = node.setdefault(name, {})
    node[leaf] = value
    with pytest.raises(InputError, match=said) as caught:
        Strategy.from_json(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_a_strategy_is_a_mapping(data):
    with pytest.raises(InputError, match="strategy must be a mapping"):
        Strategy.from_json(data)


@pytest.mark.parametrize("name", FORMATS)
def test_deployments_of_every_format(name):
    scheme = FORMATS[name]
    for storage in scheme.linears:
        grid = isinstance(storage, Grid)
        held = (
            {"bits": storage.bits, "group_size": storage.group_size, "symmetric": storage.symmetric}
            if grid
            else {"bits": 16, "group_size": 0}
        )
        # vLLM has kernels for 4 and 8 bits; those for 4 bits support zero points.
        served = not grid or name != "compressed-tensors" or held["bits"] == 4
        served = served or (held["bits"], held["symmetric"]) == (8, True)
        for runtime in scheme.runtimes if served else ("transformers",):
            deployment = Deployment(runtime=runtime, format=name, **held)
            assert Deployment.from_json(deployment.to_json()) == deployment
        if not served:
            with pytest.raises(InputError, match=r"the runtime of .* is 'vllm'; it can be transformers"):
                Deployment(runtime="vllm", format=name, **held)
    with pytest.raises(InputError, match="the runtime of"):
        Deployment(runtime="torchscript", format=name, **held)
    with pytest.raises(InputError, match=name):
        Deployment(runtime=scheme.runtimes[0], format=name, bits=7, group_size=32)


def test_a_deployment_of_older_records_is_read():
    data = {"runtime": "llama.cpp", "format": "gguf-q4_0", "bits": 4, "group_size": 32}
    assert Deployment.from_json(data) == Deployment(**data, symmetric=True, keep=())


def test_the_grid_of_a_finishing_and_of_a_deployment_are_compared():
    held = {"format": "compressed-tensors", "bits": 4, "group_size": 64}
    finishing = Finishing(**held, keep=("attention", "layers.0"), scales="learned", start=0.5)
    assert Deployment(runtime="vllm", **held, keep=("layers.0", "attention")).scheme == finishing.scheme
    for other in ({}, {"keep": ("attention",)}, {"keep": ("attention", "layers.0"), "symmetric": False}):
        assert Deployment(runtime="vllm", **held, **other).scheme != finishing.scheme


def test_vllm_cannot_keep_a_part_of_what_it_computes_as_one():
    layer = "model.layers.0.{}.weight"
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    tensors = [TensorSpec(name=layer.format(name), role=Role.LINEAR, shape=(64, 64)) for name in names]
    held = {"format": "compressed-tensors", "bits": 4, "group_size": 64}
    for keep in (("attention",), ("down_proj", "o_proj"), ("gate_proj", "up_proj")):
        Deployment(runtime="vllm", **held, keep=keep).check_model(tensors)
    for keep, fused in (("v_proj", "q_proj, k_proj, v_proj"), ("up_proj", "gate_proj, up_proj")):
        Deployment(runtime="transformers", **held, keep=(keep,)).check_model(tensors)
        with pytest.raises(InputError, match=f"vLLM computes {fused} as one: keep all of them or none"):
            Deployment(runtime="vllm", **held, keep=(keep,)).check_model(tensors)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": "lsq"}, "finishing.scales is 'lsq'; it can be absmax, learned"),
        ({"start": 1.0}, "finishing.start is a share of the decay, 0 to below 1, not 1.0"),
        ({"start": -0.1}, "finishing.start is a share"),
        ({"rounding": "compensated"}, "which codes stay where scales alone are trained: give finishing.scales alone"),
        ({"rounding": "compensated", "scales": "learned"}, "give finishing.scales alone, or leave rounding out"),
        ({"keep": ["Attention"]}, "keep holds 'Attention': it can be attention, embeddings, head, or part"),
        ({"symmetric": False}, "gguf-q4_0 cannot hold 4 bits in groups of 32, asymmetric"),
    ],
)
def test_finishings_that_break_a_rule(fields, message):
    with pytest.raises(InputError, match=message):
        Finishing.from_json({"format": "gguf-q4_0", "bits": 4, "group_size": 32, **fields})


def test_names_of_deployments():
    q4 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
    int4 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=64)
    assert (q4.name, int4.name) == ("gguf-q4_0", "compressed-tensors-int4-g64")


def test_the_likeliest_tokens_are_approximate_and_all_tokens_and_draws_are_not():
    full = {"signal": "states", "signal_tokens": 0}
    assert Distillation(divergence="reverse_kl").approximation(300).startswith("reverse_kl of 64 tokens and the rest")
    assert Distillation(signal_tokens=299).approximation(300).startswith("forward_kl of 299 tokens and the rest")
    assert Distillation(signal_tokens=300).approximation(300) is None, "which are all there are"
    warm = Distillation(temperature=Temperature(shape="linear", start=5.0, end=1.0))
    assert warm.approximation(300).startswith("forward_kl of 64 tokens and the rest")
    told = Distillation(signal="written", signal_tokens=0, divergence="jsd", mixture=0.5)
    assert told.approximation(300) == "jsd of the tokens told and the rest as one outcome: a lower bound"
    assert Distillation().approximation(300) == "forward_kl of 64 tokens and the rest as one outcome: a lower bound"
    assert Distillation(signal_tokens=1, temperature=Temperature(start=0.7, end=0.7)).approximation(300) is not None
    assert (
        Distillation(signal="written", signal_tokens=0).approximation(300).startswith("forward_kl of the tokens told")
    )
    for exact in (
        Distillation(signal="sampled"),
        Distillation(divergence="reverse_kl", **full),
        Distillation(divergence="reverse_kl", divergence_weight=0.0),
    ):
        assert exact.approximation(300) is None
    # If a teacher has few tokens, the likeliest are all of them, however many were asked for.
    for vocabulary, marked in ((65, True), (64, False), (20, False)):
        assert (Distillation().approximation(vocabulary) is not None) == marked
    assert told.approximation(20) is not None, "of which writers may have told fewer"


def test_strategies_that_differ_in_any_field_have_different_lines():
    """A neighbour of the best differs in one field, and its row must not read like the best's row."""
    base = Strategy(
        init=Init(ffn=0.5),
        distillation=Distillation(
            divergence="jsd",
            mixture=0.5,
            temperature=Temperature(shape="linear", start=3.0, end=1.0),
            signal="states",
            signal_tokens=0,
            alignment=Alignment(layers="even", count=2, projection="low-rank", rank=8),
            attention=Attention(kind="relations", relation_heads=4),
            lora=Lora(),
        ),
        finishing=Finishing(format="compressed-tensors", bits=4, group_size=32),
    ).to_json()
    changes = {
        "init": {"layers": "contiguous", "depth": 0.625, "ffn": 0.51, "heads": 0.5, "width": 0.5},
        "distillation": {
            "divergence": "skew_forward_kl",
            "mixture": 0.25,
            "divergence_weight": 0.0361,
            "final_divergence_weight": 0.1,
            "standardise": True,
            "signal": "online",
            "positions": "all",
            "learning_rate": 0.000253,
            "train_embeddings": True,
        },
        "distillation.temperature": {"shape": "cosine", "start": 2.9, "end": 1.1},
        "distillation.alignment": {
            "layers": "last",
            "count": 3,
            "distance": "l2",
            "rank": 9,
            "weight": 0.809,
            "balance": True,
            "projection_rate": 4.0,
        },
        "distillation.attention": {"relation_heads": 2, "teacher_depth": 0.8, "weight": 2.0, "balance": True},
        "distillation.lora": {"rank": 8, "alpha": 16.0, "layers": "ffn"},
        "finishing": {"bits": 8, "group_size": 64, "symmetric": False, "scales": "learned", "start": 0.5},
    }
    lines = [Strategy.from_json(base).describe()]
    for path, fields in changes.items():
        for name, value in fields.items():
            data = json.loads(json.dumps(base))
            part = data
            for key in path.split("."):
                part = part[key]
            assert part[name] != value
            part[name] = value
            lines.append(Strategy.from_json(data).describe())
    assert len(set(lines)) == len(lines)


def test_the_line_of_a_strategy():
    assert Strategy().describe() == "80% even, KD 0.50 T1, lr 0.0003"
    unheard = Distillation(divergence_weight=0.0, signal="online", signal_tokens=0)
    assert Strategy(distillation=unheard).describe() == "80% even, labels alone, lr 0.0003"
    recipe = Distillation(
        divergence="taid",
        mixture=0.4,
        signal="states",
        signal_tokens=0,
        divergence_weight=0.98,
        temperature=Temperature(shape="cosine", start=3.2, end=1.5),
        alignment=Alignment(weight=5.71),
        learning_rate=0.00164,
    )
    assert WHOLE.describe() == "whole teacher"
    assert Init(source="pretrained", model="owner/name", depth=1.0).describe() == "from owner/name"
    assert Init(depth=1.0, dropped=(3, 1)).describe() == "without layer 3"
    assert Init(depth=1.0, dropped=(3, 2)).describe() == "without layers 3 to 4"
    assert Init(heads=0.5, width=0.25).describe() == "80% even heads 50% width 25%"
    assert Init(depth=1.0, ffn=0.875, repair=True).describe() == "all layers ffn 87.5% repaired"
    assert Init(depth=1.0, layers="influence").describe() == "100% influence"
    assert Init(source="scratch", depth=1.0).describe() == "100% from scratch"
    widths = {(64,): "ffn 64", (64, 64, 32, 64): "ffn 64x2+32+64", (8, 9) * 3: "ffn 8-9 (d9372a)"}
    widths[8, 9, 8, 9, 9] = "ffn 8+9+8+9x2"  # four runs are listed, and five are not
    widths[8, 9, 8, 9, 8] = f"ffn 8-9 ({hashlib.sha256(b'[8,9,8,9,8]').hexdigest()[:6]})"
    for by_layer, said in widths.items():
        assert Init(ffn_widths=by_layer).describe() == f"80% even {said}"
    strategy = Strategy(distillation=recipe, finishing=Finishing(format="gguf-q4_0", bits=4, group_size=32))
    assert strategy.describe() == (
        "80% even, taid(0.4) 0.98 T3.2>1.5 cosine, signal states, lr 0.00164, last none x5.71, QAT gguf-q4_0"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"divergence_weight": 0.123}, "KD 0.123 T1, lr 0.0003"),
        ({"final_divergence_weight": 0.1}, "KD 0.50>0.10 T1, lr 0.0003"),
        ({"divergence": "reverse_kl", "signal_tokens": 32}, "reverse kl 0.50 T1, signal top-k 32, lr 0.0003"),
        (
            {"signal": "online", "signal_tokens": 0, "standardise": True},
            "KD 0.50 T1, signal online, lr 0.0003, standardise",
        ),
        (
            {"positions": "uncertain", "uncertain_share": 0.25},
            "KD 0.50 T1, lr 0.0003, positions uncertain, uncertain share 0.25",
        ),
        (
            {"alignment": Alignment(layers="even", count=2, distance="l2")},
            "KD 0.50 T1, lr 0.0003, even-2 none x1 distance l2",
        ),
        (
            {"attention": Attention(kind="relations", relation_heads=4, weight=0.5)},
            "KD 0.50 T1, lr 0.0003, attention relations x0.5 relation heads 4",
        ),
        ({"lora": Lora(rank=4, layers="ffn")}, "KD 0.50 T1, lr 0.0003, LoRA 4 layers ffn"),
        (
            {"signal": "online", "signal_tokens": 0, "on_policy": OnPolicy(share=0.25, length=12, temperature=0.5)},
            "KD 0.50 T1, signal online, lr 0.0003, on-policy 25% x12 temperature 0.5",
        ),
    ],
)
def test_the_line_names_what_differs_from_the_default(fields, said):
    assert Strategy(init=WHOLE, distillation=Distillation(**fields)).describe() == f"whole teacher, {said}"


CUTS = {
    # What is kept of the teacher: the whole, whether layers and parts of layers are chosen by data.
    "the whole": (WHOLE, True, False, False),
    "fewer layers": (Init(depth=0.5), False, False, False),
    "layers by data": (Init(layers="influence"), False, True, True),
    "blocks by data": (Init(layers="block-influence"), False, True, True),
    "late layers": (Init(layers="contiguous"), False, False, False),
    "fewer neurons": (Init(depth=1.0, ffn=0.5), False, False, True),
    "fewer heads": (Init(depth=1.0, heads=0.5), False, False, True),
    "fewer channels": (Init(depth=1.0, width=0.5), False, False, True),
    "neurons by layer": (Init(depth=1.0, ffn_widths=(64,)), False, False, True),
    "scratch": (Init(source="scratch", ffn=0.5), False, False, False),
    "another model": (Init(source="pretrained", model="owner/name", depth=1.0), False, False, False),
}


@pytest.mark.parametrize("name", CUTS)
def test_data_decide_what_is_kept_of_some_cuts(name):
    init, whole, by_influence, selective = CUTS[name]
    assert (init.whole, init.by_influence, init.selective) == (whole, by_influence, selective)


def test_repaired_ffns_are_cut_ones():
    assert Init(ffn=0.5, repair=True).repair
    assert Init(ffn_widths=(64,), repair=True).repair
    assert not Init(ffn_widths=(1,)).repair


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": Lora(), "train_embeddings": True}, "random weights, and lora changes weights only a little"),
        ({"train_embeddings": False}, "set distillation.train_embeddings"),
        ({"train_embeddings": True}, "finishing.scales alone would not train them"),
    ],
)
def test_random_weights_are_trained_as_a_whole(changes, said):
    scratch, recipe = Init(source="scratch", depth=1.0), Distillation(**changes)
    alone = Finishing(format="gguf-q4_0", bits=4, group_size=32, scales="alone")
    with pytest.raises(InputError, match=said):
        Strategy(init=scratch, distillation=recipe, finishing=alone if "alone" in said else None)
    whole = Strategy(init=scratch, distillation=Distillation(train_embeddings=True))
    assert whole.describe().startswith("100% from scratch")


def test_students_begin_alike_by_their_weights_and_their_codes():
    grid = {"format": "gguf-q4_0", "bits": 4, "group_size": 32}
    alone, trained = (Finishing(**grid, scales=scales) for scales in ("alone", "absmax"))
    compensated = dataclasses.replace(alone, rounding="compensated")
    plain, kept = Strategy(finishing=alone), Strategy(finishing=compensated)
    assert [one.codes for one in (Strategy(), plain, kept)] == [None, None, compensated.scheme]
    assert plain.begins_as(Strategy(finishing=trained))
    assert plain.begins_as(Strategy(distillation=Distillation(learning_rate=0.01)))
    assert kept.begins_as(kept)
    assert not kept.begins_as(plain)
    assert not plain.begins_as(Strategy(init=WHOLE))
    # Scales alone are trained from the first step, so they are part of what is trained before the decay.
    assert Strategy(finishing=trained).stable_id == Strategy().stable_id
    assert len({Strategy().stable_id, plain.stable_id, kept.stable_id}) == 3
    # The on-policy phase is part of the decay.
    online = Distillation(signal="online", signal_tokens=0)
    phase = dataclasses.replace(online, on_policy=OnPolicy())
    assert Strategy(distillation=phase).stable_id == Strategy(distillation=online).stable_id
    assert Strategy(distillation=phase).id != Strategy(distillation=online).id


@pytest.mark.parametrize("dropped", [(0, 2), (2, 0), (-1, 2), (3,), (1, 2, 3)])
def test_layers_that_are_left_out_are_a_first_one_and_a_number(dropped):
    assert Init(depth=1.0, dropped=(1, 1)).dropped == (1, 1)
    with pytest.raises(InputError, match=r"init\.dropped is the first layer that is left out, 1 or more"):
        Init(depth=1.0, dropped=dropped)
