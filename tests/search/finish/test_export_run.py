"""Which student is exported, and how it is packed. An impossible export is refused before anything is written."""

import errno
import os
import re
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.torch import load_file

from autodistill.cli.app import main
from autodistill.errors import DamagedError, InputError, VerificationError
from autodistill.export.base import load_exporter
from autodistill.export.compressed_tensors import CompressedTensorsExporter
from autodistill.export.gguf import GgufExporter
from autodistill.export.graphs.onnx import OnnxExporter
from autodistill.export.graphs.onnx_decoder import Decoder
from autodistill.export.proof import load, simulate
from autodistill.hardware.budget import Budget
from autodistill.quantization.grids import Q4_0
from autodistill.quantization.packing import deployed
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.search.finish.export_run import export_run
from autodistill.service.promise import find_promise
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher
from autodistill.utils.checksums import write_list
from autodistill.utils.json_files import read_json, write_json

DEPLOYMENTS = {
    "f16": Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0),
    "q8_0": Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32),
    "q4_0": Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32),
    "q4_k": Deployment(runtime="llama.cpp", format="gguf-q4_k", bits=4, group_size=32, symmetric=False),
    "int8": Deployment(runtime="vllm", format="compressed-tensors", bits=8, group_size=64),
}


def row(trial: str, packing: str, accuracy: float, kind: str = "student", **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": f"{trial}-{packing}",
        "trial": trial,
        "kind": kind,
        "name": trial,
        "deployment": DEPLOYMENTS[packing].to_json(),
        "status": "completed",
        "feasible": True,
        "split": "validation",
        "fidelity": 1.0,
        "accuracy": accuracy,
    }
    return Row.from_json(least | fields)


SEARCH = {
    "metric": "accuracy",
    "direction": "max",
    "teacher": {"name": "big", "reference": "models/big one"},
    "data": {"name": "text", "reference": "text"},
    "plan": {"batch_tokens": 512, "sequence_length": 256},
    "licences": {"big": "MIT", "text": "CC0-1.0"},
}
ROWS = [
    row("t000", "f16", 0.30),
    row("t000", "q8_0", 0.31),
    row("t000", "int8", 0.32),
    row("t001", "q4_0", 0.40),
    row("t001", "f16", 0.45, feasible=False),
    row("t002", "f16", 0.20, fidelity=0.5),
    row("t003", "f16", 0.10),
    row("t004", "f16", 0.15, train_tokens=9216, seed=7),
    row("teacher", "f16", 0.50, "teacher"),
    row("t000", "f16", 0.99, row_id="t000-f16-test", split="test"),
]


@pytest.fixture(autouse=True)
def few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use only two sequences. They are enough to show that the check runs."""
    monkeypatch.setattr("autodistill.search.finish.export_run.POSITIONS", 250)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Create a run whose students t000 and t001 are on disk and differ."""
    with RunFolder.create(tmp_path_factory.mktemp("runs"), "small") as made:
        write_json(made.search_file, SEARCH)
        for one in ROWS:
            made.events.append({"event": "test" if one.split == "test" else "row", "row": one.to_json()})
        made.events.append({"event": "students-collected", "trials": ["t004"], "bytes": 1})
        for seed, trial in enumerate(("t000", "t001")):
            save_tiny_teacher(made.checkpoints / trial / "student", layers=2, ffn=128, seed=seed)
            (made.checkpoints / trial / "student" / "LICENSE").write_text("Do as you please.")
    return made


def weights(run: RunFolder, trial: str) -> np.ndarray[Any, Any]:
    """Return a weight of one layer whose order GGUF does not change."""
    files = load_file(run.checkpoints / trial / "student" / "model.safetensors")
    return files["model.layers.0.mlp.up_proj.weight"].numpy()


def stored(path: Path) -> tuple[str, np.ndarray[Any, Any]]:
    """Return the type and bytes of the same layer in a GGUF file."""
    tensor = next(one for one in GGUFReader(path).tensors if one.name == "blk.0.ffn_up.weight")
    return tensor.tensor_type.name, np.array(tensor.data)


