"""A client of federated distillation: a model, its private text, and the public text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autodistill.data.documents import resolve_data
from autodistill.data.tokenization import encode, load_tokenizer
from autodistill.distillation.student.build import save_student
from autodistill.errors import InputError
from autodistill.federated.flower import client_of
from autodistill.federated.predictions import KEPT, Predictions
from autodistill.models.loading import load_model
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import unwritable

_ROWS = 32  # sequences that are predicted at the same time


class Client:
    """A participant that trains on its own text, and towards the pooled predictions on the public text.

    Args:
        model: Causal language model in float32.
        own: Token ids [sequences, length] of its own text.
        public: Token ids [sequences, length] of the public text, the same for all clients.
        rate: Learning rate of AdamW.
        steps: Number of steps in each round.
        batch: Sequences of a step: this many of its own text, and as many of the public text.
        weight: Weight of the public text in the loss, once there are pooled predictions.
        seed: Seed of the order in which text is read.
        device: Where it trains: "cpu" or "cuda". The model is moved there.
    """

    def __init__(
        self,
        model: Any,
        own: npt.NDArray[np.int64],
        public: npt.NDArray[np.int64],
        *,
        rate: float = 1e-3,
        steps: int = 50,
        batch: int = 8,
        weight: float = 1.0,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.model, self._device = model.to(device), device
        self._own, self._public = (torch.from_numpy(text).to(device) for text in (own, public))
        self._steps, self._batch, self._weight = steps, batch, weight
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        self._dice = torch.Generator().manual_seed(seed)

    @property
    def positions(self) -> int:
        """Number of tokens of the public text that are predicted."""
        return self._public[:, 1:].numel()

    def round(self, agreed: Predictions | None) -> Predictions:
        """Train for a round, and return the model's predictions on the public text after it.

        Args:
            agreed: The pooled predictions of the previous round, if there was one.
        """
        self.model.train()
        for _ in range(self._steps):
            loss = self._likelihood()
            if agreed is not None:
                loss = loss + self._weight * self._agreement(agreed)
            self._optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
        return self.predict()

    def predict(self) -> Predictions:
        """Return the model's likeliest tokens at each position of the public text."""
        self.model.eval()
        tokens, probabilities = [], []
        with torch.no_grad():
            for rows in self._public.split(_ROWS):
                found = self._logits(rows).softmax(dim=-1).flatten(0, 1)
                top = found.topk(min(KEPT, found.shape[1]), dim=1)
                tokens.append(top.indices.int().cpu())
                probabilities.append(top.values.half().cpu())
        return Predictions(tokens=torch.cat(tokens).numpy(), probabilities=torch.cat(probabilities).numpy())

    def _logits(self, rows: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        return found

    def _chosen(self, count: int) -> Tensor:
        return torch.randint(count, (min(self._batch, count),), generator=self._dice)

    def _likelihood(self) -> Tensor:
        """Return the cross-entropy of some sequences of its own text, in nats per token."""
        rows = self._own[self._chosen(len(self._own))]
        return torch.nn.functional.cross_entropy(self._logits(rows).flatten(0, 1), rows[:, 1:].flatten())

    def _agreement(self, agreed: Predictions) -> Tensor:
        """Return the cross-entropy with the pooled predictions, in nats per token. Tokens not shared count as one."""
        chosen, each = self._chosen(len(self._public)), self._public.shape[1] - 1
        places = (chosen[:, None] * each + torch.arange(each)).flatten()
        logs = self._logits(self._public[chosen]).flatten(0, 1).log_softmax(dim=1)
        tokens = torch.from_numpy(agreed.tokens[places.numpy()].astype(np.int64)).to(self._device)
        target = torch.from_numpy(agreed.probabilities[places.numpy()].astype(np.float32)).to(self._device)
        shared = logs.gather(1, tokens)
        rest = (1 - target.sum(dim=1)).clamp_min(0)
        others = (1 - shared.exp().sum(dim=1)).clamp_min(1e-6).log()
        return -((target * shared).sum(dim=1) + rest * others).mean()


def sequences(tokenizer: Any, texts: Sequence[str], length: int) -> npt.NDArray[np.int64]:
    """Return texts one after another as token ids [sequences, length]. An incomplete last sequence is dropped.

    Raises:
        InputError: The texts do not fill one sequence.
    """
    ids = np.concatenate([np.zeros(0, np.int32), *encode(tokenizer, texts)]).astype(np.int64)
    count = len(ids) // length
    if count == 0:
        raise InputError(f"{len(ids)} tokens do not fill a sequence of {length}: give more text, or shorter sequences")
    return ids[: count * length].reshape(count, length)


def _texts(reference: str) -> list[str]:
    source = resolve_data(reference)
    if source.conversations:
        raise InputError(
            f"{source.name} has conversations, and federated distillation takes plain text: give .txt files"
        )
    return [str(one) for one in source.documents]


class Member:
    """A client whose model and text were read, and that will write its final model into a folder.

    Args:
        model: A transformers folder with its initial model. All clients need the same tokenizer.
        data: Text that stays here: a folder of .txt or .md files, or another reference of `--data`.
        public: The public text, the same for all clients.
        out: Folder for the final model.
        length: Tokens of a sequence, the same for all clients.
        training: Arguments of `Client`: rate, steps, batch, weight, seed, device. The device is a GPU if there is
            one, unless it is given.

    Raises:
        InputError: The input is invalid, or the folder is there already or cannot be written.
    """

    def __init__(
        self, *, model: str | Path, data: str, public: str, out: str | Path, length: int = 128, **training: Any
    ) -> None:
        self._folder, self._out = Path(model), Path(out)
        _check_free(self._out)
        tokenizer = load_tokenizer(self._folder)
        own, shared = (sequences(tokenizer, _texts(ref), length) for ref in (data, public))
        where = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
        self._client = Client(load_model(self._folder, torch.float32), own, shared, **(where | training))

    def take_part(
        self, address: str, certificate: bytes | None = None, on_round: Callable[[str], None] = print
    ) -> Path:
        """Take part until the server ends it, and write the final model.

        Args:
            address: Address of the server, as host:port.
            certificate: The server's root certificate in PEM. Without it nothing is encrypted.
            on_round: Called with a line for each round.

        Raises:
            InputError: The server does not answer, the folder cannot be written any more, or Flower is not installed.
        """
        client_of(self._client.round, self._client.positions, address, certificate, on_round)
        try:
            save_student(self._client.model.cpu(), self._folder, self._out)
        except OSError as error:
            raise unwritable(self._out, error) from error
        return self._out


def _check_free(out: Path) -> None:
    """Refuse a folder that exists, or that cannot be made."""
    if out.exists():
        raise InputError(f"{out} is there already: give another folder")
    try:
        make_folder(out.absolute().parent)
        with TemporaryDirectory(prefix=".probe-", dir=out.absolute().parent):
            pass
    except OSError as error:
        raise unwritable(out.parent, error) from error


def join(
    address: str,
    *,
    model: str | Path,
    data: str,
    public: str,
    out: str | Path,
    length: int = 128,
    certificate: bytes | None = None,
    on_round: Callable[[str], None] = print,
    **training: Any,
) -> Path:
    """Take part in federated distillation until the server ends it, and write this client's final model.

    Args:
        address: Address of the server, as host:port.
        model: A transformers folder with this client's initial model. All clients need the same tokenizer.
        data: Text that stays here: a folder of .txt or .md files, or another reference of `--data`.
        public: The public text, the same for all clients.
        out: Folder for the final model.
        length: Tokens of a sequence, the same for all clients.
        certificate: The server's root certificate in PEM. Without it nothing is encrypted.
        on_round: Called with a line for each round.
        training: As for `Member`.

    Raises:
        InputError: The input is invalid, or the folder cannot be written, which is found before anything is sent; the
            server does not answer; or Flower is not installed.
    """
    member = Member(model=model, data=data, public=public, out=out, length=length, **training)
    return member.take_part(address, certificate, on_round)
