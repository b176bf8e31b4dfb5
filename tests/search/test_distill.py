"""Every way in which a student begins, and every kind of family, along the whole path of `autodistill distill`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from autodistill import api
from autodistill.advisor.candidates import stored
from autodistill.distillation.student.check import student_spec
from autodistill.distillation.training.lora import Adapters
from autodistill.errors import InputError
from autodistill.export.huggingface import load_in_transformers
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config, uniform
from autodistill.models.model_folder import read_config
from autodistill.quantization.formats import weights_bytes
from autodistill.quantization.grids import integer_grid
from autodistill.quantization.packing import deployed
from autodistill.runs.run_folder import RunFolder
from autodistill.search.finish.export_run import export_run
from autodistill.search.preview import plan_search
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import Outcome, search
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.named import load_strategy
from autodistill.testing import save_tiny_teacher, tiny_text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    teacher = save_tiny_teacher(folder / "teacher", layers=8, width=128, ffn=192)
    plain = {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}
    gguf = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
    packed = {"runtime": "vllm", "format": "compressed-tensors", "bits": 8, "group_size": 32}
    # One space has a single deployment that is quick to verify. The others have more.
    for name, deployments in (("one", [plain]), ("two", [gguf, plain]), ("three", [gguf, packed, plain])):
        space = {"name": name, "dimensions": {"init.depth": {"choices": [0.8]}}, "deployments": deployments}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(space))
    return teacher, tiny_text(folder / "text", documents=30, sentences=24), folder / "cache"


def request(inputs: tuple[Path, Path, Path], out: Path, strategy: Path | str, **changes: object) -> SearchRequest:
    teacher, text, cache = inputs
    fields: dict[str, object] = {
        "budget": Budget(memory_bytes=16 * 10**9, context=256),
        "strategy": str(strategy),
        "space": str(text.parent / "one.yaml"),
        "teacher": str(teacher),
        "data": str(text),
        "tokens": 1024,
        "runner": "inline",
        "runs": out,
        "name": "run",
        "cache": cache,
    }
    return SearchRequest(**(fields | changes))  # type: ignore[arg-type]


def student_of(outcome: Outcome) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(outcome.finish.paths["huggingface"], dtype=torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "from_scratch",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("influence", "narrow", "block_influence")),
    ],
)
def test_a_named_strategy_ends_in_a_student_that_transformers_loads(inputs, tmp_path: Path, name: str) -> None:
    outcome = search(request(inputs, tmp_path, name))
    init = load_strategy(name).init
    config = student_of(outcome).config
    assert config.num_hidden_layers == int(init.depth * 8 + 1e-9)
    assert config.intermediate_size == {1.0: 192, 0.7: 128}[init.ffn]
    (row,) = {row.trial: row for row in outcome.rows if row.kind == "baseline"}.values()
    assert row.status == "completed"
    assert outcome.finish.best.name == name


def written(folder: Path, **init: object) -> Path:
    path = folder / "mine.yaml"
    recipe = {"divergence_weight": 0.5, "train_embeddings": init.get("source") == "scratch"}
    path.write_text(yaml.safe_dump({"init": init, "distillation": recipe}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt_neox"])
def test_every_family_is_distilled_finished_on_a_grid_and_exported(inputs, tmp_path: Path, architecture: str) -> None:
    sizes = {"layers": 6, "width": 128, "ffn": 192, "heads": 4}
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, tied=False, **sizes)
    # With three layers less, every third layer has full attention, whichever block of them has least influence.
    strategy = written(tmp_path, depth=0.5, layers="influence", ffn=0.67)
    recipe = yaml.safe_load(strategy.read_text()) | {"finishing": {"format": "gguf-q8_0", "bits": 8, "group_size": 32}}
    strategy.write_text(yaml.safe_dump(recipe))
    two = str(inputs[1].parent / "two.yaml")
    outcome = search(request((teacher, *inputs[1:]), tmp_path / "out", strategy, space=two, tokens=2048))
    assert {row.deployment.format for row in outcome.rows} == {"huggingface", "gguf-q8_0"}
    config = AutoConfig.from_pretrained(outcome.finish.paths["huggingface"])
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == (architecture, 128, 3)
    assert outcome.finish.checks["gguf"].agreement > 0.9
    assert abs(outcome.finish.checks["gguf"].excess) < 0.02


def test_why_a_student_has_no_gguf_is_said_before_it_is_trained(inputs, tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture="gemma3_text", layers=6, width=128, ffn=192)
    two = str(inputs[1].parent / "two.yaml")
    asked = request((teacher, *inputs[1:]), tmp_path / "out", written(tmp_path, depth=0.84), space=two)
    (note,) = [note for note in plan_search(asked)["plan"]["notes"] if "GGUF cannot hold" in note]
    assert "of these 5 it is 3, 5: keep all layers" in note
    wide = written(tmp_path, depth=1.0, ffn_widths=[192, 64, 128, 192, 64, 32])
    asked = request((teacher, *inputs[1:]), tmp_path / "out", wide, space=two)
    (note,) = [note for note in plan_search(asked)["plan"]["notes"] if "GGUF cannot hold" in note]
    assert "llama.cpp computes gemma3_text with one FFN width in all layers, and these have 32 to 192 neurons" in note
    grid = {"format": "gguf-q8_0", "bits": 8, "group_size": 32}
    wide.write_text(yaml.safe_dump(yaml.safe_load(wide.read_text()) | {"finishing": grid}))
    with pytest.raises(InputError, match=r"GGUF cannot hold this gemma3_text: llama\.cpp computes"):
        plan_search(asked)
    few = written(tmp_path, depth=0.5, ffn_widths=[192, 64])
    with pytest.raises(InputError, match=r"init\.ffn_widths has 2 numbers, and 3 of the teacher's 6 layers are kept"):
        plan_search(request((teacher, *inputs[1:]), tmp_path / "out", few, space=two))


@pytest.mark.slow
def test_a_student_whose_layers_differ_is_trained_on_a_grid_exported_and_read(inputs, tmp_path: Path) -> None:
    strategy, widths = tmp_path / "mine.yaml", (192, 64, 128, 32, 192, 96)
    grid = {"format": "gguf-q4_0", "bits": 4, "group_size": 32, "scales": "learned"}
    init = {"depth": 0.75, "layers": "influence", "ffn_widths": list(widths)}
    strategy.write_text(yaml.safe_dump({"init": init, "distillation": {"divergence_weight": 0.5}, "finishing": grid}))
    mixed = {"runtime": "llama.cpp", **grid, "types": {"embeddings": "q4_0", "layers.1.mlp.up_proj": "q8_0"}}
    del mixed["scales"]
    space = yaml.safe_load((inputs[1].parent / "two.yaml").read_text())
    space["deployments"].append(mixed)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    asked = request(inputs, tmp_path / "runs", strategy, space=str(tmp_path / "space.yaml"), tokens=2048)
    outcome = search(asked)
    rows = {row.deployment_name: row for row in outcome.rows if row.kind == "baseline"}
    assert len(rows) == 4
    spec = student_spec(load_strategy(strategy), spec_from_config(read_config(inputs[0])))
    assert spec.ffn_widths == widths
    for row in rows.values():
        assert (row.params, spec_from_config(row.shape)) == (spec.parameters, spec)
        assert row.name == "mine"
        assert "75% influence ffn 32-192" in row.strategy.describe()
    run = RunFolder.open(tmp_path / "runs", "run")
    paths = export_run(run, rows["gguf-q8_0"].row_id, ["gguf", "huggingface"], tmp_path / "out")
    paths["mixed"] = export_run(run, rows[Deployment.from_json(mixed).name].row_id, ["gguf"], tmp_path / "mixed")[
        "gguf"
    ]
    for name in ("gguf", "mixed"):
        fields = GGUFReader(paths[name]).fields
        assert fields["general.architecture"].contents() == "deci"
        assert fields["deci.feed_forward_length"].contents() == list(widths)
    stock = AutoModelForCausalLM.from_pretrained(paths["huggingface"])
    assert stock.config.intermediate_size == 192
    assert stock.num_parameters() == uniform(spec).parameters
    size = (paths["huggingface"] / "model.safetensors").stat().st_size
    assert rows["huggingface"].size_bytes == pytest.approx(size, rel=0.02)
    assert f"holds {uniform(spec).parameters:,} weights" in (paths["huggingface"] / "README.md").read_text()
    # Readers of rows can read these rows.
    (kept,) = [one for one in stored(tmp_path / "runs") if one.cells["row_id"] == rows["gguf-q8_0"].row_id]
    assert kept.spec == spec
    chosen = api.pick(budget="16GB", context=256, runs=tmp_path / "runs").document["pick"]
    assert chosen["row_id"] in {row.row_id for row in outcome.rows}
    told = api.estimate(inputs[0], strategy=str(strategy), format="gguf-q8_0", context=256).document
    assert told["weights_bytes"] == weights_bytes(spec.tensors, rows["gguf-q8_0"].deployment)
    assert f"| {rows['gguf-q8_0'].row_id} | mine |" in (run.path / "report.md").read_text()


@pytest.mark.slow
def test_a_pretrained_sibling_is_the_student_and_low_rank_changes_are_merged_before_it_is_packed(
    inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sibling = save_tiny_teacher(tmp_path / "sibling", architecture="qwen2", layers=2, width=64, seed=9)
    strategy = written(tmp_path, source="pretrained", model=str(sibling), depth=1.0)
    recipe = yaml.safe_load(strategy.read_text())
    recipe["distillation"] |= {"lora": {"rank": 4, "alpha": 8.0}, "learning_rate": 0.01}
    recipe["finishing"] = {"format": "compressed-tensors", "bits": 6, "group_size": 32}
    strategy.write_text(yaml.safe_dump(recipe))
    space = yaml.safe_load((inputs[1].parent / "one.yaml").read_text())
    space["deployments"].append(recipe["finishing"] | {"runtime": "transformers"})
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    changes, merge = {}, Adapters.merge

    def watched(adapters: Adapters, model: torch.nn.Module) -> None:
        changes.update({name: parameter.detach().double() for name, parameter in adapters.named()})
        merge(adapters, model)

    monkeypatch.setattr(Adapters, "merge", watched)
    outcome = search(request(inputs, tmp_path / "out", strategy, space=str(tmp_path / "space.yaml"), tokens=4096))
    config = student_of(outcome).config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen2", 64, 2)
    base = load_file(sibling / "model.safetensors")
    exact = {name: weight.double() for name, weight in base.items()}
    for name in {name.rpartition(".")[0] for name in changes}:
        exact[name] += 8.0 / 4 * changes[f"{name}.up"] @ changes[f"{name}.down"]
    changed = {name for name in base if not torch.equal(exact[name], base[name].double())}
    assert changed == {name for name in base if name.endswith("proj.weight")}
    assert len(changed) == 2 * 7
    # Every deployment packs the float32 student: W + (alpha / r) B A for changed weights, and the rest unchanged.
    (folder,) = (tmp_path / "out").glob("**/student/model.safetensors")
    trained = load_file(folder)
    assert trained.keys() == base.keys()
    for name, weight in trained.items():
        if name in changed:
            torch.testing.assert_close(weight.double(), exact[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(weight, base[name]), name
    plain = dict(student_of(outcome).named_parameters())
    served = dict(load_in_transformers(outcome.finish.paths["compressed-tensors"]).named_parameters())
    for name in changed:
        assert torch.equal(plain[name], trained[name].bfloat16().float())
        packed = torch.from_numpy(deployed(trained[name].numpy(), integer_grid(6, 32, symmetric=True)))
        assert torch.equal(served[name].detach(), packed.to(served[name].dtype)), name


def test_a_pretrained_model_of_other_tokens_is_refused_before_training(inputs, tmp_path: Path) -> None:
    other = save_tiny_teacher(tmp_path / "other", layers=2, vocabulary=290)  # it has ten merges fewer
    strategy = written(tmp_path, source="pretrained", model=str(other), depth=1.0)
    with pytest.raises(
        InputError, match=r"logit distillation needs one vocabulary: .* lacks 10 of the teacher's 300 tokens"
    ):
        search(request(inputs, tmp_path / "out", strategy))


def test_a_pretrained_model_of_a_shorter_context_than_the_budgets_is_refused(inputs, tmp_path: Path) -> None:
    sibling = save_tiny_teacher(tmp_path / "sibling", layers=2, width=64)
    config = json.loads((sibling / "config.json").read_text())
    (sibling / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    strategy = written(tmp_path, source="pretrained", model=str(sibling), depth=1.0)
    with pytest.raises(InputError, match=r"the pretrained .*sibling has a context of 128 .*--context 128 or less"):
        plan_search(request(inputs, tmp_path / "out", strategy))


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"source": "pretrained", "model": "/nowhere/at/all", "depth": 1.0}, "/nowhere/at/all"),
        ({"depth": 1.0, "ffn": 0.1}, "rounds to none: they are kept in multiples of 64"),
    ],
)
def test_an_impossible_student_is_refused_before_anything_is_loaded(
    inputs, tmp_path: Path, init: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan_search(request(inputs, tmp_path / "out", written(tmp_path, **init)))


def chatty(folder: Path, template: str, eos: str = "</s>", **sizes: int) -> Path:
    save_tiny_teacher(folder, width=128, ffn=192, **sizes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pretrained_student_that_cannot_say_how_answers_end_is_refused(inputs, tmp_path: Path) -> None:
    ended = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<pad>\n{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant\n{% endif %}"
    teacher = chatty(tmp_path / "teacher", ended + prompt, "<pad>", layers=4)
    student = save_tiny_teacher(tmp_path / "student", layers=2, width=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (student / name).write_text((student / name).read_text().replace("<pad>", "<other>"))
    records = ({"prompt": f"Is {n} near the river?", "answer": f"the river, {n % 7}"} for n in range(150))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))

    def asked(name: str, **distillation: object) -> SearchRequest:
        strategy = tmp_path / f"{name}.yaml"
        init = {"source": "pretrained", "model": str(student), "depth": 1.0}
        strategy.write_text(yaml.safe_dump({"init": init, "distillation": distillation}))
        return request(inputs, tmp_path / name, strategy, teacher=str(teacher), data=str(tmp_path / "chats.jsonl"))

    with pytest.raises(InputError, match=r"has no token '<pad>', .* set distillation.train_embeddings"):
        plan_search(asked("frozen"))
    assert plan_search(asked("trained", train_embeddings=True))["plan"]["tokens"] == 1024


@pytest.mark.slow
def test_a_pretrained_student_learns_and_keeps_its_own_chat_template(inputs, tmp_path: Path) -> None:
    roles = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    lines = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    teacher = chatty(tmp_path / "teacher", roles + "{% if add_generation_prompt %}<s>assistant\n{% endif %}", layers=4)
    student = chatty(
        tmp_path / "student", lines + "{% if add_generation_prompt %}a:{% endif %}", "<pad>", layers=2, seed=3
    )
    records = ({"prompt": f"Is {n} near the river?", "answer": f"the river, {n % 7}"} for n in range(150))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    outcome = search(
        request(
            inputs,
            tmp_path / "runs",
            written(tmp_path, source="pretrained", model=str(student), depth=1.0),
            space=str(inputs[1].parent / "three.yaml"),
            teacher=str(teacher),
            data=str(tmp_path / "chats.jsonl"),
            metric="exact_match",
            tokens=2048,
        )
    )
    folder = outcome.finish.paths["huggingface"]
    question = [{"role": "user", "content": "Is 5 near the river?"}]
    expected = AutoTokenizer.from_pretrained(student).apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )
    exported = AutoTokenizer.from_pretrained(folder)
    assert exported.apply_chat_template(question, add_generation_prompt=True, return_dict=False) == expected
    model = student_of(outcome)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id, exported.eos_token) == (2, 2, "<pad>")
    fields = GGUFReader(outcome.finish.paths["gguf"]).fields
    assert fields["tokenizer.chat_template"].contents() == exported.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    (packed,) = export_run(
        RunFolder(tmp_path / "runs", "run"), None, ["compressed-tensors"], tmp_path / "packed"
    ).values()
    served = AutoTokenizer.from_pretrained(packed)
    assert (served.chat_template, served.eos_token) == (exported.chat_template, "<pad>")
    integers = AutoModelForCausalLM.from_pretrained(packed)
    assert (integers.config.eos_token_id, integers.generation_config.eos_token_id) == (2, 2)
    written_after = integers.generate(torch.tensor([expected]), max_new_tokens=8)[0, len(expected) :].tolist()
    # Asked in its own template, it says what it was taught. It would not end as in the teacher's template.
    assert served.decode(written_after).startswith(" the river,")
    assert 1 not in written_after
    (note,) = json.loads((tmp_path / "runs" / "run" / "search.json").read_text())["templates"].values()
    assert note in outcome.document["notes"]
    assert note.startswith(f"{student} reads its own chat template and is served with it: ")
    assert note.endswith("it ends an answer with <pad>, and the teacher with </s>")
    # The teacher, and the student before and after training, get exactly the same tokens and questions.
    counts = {tuple(row.documents["count"]) for row in outcome.finish.test}
    assert len(counts) == 1
    assert {row.kind for row in outcome.finish.test} == {"teacher", "initial", "baseline"}
    followed = tmp_path / "followed.yaml"
    recipe = {"divergence_weight": 0.5, "attention": {"kind": "relations", "relation_heads": 4}}
    init = {"source": "pretrained", "model": str(student), "depth": 1.0}
    followed.write_text(yaml.safe_dump({"init": init, "distillation": recipe}))
    with pytest.raises(InputError, match="attention is compared between the same tokens"):
        search(request(inputs, tmp_path / "more", followed, teacher=str(teacher), data=str(tmp_path / "chats.jsonl")))
