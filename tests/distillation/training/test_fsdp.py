"""Two gloo processes against one: gradients, a step's weights, and trials that resume with another number of them."""

import json
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from autodistill.distillation.teacher.output_cache import TeacherCache
from autodistill.distillation.training import checkpoint
from autodistill.distillation.training.checkpoint import read_metadata
from autodistill.distillation.training.fsdp import Sharding, whole_model
from autodistill.errors import InputError
from autodistill.models.tensors import Role, TensorSpec
from autodistill.strategy.recipe import Alignment, Attention, Distillation, Lora
from autodistill.strategy.strategy import Finishing, Strategy
from autodistill.testing import save_tiny_teacher
from tests import process_group

ALIGNED = Strategy(
    distillation=Distillation(
        learning_rate=1e-2,
        alignment=Alignment(layers="even", count=2, projection="low-rank", rank=8, weight=0.3),
    )
)
PLAIN = Strategy(distillation=Distillation(learning_rate=1e-2, train_embeddings=True))
ATTENDED, RELATED = (
    replace(PLAIN, distillation=replace(PLAIN.distillation, attention=attention))
    for attention in (Attention(kind="maps"), Attention(kind="relations", relation_heads=4))
)
UNCERTAIN = replace(PLAIN, distillation=replace(PLAIN.distillation, positions="uncertain", uncertain_share=0.5))
BALANCED = replace(
    RELATED,
    distillation=replace(
        RELATED.distillation,
        attention=Attention(kind="relations", relation_heads=4, balance=True),
        alignment=replace(ALIGNED.distillation.alignment, balance=True),
    ),
)
CHANGED = replace(PLAIN, distillation=replace(PLAIN.distillation, train_embeddings=False, lora=Lora(rank=4)))
GRID = Finishing(format="gguf-q4_0", bits=4, group_size=32).storage(
    TensorSpec(name="weight", role=Role.LINEAR, shape=(64, 64))
)
STEP = 128  # four sequences


@dataclass(frozen=True)
class Task:
    """The work of each process: train from a checkpoint or the start to a number of tokens, and save."""

    workshop: object
    cache: Path
    strategy: Strategy
    until: int
    out: Path
    begin: Path | None = None
    plan: tuple[tuple[str, object], ...] = ()
    learned: bool | None = None  # whether a decay learns scales; None for the stable part
    grids: bool = True  # whether a decay is on a grid


def run(task, sharding=None):
    workshop = replace(task.workshop, cache=TeacherCache(task.cache))
    trainer = workshop.trainer(task.strategy, batch_tokens=STEP, sharding=sharding, **dict(task.plan))
    if task.begin:
        trainer.load(task.begin)
    if task.learned is None:
        records = list(trainer.train_stable(task.until))
    else:
        grids = {name: GRID for name, tensor in trainer.model.named_parameters() if tensor.ndim == 2}
        records = list(trainer.train_decay(task.until, grids.get if task.grids else None, learned=task.learned))
    trainer.save(task.out)
    if task.learned is not None:
        model = trainer.model if sharding is None else whole_model(sharding, trainer.model)
        if model is not None:
            save_file({name: tensor.detach() for name, tensor in model.named_parameters()}, f"{task.out}.student")
    if task.learned and (sharding is None or sharding.rank == 0):
        np.savez(
            task.out.with_name(task.out.name + ".npz"), **{name: item.scales for name, item in trainer.scales.items()}
        )
    return [(record.loss, record.divergence, record.gradient_norm) for record in records]


def joined(rank, port):
    """Make this process one of two."""
    process_group.begin()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    return Sharding("cpu")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def work(rank, port, tasks, results):
    sharding = joined(rank, port)
    for index, task in enumerate(tasks):
        np.save(results / f"{index}.{rank}.npy", run(task, sharding))
    process_group.leave()


def in_two(function, *arguments):
    """Run a function in two processes, which are forks of a process that has imported what they need."""
    multiprocessing.set_forkserver_preload([__name__, "tests.conftest", "torch.distributed.fsdp"])
    multiprocessing.start_processes(function, (free_port(), *arguments), nprocs=2, start_method="forkserver")


def together(tasks, results):
    """Run tasks in two processes. Return the records of each task, after checking that both processes agree."""
    in_two(work, tasks, results)
    files = [[np.load(results / f"{index}.{rank}.npy") for rank in (0, 1)] for index in range(len(tasks))]
    for one, other in files:
        np.testing.assert_array_equal(one, other)
    return [one for one, _ in files]


