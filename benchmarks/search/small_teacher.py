"""Train a language model of 2.3M parameters on documentation: a teacher whose weights are on no grid.

    nice -n 19 python -m benchmarks.search.small_teacher [--tokens 69M] [--time 2h]

A Llama of three layers and its own tokenizer are trained from nothing on the texts of `common.debian_texts`. Training
uses one thread, and a constant rate after a warm-up. Each document is read once, and then once more, cut into other
sequences. The teacher is the exponential average of the weights, which needs no decay. Every million tokens the whole
teacher is written anew, as a folder that transformers reads. `training.json` next to its weights has its number of
tokens and its scores on documents that it never reads. If the training was stopped, the same command continues it, with
the same bits. The loss is compiled, for which torch needs a C++ compiler. With AMX, a core then reads 7,000 tokens a
second, instead of 5,000.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model, save_model
from autodistill.options import cache_folder
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import read_json
from benchmarks.common import debian_texts, report
from benchmarks.common.debian_texts import Texts
from benchmarks.common.program import parse, parser_of, tiny_data, token_count
from benchmarks.search.off_grid_teacher import errors, off_grid

# Width and FFN are multiples of 256, as super-blocks of K-quants require.
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
VOCABULARY, SEQUENCE, BATCH = 2048, 512, 1
RATE, WARMUP, WEIGHT_DECAY, BETAS, AVERAGED = 1e-3, 200, 0.1, (0.9, 0.98), 0.999
# 30 tokens for each parameter.
TOKENS = 69_000_000
EVERY, TEST_TOKENS = 1_000_000, 32_768
# Characters of the text from which the tokenizer is made.
_READ = 8_000_000
_BEGIN, _END, _PAD = "<s>", "</s>", "<pad>"


def training_folder(
    texts: Path,
    shape: dict[str, Any] = SHAPE,
    vocabulary: int = VOCABULARY,
    every: int = EVERY,
    compiled: bool = True,
) -> Path:
    """Return the folder of the cache that a training on texts is kept in, whether it has begun or not.

    Args:
        texts: The folder of the texts.
        shape, vocabulary, every, compiled: As for `SmallTeacher`.
    """
    recipe = [shape, vocabulary, SEQUENCE, BATCH, RATE, WARMUP, WEIGHT_DECAY, BETAS, AVERAGED, every, compiled]
    return cache_folder() / "benchmarks" / f"small-teacher-{content_hash([recipe, texts.name])}"


class SmallTeacher:
    """The training of the teacher, and its folders.

    Args:
        texts: The training text and the held-out texts.
        shape: A Llama's shape, with the names of its config.
        vocabulary: Entries of the tokenizer.
        every: Tokens between checkpoints.
        compiled: Whether the loss is compiled. This takes a minute at the start and changes the bits.
    """

    def __init__(
        self,
        texts: Texts,
        shape: dict[str, Any] = SHAPE,
        vocabulary: int = VOCABULARY,
        every: int = EVERY,
        compiled: bool = True,
    ) -> None:
        self._texts, self._shape, self._vocabulary, self._every = texts, shape, vocabulary, every
        self._loss = torch.compile(_loss) if compiled else _loss
        self.folder = training_folder(texts.folder, shape, vocabulary, every, compiled)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checkpoint = self.folder / "checkpoint.pt"
        self.tokenizer = self._made_tokenizer()
        self._text = self._made_tokens()

    @property
    def text_tokens(self) -> int:
        """Tokens of all documents that it reads."""
        return len(self._text)

    @property
    def newest(self) -> Path | None:
        """The checkpoint that was trained longest, or None if there is none."""
        return next(reversed(self.folders()), None)

    def folders(self) -> list[Path]:
        """Return all checkpoints in the order of their tokens."""
        return sorted(self.folder.glob("tokens-*"), key=_tokens)

    def train(self, tokens: int, seconds: float = float("inf")) -> None:
        """Continue training up to this many tokens or to the end of the time, with a checkpoint at the end too.

        Text that has been read to its end is read again. Each time the cuts move by half a sequence.
        """
        torch.manual_seed(0)
        model = self._model()
        averaged = {name: one.detach().clone() for name, one in model.named_parameters()}
        decayed = [one for one in model.parameters() if one.ndim == 2]
        plain = [one for one in model.parameters() if one.ndim != 2]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
        step, spent = self._load(model, averaged, optimizer)
        weights, averages = [*model.parameters()], [*averaged.values()]
        size, began = SEQUENCE * BATCH, time.monotonic()
        last, reading = tokens // size, (len(self._text) - SEQUENCE) // size
        while step < last and time.monotonic() - began < seconds:
            times, place = divmod(step, reading)
            first = place * size + times * SEQUENCE // 2 % SEQUENCE
            part = torch.from_numpy(self._text[first : first + size].astype(np.int64))
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
            ids = part.view(BATCH, SEQUENCE)
            loss = self._loss(model, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            share = min(AVERAGED, step / (step + 10))
            with torch.no_grad():
                for average, weight in zip(averages, weights, strict=True):
                    average.lerp_(weight, 1 - share)
            if step * size // self._every > (step - 1) * size // self._every:
                now = time.monotonic()
                spent, began, seconds = spent + now - began, now, seconds - (now - began)
                self._save(model, averaged, optimizer, step, spent, float(loss.detach()))
        if step and not (self.folder / f"tokens-{step * size}").exists():
            spent += time.monotonic() - began
            self._save(model, averaged, optimizer, step, spent, None)

    def _model(self) -> Any:
        tokenizer = self.tokenizer
        config = LlamaConfig(
            vocab_size=self._vocabulary,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **self._shape,
        )
        # In sequences of 512, fused attention is slower than the compiled backward pass of eager attention.
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    def _load(
        self, model: Any, averaged: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[int, float]:
        if not self._checkpoint.exists():
            return 0, 0.0
        state = torch.load(self._checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.update(state["averaged"])
        return state["step"], state["seconds"]

    def _save(
        self,
        model: Any,
        averaged: dict[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        step: int,
        seconds: float,
        loss: float | None,
    ) -> None:
        """Write the checkpoint, then the teacher. The last earlier teacher stays, and every fourth."""
        size = SEQUENCE * BATCH
        tokens = step * size
        state = {"model": model.state_dict(), "averaged": averaged, "optimizer": optimizer.state_dict()}
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state | {"step": step, "seconds": seconds}, partial)
        os.replace(partial, self._checkpoint)
        teacher = self._model()
        teacher.load_state_dict(averaged, strict=False)
        teacher.tie_weights()
        nll, accuracy = self._test_scores(teacher)
        parameters = sum(one.numel() for one in teacher.parameters())
        made = {
            "tokens": tokens,
            "parameters": parameters,
            "tokens_per_parameter": tokens / parameters,
            "seconds": seconds,
            "train_loss": loss,
            "test_nll": nll,
            "test_accuracy": accuracy,
            "texts": self._texts.record,
            "made": report.stamp(),
        }
        folder = self.folder / ".partial"
        shutil.rmtree(folder, ignore_errors=True)
        save_model(teacher, folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(made, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.rename(folder, self.folder / f"tokens-{tokens}")
        for old in self.folders()[:-2]:
            if _tokens(old) % (4 * self._every) >= size:
                shutil.rmtree(old)
        seen = "" if loss is None else f"loss {loss:.3f}, "
        line = f"{tokens:,} tokens, {seconds:.0f} s, {seen}test NLL {nll:.4f}, accuracy {accuracy:.4f}"
        print(line, file=sys.stderr, flush=True)

    @torch.no_grad()
    def _test_scores(self, model: Any) -> tuple[float, float]:
        """Return NLL and accuracy of the next token on documents that are in no student's text either."""
        ids = self._encoded(_folder_texts(self._texts.folder / "manuals-test"), TEST_TOKENS)
        rows = torch.from_numpy(ids[: len(ids) // SEQUENCE * SEQUENCE].astype(np.int64)).view(-1, SEQUENCE)
        nll, right, count = 0.0, 0, 0
        for row in rows.split(BATCH):
            scores = model(input_ids=row).logits[:, :-1].flatten(0, 1).float()
            wanted = row[:, 1:].flatten()
            nll += float(torch.nn.functional.cross_entropy(scores, wanted, reduction="sum"))
            right += int((scores.argmax(dim=-1) == wanted).sum())
            count += len(wanted)
        return nll / count, right / count

    def _made_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a byte-level BPE that splits text as GPT-2's does, because llama.cpp knows that one."""
        path = self.folder / "tokenizer.json"
        if not path.exists():
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=self._vocabulary,
                special_tokens=[_BEGIN, _END, _PAD],
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            )
            tokenizer.train_from_iterator(_up_to(self._lines(), _READ), trainer)
            partial = path.with_suffix(".partial")
            tokenizer.save(str(partial))
            os.replace(partial, path)
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_file(str(path)),
            bos_token=_BEGIN,
            eos_token=_END,
            pad_token=_PAD,
            model_max_length=self._shape["max_position_embeddings"],
        )

    def _made_tokens(self) -> npt.NDArray[np.uint16]:
        """Return all documents as one row of tokens, each with an end token."""
        path = self.folder / "tokens.npy"
        if not path.exists():
            partial = self.folder / "tokens.partial.npy"
            np.save(partial, self._encoded(self._lines()))
            os.replace(partial, path)
        found: npt.NDArray[np.uint16] = np.load(path, mmap_mode="r")
        return found

    def _encoded(self, texts: Iterator[str], most: float = float("inf")) -> npt.NDArray[np.uint16]:
        end, parts, count = self.tokenizer.eos_token_id, list[npt.NDArray[np.uint16]](), 0
        for some in _batches(texts, 64):
            for one in self.tokenizer.backend_tokenizer.encode_batch_fast(some, add_special_tokens=False):
                parts.append(np.array([*one.ids, end], dtype=np.uint16))
                count += len(one.ids) + 1
            if count >= most:
                break
        joined = np.concatenate(parts)
        return joined if count < most else joined[: int(most)]

    def _lines(self) -> Iterator[str]:
        with self._texts.train.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _tokens(folder: Path) -> int:
    return int(folder.name.removeprefix("tokens-"))


