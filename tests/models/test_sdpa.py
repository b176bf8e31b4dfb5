"""Models compute transformers' own SDPA on a CPU, bit for bit, and written folders name no implementation."""

import torch
from transformers import AutoModelForCausalLM

from autodistill.models.loading import ATTENTION, load_model

IDS = torch.arange(64).view(2, 32) * 7 % 300


def test_logits_are_those_of_sdpa(workshop):
    plain = AutoModelForCausalLM.from_pretrained(workshop.teacher, dtype=torch.float32, attn_implementation="sdpa")
    model = load_model(workshop.teacher, torch.float32)
    assert model.config._attn_implementation == ATTENTION
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            assert torch.equal(model(IDS, **options).logits, plain.eval()(IDS, **options).logits)


def test_a_written_folder_is_anyones(workshop, tmp_path):
    load_model(workshop.teacher, torch.float32).save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
