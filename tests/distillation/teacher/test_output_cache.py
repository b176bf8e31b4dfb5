"""The cache's content against the teacher's dense outputs; and damage, limits and other writers are handled well."""

import errno
import json
import os
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from autodistill.data.dataset import TokenSet
from autodistill.distillation.losses.schedules import GRID
from autodistill.distillation.teacher import build_cache as cache_making
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.output_cache import META, CacheSettings, TeacherCache
from autodistill.errors import DamagedError, InputError
from autodistill.models.loading import load_model
from autodistill.runs.run_folder import RunFolder
from autodistill.strategy.recipe import Distillation, Temperature

K, STATES = 16, (0, 3, 5)
SETTINGS = CacheSettings(top_k=K, states=STATES)


class Teacher:
    """Loads the teacher and counts the loads."""

    def __init__(self, folder):
        self._folder = folder
        self.loads = 0

    def __call__(self):
        self.loads += 1
        return load_model(self._folder, torch.float32)


@pytest.fixture
def teacher(workshop):
    return Teacher(workshop.teacher)


@pytest.fixture
def ensure(workshop, teacher, tmp_path):
    def call(sequences=2, settings=SETTINGS, **changes):
        arguments = {
            "teacher_fingerprint": "t",
            "data_fingerprint": "d",
            "data": workshop.data.head(sequences * workshop.data.tokens.shape[1]),
            "vocabulary": 300,
            "width": 64,
            "settings": settings,
            "root": tmp_path,
            "limit_bytes": 10**8,
        }
        return ensure_cache(changes.pop("load_teacher", teacher), **(arguments | changes))

    return call


@pytest.fixture(scope="module")
def dense(workshop):
    """Return float64 logits [tokens, vocab] of all sequences, and each layer's raw outputs, from transformers."""
    model = AutoModelForCausalLM.from_pretrained(workshop.teacher, dtype=torch.float32).eval()
    last = {}
    model.model.layers[-1].register_forward_hook(lambda module, arguments, output: last.update(value=output))
    with torch.no_grad():
        out = model(torch.from_numpy(workshop.data.tokens.astype(np.int64)), output_hidden_states=True)
    # The last hidden state of transformers comes after the final norm. The others are the layers' inputs.
    states = [*out.hidden_states[1:-1], last["value"]]
    assert torch.equal(model.model.norm(last["value"]), out.hidden_states[-1])
    return out.logits[:, :-1].double().numpy(), [state[:, :-1].double().numpy() for state in states]


def _logsumexp(logits, temperature):
    scaled = logits / temperature
    highest = scaled.max(axis=-1, keepdims=True)
    return np.log(np.exp(scaled - highest).sum(axis=-1)) + highest[..., 0]


def test_top_logits_and_exact_logsumexp(workshop, dense):
    logits = dense[0].reshape(-1, 300)
    order = np.argsort(-logits, axis=1)[:, :K]
    expected = np.take_along_axis(logits, order, axis=1)
    for temperature in GRID:
        target = workshop.cache.top(range(8), temperature, K)
        assert target.temperature == temperature
        np.testing.assert_array_equal(target.ids.numpy(), order)
        # Each logit keeps float16's 11 bits of its distance from the row's largest.
        slack = 2.0**-11 * (expected[:, :1] - expected) / temperature + 1e-5
        exact = expected / temperature - _logsumexp(logits, temperature)[:, None]
        assert (np.abs(target.log_p.numpy() - exact) <= slack).all()


def test_drawn_tokens_and_their_weights(workshop, dense):
    """Ids are distinct, and log-probabilities exact.

    A weight is one over the chance that one of 12 points hits the token.
    """
    logits = dense[0].reshape(-1, 300)
    at_one = logits - _logsumexp(logits, 1.0)[:, None]
    for temperature in (0.5, 1.0):
        target = workshop.cache.sampled(range(8), temperature, 12)
        exact = logits / temperature - _logsumexp(logits, temperature)[:, None]
        for row, (ids, log_p, weights) in enumerate(zip(target.ids, target.log_p, target.weights, strict=True)):
            drawn = ids[weights > 0].tolist()
            assert 1 <= len(drawn) == len(set(drawn)) <= 12
            assert (weights[len(drawn) :] == 0).all()
            # A token with more than a twelfth of the probability is always drawn.
            assert set(np.flatnonzero(at_one[row] > np.log(1.001 / 12))) <= set(drawn)
            np.testing.assert_allclose(log_p[: len(drawn)], exact[row, drawn], rtol=0, atol=1e-2)
            met = np.minimum(1, 12 * np.exp(at_one[row, drawn]))
            np.testing.assert_allclose(weights[: len(drawn)], 1 / met, rtol=5e-3)