def test_by_default_the_best_student_that_fits_is_packed_on_its_own_grid(run: RunFolder, tmp_path: Path) -> None:
    paths = export_run(run, None, ["gguf"], tmp_path)
    assert paths == {"gguf": tmp_path / "gguf" / "student.gguf"}
    assert stored(paths["gguf"])[0] == "Q4_0"


def test_a_student_that_was_evaluated_in_super_blocks_is_exported_so(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "runs", "wide") as made:
        write_json(made.search_file, SEARCH)
        for packing, accuracy in (("f16", 0.3), ("q4_k", 0.2)):
            made.events.append({"event": "row", "row": row("t000", packing, accuracy).to_json()})
        save_tiny_teacher(made.checkpoints / "t000" / "student", layers=2, width=256)
    paths = export_run(made, "t000-q4_k", ["gguf"], tmp_path)
    assert stored(paths["gguf"])[0] == "Q4_K"


def test_a_container_other_than_the_rows_takes_the_best_deployment_of_its_trial(run: RunFolder, tmp_path: Path) -> None:
    paths = export_run(run, "t000-int8", ["huggingface", "gguf", "compressed-tensors"], tmp_path)
    assert list(paths) == ["huggingface", "gguf", "compressed-tensors"]
    assert stored(paths["gguf"])[0] == "Q8_0"
    kept = load_file(paths["huggingface"] / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    # bfloat16 keeps 8 significant bits.
    np.testing.assert_allclose(kept.float().numpy(), weights(run, "t000"), rtol=2**-8)
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(paths["compressed-tensors"] / "model.safetensors")


def test_a_gguf_file_says_of_whom_it_is_a_student_and_under_which_license(run: RunFolder, tmp_path: Path) -> None:
    """llama.cpp's converter states a model's origin in the same fields. The file may be served without its card."""
    fields = GGUFReader(export_run(run, None, ["gguf"], tmp_path)["gguf"]).fields
    said = {key: fields[key].contents() for key in fields if key.startswith("general.")}
    assert (said["general.name"], said["general.license"]) == ("Student of big", "mit")
    assert (said["general.base_model.count"], said["general.base_model.0.name"]) == (1, "big")


def test_a_card_and_the_license_lie_beside_each(run: RunFolder, tmp_path: Path) -> None:
    for container, path in export_run(run, "t000-q8_0", ["gguf", "huggingface"], tmp_path).items():
        folder = tmp_path / container
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert f"stored here as {'gguf-q8_0' if container == 'gguf' else 'huggingface'}." in card
        assert "0.3200" in card, "another packing of it"
        assert "inherit: MIT" in card
        assert "(text): CC0-1.0" in card
        assert (folder / "LICENSE").read_text() == "Do as you please."
        assert path.exists()


def test_a_student_that_was_changed_is_not_exported_under_the_old_figures(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "runs", "small") as made:
        write_json(made.search_file, SEARCH)
        made.events.append({"event": "row", "row": row("t000", "f16", 0.3).to_json()})
        folder = made.checkpoints / "t000" / "student"
        save_tiny_teacher(folder, layers=2)
        reached = {"event": "rung", "trial": "t000", "rung": 0, "tokens": 64, "value": 0.3}
        made.events.append({**reached, "student": write_list(folder)})
    lines: list[str] = []
    export_run(made, None, ["huggingface"], tmp_path / "first", lines.append)
    assert [line.partition(" ")[0] for line in lines] == ["writing", "running", "t000"], "only what is done"
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    said = r"t000-f16 .*model\.safetensors has changed .*: choose another row, or make one like it with `autodistill d"
    with pytest.raises(DamagedError, match=said) as caught:
        export_run(made, None, ["huggingface"], tmp_path / "second")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "second").exists()
    # A student whose file list was rewritten is not exported either.
    write_list(folder)
    with pytest.raises(DamagedError, match="is not what the run's log names"):
        export_run(made, None, ["huggingface"], tmp_path / "second")


def test_a_student_of_an_earlier_version_is_exported_and_that_is_said(run: RunFolder, tmp_path: Path) -> None:
    lines: list[str] = []
    export_run(run, "t000-q8_0", ["huggingface"], tmp_path, lines.append)
    assert "kept no checksums" in lines[0]


