"""The counters on llama.cpp's and vLLM's pages, against the parser of prometheus_client."""

from __future__ import annotations

from collections import defaultdict

import pytest
from prometheus_client.parser import text_string_to_metric_families

from autodistill.errors import ServiceError
from autodistill.service.metrics import read_counters

LLAMA = """# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 1200
# TYPE llamacpp:tokens_predicted_total counter
llamacpp:tokens_predicted_total 345
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 3
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 2
# TYPE llamacpp:predicted_tokens_seconds gauge
llamacpp:predicted_tokens_seconds nan
# TYPE llamacpp:spec_decode_num_draft_tokens_total counter
llamacpp:spec_decode_num_draft_tokens_total 80
# TYPE llamacpp:spec_decode_num_accepted_tokens_total counter
llamacpp:spec_decode_num_accepted_tokens_total 60
"""
VLLM = r"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {b} \"c\" 1"} 2.0
vllm:num_requests_running{engine="1",model_name="a {b} \"c\" 1"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 7.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 1.5e+06
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 250.0
vllm:generation_tokens_total{engine="1",model_name="m"} 50.0
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09
"""


def sums(text: str) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


def test_what_llama_cpp_counts_is_read() -> None:
    found, theirs = read_counters(LLAMA), sums(LLAMA)
    assert found.runtime == "llama.cpp"
    assert found.prompt_tokens == theirs["llamacpp:prompt_tokens_total"]
    assert found.answer_tokens == theirs["llamacpp:tokens_predicted_total"]
    assert (found.running, found.waiting) == (3, 2)
    assert found.acceptance == 0.75


def test_what_vllm_counts_is_read_over_all_labels() -> None:
    found, theirs = read_counters(VLLM), sums(VLLM)
    assert found.runtime == "vllm"
    assert found.running == theirs["vllm:num_requests_running"] == 5
    assert found.waiting == theirs["vllm:num_requests_waiting"]
    assert found.prompt_tokens == theirs["vllm:prompt_tokens_total"]
    assert found.answer_tokens == theirs["vllm:generation_tokens_total"] == 300
    assert found.acceptance is None


@pytest.mark.parametrize("text", ["", "<html>", "up 1\n", "llamacpp:requests_processing 1\n"])
def test_a_page_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ServiceError, match=r"neither llama\.cpp's nor vLLM's"):
        read_counters(text)