def test_draws_are_unbiased(dense):
    """Over 4,000 samples of one row, the weighted probabilities average to the true probabilities."""
    logits = torch.from_numpy(dense[0][0, :1]).float()
    shifted = logits - logits.amax()
    p = torch.softmax(logits[0].double(), dim=0)
    times, draws = 4000, 12
    offset = torch.rand(times, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts, ids, _ = cache_making._draw(shifted.expand(times, -1), draws, offset)
    assert counts.sum() == len(ids)
    mean = torch.zeros(300, dtype=torch.float64)
    mean.scatter_add_(0, ids, (p[ids] / (draws * p[ids]).clamp(max=1)) / times)
    # Each token is drawn or not, which is a binomial proportion. The bound is five standard errors.
    met = (draws * p).clamp(max=1)
    error = p / met * (met * (1 - met) / times).sqrt()
    assert ((mean - p).abs() <= 5 * error + 1e-7).all()
    assert mean.sum() == pytest.approx(1, abs=0.01)


def test_each_row_has_an_offset_of_its_own_from_0_to_1(workshop, dense):
    """`test_draws_are_unbiased` assumes this: a fixed offset would never draw the tokens between its points.

    The first drawn token shows the offset to within twelve times its probability. Over 248 rows, offsets are uniform.
    """
    logits = dense[0].reshape(-1, 300)
    p = np.exp(logits - _logsumexp(logits, 1.0)[:, None])
    target = workshop.cache.sampled(range(8), 1.0, 12)
    ends = 12 * p.cumsum(axis=1)
    first = target.ids[:, 0].numpy()
    rows = np.arange(len(first))
    # Drawn tokens are kept in the order of their ids.
    assert (np.where(target.weights > 0, target.ids, 300).min(axis=1) == first).all()
    above, below = ends[rows, first], ends[rows, first] - 12 * p[rows, first]
    assert (below < 1).all()
    offsets = np.sort(np.minimum((above + below) / 2, 1))
    expected = (rows + 0.5) / len(rows)
    # Kolmogorov's distance, at one in a thousand, plus the uncertainty that the first tokens leave.
    assert np.abs(offsets - expected).max() < 1.95 / np.sqrt(len(rows)) + 12 * p[rows, first].mean()


def test_final_states_give_the_teachers_logits(workshop, dense):
    states = workshop.cache.final(range(8))
    assert states.dtype == torch.float16
    head = load_model(workshop.teacher, torch.float32).lm_head.weight.detach()
    logits = dense[0].reshape(-1, 300)
    # Each of the 64 state values has 11 bits.
    slack = 2.0**-11 * (states.double().abs() @ head.double().abs().T).numpy() + 1e-4
    assert (np.abs(states.double().numpy() @ head.double().numpy().T - logits) <= slack).all()


def test_states_are_raw_layer_outputs_normalized(workshop, dense):
    for layer, raw in enumerate(dense[1]):
        raw = raw.reshape(-1, 64)
        expected = raw / np.sqrt((raw**2).mean(axis=1, keepdims=True))
        actual = workshop.cache.state(range(8), layer)
        assert actual.dtype == torch.float16
        np.testing.assert_allclose(actual.double().numpy(), expected, rtol=2**-11, atol=1e-5)
        size = workshop.cache.state_size(range(8), layer)
        assert (size.dtype, size.shape) == (torch.float32, (len(raw), 1))
        np.testing.assert_allclose(size.numpy(), np.sqrt((raw**2).mean(axis=1, keepdims=True)), rtol=1e-6)


def test_rows_come_in_the_order_asked_for(workshop):
    cache, rows = workshop.cache, workshop.data.tokens.shape[1] - 1
    both, drawn = cache.top([5, 2], 2.0, K), cache.sampled([5, 2], 2.0, 12)
    for position, index in enumerate((5, 2)):
        part = slice(position * rows, (position + 1) * rows)
        alone = cache.top([index], 2.0, K)
        assert torch.equal(both.ids[part], alone.ids)
        assert torch.equal(both.log_p[part], alone.log_p)
        found, expected = drawn.weights[part], cache.sampled([index], 2.0, 12).weights
        assert torch.equal(found[found > 0], expected[expected > 0])
        assert torch.equal(cache.final([5, 2])[part], cache.final([index]))
        assert torch.equal(cache.state([5, 2], 3)[part], cache.state([index], 3))


def test_only_stored_temperatures_and_layers(ensure):
    cache = TeacherCache(ensure())
    with pytest.raises(ValueError):
        cache.top([0], 1.7, K)
    with pytest.raises(ValueError, match="holds 16 tokens, not 17"):
        cache.top([0], 1.0, 17)
    with pytest.raises(KeyError):
        cache.sampled([0], 1.0, 12)
    with pytest.raises(KeyError):
        cache.state([0], 4)


def test_more_stored_tokens_than_the_vocabulary_has(ensure, workshop, dense):
    cache = TeacherCache(ensure(settings=CacheSettings(top_k=1000)))
    target = cache.top([0], 1.0, 1000)
    assert target.ids.shape == (31, 300)
    np.testing.assert_allclose(target.log_p.exp().sum(dim=1).numpy(), 1, atol=2e-3)


def test_bfloat16_is_close(ensure, dense):
    cache = TeacherCache(ensure(settings=replace(SETTINGS, bf16=True)))
    assert cache.settings.bf16
    expected = dense[0][0].max(axis=1) - _logsumexp(dense[0][0], 1.0)
    actual = cache.top([0], 1.0, 1).log_p[:, 0].numpy()
    assert 0 < np.abs(actual - expected).max() < 0.2


def test_is_computed_once(ensure, teacher):
    seen = []
    first = ensure(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert ensure() == first
    assert teacher.loads == 1


def test_a_larger_cache_serves_a_smaller_request(ensure, teacher):
    large = ensure(sequences=4)
    assert ensure(sequences=3) == large
    assert teacher.loads == 1
    ensure(sequences=5)
    assert teacher.loads == 2


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_fingerprint": "other"},
        {"data_fingerprint": "other"},
        {"settings": replace(SETTINGS, top_k=8)},
        {"settings": replace(SETTINGS, states=(0,))},
        {"settings": replace(SETTINGS, temperatures=(1.0,))},
        {"settings": replace(SETTINGS, draws=(12,))},
        {"settings": replace(SETTINGS, final=True)},
        {"settings": replace(SETTINGS, bf16=True)},
    ],
)
def test_another_teacher_data_or_setting_is_another_cache(ensure, teacher, change):
    assert ensure() != ensure(**change)
    assert teacher.loads == 2


