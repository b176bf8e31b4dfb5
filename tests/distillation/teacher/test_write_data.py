"""Teacher-written data: resumed, torn, interrupted; from a local teacher, a faulty endpoint and llama.cpp's server."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodistill.cli.app import main
from autodistill.cli.summary import written_summary
from autodistill.data.chat_template import Renderer
from autodistill.data.conversations import logprobs_of, single_turn
from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.student.build import build_student
from autodistill.distillation.student.pretrained import token_rows
from autodistill.distillation.teacher import write_data as writing
from autodistill.distillation.teacher.endpoint import Choice, Reply
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.teacher.write_data import WriteRequest, write_data
from autodistill.distillation.training.trainer import Trainer
from autodistill.errors import EndpointError, InputError, InterruptedWritingError, WritingError
from autodistill.export.gguf import GgufExporter
from autodistill.hardware.budget import Budget
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.named import load_strategy
from autodistill.strategy.strategy import Init, Strategy
from autodistill.testing import save_tiny_teacher, small_plan, tiny_tokenizer
from tests.search.conftest import untimed

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
PROMPTS = ("the miller", "a fox", "the old gardener")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random teacher that writes only printable tokens: bytes of torn characters have no name to match by."""
    folder = save_tiny_teacher(tmp_path_factory.mktemp("teacher"), layers=3, tied=False)
    tokenizer = tiny_tokenizer()
    weights = load_file(folder / "model.safetensors")
    for token in range(len(tokenizer)):
        if token <= 2 or not tokenizer.decode([token]).isprintable() or "\ufffd" in tokenizer.decode([token]):
            weights["lm_head.weight"][token] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def request_(teacher: Path, tmp_path: Path) -> WriteRequest:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return WriteRequest(
        prompts=str(tmp_path / "prompts.txt"),
        out=tmp_path / "made" / "data.jsonl",
        teacher=str(teacher),
        cache=tmp_path / "cache",
        max_tokens=8,
    )