def test_a_row_that_is_asked_for_is_the_one_that_is_exported(run: RunFolder, tmp_path: Path) -> None:
    paths = export_run(run, "t000-f16", ["gguf"], tmp_path)
    kind, data = stored(paths["gguf"])
    assert kind == "F16"
    np.testing.assert_array_equal(data, weights(run, "t000").astype(np.float16))


@pytest.mark.parametrize(
    ("row_id", "containers", "words"),
    [
        ("t009-f16", ["gguf"], ["t009-f16", "t000-int8", "t001-q4_0"]),
        ("t000-f16-test", ["gguf"], ["no row"]),
        ("t003-f16", ["gguf"], ["t003-f16", "removed"]),
        (
            "t004-f16",
            ["gguf"],
            [
                "removed by the search, to hold --checkpoint-limit",
                "autodistill distill FILE --teacher 'models/big one' --data text --tokens 9216 --step-tokens 512",
                "--sequence-length 256 --seed 7",
                "strategy of t004",
            ],
        ),
        ("t002-f16", ["gguf"], ["t002-f16", "not trained to the end"]),
        ("teacher-f16", ["gguf"], ["models/big one", "--teacher"]),
        (None, ["onion"], ["onion", "aoti, compressed-tensors, executorch, gguf, huggingface"]),
        (None, [], ["--to", "gguf"]),
        (None, ["gguf", "gguf"], ["twice"]),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    row_id: str | None, containers: list[str], words: list[str], run: RunFolder, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        export_run(run, row_id, containers, tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_format_that_the_search_never_tried_is_evaluated_then_and_what_it_needs_is_said(
    run: RunFolder, tmp_path: Path
) -> None:
    before, log = read_json(run.search_file), run.events.all()
    told: list[str] = []
    try:
        write_json(run.search_file, before | {"budget": Budget(memory_bytes=10**9, context=128).to_json()})
        path = export_run(run, "t001-q4_0", ["compressed-tensors"], tmp_path, told.append)["compressed-tensors"]
    finally:
        write_json(run.search_file, before)
    assert RunFolder.open(run.path.parent, run.name).events.all() == log
    record = read_json(path / "export.json")
    packed = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=32)
    assert Deployment.from_json(record["deployment"]) == packed
    assert (record["row"], record["promise"]) == ("t001-q4_0", None)
    expected = load(path)
    own = simulate(run.checkpoints / "t001" / "student", DEPLOYMENTS["q4_0"], expected.sequences, 1)
    # It has the row's own codes. Only scales are rounded once more, to bfloat16.
    kept = dict(CompressedTensorsExporter().unpack(path))["model.layers.0.mlp.up_proj.weight"]
    values = deployed(weights(run, "t001"), Q4_0)
    assert np.linalg.norm(kept - values) < 0.02 * np.linalg.norm(values)
    (note,) = [line for line in told if "not evaluated in the search" in line]
    assert note.startswith("t001 as compressed-tensors-int4-g32: not evaluated in the search. On 248 tokens of general")
    assert f", it loses {expected.nll.mean():.4f} nats a token and predicts " in note
    assert f"; as gguf-q4_0 it loses {own.nll.mean():.4f} nats a token" in note
    # vLLM's process and captured graphs take 1 GB by themselves.
    over = (
        r" At context 128 and batch 1 it needs 1\.\d+ GB in vllm, predicted: [\d.]+ MB over the budget of 1\.00 GB\.$"
    )
    assert re.search(over, note)
    assert note in (path / "README.md").read_text(encoding="utf-8")


def test_a_folder_with_something_in_it_is_left_alone(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "student.gguf").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        export_run(run, None, ["huggingface", "gguf"], tmp_path)
    assert (tmp_path / "gguf" / "student.gguf").read_text() == "mine"
    assert not (tmp_path / "huggingface").exists()
    with pytest.raises(InputError, match=r"student\.gguf is a file: name a folder with --out"):
        export_run(run, None, ["huggingface"], tmp_path / "gguf" / "student.gguf")


def test_a_finished_export_is_kept_and_only_what_is_missing_is_written(run: RunFolder, tmp_path: Path) -> None:
    first = export_run(run, None, ["gguf"], tmp_path)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "gguf").iterdir()}
    told: list[str] = []
    both = export_run(run, None, ["gguf", "huggingface"], tmp_path, told.append)
    assert both["gguf"] == first["gguf"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "gguf").iterdir()} == written
    assert (both["huggingface"] / "model.safetensors").is_file()
    assert [line for line in told if line.endswith("kept")] == [
        f"t001 is already exported as gguf, and nothing has changed: {first['gguf']} is kept"
    ]


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param("t000-q8_0", id="of another row"),
        pytest.param("t001-q4_0", id="never run"),
        pytest.param("changed", id="changed since"),
    ],
)
def test_another_export_is_not_taken_for_this_one(asked: str, run: RunFolder, tmp_path: Path) -> None:
    export_run(run, "t001-q4_0", ["gguf"], tmp_path, verified=asked != "t001-q4_0")
    if asked == "changed":
        (tmp_path / "gguf" / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"not an empty folder, and its export is of another row or version, or was"):
        export_run(run, "t001-q4_0" if asked == "changed" else asked, ["huggingface", "gguf"], tmp_path)
    assert not (tmp_path / "huggingface").exists()