def _folder_texts(folder: Path) -> Iterator[str]:
    return (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))


def _up_to(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters < 0:
            return


def _batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    some = list[str]()
    for text in texts:
        some.append(text)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def small_teacher(tokens: int | None = None) -> Path:
    """Return the folder of the teacher after this many tokens, or the newest.

    Raises:
        SystemExit: The teacher does not exist yet.
    """
    one = SmallTeacher(debian_texts.debian_texts())
    found = one.newest if tokens is None else one.folder / f"tokens-{tokens}"
    if found is not None and not found.exists():
        sys.exit(f"the small teacher has no folder after {tokens:,} tokens: leave the tokens out for the newest one")
    if found is None:
        sys.exit("the small teacher has no checkpoint yet: run python -m benchmarks.search.small_teacher first")
    return found


def described(folder: Path) -> str:
    """Describe the teacher in a folder: how far it is trained. For another model, return the folder's name."""
    record = folder / "training.json"
    if not record.exists():
        return folder.name
    told = read_json(record)
    return (
        f"the small language model after {told['tokens']:,} tokens, {told['tokens_per_parameter']:.2f} a parameter "
        f"(of 30 that are its aim)"
    )


def _tiny(tokens: int) -> SmallTeacher:
    """Return a teacher of tiny sizes, for a smoke run."""
    text = Path(tiny_data(60))
    folder = text.parent / "texts"
    (folder / "manuals-test").mkdir(parents=True)
    documents = [*_folder_texts(text)]
    lines = [json.dumps({"text": document}) for document in documents[:50]]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for place, document in enumerate(documents[50:]):
        (folder / "manuals-test" / f"{place}.txt").write_text(document, encoding="utf-8")
    shape = SHAPE | {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    return SmallTeacher(Texts(folder=folder, record={}), shape, vocabulary=288, every=tokens // 2, compiled=False)


def sections(teacher: SmallTeacher) -> list[str]:
    """Return the parts of the report."""
    folder = teacher.newest
    assert folder is not None
    model = load_model(folder, torch.float32)
    found = errors(model, spec_from_config(read_json(folder / "config.json")))
    rows = []
    for one in teacher.folders():
        told = read_json(one / "training.json")
        share = f"{told['tokens_per_parameter']:.2f}"
        read = f"{told['test_nll']:.4f}", f"{100 * told['test_accuracy']:.2f}"
        rows.append([f"{told['tokens']:,}", share, f"{told['seconds']:.0f}", *read])
        report.note("training", told, told["made"])
    report.note("errors", found)
    kinds = [[kind, f"{error:.4f}", f"{normal:.4f}"] for kind, (error, normal) in found.items()]
    packages = told["texts"].get("packages", {})
    licenses = ", ".join(f"{name} ({one['license']})" for name, one in packages.items())
    return [
        f"{told['parameters']:,} parameters. {TOKENS:,} tokens, 30 a parameter, are the aim; the text has "
        f"{teacher.text_tokens:,} and is read again after them, and this one has had {told['tokens']:,}. Read on "
        f"{TEST_TOKENS:,} tokens of documents that it does not read, the folders that are kept:",
        report.table(["tokens", "a parameter", "s", "NLL", "accuracy, %"], rows),
        "Squared error of packing over that of a uniform error in a step, under the scales that fit best. "
        f"{'It lies on no grid.' if off_grid(found) else '**It is not off the grid.**'}",
        report.table(["grid", "its weights", "normal weights"], kinds),
        f"Packages of Debian that all texts are made of, with their licences: {licenses}.",
    ]


def main() -> None:
    """Train the teacher as far as the time allows, print where it is, and write the report."""
    parser = parser_of(__doc__, time=True)
    parser.add_argument("--tokens", type=token_count, default=TOKENS, help="in all, 30 a parameter by default")
    arguments = parse(parser, tokens=6 * SEQUENCE * BATCH)
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    one = _tiny(arguments.tokens) if arguments.smoke else SmallTeacher(debian_texts.debian_texts())
    one.train(arguments.tokens, arguments.time)
    if one.newest is None:
        sys.exit("no time for a step: give more")
    print(one.newest)
    print(report.write("small-teacher", "A small language model off any grid", sections(one)))


if __name__ == "__main__":
    main()