def remotely(request: WriteRequest, **changes: Any) -> WriteRequest:
    """Return the same request for an endpoint. It needs a teacher's tokenizer only for log-probabilities."""
    local = {} if changes.get("top_k") else {"teacher": None, "cache": None}
    return replace(request, **({"model": "big"} | local | changes))


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _expected(teacher: Path, prompt: str, limit: int) -> list[int]:
    """Return the likeliest answer, with one forward pass per token."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": prompt}]
    tokenizer = tiny_tokenizer()
    ids = tokenizer.apply_chat_template(messages, chat_template=CHATML, add_generation_prompt=True, return_dict=False)
    written: list[int] = []
    while len(written) < limit and tokenizer.eos_token_id not in written:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + written])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


def test_a_local_teacher_writes_what_it_holds_for_likeliest(request_: WriteRequest, teacher: Path) -> None:
    counts = write_data(request_)
    records = {record["asked"][0]["content"]: record for record in _records(request_.out)}
    assert set(records) == set(PROMPTS)
    total = 0
    for prompt, record in records.items():
        expected = _expected(teacher, prompt, 8)
        assert record["cut"] == tiny_tokenizer().decode(expected)
        assert record["answer_tokens"] == len(expected) == 8  # a random model does not end by itself
        total += record["prompt_tokens"]
        assert record["signal"] == "text"
    assert counts == {
        "out": str(request_.out),
        "prompts": 3,
        "kept": 0,
        "written": 3,
        "unfinished": 3,
        "blank": 0,
        "too_long": 0,
        "prompt_tokens": total,
        "answer_tokens": 24,
        "top-k": 0,
        "text": 3,
        "others": 0,
        "refused": [],
    }


def test_what_the_teacher_does_not_read_is_counted_and_the_rest_written(request_: WriteRequest, teacher: Path) -> None:
    config = json.loads((teacher / "config.json").read_text())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML

    def tokens(prompt: str) -> int:
        messages = [{"role": "user", "content": prompt}]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    # With the longest answer, one prompt fills the context, and the other has a token more.
    words = "x" * (config["max_position_embeddings"] - request_.max_tokens - tokens(""))
    fits, longer = words, words + "x"
    assert tokens(fits) + 8 == config["max_position_embeddings"] == tokens(longer) + 7
    Path(request_.prompts).write_text("\n".join([longer, "a fox", fits]))
    counts = write_data(request_)
    assert (counts["prompts"], counts["written"], counts["too_long"]) == (3, 2, 1)
    assert {record["asked"][0]["content"] for record in _records(request_.out)} == {"a fox", fits}
    assert "1 prompts are not answered: with --max-tokens" in written_summary(counts)
    again = write_data(request_)
    assert (again["kept"], again["written"], again["too_long"]) == (2, 0, 1)
    fewer = write_data(replace(request_, max_tokens=7))
    assert (fewer["written"], fewer["too_long"]) == (3, 0)
    # Training also learns from what was written with other settings. The user should know this.
    assert (again["others"], fewer["others"]) == (0, 2)
    assert "2 more answers are in the file, from other prompts or settings" in written_summary(fewer)


def test_a_prompt_that_the_teacher_has_no_numbers_for_is_named_and_the_others_kept(
    request_: WriteRequest, teacher: Path, tmp_path: Path
) -> None:
    # One word appears in no other prompt, and the model reads it as NaN.
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:2], "qq"]))
    ids = [tiny_tokenizer()(prompt)["input_ids"] for prompt in (*PROMPTS[:2], CHATML, "qq")]
    (own, *_) = set(ids[3]) - {token for other in ids[:3] for token in other}
    broken = shutil.copytree(teacher, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][own] = math.nan
    weights["lm_head.weight"][own] = 0  # nor is it written
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    wanted = replace(request_, teacher=str(broken))  # all prompts are in one batch
    with pytest.raises(WritingError, match=r"not finite, to the prompt 'qq' .* leave that prompt out; 2 of 3 answers"):
        write_data(wanted)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    assert (write_data(wanted)["kept"], len(_records(request_.out))) == (2, 2)


def _canned(monkeypatch: pytest.MonkeyPatch, replies: dict[str, Any]) -> list[dict[str, Any]]:
    """Replace an endpoint: return answers by prompt, or raise."""
    seen: list[dict[str, Any]] = []

    def ask(self: Any, messages: Any, **options: Any) -> Reply:
        seen.append({"messages": messages, **options})
        reply = replies[messages[-1]["content"]]
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, Reply):
            return reply
        return Reply(text=reply, finished=True, prompt_tokens=5, answer_tokens=2, tokens=())

    monkeypatch.setattr(writing.Endpoint, "ask", ask)
    monkeypatch.setattr(writing.Endpoint, "reach", lambda self: None)
    return seen


def test_answers_are_data_and_cut_ones_are_not(request_: WriteRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Reply(text="and so", finished=False, prompt_tokens=5, answer_tokens=8, tokens=())
    seen = _canned(monkeypatch, {PROMPTS[0]: "paints", PROMPTS[1]: cut, PROMPTS[2]: "repairs\nit"})
    remote = remotely(request_, endpoint="http://127.0.0.1:1/v1", temperature=0.7, top_p=0.9, seed=3)
    counts = write_data(remote)
    assert (counts["written"], counts["unfinished"], counts["prompt_tokens"], counts["answer_tokens"]) == (3, 1, 15, 12)
    documents = resolve_data(str(request_.out)).documents
    assert sorted(documents, key=str) == sorted(
        [single_turn(PROMPTS[0], "paints"), single_turn(PROMPTS[2], "repairs\nit")], key=str
    )
    options = {"max_tokens": 8, "top_logprobs": 0, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    assert all(options.items() <= one.items() for one in seen)
    assert {record["settings"]["writer"] for record in _records(request_.out)} == {"big at http://127.0.0.1:1/v1"}


def test_it_goes_on_where_it_ended_and_pays_for_nothing_twice(
    request_: WriteRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = remotely(request_, endpoint="http://127.0.0.1:1/v1", batch=1)
    _canned(monkeypatch, {PROMPTS[0]: "one", PROMPTS[1]: EndpointError("it is down"), PROMPTS[2]: "three"})
    with pytest.raises(EndpointError, match=r"it is down; \d of 3 answers are in .*data.jsonl, .* the same command"):
        write_data(remote)
    kept = len(_records(request_.out))
    with request_.out.open("a") as file:
        file.write('{"messages": [{"role": "us')  # killed while writing
    seen = _canned(monkeypatch, dict.fromkeys(PROMPTS, "later"))
    counts = write_data(remote)
    assert (counts["kept"], counts["written"], len(seen)) == (kept, 3 - kept, 3 - kept)
    assert len(_records(request_.out)) == 3
    assert write_data(remote)["written"] == 0
    # Other settings or another model mean other answers.
    for other in (replace(remote, model="bigger"), replace(remote, temperature=1.0, seed=1)):
        assert write_data(other)["written"] == 3
    assert len({record["key"] for record in _records(request_.out)}) == 9


def test_what_was_under_way_when_one_failed_is_kept(request_: WriteRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = threading.Barrier(3)

    def ask(self: Any, messages: Any, **options: Any) -> Reply:
        under_way.wait(30)
        if messages[-1]["content"] == PROMPTS[0]:
            raise EndpointError("it is down")
        time.sleep(0.2)
        return Reply(text="slow", finished=True, prompt_tokens=1, answer_tokens=1, tokens=())

    monkeypatch.setattr(writing.Endpoint, "ask", ask)
    with pytest.raises(EndpointError, match=r"2 of 3 answers .* took 2 tokens of prompts and 2 of answers;"):
        write_data(remotely(request_, endpoint="http://127.0.0.1:1/v1", batch=3))
    assert len(_records(request_.out)) == 2


def test_of_a_failure_the_tokens_that_this_command_took_are_said(
    request_: WriteRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = remotely(request_, endpoint="http://127.0.0.1:1/v1", batch=1)
    long = Reply(text="one", finished=True, prompt_tokens=1200, answer_tokens=34, tokens=())
    _canned(monkeypatch, {PROMPTS[0]: long, **dict.fromkeys(PROMPTS[1:], EndpointError("it is down"))})
    with pytest.raises(EndpointError, match=r"1 of 3 answers .* took 1,200 tokens of prompts and 34 of answers;"):
        write_data(remote)
    # What was kept from before was paid for at that time.
    with pytest.raises(EndpointError, match=r"1 of 3 answers .* took 0 tokens of prompts and 0 of answers;"):
        write_data(remote)


def test_what_was_not_begun_when_one_failed_is_not_waited_for(
    request_: WriteRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(self: Any, messages: Any, **options: Any) -> Reply:
        raise EndpointError("it is down")

    monkeypatch.setattr(writing.Endpoint, "ask", ask)
    for _ in range(50):
        with pytest.raises(EndpointError, match="0 of 3 answers"):
            write_data(remotely(request_, endpoint="http://127.0.0.1:1/v1", batch=1))


Answers = Callable[[str], tuple[int, Any]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answers], tuple[str, list[str]]]]:
    """Serve chat completions on loopback: each prompt gets a status and a message or an error. Keep the prompts."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("AUTODISTILL_API_KEY", raising=False)
    started: list[ThreadingHTTPServer] = []

    def start(answers: Answers) -> tuple[str, list[str]]:
        seen: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append(body["messages"][-1]["content"])
                status, said = answers(seen[-1])
                usage = {"prompt_tokens": 5, "completion_tokens": 2}
                reply = {"choices": [said], "usage": usage} if status == 200 else {"error": {"message": said}}
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(ConnectionError):  # the client may be gone
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        started.append(http)
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{http.server_address[1]}/v1", seen

    yield start
    for http in started:
        http.shutdown()
        http.server_close()


