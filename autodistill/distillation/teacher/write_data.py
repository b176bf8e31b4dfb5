"""Writes data for sequence-level distillation: a teacher answers prompts, and each answer is a line of a JSONL file.

The student then learns the teacher's own words (Kim and Rush, arXiv 1606.07947).
"""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from autodistill.data.chat_template import Renderer
from autodistill.data.conversations import ANSWERING, TOLD, Turn, WriterLogprobs, logprobs_of, logprobs_record
from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.data.documents import resolve_prompts
from autodistill.data.tokenization import check_ids, tokenized
from autodistill.distillation.teacher.endpoint import Endpoint, Reply
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher, text_files
from autodistill.distillation.teacher.write_request import WriteRequest
from autodistill.errors import (
    EndpointError,
    InputError,
    InterruptedWritingError,
    NotFiniteError,
    RefusedPromptError,
    WritingError,
)
from autodistill.estimates.teacher_fit import fit_teacher
from autodistill.hardware.machine import detect
from autodistill.inference.generation import Sampling, write
from autodistill.inference.tensor_parallel import load_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.models.stored_tensors import stored_type
from autodistill.options import DEFAULT_TEACHER, cache_folder, parsed
from autodistill.utils.durable import make_folder
from autodistill.utils.event_log import EventLog
from autodistill.utils.hashing import content_hash
from autodistill.utils.input_files import check_file

Tell = Callable[[str], None]


# Number of requests to an endpoint at the same time.
_ASKED_AT_ONCE = 8
_SHOWN = 60  # characters of a prompt that was not answered
_SECONDS = 300.0  # longest time of a request to an endpoint, unless the user gives another
# Names of the counts over prompts that had no answer yet, as `write_data` returns them.
_COUNTED = ("written", "unfinished", "blank", "too_long", "prompt_tokens", "answer_tokens", "top-k", "text")


@dataclass(frozen=True)
class _Answer:
    """An answer as it is stored, with its tokens' log-probabilities if they match."""

    text: str
    finished: bool
    prompt_tokens: int
    answer_tokens: int
    writer_logprobs: WriterLogprobs | None = None


