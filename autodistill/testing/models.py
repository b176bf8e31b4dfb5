"""Tiny models, tokenizers, texts and plans, which are the same for the same arguments."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodistill.distillation.training.plan import Plan
from autodistill.models.config import per_layer_config, resized, spec_from_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SUBJECTS = ("the miller", "the teacher", "a sailor", "the young student", "a fox", "the old gardener")
_VERBS = ("carries", "measures", "paints", "forgets", "follows", "repairs")
_OBJECTS = ("the wooden boat", "a silver lamp", "the north wall", "a small garden", "the long letter", "two apples")
_PLACES = ("near the river", "in the market", "under the bridge", "behind the mill", "at the harbour")


def _sentence(dice: random.Random) -> str:
    """Return a sentence whose verb follows from the subject, and whose place mostly follows from the object."""
    subject, thing = dice.randrange(len(_SUBJECTS)), dice.randrange(len(_OBJECTS))
    place = thing % len(_PLACES) if dice.random() < 0.8 else dice.randrange(len(_PLACES))
    return f"{_SUBJECTS[subject].capitalize()} {_VERBS[subject]} {_OBJECTS[thing]} {_PLACES[place]}."


def tiny_text(folder: Path, documents: int = 24, sentences: int = 40, seed: int = 0) -> Path:
    """Write a small corpus from which even a tiny model can learn a little. It depends only on the arguments.

    Args:
        folder: Folder for one .txt file per document. It is created if missing.
        documents: Number of files.
        sentences: Sentences of each document, about 12 words long.
        seed: Another seed gives other documents.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        dice = random.Random(f"{seed}/{index}")
        text = " ".join(_sentence(dice) for _ in range(sentences))
        (folder / f"{index:03d}.txt").write_text(f"Story {index}. {text}\n", encoding="utf-8")
    return folder


def tiny_tokenizer(vocabulary: int = 300, *, begins: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that can write any text, trained on a few sentences.

    Args:
        vocabulary: Number of entries: 3 special ones (`<s>`, `</s>`, `<pad>`), 256 bytes, and merges.
        begins: Whether it begins every text with `<s>`, as the tokenizers of Gemma and Llama 3 do with theirs.

    Raises:
        ValueError: The vocabulary is too small for the bytes, or larger than the sentences allow.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    dice = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_sentence(dice) for _ in range(200)], trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"a tiny tokenizer cannot have {vocabulary} entries, but {tokenizer.get_vocab_size()}")
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}