def test_an_export_that_was_interrupted_twice_can_be_given_again(run: RunFolder, tmp_path: Path) -> None:
    left = tmp_path / "out" / "huggingface" / ".partial-abc"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    paths = export_run(run, None, ["huggingface"], tmp_path / "out")
    assert not left.exists()
    assert (paths["huggingface"] / "model.safetensors").is_file()


def test_ctrl_c_twice_while_it_is_written_is_one_line_and_the_same_command_then_exports(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first signal comes while a file is half written, and the others while that file is being removed."""
    out = tmp_path / "out"
    words = ["export", run.path.name, "--runs", str(run.path.parent), "--to", "gguf", "--out", str(out)]
    signals = []

    def interrupted(*given: Any, **more: Any) -> None:
        signals.append(given)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with monkeypatch.context() as twice:
        # Its check of the tokenizer, before anything is written, removes a folder too.
        twice.setattr("autodistill.export.gguf.cannot_cut", lambda student, vocabulary: "")
        twice.setattr("autodistill.export.gguf.add_tokenizer", interrupted)
        twice.setattr("autodistill.export.student_reader.shutil.rmtree", interrupted)
        assert main(words) == 130
    # Signals came while the file was written, and while the exporter's folder and the export's folder were removed.
    assert len(signals) == 3
    told = [line for line in capfd.readouterr().err.splitlines()[1:] if not line.startswith("writing ")]
    assert told == ["error: stopped"]
    assert not list(out.rglob("student.gguf"))
    assert main(words) == 0
    assert stored(out / "gguf" / "student.gguf")[0] == "Q4_0"
    beside = {"LICENSE", "README.md", "Modelfile", "serve.json", "export.json", "proof.npz"}
    assert {path.name for path in (out / "gguf").iterdir()} == {"student.gguf", *beside}


def test_what_is_on_disk_is_held_to_the_student(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = GgufExporter.export

    def careless(self: GgufExporter, student: Path, deployment: Deployment, out: Path, **origin: Any) -> Any:
        return export(self, run.checkpoints / "t000" / "student", deployment, out)

    monkeypatch.setattr(GgufExporter, "export", careless)
    with pytest.raises(VerificationError, match="differs from the evaluated weights"):
        export_run(run, "t001-q4_0", ["gguf"], tmp_path)


def test_a_row_of_gguf_leaves_as_onnx_with_its_own_codes(run: RunFolder, tmp_path: Path) -> None:
    path = export_run(run, "t001-q4_0", ["onnx"], tmp_path)["onnx"]
    assert path == tmp_path / "onnx"
    found = dict(OnnxExporter().unpack(path))["model.layers.0.mlp.up_proj.weight"]
    np.testing.assert_array_equal(found, deployed(weights(run, "t001"), Q4_0))
    record = read_json(path / "export.json")
    assert (record["row"], record["format"]) == ("t001-q4_0", "onnx")
    # The table has 8 bits, and its products round activations.
    assert abs(record["proof"]["excess"]) < 0.01
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "with the weights of gguf-q4_0; ONNX Runtime runs it" in card
    assert "general text, since the run's data are not in the cache any more" in card
    assert "accuracy_level of 4-bit codes: 1" in card
    assert "accuracy_level of 8-bit codes: 4" in card


def test_a_row_that_a_format_cannot_hold_is_named_with_its_tensor_before_anything_is_written(
    run: RunFolder, tmp_path: Path
) -> None:
    said = r"t000-int8 cannot be exported as onnx: .*q_proj\.weight as compressed-tensors-int8-g64.*: export to "
    with pytest.raises(InputError, match=said):
        export_run(run, "t000-int8", ["huggingface", "onnx"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_beside_a_gguf_file_lies_what_a_server_must_be_told(run: RunFolder, tmp_path: Path) -> None:
    folder = export_run(run, "t001-q4_0", ["gguf"], tmp_path, verified=False)["gguf"].parent
    told = read_json(folder / "serve.json")
    # The run has no budget, so this is the student's own context.
    assert (told["context"], told["slots"], told["cache_type_k"], told["flash_attention"]) == (512, 1, "f16", "auto")
    assert told["command"][:5] == ["llama-server", "--model", "student.gguf", "--ctx-size", "512"]
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines[1:] == ["FROM ./student.gguf", "PARAMETER num_ctx 512"]


def test_a_record_has_the_promise_of_what_was_measured_in_that_runtime_alone(run: RunFolder, tmp_path: Path) -> None:
    before = read_json(run.search_file)
    try:
        write_json(run.search_file, before | {"budget": Budget(memory_bytes=10**9, context=128).to_json()})
        paths = export_run(run, "t001-q4_0", ["gguf", "huggingface"], tmp_path, verified=False)
    finally:
        write_json(run.search_file, before)
    promise = read_json(paths["gguf"].parent / "export.json")["promise"]
    assert (promise["memory_bytes"], promise["latency"]) == (10**9, [])
    found = find_promise(paths["gguf"], tmp_path)
    assert [(one.figure, one.most) for one in found.limits] == [("memory", 1e9)]
    assert read_json(tmp_path / "huggingface" / "export.json")["promise"] is None


def test_without_a_proof_the_card_and_the_record_say_so(run: RunFolder, tmp_path: Path) -> None:
    path = export_run(run, "t001-q4_0", ["onnx"], tmp_path, verified=False)["onnx"]
    assert read_json(path / "export.json")["proof"] is None
    assert "**Unverified**" in (path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("where", ["export.graphs.onnx.copy_tokenizer", "search.finish.export_run.write_record"])
def test_a_full_disk_half_way_leaves_nothing(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"autodistill.{where}", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left on device"):
        export_run(run, "t001-q4_0", ["onnx"], tmp_path / "out", verified=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["pt2", "torchscript"])
@pytest.mark.parametrize("fallocate", [True, False])
def test_a_full_disk_is_noticed_before_torch_writes(
    fallocate: bool, name: str, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's archive writers abort the process if a write fails, so they must not begin."""
    monkeypatch.setattr(type(load_exporter(name)), "write", lambda *given: pytest.fail("torch would abort here"))
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fallocate:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, kept[1]))
    else:
        monkeypatch.delattr(os, "posix_fallocate")
        monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**16))
    try:
        with pytest.raises(InputError, match=r"cannot write to .*(File too large|No space left on device)"):
            export_run(run, "t001-q4_0", [name], tmp_path / "out", verified=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_that_does_something_else_is_not_kept(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are right, but the runtime rotates the heads the wrong way."""
    turned = Decoder._turned

    def wrong(self: Decoder, heads: str, turn: tuple[str, str]) -> str:
        return turned(self, heads, (turn[1], turn[0]))

    monkeypatch.setattr(Decoder, "_turned", wrong)
    with pytest.raises(VerificationError, match=r"all \d+ stored tensors .* the keys of layer 0 are the first"):
        export_run(run, "t001-q4_0", ["onnx"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