def _choice(content: str | None, reason: str = "stop", **fields: Any) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content}, "finish_reason": reason, **fields}


def test_a_prompt_that_is_refused_stops_no_other_and_is_told(
    request_: WriteRequest, served: Callable[[Answers], tuple[str, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"p{number:02d}" for number in range(30)]
    Path(request_.prompts).write_text("\n".join(prompts))
    wrong = {"p03": (400, "the prompt is too long"), "p11": (422, "filtered")}
    url, seen = served(lambda prompt: wrong.get(prompt) or (200, _choice(f"to {prompt}")))
    line = f"write --prompts {request_.prompts} --out {request_.out} --endpoint {url} --model big --json"
    assert main(line.split()) == 0
    counts = json.loads(capfd.readouterr().out)
    assert (counts["prompts"], counts["written"], counts["kept"]) == (30, 28, 0)
    assert sorted((one["prompt"], one["said"]) for one in counts["refused"]) == [
        ("p03", f"{url} refused (400): the prompt is too long"),
        ("p11", f"{url} refused (422): filtered"),
    ]
    answered = {record["messages"][0]["content"]: record["messages"][1]["content"] for record in _records(request_.out)}
    assert answered == {prompt: f"to {prompt}" for prompt in prompts if prompt not in wrong}
    assert sorted(seen) == prompts
    # The other prompts are not asked again. The refused ones are, because a server may get more room.
    assert main(line.removesuffix(" --json").split()) == 0
    printed = capfd.readouterr().out
    assert "0 answers written, 28 from before, of 30 prompts" in printed
    assert '2 prompts were refused; the same command asks them again. The first, "p' in printed
    assert sorted(seen[30:]) == ["p03", "p11"]
    del wrong["p03"]
    assert write_data(remotely(request_, endpoint=url, max_tokens=256))["written"] == 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_where_no_prompt_is_answered_it_is_no_prompts_fault(
    request_: WriteRequest, served: Callable[[Answers], tuple[str, list[str]]], status: int
) -> None:
    url, _ = served(lambda prompt: (status, "no logprobs here"))
    with pytest.raises(EndpointError, match=rf"refused \({status}\): no logprobs here"):
        write_data(remotely(request_, endpoint=url))


def test_an_answer_without_a_word_is_kept_and_not_asked_for_again(
    request_: WriteRequest, served: Callable[[Answers], tuple[str, list[str]]], capfd: pytest.CaptureFixture[str]
) -> None:
    said = {PROMPTS[0]: _choice(None, "length"), PROMPTS[1]: _choice(None), PROMPTS[2]: _choice("repairs")}
    url, seen = served(lambda prompt: (200, said[prompt]))
    line = f"write --prompts {request_.prompts} --out {request_.out} --endpoint {url} --model big"
    assert main(line.split()) == 0
    printed = capfd.readouterr().out
    assert "3 answers written" in printed
    assert "1 answers reached --max-tokens and are not trained on" in printed
    assert "1 answers are blank and are not trained on" in printed
    assert list(resolve_data(str(request_.out)).documents) == [single_turn(PROMPTS[2], "repairs")]
    assert main(line.split()) == 0
    assert "0 answers written, 3 from before" in capfd.readouterr().out
    assert sorted(seen) == sorted(PROMPTS)


def test_what_was_under_way_at_a_ctrl_c_is_kept_and_nothing_else_is_asked(
    request_: WriteRequest, served: Callable[[Answers], tuple[str, list[str]]]
) -> None:
    under_way, told, lines = threading.Barrier(2), threading.Event(), list[str]()

    def answer(prompt: str) -> tuple[int, Any]:
        if not told.is_set() and under_way.wait(30) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        told.wait(30)
        return 200, _choice("slow")

    def tell(line: str) -> None:
        lines.append(line)
        if "Ctrl-C again" in line:
            told.set()

    url, seen = served(answer)
    remote = remotely(request_, endpoint=url, batch=2)
    with pytest.raises(InterruptedWritingError, match=r"^stopped; 2 of 3 .* took \d+ tokens .* continues") as caught:
        write_data(remote, tell)
    assert caught.value.exit_code == 130
    assert lines == [
        "stopping once the answers in progress are complete; Ctrl-C again ends at once",
        "1 of 3 prompts",
        "2 of 3 prompts",
    ]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(_records(request_.out)) == len(seen) == 2
    assert write_data(remote, tell)["kept"] == 2
    assert lines[3:] == ["3 of 3 prompts"]
    assert sorted(seen) == sorted(PROMPTS)


@pytest.mark.slow  # it starts its own process; another test tries the first Ctrl-C in this one
def test_a_second_ctrl_c_waits_for_nobody(
    request_: WriteRequest, served: Callable[[Answers], tuple[str, list[str]]]
) -> None:
    ended, asked_for = threading.Event(), threading.Semaphore(0)

    def answer(prompt: str) -> tuple[int, Any]:
        asked_for.release()
        ended.wait(120)
        return 200, _choice("late")

    url, _ = served(answer)
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from autodistill.cli.app import main; sys.exit(main())"
    )
    line = f"write --prompts {request_.prompts} --out {request_.out} --endpoint {url} --model big"
    with subprocess.Popen([sys.executable, "-c", program, *line.split()], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            assert asked_for.acquire(timeout=120)
            process.send_signal(signal.SIGINT)
            assert "Ctrl-C again ends at once" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert "error: stopped" in process.stderr.read()
        finally:
            process.kill()
            ended.set()
    assert not request_.out.exists()


def test_answers_that_were_matched_with_another_vocabulary_are_asked_for_again(
    request_: WriteRequest, served: Callable[[Answers], tuple[str, list[str]]], tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()

    def answer(prompt: str) -> tuple[int, Any]:
        places = [{"token": tokenizer.decode([token]), "logprob": -0.5} for token in tokenizer("paints")["input_ids"]]
        told = [place | {"top_logprobs": [place]} for place in places]
        return 200, _choice("paints", logprobs={"content": told})

    url, seen = served(answer)
    other = save_tiny_teacher(tmp_path / "other", vocabulary=280)
    remote = remotely(request_, endpoint=url, top_k=2)
    wrong = write_data(replace(remote, teacher=str(other)))
    assert (wrong["top-k"], wrong["text"]) == (0, 3)
    right = write_data(remote)
    assert (right["kept"], right["written"], right["top-k"]) == (0, 3, 3)
    assert write_data(remote)["kept"] == 3
    assert len(seen) == 6
    # Text without log-probabilities is not matched with anything.
    assert write_data(remotely(request_, endpoint=url))["written"] == 3


def _told(text: str, ids: list[int | None] | None = None, end: bool = True) -> Reply:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    told = ids or [None] * len(tokens)
    places = [
        (Choice(tokenizer.decode([t]), i, -0.5), (Choice(tokenizer.decode([t]), i, -0.5), Choice("e", None, -2.0)))
        for t, i in zip(tokens, told, strict=True)
    ]
    if end:
        places.append((Choice("", None, -0.1), ()))
    return Reply(text=text, finished=True, prompt_tokens=1, answer_tokens=len(places), tokens=tuple(places))


def test_log_probabilities_are_kept_where_the_tokens_match_and_text_alone_otherwise(
    request_: WriteRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_ids = [token + 1 for token in tiny_tokenizer()("repairs")["input_ids"]]
    replies = {PROMPTS[0]: _told("paints"), PROMPTS[1]: _told("repairs", other_ids), PROMPTS[2]: _told("x", end=False)}
    _canned(monkeypatch, replies)
    counts = write_data(remotely(request_, endpoint="http://127.0.0.1:1/v1", top_k=2))
    assert (counts["top-k"], counts["text"]) == (2, 1)
    records = {record["messages"][0]["content"]: record for record in _records(request_.out)}
    first = records[PROMPTS[0]]
    assert first["tokens"] == tiny_tokenizer()("paints")["input_ids"]
    (e,) = tiny_tokenizer()("e")["input_ids"]
    assert first["top"] == [[[token, -0.5], [e, -2.0]] for token in first["tokens"]]
    assert first["vocabulary"] == Renderer(Path(request_.teacher)).vocabulary
    assert records[PROMPTS[1]]["signal"] == "text"
    assert "top" not in records[PROMPTS[1]]


def test_log_probabilities_come_through_to_the_token_sets(
    request_: WriteRequest, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other written answer has log-probabilities. Each of them is found again at its token."""
    prompts = [f"{prompt} {number}" for number in range(40) for prompt in PROMPTS[:2]]
    Path(request_.prompts).write_text("\n".join(prompts))
    _canned(monkeypatch, {p: _told(f"paints {i}") if i % 2 else f"repairs {i}" for i, p in enumerate(prompts)})
    write_data(remotely(request_, endpoint="http://127.0.0.1:1/v1", top_k=2))
    answers = [record["messages"][-1]["content"] for record in _records(request_.out)]
    source = resolve_data(str(request_.out))
    prepared = prepare(source, teacher, "t", 64, tmp_path / "cache")
    tokenizer, (e,) = tiny_tokenizer(), tiny_tokenizer()("e")["input_ids"]
    for split, info in prepared.splits.items():
        data = load_split(prepared.folder, split)
        assert data.writer_logprobs is not None
        heard = data.writer_logprobs.ids[:, :, 0] >= 0
        assert info.answers == int(data.answers[:, 1:].sum())
        assert info.told == heard.sum() > 0
        assert {answers[owner][:6] for owner in np.unique(data.documents[heard])} == {"paints"}
        assert np.array_equal(data.writer_logprobs.ids[heard][:, 0], data.tokens[heard])
        assert (data.writer_logprobs.ids[heard][:, 1] == e).sum() == (data.tokens[heard] != e).sum()
        assert (data.writer_logprobs.log_p[heard][:, 0] == -0.5).all()
        owners = np.unique(data.documents[heard])
        expected = [len(tokenizer(answers[owner])["input_ids"]) for owner in owners]
        assert info.told == sum(expected)
    train = prepared.splits["train"]
    assert prepared.notes[-1] == (
        f"{train.told} of {train.answers} answer tokens to learn from have their writer's log-probabilities, and "
        f"{train.answers - train.told} have their text alone"
    )
    # The same text with other log-probabilities is other data.
    lines = request_.out.read_text()
    request_.out.write_text(lines.replace("-0.5]", "-0.25]"))
    assert resolve_data(str(request_.out)).fingerprint != source.fingerprint
    request_.out.write_text(lines.replace("[[", "[").replace("]]", "]"))
    with pytest.raises(InputError, match=r"line \d+ of .* has log-probabilities that cannot be read"):
        resolve_data(str(request_.out))


def test_what_is_as_good_as_impossible_is_one_of_the_rest() -> None:
    told = logprobs_of("v", [7, 8, 9], [[(7, -0.1), (3, -9999.0)], [(8, math.nan)], [(9, 1e-9), (4, -math.inf)]])
    assert told.likeliest.ids.tolist() == [[7], [-1], [9]]
    assert told.likeliest.log_p.tolist() == [[pytest.approx(-0.1)], [0.0], [0.0]]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "--max-tokens must be at least 1"),
    ({"batch": 0}, "--batch must be at least 1"),
    ({"temperature": -1.0}, "--temperature"),
    ({"temperature": math.nan}, "--temperature"),
    ({"top_p": 0.0}, "--top-p"),
    ({"top_k": 3}, "--top-k is asked of an endpoint"),
    ({"top_k": 21, "endpoint": "http://a/v1", "model": "m"}, "--top-k must be 0 to 20"),
    ({"endpoint": "http://a/v1"}, "--endpoint and --model belong together"),
    ({"model": "m"}, "--endpoint and --model belong together"),
    ({"out": Path("data.txt")}, "--out is a .jsonl file"),
    ({"prompts": "nowhere.jsonl"}, "there are no prompts at"),
    ({"teacher": "nowhere"}, "there is no model at"),
]


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_bad_input_is_refused_before_a_model_is_loaded(
    request_: WriteRequest, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(writing, "load_teacher", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=said):
        write_data(replace(request_, **changes))


def test_an_endpoint_that_is_not_there_is_said_before_a_tokenizer_is_obtained(
    request_: WriteRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "text_files", lambda *_: pytest.fail("a tokenizer was obtained"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match="cannot be reached"):
        write_data(remotely(request_, endpoint=f"http://127.0.0.1:{port}/v1", top_k=2))


def test_of_a_teacher_whose_tokens_are_matched_no_weights_are_obtained(
    request_: WriteRequest, served: Callable[[Answers], tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "materialize", lambda *_: pytest.fail("weights were obtained"))
    url, _ = served(lambda prompt: (200, _choice("paints")))
    assert write_data(remotely(request_, endpoint=url, top_k=2))["written"] == 3


SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames = ["127.0.0.1"]
params.port = int(sys.argv[2])
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 1024, 2, 1
params.ui, params.offline, params.fit_params = False, True, False
server = xllamacpp.Server(params)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def llama_url(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Provide llama.cpp's own server on loopback, with the tiny teacher in float16."""
    folder = tmp_path_factory.mktemp("gguf")
    f16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
    artifact = GgufExporter().export(teacher, f16, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", SERVER, str(artifact.path), str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            try:
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                with opener.open(f"{url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield f"{url}/v1"
    finally:
        process.kill()
        process.wait()


def test_llama_cpps_own_server_writes_with_log_probabilities(
    request_: WriteRequest,
    teacher: Path,
    llama_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    line = (
        f"write --prompts {request_.prompts} --out {request_.out} --teacher {teacher} --endpoint {llama_url} "
        f"--model tiny --max-tokens 6 --top-k 4 --json --cache {request_.cache}"
    )
    assert main(line.split()) == 0
    counts = json.loads(capfd.readouterr().out)
    assert (counts["prompts"], counts["written"]) == (3, 3)
    assert counts["answer_tokens"] > 0
    assert counts["top-k"] + counts["text"] == 3
    assert counts["top-k"] > 0
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    tokenizer = tiny_tokenizer()
    for record in _records(request_.out):
        if record["signal"] != "top-k":
            continue
        turns = record["asked"] if record["messages"] is None else record["messages"][:-1]
        ids = tokenizer.apply_chat_template(turns, chat_template=CHATML, add_generation_prompt=True, return_dict=False)
        assert record["prompt_tokens"] == len(ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + record["tokens"]])).logits[0, len(ids) - 1 : -1]
        log_p = torch.log_softmax(logits.double(), -1)
        for row, token, top in zip(log_p, record["tokens"], record["top"], strict=True):
            assert len(top) == 4
            assert token == top[0][0]
            for other, said in top:
                # llama.cpp computes with float16 weights.
                assert said == pytest.approx(float(row[other]), abs=0.05)
    assert main(line.split()) == 0
    assert json.loads(capfd.readouterr().out)["kept"] == 3


ONE_DEPLOYMENT = {
    "name": "one",
    "dimensions": {"init.depth": {"choices": [0.8]}},
    "deployments": [{"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}],
}


@pytest.mark.slow  # the server's log-probabilities and the signal "written" have their own tests
def test_a_student_learns_from_what_llama_cpps_own_server_told(
    request_: WriteRequest,
    teacher: Path,
    llama_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Path(request_.prompts).write_text("\n".join(f"{prompt} {number}" for number in range(45) for prompt in PROMPTS))
    remote = remotely(request_, endpoint=llama_url, model="tiny", max_tokens=40, top_k=20, temperature=0.7, seed=1)
    assert write_data(remote)["top-k"] > 10
    # A random model rarely ends by itself, so the test treats what it said as whole answers.
    records = [record for record in _records(remote.out) if record["signal"] == "top-k"]
    for record in records:
        answer = {"role": "assistant", "content": record.pop("cut", None) or record["messages"][-1]["content"]}
        record["messages"] = [*(record.pop("asked", None) or record["messages"][:-1]), answer]
    said = [{key: value for key, value in record.items() if key != "signal"} for record in records[::5]]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in [*records, *said]))

    # If the student is the teacher itself, the divergence is minimal, and float16 leaves little of it. A sequence has
    # no room for a second record, which the server would not have seen.
    prepared = prepare(resolve_data(str(data)), teacher, "t", 64, tmp_path / "cache")
    train = load_split(prepared.folder, "train")
    trained = {}
    for depth in (1.0, 2 / 3):
        strategy = Strategy(
            init=Init(depth=depth), distillation=replace(load_strategy("written").distillation, divergence_weight=1.0)
        )
        model, kept = build_student(teacher, strategy.init)
        trainer = Trainer(
            model,
            teaching=Teaching(kept_layers=kept, layers=3, width=64),
            strategy=strategy,
            plan=small_plan(sequence_length=64, tokens=train.tokens.size, batch_tokens=train.tokens.size),
            data=train,
            seed=0,
        )
        (record,) = trainer.train_stable(train.tokens.size)
        trained[depth] = record.divergence * train.predicted / prepared.splits["train"].told
    assert trained[1.0] < 0.002
    assert trained[2 / 3] > 20 * trained[1.0]

    (tmp_path / "one.yaml").write_text(json.dumps(ONE_DEPLOYMENT))
    asked_for = SearchRequest(
        budget=Budget(memory_bytes=10**9, context=256),
        strategy="written",
        space=str(tmp_path / "one.yaml"),
        teacher=str(teacher),
        data=str(data),
        tokens=1024,
        runner="inline",
        runs=tmp_path / "runs",
        name="run",
        cache=tmp_path / "cache",
    )
    with untimed():
        assert search(asked_for).finish.best.name == "written"
    counted = json.loads((tmp_path / "runs" / "run" / "search.json").read_text())["data"]["answers"]["train"]
    assert 0 < counted["with_log_probabilities"] < counted["tokens"]

    data.write_text("".join(json.dumps(record) + "\n" for record in said * 9))
    with pytest.raises(InputError, match='the signal "written" needs answers with their writer\'s log-probabilities'):
        search(replace(asked_for, name="other"))


@pytest.mark.slow
def test_a_model_of_another_tokenizer_learns_the_text_that_a_teacher_wrote(
    request_: WriteRequest, teacher: Path, tmp_path: Path
) -> None:
    Path(request_.prompts).write_text("\n".join(f"{prompt} {number}" for number in range(45) for prompt in PROMPTS))
    write_data(replace(request_, max_tokens=24))
    # A random model rarely ends by itself, so the test treats what it said as whole answers.
    records = [{"prompt": record["asked"][0]["content"], "answer": record["cut"]} for record in _records(request_.out)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    other = save_tiny_teacher(tmp_path / "other", layers=3, vocabulary=280)
    with pytest.raises(InputError, match=f"distill sequence_level --data answers.jsonl --teacher {other}"):
        token_rows(other, teacher)
    (tmp_path / "one.yaml").write_text(json.dumps(ONE_DEPLOYMENT))
    asked_for = SearchRequest(
        budget=Budget(memory_bytes=10**9, context=256),
        strategy="sequence_level",
        space=str(tmp_path / "one.yaml"),
        teacher=str(other),
        data=str(data),
        tokens=4096,
        runner="inline",
        runs=tmp_path / "runs",
        name="run",
        cache=tmp_path / "cache",
    )
    with untimed():
        done = search(asked_for)
    assert done.finish.best.name == "sequence_level"
    student = next((tmp_path / "runs" / "run").rglob("student/config.json")).parent
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(other).get_vocab()
    ids = [tokenizer(record["answer"], return_tensors="pt").input_ids for record in records[::9]]
    nats = {}
    for folder in (other, student):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        with torch.no_grad():
            nats[folder] = sum(float(model(input_ids=text, labels=text).loss) for text in ids) / len(ids)
    # A student that learned nothing guesses among 280 tokens.
    assert nats[student] < math.log(280) - 0.2 < nats[other]


def test_the_command_line_says_what_was_done(
    request_: WriteRequest, teacher: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = f"write --prompts {request_.prompts} --out {request_.out} --teacher {teacher} --max-tokens 4"
    assert main([*line.split(), "--temperature", "0.9", "--cache", str(request_.cache)]) == 0
    printed = capfd.readouterr()
    assert f"3 answers written, 0 from before, of 3 prompts: {request_.out}" in printed.out
    assert "12 of answers" in printed.out
    assert "3 answers reached --max-tokens and are not trained on" in printed.out
    assert main([*line.split(), "--top-p", "2"]) == 2
    assert "--top-p must be above 0" in capfd.readouterr().err
