"""A pretrained student gives the teacher's ids the logits of its own ids, whatever the order of its table."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from autodistill.distillation.student.build import build_student, init_spec, kept_layers
from autodistill.distillation.student.pretrained import describe_tokens, load_pretrained, token_rows
from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.strategy.strategy import Init
from autodistill.testing import save_tiny_teacher, tiny_tokenizer

TEXT = "The miller carries two apples under the bridge. The teacher measures the long letter."


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"), layers=4)


def permuted(folder, rows=320, drop=(), tied=True, architecture="qwen2"):
    """Write a sibling that has the tiny tokenizer's ordinary tokens at other ids, and lacks some of them."""
    save_tiny_teacher(folder, architecture=architecture, layers=2, tied=tied, seed=5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    data = json.loads(tiny_tokenizer(300).backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    texts = [text for text in vocabulary if vocabulary[text] >= 3 and text not in drop]
    data["model"]["merges"] = [merge for merge in data["model"]["merges"] if not {*merge, "".join(merge)} & set(drop)]
    data["model"]["vocab"] = {text: vocabulary[text] for text in ("<s>", "</s>", "<pad>")} | {
        text: 3 + (7 * place) % len(texts) for place, text in enumerate(texts)
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = Tokenizer.from_str(json.dumps(data))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("tied", "architecture"), [(True, "qwen2"), (False, "gpt_neox")])
def test_ids_of_another_order_are_put_in_the_teachers(teacher, tmp_path, tied, architecture):
    sibling = permuted(tmp_path / "sibling", tied=tied, architecture=architecture)
    student = load_pretrained(sibling, teacher)
    assert student.get_input_embeddings().weight.shape[0] == student.config.vocab_size == 300
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) is tied
    ours = AutoTokenizer.from_pretrained(teacher)(TEXT, return_tensors="pt").input_ids
    theirs = AutoTokenizer.from_pretrained(sibling)(TEXT, return_tensors="pt").input_ids
    assert not torch.equal(ours, theirs)
    original = AutoModelForCausalLM.from_pretrained(sibling, dtype=torch.float32).eval()
    vocabulary = AutoTokenizer.from_pretrained(sibling).get_vocab()
    place = torch.tensor(
        [vocabulary[text] for text in AutoTokenizer.from_pretrained(teacher).convert_ids_to_tokens(range(300))]
    )
    with torch.no_grad():
        torch.testing.assert_close(student(ours).logits, original(theirs).logits[..., place], rtol=0, atol=1e-5)


def test_saved_it_is_the_teachers_size_and_estimate(teacher, tmp_path):
    sibling = permuted(tmp_path / "sibling")
    init = Init(source="pretrained", model=str(sibling), depth=1.0)
    student, kept = build_student(teacher, init, pretrained=sibling)
    assert kept == kept_layers(init, 4) == (0, 2)
    spec = init_spec(init, spec_from_config(AutoModelForCausalLM.from_pretrained(teacher).config.to_dict()))
    assert {tensor.name: tensor.shape for tensor in spec.tensors} == {
        name: tuple(parameter.shape) for name, parameter in student.named_parameters()
    }
    assert (student.config.bos_token_id, student.config.eos_token_id) == (0, 1)
    student.save_pretrained(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_rows_that_no_token_has_take_their_share_of_probability_at_most(teacher, tmp_path):
    padded = tmp_path / "padded"
    shutil.copytree(teacher, padded)
    model = AutoModelForCausalLM.from_pretrained(padded, dtype=torch.float32)
    model.resize_token_embeddings(384, mean_resizing=False)
    model.save_pretrained(padded)
    student = load_pretrained(teacher, padded)  # here the padded model is the teacher
    with torch.no_grad():
        probabilities = student(torch.arange(3, 60)[None]).logits.double().softmax(dim=-1)
        whole = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)(torch.arange(3, 60)[None]).logits
    assert probabilities.shape[-1] == 384
    assert float(probabilities[..., 300:].sum(dim=-1).max()) <= 84 / 384
    inside = probabilities[..., :300] / probabilities[..., :300].sum(dim=-1, keepdim=True)
    torch.testing.assert_close(inside, whole.double().softmax(dim=-1), rtol=1e-4, atol=1e-8)


def test_a_model_of_the_teachers_shape_and_tokens_keeps_its_tables_to_rows_that_no_token_has(tmp_path):
    """The rows in its own file are codes, and a mean would not lie on them."""
    folders = [tmp_path / "teacher", tmp_path / "sibling"]
    for seed, folder in enumerate(folders):
        save_tiny_teacher(folder, layers=2, seed=seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.resize_token_embeddings(384, mean_resizing=False)
        model.save_pretrained(folder)
    teacher, sibling = folders
    assert (token_rows(sibling, teacher) < 0).sum() == 84
    found = dict(load_pretrained(sibling, teacher).named_parameters())
    wanted = dict(AutoModelForCausalLM.from_pretrained(sibling, dtype=torch.float32).named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_a_special_token_of_the_teacher_alone_has_no_row(teacher, tmp_path):
    chatty = tmp_path / "chatty"
    shutil.copytree(teacher, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.save_pretrained(chatty)
    model = AutoModelForCausalLM.from_pretrained(chatty, dtype=torch.float32)
    model.resize_token_embeddings(301, mean_resizing=False)
    model.save_pretrained(chatty)
    rows = token_rows(teacher, chatty)
    assert rows.tolist() == [*range(300), -1]


def test_another_tokenizer_is_refused_with_what_to_do(teacher, tmp_path):
    merges = [text for text in tiny_tokenizer(300).get_vocab() if len(text) > 3 and not text.startswith("<")][:2]
    sibling = permuted(tmp_path / "sibling", drop=merges)
    with pytest.raises(
        InputError, match=r"needs one vocabulary: .* lacks 2 of the teacher's 300 tokens.*sequence-level"
    ):
        token_rows(sibling, teacher)


def test_a_student_is_saved_whose_settings_of_generation_greedy_choice_leaves_unused(tmp_path):
    """Many models of the hub have such settings. transformers saves them unless one was changed."""
    model, text = (save_tiny_teacher(tmp_path / name, layers=1) for name in ("model", "text"))
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (model / "generation_config.json").write_text(json.dumps(settings))
    (text / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, 2], "bos_token_id": 0}))
    loaded = load_pretrained(model, text)
    describe_tokens(loaded, text)
    loaded.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 2]
    assert loaded.config.eos_token_id == [1, 2]