def tiny_config(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return the config of a tiny model as plain data, with all other fields that transformers gives it.

    Args:
        architecture: transformers' `model_type`.
        changes: Fields of the config that are changed.
    """
    from transformers import AutoConfig

    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 192,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    if architecture == "qwen3_moe":
        sizes |= _EXPERTS | {"moe_intermediate_size": 96}
    config: dict[str, Any] = AutoConfig.for_model(architecture, **(sizes | changes)).to_dict()
    return config


def save_tiny_teacher(
    folder: Path,
    *,
    architecture: str = "llama",
    layers: int = 6,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int | Sequence[int] = 128,
    head_dim: int | None = None,
    tied: bool = True,
    seed: int = 0,
    vocabulary: int = 300,
) -> Path:
    """Save random weights as a transformers folder: config, float32 safetensors, tokenizer, generation config.

    Weights have a wider spread than training would begin with, so that the most likely token is clear. Norms differ
    from 1 and biases from 0, so that a test notices when one is left out.

    Args:
        folder: The folder. It is created if missing.
        architecture: transformers' `model_type`, one of `autodistill.models.families`. Two of three layers of
            "gemma3_text" have a sliding window of 16 tokens. Three of four layers of "qwen3_5_text" have a recurrent
            state, with two heads of keys and four of values. "gemma4_text" has the same windows, heads of twice the
            width in the other layers, a table of tokens for all layers, and capped logits. Its last three layers, if
            there are six or nine, have FFNs of twice the width and read other layers' keys and values. "qwen3_moe" has
            four experts of `ffn` neurons, of which each token uses two.
        layers, width, heads, kv_heads, ffn: Sizes. "gpt_neox" has no `kv_heads`. Several numbers for `ffn` give each
            layer its own.
        head_dim: Width of a head; `width / heads` by default, and always for "gpt_neox".
        tied: Whether the head is the embedding table.
        seed: Seed of the weights. torch's own random state is not changed.
        vocabulary: Number of entries of the tokenizer and of the embedding table.

    Returns:
        The folder.
    """
    widths = (ffn,) * layers if isinstance(ffn, int) else tuple(ffn)
    channels = width // heads if head_dim is None else head_dim
    made = _tiny_teacher(architecture, width, heads, kv_heads, widths, channels, tied, seed, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return folder


@lru_cache(maxsize=128)  # tests save the same teacher many times
def _tiny_teacher(
    architecture: str,
    width: int,
    heads: int,
    kv_heads: int,
    widths: tuple[int, ...],
    channels: int,
    tied: bool,
    seed: int,
    vocabulary: int,
) -> Mapping[str, bytes]:
    """Return the files of a tiny teacher by name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from autodistill.models.loading import held, save_model

    tokenizer = tiny_tokenizer(vocabulary)
    layers = len(widths)
    grouped = {"num_key_value_heads": kv_heads, "head_dim": channels}
    sliding = ["full_attention" if (layer + 1) % 3 == 0 else "sliding_attention" for layer in range(layers)]
    own: dict[str, dict[str, Any]] = {
        "gpt_neox": {},
        "gemma3_text": grouped | {"query_pre_attn_scalar": channels, "sliding_window": 16, "layer_types": sliding},
        "qwen3_5_text": grouped
        | {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
        "gemma4_text": grouped
        | {
            "sliding_window": 16,
            "layer_types": [*sliding[:-1], "full_attention"],
            "global_head_dim": 2 * channels,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": vocabulary,
            "num_kv_shared_layers": 3 if layers in (6, 9) else 0,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 4.0,
        },
        "qwen3_moe": grouped | _EXPERTS | {"moe_intermediate_size": max(widths)},
    }
    config = AutoConfig.for_model(
        architecture,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=max(widths),
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
        **own.get(architecture, grouped),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, tensor in held(model).items():
            if tensor.ndim == 1:
                if architecture == "gemma4_text" and name.endswith("q_norm.weight"):
                    tensor.data.fill_(0.3)  # these norms scale Gemma 4's attention instead of a constant
                tensor.data.add_(torch.randn_like(tensor), alpha=0.1)
    if len(set(widths)) > 1:
        model = _narrowed(model, widths)
    with tempfile.TemporaryDirectory(prefix="tiny-teacher-") as name:
        folder = Path(name)
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _narrowed(model: Any, widths: Sequence[int]) -> Any:
    """Return a model that keeps only the first neurons of each layer's FFN."""
    from autodistill.models.loading import model_from_weights

    spec = resized(spec_from_config(model.config.to_dict()), ffn_widths=tuple(widths))
    whole = dict(model.named_parameters())
    weights = {
        tensor.name: whole[tensor.name].detach()[tuple(map(slice, tensor.shape))].clone() for tensor in spec.tensors
    }
    return model_from_weights(model, {"per_layer_config": per_layer_config(spec)}, weights)


def small_plan(**changes: Any) -> Plan:
    """Return a plan of nine trials and three rungs, with changes to any of its fields."""
    plan = Plan(
        trials=9,
        tokens=9216,
        rungs=(1024, 3072, 9216),
        keep=(4, 2),
        sequence_length=256,
        batch_tokens=256,
        warmup_tokens=512,
        decay=0.2,
        rung_eval_tokens=1024,
        eval_tokens=2048,
        test_tokens=2048,
        workers=2,
        threads=1,
        bf16=False,
        seed=0,
        box_seconds=None,
        seconds={"export": 1.0, "test": 1.0},
    )
    return replace(plan, **changes)
