"""The store of stages: what an address depends on, what is found, and that several processes may write at once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autodistill.runs.checkpoints import LocalFiles, StageStore, default_limit, open_stages, stage_key
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.testing import small_plan
from autodistill.utils.storage import Storage

STRATEGY = Strategy(finishing=Finishing(format="gguf-q4_0", bits=4, group_size=32))
PLAN = small_plan()


def address(strategy: Strategy = STRATEGY, seed: int = 0, device: str = "cpu", **changes: object) -> str:
    return stage_key(strategy, seed, replace(PLAN, **changes), device)  # type: ignore[arg-type]


def test_an_address_leaves_out_what_comes_after_the_stage() -> None:
    others = [
        address(replace(STRATEGY, finishing=None)),
        address(rungs=(512, 9216), keep=(2,), trials=4),
        address(eval_tokens=512, rung_eval_tokens=512, test_tokens=512, seconds={}, notes=("a",), workers=7),
    ]
    assert set(others) == {address()}


def test_an_address_holds_all_that_its_bits_depend_on() -> None:
    others = [
        address(replace(STRATEGY, init=Init(depth=0.5))),
        address(replace(STRATEGY, distillation=Distillation(learning_rate=1e-4))),
        address(seed=1),
        address(device="cuda"),
        address(tokens=4096),
        address(batch_tokens=512),
        address(sequence_length=128),
        address(warmup_tokens=0),
        address(bf16=True),
        address(threads=2),
        address(micro_batch=2),
        address(checkpointing=True),
        address(optimizer_state="int8"),
    ]
    assert len({address(), *others}) == len(others) + 1


def test_runs_that_are_stored_find_their_checkpoints() -> None:
    """The addresses are those of version 0.1 on a CPU, where the threads decide the order of sums."""
    assert (address(), address(threads=4)) == ("340f0e1e4abee012", "8c23ed5921598288")


def test_on_a_gpu_a_machine_of_fewer_cores_finds_what_another_trained() -> None:
    assert address(device="cuda", threads=12) == address(device="cuda", threads=3) != address(threads=3)


def put(store: StageStore, stage: str, tokens: int, text: str = "x") -> None:
    store.save(stage, tokens, lambda path: path.write_text(text) and None)


def test_the_furthest_checkpoint_at_or_below_a_point_is_found(tmp_path: Path) -> None:
    store = open_stages(tmp_path)
    assert store.find("a", 10**9) is None
    for tokens in (192, 1000, 448):
        put(store, "a", tokens, str(tokens))
    put(store, "ab", 900)
    for point, expected in ((191, None), (192, 192), (447, 192), (999, 448), (1000, 1000), (5000, 1000)):
        found = store.find("a", point)
        assert (found and found[1].tokens) == expected
        assert found is None or found[0].read_text() == str(expected)
    assert [(item.stage, item.tokens) for item in store.checkpoints()] == [
        ("a", 192),
        ("a", 448),
        ("a", 1000),
        ("ab", 900),
    ]
    assert store.checkpoints("ab")[0].bytes == 1
    assert store.holds("a", 448)
    assert not store.holds("a", 449)
    for checkpoint in store.checkpoints("a")[1:]:
        store.remove(checkpoint)
        store.remove(checkpoint)  # two processes may collect it at the same time
    assert [item.tokens for item in store.checkpoints("a")] == [192]


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = open_stages(tmp_path)

    def half(path: Path) -> None:
        path.write_text("half of i")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.save("a", 192, half)
    assert store.find("a", 192) is None
    assert [path for path in (tmp_path / "stages").rglob("*") if path.is_file()] == []


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    store = open_stages(tmp_path)
    put(store, "a", 192)
    left = tmp_path / "stages" / ".partial" / "tmpx" / "a.000000000448.safetensors"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    assert [item.tokens for item in store.checkpoints()] == [192]
    store.sweep()
    assert not left.exists()
    assert [item.tokens for item in store.checkpoints()] == [192]


WRITER = """
import sys
from pathlib import Path
from autodistill.runs.checkpoints import open_stages
store = open_stages(Path(sys.argv[1]))
for turn in range(60):
    for tokens in (100, 200):
        store.save("a", tokens, lambda path: path.write_bytes(str(tokens).encode() * 20000) and None)
        path, found = store.find("a", 250)
        assert path.read_bytes() == str(found.tokens).encode() * 20000
"""


def test_processes_that_write_the_same_checkpoint_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(3)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert [item.tokens for item in open_stages(tmp_path).checkpoints()] == [100, 200]
    assert list((tmp_path / "stages" / ".partial").iterdir()) == []


def test_files_elsewhere_need_only_four_words(tmp_path: Path) -> None:
    class Elsewhere:
        """Keeps bytes in memory and returns copies, as an object store would."""

        def __init__(self) -> None:
            self.held: dict[str, bytes] = {}

        def put(self, file: Path, key: str) -> None:
            self.held[key] = file.read_bytes()

        def get(self, key: str) -> Path | None:
            if key not in self.held:
                return None
            (tmp_path / "copy").write_bytes(self.held[key])
            return tmp_path / "copy"

        def list(self) -> dict[str, int]:
            return {key: len(value) for key, value in self.held.items()}

        def remove(self, key: str) -> None:
            self.held.pop(key, None)

    store = StageStore(Elsewhere(), tmp_path / "scratch")
    put(store, "a", 192, "weights")
    found = store.find("a", 200)
    assert found is not None
    assert found[0].read_text() == "weights"
    store.remove(found[1])
    assert store.find("a", 200) is None


def test_the_default_limit_counts_what_is_held_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("autodistill.runs.checkpoints.shutil.disk_usage", lambda path: Usage)
    folder = tmp_path / "not yet" / "checkpoints"
    assert default_limit(folder) == 250
    LocalFiles(folder / "stages").put(_file(tmp_path, 200), "a.000000000192.safetensors")
    assert default_limit(folder) == 300
    assert default_limit(folder, students=400) == 400
    # For a storage, its own disk counts. An object store has no disk.
    shared = Storage(f"file://{tmp_path}/shared")
    assert default_limit(folder, shared) == 250
    shared.at("stages").put(_file(tmp_path, 400), "a.000000000192.safetensors")
    assert default_limit(folder, shared) == 350
    assert default_limit(folder, Storage("s3://bucket/runs?region=us-east-1")) is None


def _file(folder: Path, size: int) -> Path:
    (folder / "file").write_bytes(b"x" * size)
    return folder / "file"
