"""Internals of other libraries that we use without a promise from them: each exists, as it is used, below a bound.

If one of these tests fails with a new version, the bound in pyproject.toml stays until the code that uses the internal
has been changed.
"""

from __future__ import annotations

import inspect
import subprocess
import tomllib
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packaging.requirements import Requirement

PROJECT: dict[str, Any] = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
EVERY = [*PROJECT["project"]["dependencies"], *chain(*PROJECT["project"]["optional-dependencies"].values())]


@pytest.mark.parametrize("package", ["accelerate", "bitsandbytes", "flwr", "ray", "transformers"])
def test_packages_whose_internals_are_used_have_an_upper_bound(package: str) -> None:
    found = [one for one in map(Requirement, EVERY) if one.name == package]
    assert found
    for requirement in found:
        assert any(part.operator in ("<", "<=") for part in requirement.specifier), str(requirement)


def test_of_ray_a_jobs_working_folder_can_be_kept_off_the_import_path() -> None:
    """`search/runners/ray_session.py` replaces the method with its own."""
    from ray.job_config import JobConfig

    assert list(inspect.signature(JobConfig()._runtime_env_has_working_dir).parameters) == []
    source = inspect.getsource(__import__("ray._private.worker", fromlist=["worker"]))
    assert "_runtime_env_has_working_dir()" in source


def test_of_ray_a_node_can_be_kept_to_the_loopback_and_its_token_to_the_environment() -> None:
    """`search/runners/ray_local.py` says that there is no cluster, and has the token read again."""
    from ray._private import ray_constants, services
    from ray._raylet import AuthenticationTokenLoader

    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)
    assert "ENABLE_RAY_CLUSTER" in inspect.getsource(services.get_node_ip_address)
    assert "_node_ip_address" in inspect.getsource(__import__("ray._private.worker", fromlist=["worker"]).init)
    assert callable(AuthenticationTokenLoader.instance().reset_cache)


def test_of_ray_processes_are_begun_by_one_class_that_can_be_replaced() -> None:
    """`search/runners/ray_processes.py` replaces it, and does what Ray's code does in the fork."""
    from ray._private import services

    assert issubclass(services.ConsolePopen, subprocess.Popen)
    source = inspect.getsource(services.start_ray_process)
    assert "process = ConsolePopen(" in source
    between = source[source.index("def preexec_fn") : source.index("win32_fate_sharing")]
    assert "SIG_BLOCK, {signal.SIGINT}" in between
    assert "set_kill_on_parent_death_linux()" in between
    assert len(between.strip().splitlines()) == 6


def test_of_tune_searcher_and_scheduler_are_asked_as_they_are_written() -> None:
    """`search/runners/ray.py` hands out work through a searcher, and reads a failed trial's error file."""
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    assert Searcher.FINISHED == "FINISHED"
    assert list(inspect.signature(Searcher.suggest).parameters) == ["self", "trial_id"]
    assert list(inspect.signature(Searcher.on_trial_complete).parameters) == ["self", "trial_id", "result", "error"]
    assert list(inspect.signature(FIFOScheduler.on_trial_error).parameters)[2:] == ["trial"]
    assert isinstance(inspect.getattr_static(Trial, "error_file"), property)


def test_of_transformers_a_plan_of_tensor_parallelism_is_read_by_layer() -> None:
    """`inference/divided_part.py` divides by it, and replaces some functions with its own."""
    from transformers import PreTrainedModel
    from transformers.distributed.tensor_parallel import ColwiseParallel

    assert list(inspect.signature(PreTrainedModel._expand_parallel_plan).parameters) == ["self", "plan"]
    assert isinstance(inspect.getattr_static(PreTrainedModel, "tp_plan"), property)
    assert "module.forward = tp_forward" in inspect.getsource(ColwiseParallel.__mro__[1].install_forward)


def test_of_accelerate_fsdp2_is_prepared_without_an_accelerator() -> None:
    """`distillation/training/fsdp.py` sets the type of CPU processes by hand, and prepares the model itself."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model

    assert list(inspect.signature(fsdp2_prepare_model).parameters) == ["accelerator", "model"]
    assert DistributedType.FSDP == "FSDP"
    assert {"fsdp_version", "auto_wrap_policy", "cpu_ram_efficient_loading"} <= set(
        inspect.signature(FullyShardedDataParallelPlugin).parameters
    )
    assert isinstance(inspect.getattr_static(Accelerator, "process_index"), property)
    # It is set in the state's shared dictionary, where no property of that name is in the way.
    assert not isinstance(inspect.getattr_static(AcceleratorState, "distributed_type", None), property)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_of_bitsandbytes_the_optimizer_s_steps_are_overridden() -> None:
    """`distillation/training/optimizers/adamw_8bit.py` wraps these three, and reads states by their names."""
    from bitsandbytes.functional import quantize_blockwise
    from bitsandbytes.optim.adamw import AdamW8bit

    assert list(inspect.signature(AdamW8bit.get_config).parameters) == ["self", "gindex", "pindex", "group"]
    for method in (AdamW8bit.init_state, AdamW8bit.update_step):
        assert list(inspect.signature(method).parameters) == ["self", "group", "p", "gindex", "pindex"]
    assert {"code", "blocksize"} <= set(inspect.signature(quantize_blockwise).parameters)
    weight = torch.nn.Parameter(torch.ones(128, 128))
    weight.grad = torch.ones(128, 128)
    optimizer = AdamW8bit([weight], min_8bit_size=0)
    optimizer.step()
    states = {"state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "step"}
    assert states <= set(optimizer.state[weight])
    assert len(optimizer.state[weight]["absmax1"]) == 128 * 128 // 256


def test_of_transformers_attention_and_names_are_where_they_are_looked_for() -> None:
    """`losses/attention.py` replaces a model's attention with its own, and `models/loading.py` keeps a name."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = LlamaConfig(attn_implementation="sdpa")
    assert config._attn_implementation == "sdpa"
    assert hasattr(config, "_name_or_path")
    assert "llama3" in ROPE_INIT_FUNCTIONS
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS


def test_of_torch_parameters_have_a_version_and_modules_a_dictionary() -> None:
    """`distillation/training/fake_quantize.py` keeps rounded weights as long as their version stays the same."""
    module = torch.nn.Linear(2, 2)
    before = module.weight._version
    with torch.no_grad():
        module.weight.mul_(2)
    assert module.weight._version > before
    assert set(module._parameters) == {"weight", "bias"}


def test_of_torch_onednn_says_whether_it_computes_in_bfloat16() -> None:
    """`hardware.py` asks oneDNN. For a build without oneDNN, it assumes that the answer is no."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    flags = Path("/proc/cpuinfo").read_text() if psutil.LINUX else ""
    found = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert isinstance(found, bool)
    if "amx_bf16" in flags or "avx512_bf16" in flags:
        assert found