# Each of these gathers, shards or sums something that no other does. The rest are slow.
QUICK = ("plain", "aligned", "answers", "balanced", "grid", "learned", "longer", "changed", "changed, learned")


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, True])
def test_two_processes_train_as_one_and_each_goes_on_from_the_others_checkpoint(workshop, tmp_path, every):
    bare = replace(workshop, cache=None)
    answers = np.zeros(workshop.data.tokens.shape, dtype=bool)
    answers[::2, 5:20] = True  # some of the processes' sequences have no token that counts
    marked = replace(bare, data=replace(workshop.data, answers=answers))

    def task(name, strategy, until=STEP, bench=bare, **more):
        return Task(bench, workshop.folder, strategy, until, tmp_path / name, **more)

    narrow = save_tiny_teacher(tmp_path / "narrow", layers=6, ffn=(128, 32, 64, 128, 96, 32))
    further = {"strategy": CHANGED, "begin": tmp_path / "changed.1", "until": 3 * STEP, "learned": False}
    cases = {
        "plain": {"strategy": PLAIN},
        "aligned": {"strategy": ALIGNED},
        "parts": {"strategy": ALIGNED, "plan": (("micro_batch", 1), ("checkpointing", True))},
        "answers": {"strategy": ALIGNED, "bench": marked, "plan": (("micro_batch", 1),)},
        "attended": {"strategy": ATTENDED, "plan": (("micro_batch", 1),)},
        "related": {"strategy": RELATED, "plan": (("micro_batch", 1),)},
        "uncertain": {"strategy": UNCERTAIN, "bench": marked},
        "balanced": {"strategy": BALANCED, "bench": marked},
        "widths": {"strategy": PLAIN, "learned": False, "bench": replace(bare, teacher=narrow)},
        "grid": {"strategy": PLAIN, "learned": False},
        "frozen grid": {"strategy": ALIGNED, "learned": False, "plan": (("checkpointing", True),)},
        "learned": {"strategy": PLAIN, "learned": True},
        "longer": {"strategy": ALIGNED, "until": 2 * STEP},
        "changed": {
            "strategy": CHANGED,
            "until": 2 * STEP,  # A has no gradient in the first step, because B is 0
            "bench": marked,
            "plan": (("micro_batch", 1), ("checkpointing", True)),
        },
        "merged": {**further, "grids": False},
        "changed grid": further,
        "changed, learned": {**further, "learned": True},
    }
    cases = {name: case for name, case in cases.items() if every or name in QUICK}
    alone = {name: run(task(f"{name}.1", **case)) for name, case in cases.items()}
    again = {"begin": tmp_path / "aligned.1", "until": 2 * STEP}
    tasks = [task(f"{name}.2", **case) for name, case in cases.items()]
    tasks.append(task("continued.2", ALIGNED, **again))
    records = dict(zip([*cases, "continued"], together(tasks, tmp_path), strict=True))
    for name in cases:
        np.testing.assert_allclose(records[name], alone[name], rtol=1e-5)
        same(tmp_path / f"{name}.1", tmp_path / f"{name}.2")
    one, other = (np.load(tmp_path / f"learned.{processes}.npz") for processes in (1, 2))
    assert one.files == other.files != []
    for name in one.files:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-3)
    if every:
        gathered = load_file(tmp_path / "widths.2.student")
        assert [len(gathered[f"model.layers.{layer}.mlp.up_proj.weight"]) for layer in range(4)] == [128, 64, 128, 32]
    start = dict(workshop.trainer(CHANGED).model.named_parameters())
    for name in cases.keys() & {"merged", "changed grid", "changed, learned"}:
        one, other = (load_file(tmp_path / f"{name}.{processes}.student") for processes in (1, 2))
        assert one.keys() == other.keys()
        for weight, expected in one.items():
            torch.testing.assert_close(other[weight], expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(expected, start[weight]) != ("proj" in weight)
    # One process began and two go on, and the other way round.
    same(tmp_path / "longer.1", tmp_path / "continued.2")
    run(task("back.1", ALIGNED, until=2 * STEP, begin=tmp_path / "aligned.2"))
    same(tmp_path / "longer.1", tmp_path / "back.1")


def same(one, other):
    """Check that both checkpoints have the same names, weights and moments.

    A first step's moment is a tenth of its gradient. If a gradient is almost 0, AdamW's quotient of it and its size is
    only rounding, and the weight moves in any direction.
    """
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, expected in first.items():
        kind, _, owner = name.partition(".")
        if kind == "weight":
            clear = first[f"exp_avg.{owner}"].abs() > 1e-6
            assert clear.float().mean() > 0.9 or "embed" in name
            torch.testing.assert_close(second[name][clear], expected[clear], rtol=1e-4, atol=2e-5)
        else:
            torch.testing.assert_close(second[name], expected, rtol=1e-3, atol={"exp_avg": 1e-7}.get(kind, 1e-10))


def decoded(path):
    """Return float64 moments by name, with the largest value of each one's block.

    Blocks of 256 end with a process's rows.
    """
    processes, tensors = int(read_metadata(path)["processes"]), load_file(path)
    found = {}
    for name, codes in tensors.items():
        kind, _, owner = name.partition(".")
        if kind in ("state1", "state2") and codes.dtype == torch.uint8:
            scales = iter(tensors[f"absmax{kind[-1]}.{owner}"].double())
            table = tensors[f"qmap{kind[-1]}.{owner}"].double()
            blocks = [block for rows in codes.chunk(processes) for block in rows.flatten().split(256)]
            largest = torch.cat([next(scales).expand(len(block)) for block in blocks]).view(codes.shape)
            assert next(scales, None) is None
            found[name] = table[codes.long()] * largest, largest
    return found


@pytest.fixture(scope="module")
def eight_bit(workshop, tmp_path_factory):
    """Return a folder of checkpoints with 8-bit states: of all weights, or ("whole") of weights that no process shards.

    With changes of rank 37, blocks would end elsewhere in shards than in the whole.
    """
    folder, bare = tmp_path_factory.mktemp("eight-bit"), replace(workshop, cache=None)
    alignment = Alignment(layers="even", count=2, projection="linear", weight=0.3)
    lora = Lora(rank=37, layers="ffn")
    whole = Strategy(distillation=Distillation(learning_rate=1e-2, lora=lora, alignment=alignment))

    def task(name, until=STEP, state="int8", begin=None):
        strategy, plan = whole if "whole" in name else PLAIN, (("optimizer_state", state),)
        return Task(bare, workshop.folder, strategy, until, folder / name, begin and folder / begin, plan)

    run(task("exact", state="float32"))
    run(task("one"))
    tasks = [
        task("two"),
        task("longer", 2 * STEP),
        task("continued", 2 * STEP, begin="two"),
        task("taken", begin="one"),
        task("whole"),
        task("longer whole", 3 * STEP),
        task("continued whole", 3 * STEP, begin="whole"),
        task("taken whole", begin="whole"),
    ]
    together(tasks, folder)
    run(task("back", begin="two"))
    run(task("back whole", begin="whole"))
    return folder


def watch(rank, port, workshop, results):
    """Record how a checkpoint is gathered.

    The record has how many tensors were gathered, how many of them were whole at once, whether this process writes, and
    how many seconds it would wait for another.
    """
    sharding, whole, alive, most = joined(rank, port), checkpoint.whole, [], 0
    trainer = workshop.trainer(PLAIN, cache=TeacherCache(workshop.folder), batch_tokens=STEP, sharding=sharding)
    list(trainer.train_stable(STEP))

    def held():
        return sum(not one.expired() for one in alive)

    def watched(tensor):
        nonlocal most
        # gloo's threads release what they gathered a moment later.
        while held() and time.monotonic() < ends:
            time.sleep(0.01)
        found = whole(tensor)
        if isinstance(tensor, DTensor):
            alive.append(StorageWeakRef(found.untyped_storage()))
            most = max(most, held())
        return found

    ends = time.monotonic() + 20

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "whole", watched)
        # This acts as on a GPU, where `cpu` copies into main memory.
        patch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
        write = trainer.checkpoint()
    seconds = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    (results / str(rank)).write_text(json.dumps([len(alive), most, write is not None, seconds]))
    process_group.leave()