def _flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _torn(folder):
    path = folder / "outputs.arrow"
    path.write_bytes(path.read_bytes()[:-100])


def _altered_meta(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["settings"]["top_k"] = 8
    (folder / "meta.json").write_text(json.dumps(meta))


DAMAGES = {
    "torn": _torn,
    "flipped in the middle": lambda folder: _flip(folder / "outputs.arrow", 5000),
    "flipped at the end": lambda folder: _flip(folder / "outputs.arrow", -1),
    "no outputs": lambda folder: (folder / "outputs.arrow").unlink(),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "torn meta": lambda folder: (folder / "meta.json").write_text('{"sequences": 2, "sha'),
    "altered meta": _altered_meta,
    "meta of another kind": lambda folder: (folder / "meta.json").write_text("[1]"),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_made_good(ensure, teacher, damage):
    folder = ensure()
    content = (folder / "outputs.arrow").read_bytes()
    damage(folder)
    assert ensure() == folder
    assert teacher.loads == 2
    assert (folder / "outputs.arrow").read_bytes() == content
    assert ensure() == folder
    assert teacher.loads == 2


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_where_the_cache_is_read(ensure, damage):
    """A worker, for example, opens the cache long after the search compared it with its checksums."""
    folder = ensure()
    damage(folder)
    with pytest.raises(
        DamagedError, match=r"is not the file of teacher's outputs that was written: a search, or --resume"
    ):
        TeacherCache(folder).top([0, 1], 1.0, K)


def test_every_byte_is_held_to_a_checksum_and_each_sequence_when_it_is_read(ensure):
    folder = ensure()
    meta = json.loads((folder / "meta.json").read_text())
    path, ends = folder / "outputs.arrow", meta["ends"]
    whole = path.read_bytes()
    assert ends[-1] == len(whole)
    for part, place in enumerate([0, *ends[:-1]]):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        if part == 2:  # the part after both sequences
            with pytest.raises(DamagedError):
                TeacherCache(folder)
            continue
        cache = TeacherCache(folder)
        assert cache.top([1 - part], 1.0, K).ids.shape == (31, K)
        with pytest.raises(DamagedError):
            cache.top([part], 1.0, K)


def test_size_is_foretold_and_limited(ensure, tmp_path, teacher):
    folder = ensure(sequences=8)
    size = sum(path.stat().st_size for path in folder.iterdir())
    values = 8 * 31 * SETTINGS.bytes_per_token(300, 64)
    # A token: float16 distances and uint16 ids of 16 tokens, 10 float32 sums, three float16 states with float32 sizes.
    assert SETTINGS.bytes_per_token(300, 64) == 16 * (2 + 2) + 40 + 3 * (128 + 4)
    assert values < size < values + 8 * 4096
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"needs .* kB, above its limit of 100 kB: lower --tokens"):
        ensure(sequences=8, limit_bytes=10**5)
    assert teacher.loads == 1
    assert list(tmp_path.iterdir()) == []
    assert CacheSettings().bytes_per_token(49152, 576) == 64 * 4 + 40
    assert CacheSettings().bytes_per_token(152064, 576) == 64 * 6 + 40
    assert CacheSettings(top_k=0, temperatures=(), final=True).bytes_per_token(49152, 576) == 1152
    assert CacheSettings(top_k=0, temperatures=(1.0,), draws=(24,)).bytes_per_token(49152, 576) == 24 * 4 + 4 + 4


def test_the_limit_holds_for_what_is_written(ensure):
    needed = 2 * (31 * SETTINGS.bytes_per_token(300, 64) + 2048)
    with pytest.raises(InputError):
        ensure(limit_bytes=needed - 1)
    folder = ensure(limit_bytes=needed)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= needed


def test_the_longest_unused_is_removed_first(ensure):
    caches = {name: ensure(teacher_fingerprint=name) for name in ("a", "b", "c")}
    size = sum(path.stat().st_size for path in caches["a"].iterdir())
    for age, name in enumerate(("c", "b", "a")):
        os.utime(caches[name], (time.time() - 1000 * (age + 1),) * 2)
    ensure(teacher_fingerprint="a")  # used again just now
    ensure(teacher_fingerprint="d", limit_bytes=int(3.6 * size))
    assert [caches[name].exists() for name in ("a", "b", "c")] == [True, False, True]


def test_nothing_is_removed_while_there_is_room(ensure):
    first = ensure()
    ensure(teacher_fingerprint="b")
    assert first.exists()


def test_a_removed_cache_is_still_read_by_those_who_opened_it(ensure):
    folder = ensure()
    cache = TeacherCache(folder)
    expected = cache.top([1], 1.0, K).log_p.clone()
    shutil.rmtree(folder)
    assert torch.equal(cache.top([1], 1.0, K).log_p, expected)


def test_a_writer_that_fails_leaves_nothing(ensure, tmp_path, teacher):
    def progress(done, total):
        assert [path.name.startswith(".partial-") for path in tmp_path.iterdir() if path.is_dir()] == [True]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(progress=progress)
    assert list(tmp_path.iterdir()) == []
    ensure()
    assert teacher.loads == 2


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(ensure, tmp_path):
    for name, age in ((".partial-dead", 7200), (".partial-alive", 7200), (".partial-new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "outputs.arrow").write_bytes(b"x" * 200_000)
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
        os.utime(tmp_path / name / "outputs.arrow", (then, then) if name.endswith("dead") else None)
    ensure(limit_bytes=150_000)
    assert sorted(path.name for path in tmp_path.glob(".partial-*")) == [".partial-alive", ".partial-new"]


def test_of_many_at_once_one_runs_the_teacher_and_the_others_wait_for_it(ensure, teacher, tmp_path):
    model, loads, folders = teacher(), [], []

    def load():
        loads.append(threading.current_thread().name)
        return model

    threads = [threading.Thread(target=lambda: folders.append(ensure(load_teacher=load))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len(folders) == 8
    assert len(set(folders)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [folders[0].name]


def test_where_files_cannot_be_locked_two_writers_end_with_one_cache(ensure, teacher, tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("autodistill.utils.file_locks.fcntl.flock", refuse)
    barrier = threading.Barrier(2)
    folders = []

    def write(model):
        def load():
            barrier.wait(timeout=60)
            return model

        folders.append(ensure(load_teacher=load))

    # The teachers are loaded here because transformers cannot load two models in two threads at once.
    threads = [threading.Thread(target=write, args=(teacher(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 2
    assert folders[0] == folders[1]
    assert [path.name for path in tmp_path.iterdir()] == [folders[0].name]
    ensure()
    assert teacher.loads == 2


def test_what_another_search_holds_is_not_removed_to_make_room(ensure, tmp_path, tmp_path_factory, teacher):
    first = ensure(teacher_fingerprint="another")
    room = int(1.6 * sum(file.stat().st_size for file in first.iterdir()))  # room for one of them
    with RunFolder.create(tmp_path_factory.mktemp("runs"), "holding") as run:
        assert run.hold(first / META)
        ensure(limit_bytes=room)
        assert TeacherCache(first).sequences > 0
        assert len(list(tmp_path.iterdir())) == 2
    ensure(limit_bytes=room, teacher_fingerprint="third")
    assert not first.exists()
    with RunFolder.create(tmp_path_factory.mktemp("runs"), "late") as run:
        assert not run.hold(first / META)


def test_a_writer_that_comes_second_to_a_damaged_cache_says_so(ensure, tmp_path, teacher):
    name = ensure().name
    shutil.rmtree(tmp_path / name)

    def load():
        # Another process leaves a folder that is no cache under the final name.
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("{}")
        return teacher()

    with pytest.raises(OSError):
        ensure(load_teacher=load)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert ensure().name == name


def test_hooks_are_gone_and_dropout_is_off(workshop, ensure):
    model = load_model(workshop.teacher, torch.float32).train()
    ensure(load_teacher=lambda: model)
    assert not model.training
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_data_can_be_read_only(ensure, workshop):
    tokens = workshop.data.tokens[:2].copy()
    tokens.setflags(write=False)
    folder = ensure(data=TokenSet(tokens=tokens, documents=tokens))
    with pa.memory_map(str(folder / "outputs.arrow")) as file:
        assert pa.ipc.open_file(file).num_record_batches == 2


def _recipe(**changes):
    return Distillation(**({"divergence_weight": 0.5} | changes))


def test_a_cache_holds_what_recipes_read_and_nothing_else():
    falling = Temperature(shape="linear", start=5.0, end=1.0)
    cases = [
        ([_recipe()], {"top_k": 64, "temperatures": (1.0,)}),
        ([_recipe(divergence_weight=0.0)], {}),
        ([_recipe(divergence_weight=0.0, final_divergence_weight=1.0)], {"top_k": 64, "temperatures": (1.0,)}),
        ([_recipe(signal="online", signal_tokens=0)], {}),
        ([_recipe(signal="states", signal_tokens=0, temperature=falling)], {"final": True}),
        # Tokens are drawn at temperature 1, whatever temperature they are read at.
        (
            [_recipe(signal="sampled", signal_tokens=12, temperature=Temperature(start=0.5, end=0.5))],
            {"draws": (12,), "temperatures": (0.5, 0.7, 1.0)},
        ),
        (
            [_recipe(signal_tokens=8, temperature=falling), _recipe(signal_tokens=16)],
            {"top_k": 16, "temperatures": (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)},
        ),
    ]
    for recipes, expected in cases:
        settings = CacheSettings.for_recipes(recipes, (), bf16=False)
        assert settings == CacheSettings(**({"top_k": 0, "temperatures": ()} | expected))
        assert settings.empty == (expected == {})
        assert settings.lacks(settings) == []


def test_what_is_lacking_is_named():
    held = CacheSettings(top_k=8, temperatures=(1.0, 2.0), draws=(12,), states=(3,))
    needed = CacheSettings(top_k=9, temperatures=(1.0, 1.5), draws=(24,), states=(3, 4), final=True)
    assert held.lacks(needed) == [
        "the 9 likeliest tokens",
        "the tokens of 24 draws",
        "temperature 1.5",
        "the last hidden states",
        "the states of layer 4",
    ]
