"""The conformance suite of exporters, which the author of an exporter subclasses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from autodistill import plugins
from autodistill.errors import InputError, VerificationError
from autodistill.estimates.fit import cannot_hold
from autodistill.estimates.serving_memory import BASIS, memory
from autodistill.estimates.speed import speed
from autodistill.export.base import Artifact, Expected, Exporter, TakesAny
from autodistill.export.verify import prove, verify
from autodistill.hardware.catalog import devices
from autodistill.models.config import spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import get_format, key_of, weights_bytes
from autodistill.strategy.deployment import Deployment, serving
from autodistill.testing.models import save_tiny_teacher

_GIVEN = ("gguf-q4_0", "gguf-q4_1", "gguf-q8_0", "huggingface")  # tried with an exporter that has no formats of its own
_SEQUENCES = np.random.default_rng(0).integers(3, 300, (4, 64)).astype(np.int32)


class ExporterConformance:
    """The checks that every exporter must pass. Subclass it in a test file as `TestMine`, and name the exporter:

        class TestMine(ExporterConformance):
            exporter = "mine"

    Attributes:
        exporter: Its name, from an entry point.
    """

    exporter = ""

    def made(self) -> Exporter:
        """Return a new instance of the exporter under test."""
        found: Exporter = plugins.load("exporters", self.exporter)
        return found

    def deployments(self) -> tuple[Deployment, ...]:
        """Return the deployments to test.

        By default each format is tested once, with the first type of its linear layers. If the exporter has no formats
        of its own, some formats that it may be given are tested.
        """
        made = self.made()
        if isinstance(made, TakesAny):
            return tuple(map(_first, _GIVEN))
        return tuple(_first(form.name) for form in made.formats)

    def student(self, folder: Path) -> Path:
        """Return the model to export: by default a tiny Llama whose rows all our grids can divide into groups."""
        return save_tiny_teacher(folder / "student", layers=2, width=256, ffn=256, seed=1)

    def test_it_says_what_it_holds_and_what_serves_it(self) -> None:
        """Each format is found by its name, belongs to its container, and is served by a known runtime."""
        made = self.made()
        assert made.name == self.exporter
        if isinstance(made, TakesAny):
            assert not made.formats, "an exporter has formats of its own, or takes those of others"
            return
        assert made.formats, "an exporter names what it holds in `formats`"
        known = {*BASIS, *(runtime.name for runtime in made.runtimes)}
        for form in made.formats:
            assert get_format(form.name) == form
            assert form.container == made.name
            assert form.runtimes, f"nothing serves {form.name}"
            assert set(form.runtimes) <= known, f"{form.name} is served by {form.runtimes}; known are {sorted(known)}"

    def test_memory_and_speed_are_predicted(self, tmp_path: Path) -> None:
        """Predictions need no export. They exist for every deployment on each device that has its runtime."""
        spec = _spec(self.student(tmp_path))
        for deployment in () if isinstance(self.made(), TakesAny) else self.deployments():
            assert cannot_hold(spec, deployment) == ""
            need = memory(spec, deployment, context=256, batch=1)
            assert need.weights_bytes > 0
            assert need.total_bytes > need.weights_bytes
            assert memory(spec, deployment, context=512, batch=1).total_bytes > need.total_bytes
            served = [device for device in devices() if not device.lacks(deployment.runtime)]
            assert served, f"no class of devices has {deployment.runtime}"
            assert speed(spec, deployment, served[0], context=256).tokens_per_second > 0

    def test_what_it_wrote_is_what_was_evaluated(self, tmp_path: Path) -> None:
        """Every tensor read back is exact to the last bit, and the files are at least as large as predicted."""
        student = self.student(tmp_path)
        spec = _spec(student)
        before = _content(student)
        for deployment in self.deployments():
            artifact = self._export(student, deployment, tmp_path)
            found = verify(self.made(), artifact, student, deployment)
            assert found.tensors == len(spec.tensors)
            assert artifact.size_bytes >= weights_bytes(spec.tensors, deployment)
        assert _content(student) == before, "the student's own folder was changed"

    def test_another_student_s_weights_are_found(self, tmp_path: Path) -> None:
        """It reads back what is on disk, not what it was given."""
        student, deployment = self.student(tmp_path), self.deployments()[0]
        other = self.student(tmp_path / "other")
        artifact = self._export(student, deployment, tmp_path)
        from safetensors.torch import load_file, save_file

        weights = load_file(other / "model.safetensors")
        name = next(name for name in weights if name.endswith("up_proj.weight"))
        save_file(weights | {name: 2 * weights[name]}, other / "model.safetensors", metadata={"format": "pt"})
        try:
            verify(self.made(), artifact, other, deployment)
        except VerificationError:
            return
        raise AssertionError(f"{name} is twice as large in the student, and verify did not see it")

    def test_it_writes_the_same_each_time(self, tmp_path: Path) -> None:
        """Another instance writes the same bytes. For files with code, where torch numbers parts, all weights agree."""
        student, deployment, made = self.student(tmp_path), self.deployments()[0], self.made()
        first, second = (self._export(student, deployment, tmp_path / name) for name in ("a", "b"))
        if isinstance(made, TakesAny) and made.is_code:
            one, other = (dict(made.unpack(artifact.path)) for artifact in (first, second))
            assert list(one) == list(other)
            assert all(np.array_equal(one[name], other[name]) for name in one)
            return
        assert _content(first.path) == _content(second.path)

    def test_its_runtime_chooses_what_was_simulated(self, tmp_path: Path) -> None:
        """With the exported weights, the runtime computes the same as torch."""
        student, deployment, made = self.student(tmp_path), self.deployments()[0], self.made()
        artifact = self._export(student, deployment, tmp_path)
        check = prove(made, artifact.path, deployment, _expected(student, dict(made.unpack(artifact.path))), 1, student)
        assert check.text, "it wrote nothing"
        assert check.agreement >= 0.9, f"it chooses {check.describe()}"
        assert check.excess is None or abs(check.excess) < 0.01, f"it has {check.describe()}"

    def test_what_is_no_student_is_refused(self, tmp_path: Path) -> None:
        """It is refused in one line, and nothing is left that looks like an export."""
        (tmp_path / "empty").mkdir()
        try:
            self.made().export(tmp_path / "empty", self.deployments()[0], tmp_path / "out")
        except InputError:
            assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
            return
        raise AssertionError("an empty folder was exported")

    def _export(self, student: Path, deployment: Deployment, folder: Path) -> Artifact:
        return self.made().export(student, deployment, folder / deployment.name)


def _first(name: str) -> Deployment:
    form = get_format(name)
    bits, group_size, symmetric = key_of(form.linears[0])
    plain = Deployment(runtime=form.runtimes[-1], format=name, bits=bits, group_size=group_size, symmetric=symmetric)
    return Deployment(**{**plain.to_json(), "runtime": serving(plain)[0], "keep": ()})


def _spec(student: Path) -> ModelSpec:
    return spec_from_config(json.loads((student / "config.json").read_text(encoding="utf-8")))


def _content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def _expected(student: Path, weights: dict[str, Any]) -> Expected:
    """Return what torch chooses and loses for a student with other weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model.load_state_dict({name: torch.from_numpy(np.array(one)) for name, one in weights.items()}, strict=False)
    tokens = torch.from_numpy(_SEQUENCES.astype(np.int64))
    with torch.inference_mode():
        logits = model(tokens).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    best, second = logits.topk(2).values.unbind(-1)
    return Expected(_SEQUENCES, logits.argmax(-1).numpy(), nll.numpy(), (best - second).numpy())