def test_a_checkpoint_is_gathered_tensor_by_tensor_and_a_slow_storage_waited_for(workshop, tmp_path):
    in_two(watch, replace(workshop, cache=None), tmp_path)
    weights = len(list(workshop.trainer(PLAIN).model.parameters()))
    for rank in (0, 1):
        gathered, most, writes, seconds = json.loads((tmp_path / str(rank)).read_text())
        assert (gathered, most, writes) == (3 * weights, 1, rank == 0)
        # The timeout must allow a hundred gigabytes at 10 MB a second.
        assert seconds > 100e9 / 10e6


@pytest.mark.slow  # bitsandbytes is slow on a CPU; 16-bit states go the same way
def test_eight_bit_states_over_two_processes_are_the_moments_and_any_number_goes_on(eight_bit):
    # With the same number of processes, the result is equal to the last bit.
    longer, continued = load_file(eight_bit / "longer"), load_file(eight_bit / "continued")
    assert longer.keys() == continued.keys()
    assert all(torch.equal(continued[name], tensor) for name, tensor in longer.items())

    exact = load_file(eight_bit / "exact")
    for name, before in {"one": None, "two": None, "taken": "one", "back": "two"}.items():
        found, moments = load_file(eight_bit / name), decoded(eight_bit / name)
        rounded = decoded(eight_bit / before) if before else {}
        owners = {key.partition(".")[2] for key in moments}
        # A weight's whole size decides: a shard of 2048 of 4096 values has 8-bit states too.
        assert owners == {key[7:] for key, tensor in exact.items() if key[:7] == "weight." and tensor.numel() >= 4096}
        for key, (values, largest) in moments.items():
            kind, _, owner = key.partition(".")
            expected = exact[("exp_avg." if kind == "state1" else "exp_avg_sq.") + owner].double()
            # Half of the largest gap between codes is 0.0071 of a block's largest value. Earlier blocks differ.
            once = rounded[key][1] if rounded else 0
            assert ((values - expected).abs() <= 0.0071 * (largest + once) + 1e-12).all()
        for owner in owners:
            clear = exact[f"exp_avg.{owner}"].abs() > 1e-6
            weights = (tensors[f"weight.{owner}"][clear] for tensors in (found, exact))
            torch.testing.assert_close(*weights, rtol=1e-4, atol=2e-5)