def write_data(request: WriteRequest, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Write an answer to each prompt that the file does not answer yet. Each answer is on disk before the next one.

    An answer that reached the token limit is kept, so that it is not paid for again, but students do not learn it. A
    prompt that the endpoint refuses is left out. The same command asks it again.

    Args:
        request: What to write.
        tell: Shows a line to the user, about ten times in total.

    Returns:
        "out", the file, and these counts:
        prompts, and of these: kept from before, written, unfinished, blank;
        prompts too long for a local teacher to read with an answer of `max_tokens`;
        tokens of the prompts and answers written;
        answers with log-probabilities ("top-k") and without ("text");
        answers in the file to other prompts or with other settings ("others").
        "refused" lists the refused prompts, each with its beginning ("prompt") and the reason ("said").

    Raises:
        InputError: Options, prompts or teacher are bad, or a file cannot be written or read.
        EndpointError: The endpoint failed, or refused every prompt. After a failure, the message says how many answers
            are kept, and how many tokens this command used for them.
        WritingError: The local teacher's logits are not finite. The message names the prompt, and reports answers and
            tokens in the same way.
        InterruptedWritingError: The user pressed Ctrl-C while an endpoint writes. It is raised after the answers under
            way are kept, with the same report. A second Ctrl-C raises KeyboardInterrupt at once.
    """
    endpoint = None
    if request.endpoint is not None and request.model is not None:
        timeout = _SECONDS if request.timeout is None else float(request.timeout)
        endpoint = Endpoint(request.endpoint, request.model, timeout=timeout)
    prompts = resolve_prompts(str(request.prompts))
    log = _log(Path(request.out))
    known = {record.get("key") for record in log.read()}
    matcher = _matcher(request, endpoint, reach=len(known) < len(prompts)) if endpoint and request.top_k else None
    writer, answers = _from_endpoint(request, endpoint, matcher, tell) if endpoint else _from_teacher(request)
    settings = {
        "writer": writer,
        "max_tokens": request.max_tokens,
        "top_k": request.top_k,
        **dataclasses.asdict(_sampling(request)),
    }
    if matcher:
        # The log-probabilities that an answer keeps depend on this vocabulary.
        settings["vocabulary"] = matcher.vocabulary
    keys = [content_hash({"settings": settings, "prompt": prompt}, digits=16) for prompt in prompts]
    missing = [place for place, key in enumerate(keys) if key not in known]
    counts = {"prompts": len(prompts), "kept": len(prompts) - len(missing), **dict.fromkeys(_COUNTED, 0)}
    counts["others"] = len(known - {None, *keys})
    refused: list[dict[str, str]] = []
    try:
        for place, answer in answers([prompts[place] for place in missing]):
            prompt = prompts[missing[place]]
            if answer is None:
                counts["too_long"] += 1
            elif isinstance(answer, RefusedPromptError):
                refused.append({"prompt": _beginning(prompt), "said": str(answer)})
            else:
                log.append(_record(keys[missing[place]], settings, prompt, answer))
                _count(counts, answer)
            done = sum(counts[name] for name in ("kept", "written", "too_long")) + len(refused)
            if done == len(prompts) or done % max(1, len(prompts) // 10) == 0:
                tell(f"{done} of {len(prompts)} prompts")
    except (EndpointError, WritingError, InterruptedWritingError) as error:
        kept = counts["kept"] + counts["written"]
        raise type(error)(
            f"{error}; {kept} of {len(prompts)} answers are in {request.out}, for which this command took "
            f"{counts['prompt_tokens']:,} tokens of prompts and {counts['answer_tokens']:,} of answers; the same "
            "command continues with the rest"
        ) from error
    if len(refused) == len(prompts):
        # When all prompts are refused, the cause is probably the options or the model.
        raise EndpointError(f"none of {len(prompts)} prompts was answered: {refused[0]['said']}")
    return {"out": str(request.out), **counts, "refused": refused}


def _sampling(request: WriteRequest) -> Sampling:
    return Sampling(temperature=request.temperature, top_p=request.top_p, seed=request.seed)


def _log(out: Path) -> EventLog:
    """Open the file of answers, and create its folder."""
    check_file(out)
    try:
        make_folder(out.parent)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
    return EventLog(out)


def _matcher(request: WriteRequest, endpoint: Endpoint, *, reach: bool) -> _Matcher:
    """Return what matches the endpoint's log-probabilities with the teacher's tokens.

    Args:
        request: Names the teacher.
        endpoint: The endpoint.
        reach: Whether to try the endpoint before a tokenizer is obtained.
    """
    teacher = resolve_teacher(str(request.teacher or DEFAULT_TEACHER))
    if reach:
        endpoint.reach()
    with text_files(teacher) as folder:
        return _Matcher(folder)


def _count(counts: dict[str, int], answer: _Answer) -> None:
    counts["written"] += 1
    counts["unfinished"] += not answer.finished
    counts["blank"] += answer.finished and not answer.text.strip()
    counts["prompt_tokens"] += answer.prompt_tokens
    counts["answer_tokens"] += answer.answer_tokens
    counts["text" if answer.writer_logprobs is None else "top-k"] += 1


def _beginning(prompt: Sequence[Turn]) -> str:
    return " ".join(prompt[-1].content.split())[:_SHOWN]


def _record(key: str, settings: Mapping[str, Any], prompt: Sequence[Turn], answer: _Answer) -> dict[str, Any]:
    """Return a line of the file: a record with `messages`, which is None for an unfinished answer."""
    asked = [turn._asdict() for turn in prompt]
    messages = [*asked, {"role": ANSWERING, "content": answer.text}]
    learnt = {"messages": messages} if answer.finished else {"messages": None, "asked": asked, "cut": answer.text}
    signal = {TOLD: "text"} if answer.writer_logprobs is None else logprobs_record(answer.writer_logprobs)
    used = {"prompt_tokens": answer.prompt_tokens, "answer_tokens": answer.answer_tokens}
    return {**learnt, **signal, **used, "key": key, "settings": dict(settings)}


# Yields the places of prompts and their answers, or None if prompt and answer do not fit the model's context.
_Answers = Callable[[Sequence[Sequence[Turn]]], Iterator[tuple[int, _Answer | RefusedPromptError | None]]]


def _from_teacher(request: WriteRequest) -> tuple[str, _Answers]:
    """Return the identity of the teacher's outputs, and a function that makes it answer."""
    teacher = materialize(resolve_teacher(str(request.teacher or DEFAULT_TEACHER)), cache_folder(request.cache))
    spec = spec_from_config(read_config(teacher.folder))
    fit = fit_teacher(spec, stored=stored_type(teacher.folder), sequence_length=SEQUENCE_LENGTH, machine=detect())

    def answers(prompts: Sequence[Sequence[Turn]]) -> Iterator[tuple[int, _Answer | None]]:
        """Yield the place of each prompt with its answer, or with None if the context has no room for an answer."""
        if not prompts:
            return
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        renderer = Renderer(teacher.folder)
        ids = {place: renderer.prompt(prompt) for place, prompt in enumerate(prompts)}
        # The stop tokens are checked too, because they pad the answers that end before others.
        largest = max(max(one, default=0) for one in (*ids.values(), renderer.stops))
        check_ids(largest, spec.vocabulary, teacher.name)
        if (empty := next((place for place, one in ids.items() if not one), None)) is not None:
            raise InputError(f"the tokenizer of {teacher.name} makes no token from {_beginning(prompts[empty])!r}")
        longest = parsed(request.max_tokens)
        read = [place for place, one in ids.items() if len(one) + longest <= spec.max_context]
        yield from ((place, None) for place in ids.keys() - set(read))
        if not read:
            return
        came = write(
            load_teacher(teacher.folder, fit.held_type, device, fit.processes),
            [ids[place] for place in read],
            stops=renderer.stops,
            max_tokens=longest,
            sampling=_sampling(request),
            batch=request.batch,
            device=device,
        )
        try:
            for number, written in came:
                place, text = read[number], str(renderer.tokenizer.decode(written, skip_special_tokens=True))
                yield place, _Answer(text, written[-1] in renderer.stops, len(ids[place]), len(written))
        except NotFiniteError as error:
            raise WritingError(
                f"{error}, to the prompt {_beginning(prompts[read[error.place]])!r} of {teacher.name}: check the "
                "teacher's weights, or leave that prompt out"
            ) from error

    return f"{teacher.name} {fit.of(teacher.fingerprint)}", answers


def _from_endpoint(
    request: WriteRequest, endpoint: Endpoint, matcher: _Matcher | None, tell: Tell
) -> tuple[str, _Answers]:
    """Return a name for the endpoint's model, and a function that sends it several prompts at the same time."""
    options = dataclasses.asdict(_sampling(request))

    def ask(prompt: Sequence[Turn]) -> _Answer:
        """Return the answer to one prompt."""
        reply = endpoint.ask(
            [turn._asdict() for turn in prompt],
            max_tokens=parsed(request.max_tokens),
            top_logprobs=request.top_k,
            **options,
        )
        writer_logprobs = matcher.match(reply) if matcher else None
        return _Answer(reply.text, reply.finished, reply.prompt_tokens, reply.answer_tokens, writer_logprobs)

    def answers(prompts: Sequence[Sequence[Turn]]) -> Iterator[tuple[int, _Answer | RefusedPromptError]]:
        """Yield the place of each prompt with its answer, or with the error of a refusal, as they come."""
        left = deque(enumerate(prompts))
        came: SimpleQueue[tuple[int, _Answer | RefusedPromptError] | Exception | None] = SimpleQueue()

        def work() -> None:
            """Ask until no prompt is left, then put None to mark the end."""
            with suppress(IndexError):
                while True:
                    place, prompt = left.popleft()
                    try:
                        came.put((place, ask(prompt)))
                    except RefusedPromptError as error:
                        came.put((place, error))
                    except Exception as error:
                        came.put(error)
            came.put(None)

        working = min(request.batch or _ASKED_AT_ONCE, len(prompts))
        failure: Exception | None = None
        with _first_interrupt(lambda: came.put(InterruptedWritingError("stopped"))):
            try:
                for _ in range(working):
                    # Daemon threads, because Python waits for a pool's threads at exit, even after a second Ctrl-C.
                    threading.Thread(target=work, name="endpoint", daemon=True).start()
                while working:
                    found = came.get()
                    if found is None:
                        working -= 1
                    elif isinstance(found, Exception):
                        # Requests under way are already paid for, so their answers are waited for and kept.
                        left.clear()
                        failure = failure or found
                        if isinstance(found, InterruptedWritingError):
                            tell("stopping once the answers in progress are complete; Ctrl-C again ends at once")
                    else:
                        yield found
            finally:
                left.clear()
        if failure is not None:
            raise failure

    return f"{endpoint.model} at {endpoint.url}", answers


@contextmanager
def _first_interrupt(meet: Callable[[], None]) -> Iterator[None]:
    """Call `meet` at the first Ctrl-C in the block. The next Ctrl-C raises KeyboardInterrupt again.

    Nothing changes outside the main thread, or if Ctrl-C is already ignored or handled by other code.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def restore() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def first(*_: object) -> None:
        restore()
        meet()

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        restore()


class _Matcher:
    """Finds an endpoint's tokens in a local tokenizer.

    They match if the local tokenizer splits the answer into tokens of the same text, and of the same ids if the server
    reports ids.

    Attributes:
        vocabulary: See `WriterLogprobs`.
    """

    def __init__(self, folder: Path) -> None:
        renderer = Renderer(folder)
        self.vocabulary, tokenizer = renderer.vocabulary, renderer.tokenizer
        self._encode = lambda text: tokenized(tokenizer, text)["input_ids"]
        names: dict[str, list[int]] = {}
        self._names = [str(tokenizer.decode([token])) for token in range(len(tokenizer))]
        for token, name in enumerate(self._names):
            names.setdefault(name, []).append(token)
        # A text that several tokens share, such as that of an incomplete character, identifies none of them.
        self._ids = {name: tokens[0] for name, tokens in names.items() if len(tokens) == 1}

    def match(self, reply: Reply) -> WriterLogprobs | None:
        """Return the answer's tokens and the likeliest ones at each position, or None if they do not match."""
        ids = self._encode(reply.text)
        # The server may also report the token that ends the answer, which has no text.
        places = reply.tokens[: len(ids)]
        if not ids or len(places) < len(ids):
            return None
        for token, (choice, _) in zip(ids, places, strict=True):
            if choice.id not in (None, token) or choice.text != self._names[token]:
                return None
        by_id = all(choice.id is not None for choice, _ in places)
        top = []
        for _, likeliest in places:
            found = [(one.id if by_id else self._ids.get(one.text), one.logprob) for one in likeliest]
            known = ((token, logprob) for token, logprob in found if token is not None)
            top.append([(token, logprob) for token, logprob in known if 0 <= token < len(self._names)])
        return logprobs_of(self.vocabulary, ids, top)
