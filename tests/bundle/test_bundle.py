"""A bundle is complete, matches its export and its checksums, and its smoke test recognises the student."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from autodistill.bundle.sums import check_sums
from autodistill.bundle.write import write_bundle
from autodistill.cli.app import main
from autodistill.errors import DamagedError, InputError
from autodistill.service.launch import Setting, command
from autodistill.service.served import find_served
from tests.bundle.conftest import BUDGET, CONTEXT, PROMISE, STREAMS, free_port, served

KUBERNETES = ("1.30", "1.33")
NAMES = {
    *("README.md", "Dockerfile", "compose.yaml", "kubernetes.yaml", "prometheus.yml", "alerts.yml", "dashboard.json"),
    *("smoke_test.py", "answers.json", "SHA256SUMS"),
}


@pytest.fixture(scope="module")
def bundle(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the export to GGUF."""
    out = tmp_path_factory.mktemp("bundle") / "student"
    assert main(["bundle", str(gguf), "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def changed(gguf: Path, folder: Path, **fields: Any) -> Path:
    """Return a copy of the export with other fields in its record."""
    copied = Path(shutil.copytree(gguf, folder))
    record = json.loads((copied / "export.json").read_text())
    (copied / "export.json").write_text(json.dumps(record | fields))
    return copied


def container(bundle: Path) -> dict[str, Any]:
    """Return the container of the Deployment."""
    deployment = next(yaml.safe_load_all((bundle / "kubernetes.yaml").read_text()))
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


def test_it_has_all_files_and_the_export_itself_byte_for_byte(bundle: Path, gguf: Path) -> None:
    names = {path.name for path in bundle.iterdir()}
    assert names == NAMES | {"model", "t001-gguf-q8-0-k-q8-0-v-f16.service"}
    for path in gguf.iterdir():
        assert (bundle / "model" / path.name).read_bytes() == path.read_bytes()
        assert (bundle / "model" / path.name).stat().st_mode & 0o444 == 0o444, "another user serves it"
    assert not [path for path in bundle.parent.iterdir() if path != bundle]


def test_another_program_finds_its_sums_right(bundle: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=bundle, check=True, capture_output=True)
    assert check_sums(bundle).other_files == ()


def test_an_altered_byte_a_missing_file_and_a_further_one_are_named(copy: Path, capsys: Any) -> None:
    (copy / "api_key").write_text("secret")
    assert main(["bundle", "--check", str(copy)]) == 0
    assert "not of the bundle: api_key" in capsys.readouterr().out
    path = copy / "compose.yaml"
    path.write_bytes(path.read_bytes().replace(b"read_only: true", b"read_only: off "))
    with pytest.raises(DamagedError, match=r"compose\.yaml has changed since it was written"):
        check_sums(copy)
    path.unlink()
    with pytest.raises(DamagedError, match=r"compose\.yaml is missing"):
        check_sums(copy)


@pytest.mark.parametrize("line", ["0" * 63 + "  name", "0" * 64 + "  /etc/passwd", "0" * 64 + "  ../name", "x"])
def test_a_list_of_sums_that_is_none_is_refused(copy: Path, line: str) -> None:
    (copy / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(InputError, match=r"line 1 of .*SHA256SUMS is no checksum of a file of the bundle"):
        check_sums(copy)


@pytest.mark.system  # its schemas take 108 MB
@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("runtime", ["llama.cpp", "vllm"])
def test_the_manifests_are_those_that_kubernetes_takes(
    runtime: str, version: str, bundle: Path, packed: Path, tmp_path: Path
) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    if runtime == "vllm":
        write_bundle(packed, bundle := tmp_path / "bundle")
    documents = list(yaml.safe_load_all((bundle / "kubernetes.yaml").read_text()))
    assert [one["kind"] for one in documents] == ["Deployment", "Service", "PodDisruptionBudget"]
    for document in documents:
        validate.validate(document, version, strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate(documents[0] | {"spec": documents[0]["spec"] | {"replicas": "three"}}, version, strict=True)


def test_memory_is_what_was_measured_and_limited_to_what_was_promised(bundle: Path) -> None:
    found = container(bundle)["resources"]
    assert found["limits"] == {"memory": str(BUDGET)}
    asked = int(found["requests"]["memory"].removesuffix("Mi")) * 2**20
    assert 150_500_000 <= asked < 150_500_000 + 2**20
    student = yaml.safe_load((bundle / "compose.yaml").read_text())["services"]["student"]
    assert student["mem_limit"] == student["memswap_limit"] == BUDGET
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(next(bundle.glob("*.service")).read_text())
    assert (unit["Service"]["MemoryMax"], unit["Service"]["Restart"]) == (str(BUDGET), "always")


def test_nothing_runs_with_rights_or_listens_beyond_what_is_said(bundle: Path) -> None:
    student = yaml.safe_load((bundle / "compose.yaml").read_text())["services"]["student"]
    assert (student["read_only"], student["cap_drop"], student["ports"]) == (True, ["ALL"], ["127.0.0.1:8080:8080"])
    assert container(bundle)["securityContext"]["readOnlyRootFilesystem"] is True
    lines = (bundle / "Dockerfile").read_text().splitlines()
    assert lines[0].startswith("ARG BASE=")
    assert lines[1] == "FROM ${BASE}"
    assert "USER 10001:10001" in lines


def test_the_server_is_told_context_slots_and_cache_of_the_launch_file(bundle: Path, gguf: Path) -> None:
    launch = json.loads((gguf / "serve.json").read_text())
    for words in (container(bundle)["args"], docker_command(bundle)):
        told = dict(pairwise(words))
        assert int(told["--ctx-size"]) == CONTEXT * STREAMS
        assert int(told["--parallel"]) == STREAMS
        assert (told["--cache-type-k"], told["--cache-type-v"]) == ("q8_0", "f16")
        assert told["--flash-attn"] == launch["flash_attention"] == "on"
        assert told["--model"] == f"/model/{launch['model']}"
        assert "--metrics" in words


def docker_command(bundle: Path) -> list[str]:
    """Return the arguments that the image gives its server."""
    last = (bundle / "Dockerfile").read_text().splitlines()[-1]
    return [str(word) for word in json.loads(last.removeprefix("CMD "))]


def test_llama_cpp_itself_knows_every_flag(bundle: Path) -> None:
    """xllamacpp's library contains llama.cpp's own argument parser, with the names of the flags as text."""
    xllamacpp = pytest.importorskip("xllamacpp")
    library = next(Path(xllamacpp.__file__).parent.glob("*.so")).read_bytes()
    flags = [word for word in docker_command(bundle) if word.startswith("--")]
    assert [flag for flag in flags if not re.search(rb"\0" + flag.encode() + rb"\0", library)] == []


@pytest.mark.parametrize(
    ("device", "resource", "base"),
    [
        ("NVIDIA GeForce RTX 4090", "nvidia.com/gpu", "server-cuda"),
        ("NVIDIA of tomorrow", "nvidia.com/gpu", "server-cuda"),
        ("AMD Instinct MI300X", "amd.com/gpu", "server-rocm"),
    ],
)
def test_each_replica_has_a_gpu_where_the_device_is_one(
    device: str, resource: str, base: str, gguf: Path, tmp_path: Path
) -> None:
    export = changed(gguf, tmp_path / "export", promise=PROMISE | {"device": device})
    write_bundle(export, tmp_path / "bundle", "llamacpp")
    found = container(tmp_path / "bundle")["resources"]
    assert found == {"requests": {resource: 1}, "limits": {resource: 1}}, "the memory is that of the GPU"
    assert f"llama.cpp:{base}\n" in (tmp_path / "bundle" / "Dockerfile").read_text()
    deployment = next(yaml.safe_load_all((tmp_path / "bundle" / "kubernetes.yaml").read_text()))
    assert deployment["spec"]["replicas"] == 3


def test_vllm_is_told_context_sequences_and_its_share_of_the_gpu(packed: Path, tmp_path: Path) -> None:
    promise = PROMISE | {"device": "NVIDIA GeForce RTX 4090", "memory_bytes": 12_000_000_000}
    export = changed(packed, tmp_path / "export", promise=promise)
    write_bundle(export, tmp_path / "bundle", "vllm")
    told = yaml.safe_load((tmp_path / "bundle" / "vllm.yaml").read_text())
    assert (told["model"], told["max-model-len"], told["max-num-seqs"]) == ("/model", CONTEXT, STREAMS)
    assert told["gpu-memory-utilization"] == pytest.approx(12e9 / (24564 * 2**20), abs=0.011)
    assert docker_command(tmp_path / "bundle") == ["--config", "/vllm.yaml"]
    # `serve` says the same to vLLM.
    setting = Setting(served=find_served(export, tmp_path), host="127.0.0.1", port=8000, key="key", threads=1)
    words = command(setting)
    given = dict(zip(words[3::2], words[4::2], strict=True))
    for option in ("max-model-len", "max-num-seqs", "generation-config", "gpu-memory-utilization"):
        assert given[f"--{option}"] == str(told[option])


LIMITS = [
    {"quantity": "ttft", "percentile": 95, "seconds": 0.3, "streams": 1, "prompt": 512},
    {"quantity": "tpot", "percentile": 90, "seconds": 0.05, "streams": 1, "prompt": None},
]


@pytest.mark.parametrize(
    ("promise", "expected"),
    [
        (
            {"latency": LIMITS},
            {
                "FirstTokenLate": 'autodistill_first_token_seconds{quantile="0.95"} > 0.3',
                "TokensLate": 'autodistill_token_seconds{quantile="0.95"} > 0.05',
                "MemoryOverBudget": f"autodistill_memory_bytes > {BUDGET}",
            },
        ),
        (
            {"memory_bytes": None},
            {
                "FirstTokenLate": 'autodistill_first_token_seconds{quantile="0.5"} > 0.06',
                "TokensLate": 'autodistill_token_seconds{quantile="0.95"} > 0.025',
            },
        ),
        ({"device": "Raspberry Pi 5 8GB"}, {"MemoryOverBudget": f"autodistill_memory_bytes > {BUDGET}"}),
        # The monitor sees the server's main memory, and the promise is about the GPU's.
        ({"device": "NVIDIA GeForce RTX 4090"}, {}),
        (
            {"measured": {"memory_bytes": BUDGET, "memory_on": "discrete-gpu"}, "latency": LIMITS[:1]},
            {"FirstTokenLate": 'autodistill_first_token_seconds{quantile="0.95"} > 0.3'},
        ),
    ],
    ids=["asked", "measured", "measured elsewhere", "for a GPU", "measured on a GPU"],
)
def test_alerts_are_of_what_was_promised(
    promise: dict[str, Any], expected: dict[str, str], gguf: Path, tmp_path: Path
) -> None:
    write_bundle(changed(gguf, tmp_path / "export", promise=PROMISE | promise), tmp_path / "bundle")
    (group,) = yaml.safe_load((tmp_path / "bundle" / "alerts.yml").read_text())["groups"]
    found = {rule["alert"]: rule["expr"] for rule in group["rules"]}
    assert {name: found.pop(name) for name in expected} == expected
    assert set(found) == {"StudentDown", "MonitorDown", "PromiseBroken"}


@pytest.mark.parametrize(("device", "limit"), [("Raspberry Pi 5 8GB", BUDGET), ("NVIDIA GeForce RTX 4090", None)])
def test_the_panel_of_memory_has_a_limit_if_that_is_of_the_process(
    device: str, limit: int | None, gguf: Path, tmp_path: Path
) -> None:
    write_bundle(changed(gguf, tmp_path / "export", promise=PROMISE | {"device": device}), tmp_path / "bundle")
    panels = {one["title"]: one for one in json.loads((tmp_path / "bundle" / "dashboard.json").read_text())["panels"]}
    assert panels["Memory"]["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"] == limit
    assert ("The promise is about the GPU's memory" in panels["Memory"]["description"]) == (limit is None)


def test_questions_are_the_clearest_and_their_answers_those_of_the_proof(bundle: Path, gguf: Path) -> None:
    asked = json.loads((bundle / "answers.json").read_text())
    with np.load(gguf / "proof.npz") as proof:
        answers = {
            tuple(row[: n + 1]): top[n]
            for row, top in zip(proof["sequences"], proof["top1"], strict=True)
            for n in range(39)
        }
        leads = {
            tuple(row[: n + 1]): lead[n]
            for row, lead in zip(proof["sequences"], proof["leads"], strict=True)
            for n in range(39)
        }
    assert len(asked["questions"]) == 24
    for one in asked["questions"]:
        assert one["answer"] == answers[tuple(one["prompt"])]
    chosen = [leads[tuple(one["prompt"])] for one in asked["questions"]]
    assert np.median(chosen) > np.median(list(leads.values()))
    written = json.loads((gguf / "export.json").read_text())["proof"]["same_written"]
    assert len(asked["written"]["answer"]) == written > 0


@pytest.fixture(scope="module")
def running(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundle's server as its Dockerfile starts it, on a free port, with a key."""
    folder = tmp_path_factory.mktemp("running")
    key = folder / "api_key"
    key.write_text("a key of some length\n".replace(" ", "-"))
    port = free_port()
    words = [word.replace("/model/", f"{bundle}/model/", 1) for word in docker_command(bundle)]
    change = {"--host": "127.0.0.1", "--port": str(port), "--api-key-file": str(key)}
    for flag, value in change.items():
        words[words.index(flag) + 1] = value
    with served(words, folder / "log"):
        yield f"http://127.0.0.1:{port}", key


def smoke(bundle: Path, url: str, key: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the bundle's smoke test as its users do, in a Python that has only its standard library."""
    words = [sys.executable, "-I", "-S", str(bundle / "smoke_test.py"), "--url", url, "--key-file", str(key), *more]
    return subprocess.run(words, capture_output=True, text=True, timeout=100)


def test_the_smoke_test_knows_the_student_again(bundle: Path, running: Any) -> None:
    done = smoke(bundle, *running)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    count = re.fullmatch(r"ok: (\d+) of (\d+) answers of t001\S+ are those recorded at the export\n", done.stdout)
    assert count is not None
    assert count[1] == count[2]


def test_the_smoke_test_tells_one_answer_that_differs_a_wrong_key_and_nobody_there(
    copy: Path, running: Any, tmp_path: Path
) -> None:
    url, key = running
    asked = json.loads((copy / "answers.json").read_text())
    asked["questions"][0]["answer"] += 1
    (copy / "answers.json").write_text(json.dumps(asked))
    done = smoke(copy, url, key)
    assert (done.returncode, "FAILED: " in done.stdout) == (1, True)
    (tmp_path / "other").write_text("another-key-of-some-length")
    assert "/v1/completions answered 401" in smoke(copy, url, tmp_path / "other").stdout
    gone = smoke(copy, f"http://127.0.0.1:{free_port()}", key, "--wait", "0")
    assert (gone.returncode, "is not reached" in gone.stdout) == (1, True)


def damaged(export: Path) -> None:
    path = next(export.glob("*.gguf"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["EXPORT"], "name it with --out"),
        (["EXPORT", "--out", "FULL"], "exists and is not an empty folder"),
        (["EXPORT", "--out", "EXPORT/inner"], "lies within the export"),
        (["EXPORT", "--out", "new", "--runtime", "ollama"], "there is no runtime 'ollama'"),
        (["EXPORT", "--out", "new", "--runtime", "vllm"], "is an export to gguf"),
        (["EXPORT", "--out", "new", "--image", "No Image"], "is no name of an image"),
        (["EXPORT", "--out", "new", "--image", "team/../student"], "is no name of an image"),
        (["EXPORT", "--out", "new", "--image", "x" * 256], "is no name of an image"),
        (["FULL", "--out", "new"], "has no export.json"),
        (["DAMAGED", "--out", "new"], "has changed since it was written"),
        (["UNPROMISED", "--out", "new"], "has no promise"),
        (["UNPROVEN", "--out", "new"], "was exported without a proof"),
        (["NONSENSE", "--out", "new"], "the promise in"),
        ([], "takes the folder of an export"),
        (["--check", "FULL"], "has no SHA256SUMS"),
        (["EXPORT", "--check", "FULL"], "give it alone"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: list[str], said: str, gguf: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    places = {"EXPORT": shutil.copytree(gguf, tmp_path / "export"), "FULL": full}
    places["DAMAGED"] = shutil.copytree(gguf, tmp_path / "damaged")
    damaged(places["DAMAGED"])
    for name, fields in {
        "UNPROMISED": {"promise": None},
        "UNPROVEN": {"proof": None},
        "NONSENSE": {"promise": PROMISE | {"streams": "two"}},
    }.items():
        places[name] = changed(gguf, tmp_path / name.lower(), **fields)
    before = sorted(tmp_path.rglob("*"))
    given = [re.sub("^[A-Z]+", lambda found: str(places.get(found[0], found[0])), word) for word in words]
    assert main(["bundle", *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert sorted(tmp_path.rglob("*")) == before