def test_bfloat16_states_over_two_processes_are_the_moments_and_any_number_goes_on(workshop, tmp_path):
    bare = replace(workshop, cache=None)

    def task(name, until=STEP, begin=None, state="bfloat16"):
        plan = (("optimizer_state", state),)
        return Task(bare, workshop.folder, ALIGNED, until, tmp_path / name, begin and tmp_path / begin, plan)

    run(task("exact", state="float32"))
    run(task("one"))
    longer, continued = task("longer", 2 * STEP), task("continued", 2 * STEP, begin="two")
    together([task("two"), longer, continued, task("taken", begin="one")], tmp_path)
    run(task("back", begin="two"))
    names = ("exact", "one", "two", "longer", "continued", "taken", "back")
    exact, one, two, longer, continued, taken, back = (load_file(tmp_path / name) for name in names)
    for found, expected in ((continued, longer), (taken, one), (back, two)):
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    for found in (one, two):
        moments = {name for name, tensor in found.items() if tensor.dtype == torch.bfloat16}
        assert moments == {name for name in exact if name.startswith("exp_avg")}
        for name in moments:
            # The value is one of the two neighbours of float32's value. The processes also sum in another order.
            torch.testing.assert_close(found[name].float(), exact[name], rtol=2**-7 + 1e-3, atol=1e-7)
    for name in {name for name in exact if name.startswith("weight.")}:
        clear = exact[f"exp_avg.{name[7:]}"].abs() > 1e-6
        torch.testing.assert_close(two[name][clear], exact[name][clear], rtol=1e-4, atol=2e-5)


@pytest.mark.slow  # bitsandbytes is slow on a CPU; 16-bit states go the same way
def test_eight_bit_states_of_what_is_whole_in_every_process_go_on_in_any_number(eight_bit):
    names = ("whole", "taken whole", "back whole", "longer whole", "continued whole")
    begun, taken, back, longer, continued = (load_file(eight_bit / name) for name in names)
    rounded = {name.split(".")[1] for name, tensor in begun.items() if tensor.dtype == torch.uint8}
    assert rounded == {"adapter", "projection"}
    for found, expected in ((taken, begun), (back, begun), (continued, longer)):
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_sequences_that_do_not_divide_are_refused():
    sharding = Sharding.__new__(Sharding)
    sharding.rank, sharding.count = 1, 2
    assert sharding.share([5, 6, 7, 8]) == [6, 8]
    with pytest.raises(InputError, match="3 sequences does not divide over 2"):
        sharding.share([1, 2, 3])
