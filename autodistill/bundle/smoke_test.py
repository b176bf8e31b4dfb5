"""Ask a served student the questions that were recorded when it was exported, and compare the answers.

    python3 smoke_test.py --url http://127.0.0.1:8080 --key-file api_key

It needs only Python 3.9 or newer. For an export to ONNX it runs the files themselves with onnxruntime-genai. Exit code
0: this is the student that was exported. 1: it is not, or it could not be reached.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import sys
import time
import urllib.error
import urllib.request
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 120.0  # time limit of one request


class FailedError(Exception):
    """A smoke test that failed; the message says what is wrong, in one line."""


class Service:
    """A server of llama.cpp or vLLM.

    Args:
        url: Its address.
        key: Key that is sent with its requests; "" for none.
        recorded: Content of answers.json.
    """

    def __init__(self, url: str, key: str, recorded: dict[str, Any]) -> None:
        self.url, self.key, self.recorded = url.rstrip("/"), key, recorded

    def request(self, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> tuple[int, str]:
        """Send one request, a POST if there is a body; return the status and the text of the answer."""
        headers = {"Content-Type": "application/json"}
        key = self.key if key is None else key
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
                return answer.status, answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode("utf-8", "replace")
        except (OSError, ValueError) as error:
            raise FailedError(f"{self.url} is not reached: {getattr(error, 'reason', error)}") from None

    def wait(self, seconds: float) -> None:
        """Wait until the server is healthy."""
        ends = time.monotonic() + seconds
        while True:
            try:
                if self.request("/health")[0] == 200:
                    return
                why = "it is not healthy"
            except FailedError as failed:
                why = str(failed)
            if time.monotonic() > ends:
                raise FailedError(f"after {seconds:.0f} s: {why}")
            time.sleep(0.5)

    def next_token(self, prompt: list[int], ends: bool) -> int:
        """Return the token that the server chooses after a prompt; tokens that end the text only if `ends`."""
        common = {"prompt": prompt, "temperature": 0, "ignore_eos": not ends}
        if self.recorded["runtime"] == "vllm":
            path, more = (
                "/v1/completions",
                {"model": self.recorded["student"], "max_tokens": 1, "return_token_ids": True},
            )
        else:
            path, more = "/completion", {"n_predict": 1, "return_tokens": True}
        status, text = self.request(path, {**common, **more})
        if status != 200:
            raise FailedError(f"{path} answered {status}: {text[:200]}")
        found = json.loads(text)
        tokens = found["choices"][0]["token_ids"] if path == "/v1/completions" else found["tokens"]
        if not tokens:
            raise FailedError(f"{path} wrote no token after a prompt of {len(prompt)}")
        return int(tokens[0])

    def check_surroundings(self) -> None:
        """Check that text is continued, that a wrong key is refused, and that there are metrics."""
        body = {"model": self.recorded["student"], "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        status, text = self.request("/v1/completions", body)
        if status != 200:
            raise FailedError(f"/v1/completions answered {status}: {text[:200]}")
        if self.key and self.request("/v1/completions", body, key=f"wrong-{self.key}")[0] != 401:
            raise FailedError("a wrong key is not refused")
        status, text = self.request("/metrics")
        name = "vllm:" if self.recorded["runtime"] == "vllm" else "llamacpp:"
        if status != 200 or name not in text:
            raise FailedError(f"/metrics answered {status}, without any {name}")


class Library:
    """Model files that onnxruntime-genai runs.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        try:
            self.genai: Any = importlib.import_module("onnxruntime_genai")
        except ImportError:
            raise FailedError("onnxruntime-genai is not installed: pip install -r requirements.txt") from None
        self.model = self.genai.Model(str(folder))

    def next_token(self, prompt: list[int], ends: bool) -> int:
        """Return the token that the model chooses after a prompt; tokens that end the text only if `ends`."""
        parameters = self.genai.GeneratorParams(self.model)
        least = {} if ends else {"min_length": len(prompt) + 1}
        parameters.set_search_options(max_length=len(prompt) + 1, do_sample=False, **least)
        generator = self.genai.Generator(self.model, parameters)
        generator.append_tokens(prompt)
        generator.generate_next_token()
        return int(generator.get_next_tokens()[0])


def compare(server: Service | Library, recorded: dict[str, Any]) -> tuple[int, int]:
    """Ask all questions; return how many answers are as recorded, and how many questions there are."""
    places = [(one["prompt"], one["answer"], True) for one in recorded["questions"]]
    written = recorded["written"]
    for number, answer in enumerate(written["answer"]):
        places.append((written["prompt"] + written["answer"][:number], answer, False))
    same = 0
    for prompt, answer, ends in places:
        found = server.next_token(prompt, ends)
        same += found == answer
        if found != answer:
            print(f"after {len(prompt)} tokens it chose {found}, where {answer} was recorded")
    return same, len(places)


def main() -> int:
    """Parse the arguments, ask the questions, and print the result; return the exit code."""
    parser = argparse.ArgumentParser(description="Ask a served student what was asked of it when it was exported.")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="address of the server")
    parser.add_argument("--key-file", type=pathlib.Path, help="file with its key (default: the variable API_KEY)")
    parser.add_argument("--wait", type=float, default=60.0, metavar="SECONDS", help="how long it may take to start")
    given = parser.parse_args()
    recorded = json.loads((HERE / "answers.json").read_text(encoding="utf-8"))
    try:
        asked: Service | Library
        if recorded["runtime"] == "onnxruntime":
            asked = Library(HERE / "model")
        else:
            key = given.key_file.read_text().strip() if given.key_file else os.environ.get("API_KEY", "")
            asked = Service(given.url, key, recorded)
            asked.wait(given.wait)
            asked.check_surroundings()
        same, count = compare(asked, recorded)
        if same < recorded["least"] * count:
            raise FailedError(f"{same} of {count} answers are those recorded at the export")
    except (FailedError, OSError) as failed:
        print(f"FAILED: {failed}")
        return 1
    print(f"ok: {same} of {count} answers of {recorded['student']} are those recorded at the export")
    return 0


if __name__ == "__main__":
    sys.exit(main())
