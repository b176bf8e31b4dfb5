"""Brings teacher, data and pretrained models onto this machine's disk, and derives what depends on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.data.chat_template import Template
from autodistill.data.dataset import Prepared, RenderingInfo, load_split
from autodistill.data.prepare import prepare
from autodistill.data.student_template import own_template
from autodistill.data.tokenization import check_ids, load_tokenizer
from autodistill.distillation.student.check import check_rendering
from autodistill.distillation.student.pretrained import token_rows
from autodistill.distillation.student.repair import HeldMoments
from autodistill.distillation.teacher.given_file import as_given
from autodistill.distillation.teacher.resolve import Teacher, materialize, resolve_teacher, text_files
from autodistill.distillation.teacher.stored_grids import StoredAs, stored_as, with_own
from autodistill.distillation.teacher.target_sources import check_logprobs
from autodistill.distillation.training.on_policy import SEVERAL_PROCESSES
from autodistill.errors import InputError
from autodistill.estimates.divided import splits
from autodistill.estimates.fit import cannot_hold, holdable
from autodistill.estimates.teacher_fit import TeacherFit, fit_teacher
from autodistill.estimates.training_fit import TrainingFit
from autodistill.export.gguf_tokenizer import spaces
from autodistill.export.process_memory import measured_process_bytes
from autodistill.export.tokenizer_check import cannot_cut
from autodistill.hardware.budget import on_gpu, served
from autodistill.inference.tensor_parallel import load_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.models.spec import ModelSpec
from autodistill.models.stored_tensors import stored_type
from autodistill.search.construction.construction import arms
from autodistill.search.planning.placement import Place, Workers, process_bytes, share_out
from autodistill.search.planning.representatives import cases, signal_cases
from autodistill.search.planning.trial_memory import TrialMemory
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.request.validate import check_students
from autodistill.search.setup.candidates import beginning, check_candidates, check_rows, open_candidates
from autodistill.search.setup.training_setup import (
    main_memory,
    memory_of_trials,
    over_more_gpus,
    planned_for,
    tokens_of_step,
)
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.utils.json_files import read_json

_DIVIDED = (
    "no student of the space can be trained on one GPU, so each trial is trained on {} (FSDP2); --gpus-per-trial sets "
    "another number"
)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Teacher, data and the pretrained models that students may start from, on this machine's disk.

    Attributes:
        teacher: The teacher's folder, shape and fingerprint.
        data: The prepared splits.
        spec: The teacher's shape.
        workers: How the machines are divided among trials.
        device: Where this process runs models. On a cluster, trials may run on another kind.
        bf16: Whether this machine computes in bfloat16 natively.
        threads: CPU threads of this machine.
        step_tokens: The requested, the stored or the least size of an optimiser step, until a measurement chooses one.
        fit: The result of `fit_step` for `step_tokens`.
        fit_step: Returns how a step of some tokens is trained.
        largest: The student, with its strategy, that a plan is made for: the largest of the space, or of those that can
            be trained here.
        most_parameters: The most weights of a student that is trained.
        memory: The memory of a trial.
        untrained: Which students cannot be trained here, or "".
        teacher_fit: How the teacher is run on this machine.
        pretrained_models: The models that students may start from, by reference.
        renderings: As in `TrialSetting`.
        templates: A note for each model with its own chat template, by the model's reference.
        caveat: What the user must know about GGUF files with this teacher's tokenizer, or "".
        stored: How a quantised teacher is stored, or None.
        ranked: A sentence on whether the teacher's own file or codes are among the rows, or "".
        of_models: Notes on the files that students start from.
        divided: That each trial has several GPUs although the user did not ask for them, or "".
        moments: The activations by which the teacher's FFNs are cut and repaired.
    """

    teacher: Teacher
    data: Prepared
    spec: ModelSpec
    workers: Workers
    device: str
    bf16: bool
    threads: int
    step_tokens: int
    fit: TrainingFit
    fit_step: Callable[[int], TrainingFit] = field(repr=False)
    largest: tuple[Strategy, ModelSpec]
    most_parameters: int
    memory: TrialMemory
    untrained: str
    teacher_fit: TeacherFit
    pretrained_models: Mapping[str, Teacher]
    renderings: Mapping[str, str]
    templates: Mapping[str, str]
    caveat: str = ""
    stored: StoredAs | None = None
    ranked: str = ""
    of_models: tuple[str, ...] = ()
    divided: str = ""
    moments: HeldMoments = field(default_factory=HeldMoments, repr=False, compare=False)

    @property
    def pretrained(self) -> Mapping[str, Path]:
        """The folder of each pretrained model, by the model's reference."""
        return {model: found.folder for model, found in self.pretrained_models.items()}

    @property
    def outputs_of(self) -> str:
        """The key of the teacher's outputs."""
        return self.teacher_fit.of(self.teacher.fingerprint)

    @property
    def of_teacher(self) -> tuple[str, ...]:
        """Sentences on what the figures mean if the teacher is quantised already."""
        return tuple(filter(None, (self.stored.note if self.stored else "", self.ranked)))

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what a reader must know about data, text and templates."""
        known = tuple(filter(None, (self.divided, self.caveat)))
        return (*self.data.notes, *known, *self.templates.values(), *self.of_models)

    def teacher_deployments(self, config: SearchConfig) -> tuple[Deployment, ...]:
        """Return the deployments that the teacher is evaluated under: its own file or codes, and the space's.

        If constructions are raced, those of the whole teacher and one deployment in 16 bits replace the space's.
        """
        deployments = config.space.deployments
        if config.constructions:
            constructed = [one.deployment for one in arms(config.constructions) if one.whole]
            wide = [one for one in deployments if one.bits == 16 and not one.types]
            deployments = tuple(dict.fromkeys((*constructed, *wide[:1])))
        own = _own(self.teacher, self.stored, self.spec, config)
        if own is not None and not _not_ranked(own, self.spec, config):
            deployments = (own, *deployments) if own.file else with_own(own, deployments)
        return tuple(one for one in holdable(self.spec, deployments) if self._packs(one))

    def candidate_file(self, reference: str, config: SearchConfig) -> Deployment:
        """Return the deployment of a file that the user named, as it is."""
        found = as_given(self.pretrained_models[reference], self.spec, config.budget, config.kv_type)
        assert found is not None  # a candidate is a GGUF file
        return found

    def stepping(self, tokens: int) -> Loaded:
        """Return the same with optimiser steps of so many tokens."""
        return replace(self, step_tokens=tokens, fit=self.fit_step(tokens))

    def load_teacher(self, device: str = "cpu") -> Any:
        """Load the teacher in the precision that fits, computing in float32.

        A teacher that is divided among processes lies on this machine's devices.
        """
        fit = self.teacher_fit
        return load_teacher(
            self.teacher.folder, fit.held_type, self.device if fit.processes > 1 else device, fit.processes
        )

    def _packs(self, deployment: Deployment) -> bool:
        """Return whether the teacher's parts in all processes consist of whole groups of the deployment's grids."""
        return not splits(self.spec, deployment, self.teacher_fit.processes)


def load(config: SearchConfig, place: Place) -> Loaded:
    """Bring teacher and data onto this machine's disk, and decide how trials share the machines.

    Raises:
        InputError: The data is too short, a pretrained model has other tokens, or a candidate is of another model. Or
            training fits for nothing of the space, or no deployment can hold a student with the teacher's tokenizer.
        NothingFitsError: No deployment that can hold a student fits the budget.
    """
    _compare_tokens(config)
    candidates = open_candidates(config) if config.stored is None else []
    if place.share.processes > 1 and any(one.on_policy for one in signal_cases(config.space)):
        raise InputError(SEVERAL_PROCESSES)
    teacher = materialize(config.teacher, config.cache)
    spec = spec_from_config(read_json(teacher.folder / "config.json"))
    # A run that an earlier version began continues without the rows of the teacher's own file and codes.
    if config.stored is not None and "file" not in config.stored["teacher"]:
        teacher = replace(teacher, original=None)
    if config.stored is None or "stored_as" in config.stored["teacher"]:
        teacher, stored = stored_as(config.teacher, teacher, spec, config.cache)
    else:
        stored = None
    if reason := cannot_cut(teacher.folder, spec.vocabulary):
        spec = replace(spec, text_not_in_gguf=reason)
    elif process := _process_bytes(config, teacher.folder, spec):
        spec = replace(spec, process_bytes=process)
    if spec.text_not_in_gguf or spec.process_bytes:
        check_students(config, spec)
    check_candidates(candidates, teacher.folder, spec)
    length = config.sequence_length
    begun = {model: beginning(model, config.cache) for model in (*config.space.models, *config.candidates)}
    models = {model: found for model, (found, _) in begun.items()}
    pretrained = {model: found.folder for model, found in models.items()}
    rows = {model: token_rows(folder, teacher.folder).numpy() for model, folder in pretrained.items()}
    for candidate in config.candidates:
        check_rows(candidate, rows[candidate])
    # A candidate, as a file of the teacher's model, uses the teacher's template.
    others = {model: folder for model, folder in pretrained.items() if model not in config.candidates}
    own, refused = _own_templates(config, teacher.folder, others)
    renderings = {model: template.name for model, template in own.items()}
    data = prepare(
        config.source,
        teacher.folder,
        tokenizer_fingerprint(teacher.folder),
        length,
        config.cache,
        templates=tuple(own.values()),
    )
    data = replace(data, notes=(*config.source.notes, *data.notes))
    for split in data.splits:
        check_ids(int(load_split(data.folder, split).tokens.max(initial=0)), spec.vocabulary, teacher.name)
    check_logprobs(signal_cases(config.space), data.splits["train"].told > 0)
    _check_sayable(config, teacher.folder, data, rows, renderings)
    teacher_fit = fit_teacher(spec, stored=stored_type(teacher.folder), sequence_length=length, machine=place.here)
    return Loaded(
        teacher=teacher,
        data=data,
        spec=spec,
        device="cuda" if place.here.gpus else "cpu",
        bf16=place.here.bf16,
        threads=place.here.cpus,
        teacher_fit=teacher_fit,
        pretrained_models=models,
        renderings=renderings,
        templates=refused | {model: _template_note(model, data.renderings[name]) for model, name in renderings.items()},
        caveat=_caveat(config, reason, teacher.folder),
        stored=stored,
        ranked=_ranked(teacher, stored, spec, config),
        of_models=tuple(note for _, note in begun.values() if note),
        **_training_of(config, place, spec, teacher_fit),
    )


def load_again(loaded: Loaded, config: SearchConfig, place: Place) -> Loaded:
    """Return the same teacher and data for another budget, whose students' training is made to fit.

    Args:
        loaded: What was loaded for one budget.
        config: The checked request of the other budget; all else is the same.
        place: The machines of the search.

    Raises:
        InputError, NothingFitsError: As `load`.
    """
    spec = loaded.spec
    if spec.text_not_in_gguf or spec.process_bytes:
        check_students(config, spec)
    return replace(
        loaded,
        caveat=_caveat(config, spec.text_not_in_gguf, loaded.teacher.folder),
        ranked=_ranked(loaded.teacher, loaded.stored, spec, config),
        **_training_of(config, place, spec, loaded.teacher_fit),
    )


def _training_of(config: SearchConfig, place: Place, spec: ModelSpec, teacher_fit: TeacherFit) -> dict[str, Any]:
    """Return how the students of a space are trained here, as fields of `Loaded`.

    If one GPU can train none of them, each trial has as many GPUs as that takes, at least. A resumed run has as many as
    before.
    """
    before = config.stored["plan"].get("processes", 1) if config.stored is not None else None
    if before not in (None, place.share.processes):
        place = next((one for one in over_more_gpus(config, place) if one.share.processes == before), place)
    try:
        return _training_on(config, place, spec, teacher_fit) | {"divided": ""}
    except InputError:
        for larger in over_more_gpus(config, place) if before is None else ():
            with suppress(InputError):
                found = _training_on(config, larger, spec, teacher_fit)
                return found | {"divided": _DIVIDED.format(larger.share.processes)}
        raise


def _training_on(config: SearchConfig, place: Place, spec: ModelSpec, teacher_fit: TeacherFit) -> dict[str, Any]:
    """Return how the students of a space are trained with a given share of the machines, as fields of `Loaded`."""
    whole = memory_of_trials(place, spec, teacher_fit)
    step_tokens = tokens_of_step(config, place)
    largest, most, fit_step, untrained = planned_for(config, whole, step_tokens)
    fit = fit_step(step_tokens)
    main_bytes = main_memory(config.space, whole, most, teacher_fit, fit)
    share_bytes = process_bytes(place.machines, whole.limit_bytes, main_bytes, config.runner, place.share)
    return {
        "workers": share_out(place.machines, main_bytes, config.runner, place.share),
        "step_tokens": step_tokens,
        "fit": fit,
        "fit_step": fit_step,
        "largest": largest,
        "most_parameters": most,
        "memory": replace(whole, share_bytes=share_bytes),
        "untrained": untrained,
    }


def _compare_tokens(config: SearchConfig) -> None:
    """Refuse pretrained models with another tokenizer before any weights are obtained."""
    models = (*config.space.models, *config.candidates)
    if not models:
        return
    with text_files(config.teacher) as teacher:
        for model in models:
            with text_files(resolve_teacher(model)) as folder:
                token_rows(folder, teacher, model)


def _own_templates(
    config: SearchConfig, teacher: Path, pretrained: Mapping[str, Path]
) -> tuple[dict[str, Template], dict[str, str]]:
    """Return the chat templates of pretrained models that differ from the teacher's on this data.

    Returns also why some models' templates cannot be used. Both are by the models' references.
    """
    own, refused = {}, {}
    conversations = config.source.conversations
    for model, folder in pretrained.items() if conversations else ():
        template, reason = own_template(folder, teacher, conversations)
        if template is not None:
            own[model] = template
        elif reason is not None:
            refused[model] = (
                f"{model} learns and is served in the teacher's chat template, as its own cannot be used: {reason}"
            )
    if own:
        paths = {"init", "init.model", "distillation", "distillation.attention"}
        for strategy in cases(config.space, paths, 1):
            check_rendering(strategy, own)
    return own, refused


def _check_sayable(
    config: SearchConfig,
    teacher: Path,
    data: Prepared,
    rows: Mapping[str, npt.NDArray[np.int64]],
    renderings: Mapping[str, str],
) -> None:
    """Refuse a pretrained student whose frozen table has no rows for some tokens of the answers that it must learn.

    Args:
        config: The checked request, with the space.
        teacher: Folder of the teacher, whose tokenizer made all tokens.
        data: The data with the answers.
        rows: For each model its row for each token of the teacher, -1 for none.
        renderings: Renderings of the models that read their own.
    """
    paths = {"init", "init.model", "distillation", "distillation.train_embeddings"}
    strategies = cases(config.space, paths, 1)
    frozen = {one.init.model for one in strategies if one.init.model and not one.distillation.train_embeddings}
    for model in sorted(frozen):
        train = load_split(data.folder, "train", renderings.get(model, ""))
        if train.answers is None or (rows[model] >= 0).all():
            continue
        learnt = np.bincount(train.tokens[train.answers], minlength=len(rows[model]))
        lacking = np.flatnonzero((rows[model] < 0) & (learnt > 0))
        if len(lacking):
            token = load_tokenizer(teacher).convert_ids_to_tokens(int(lacking[0]))
            raise InputError(
                f"{model} has no token {token!r}, which the answers to learn from contain {learnt[lacking[0]]:,} "
                "times, and with a frozen table it could never write it: set distillation.train_embeddings, or choose "
                "a model that has it"
            )


def _process_bytes(config: SearchConfig, folder: Path, spec: ModelSpec) -> int:
    """Return the bytes of overhead of llama.cpp's process here, or 0 if it serves no student.

    A resumed run uses its stored value. For a GPU this is 0, since its budget does not limit the host's memory.
    """
    if config.stored is not None:
        return int(config.stored["teacher"].get("process_bytes", 0))
    served = config.space.solved or any(one.runtime == "llama.cpp" for one in config.space.deployments)
    return measured_process_bytes(folder, spec.vocabulary, config.cache) if served and not on_gpu(config.budget) else 0


def _caveat(config: SearchConfig, reason: str, teacher: Path) -> str:
    """Return what the user must know about GGUF files with this teacher's tokenizer, or "" if the space has none.

    Args:
        config: The checked request, with the space.
        reason: Why there can be no such file, or "".
        teacher: Folder of the teacher.
    """
    if not any(one.container == "gguf" for one in config.space.deployments):
        return ""
    return f"the space's GGUF deployments are left out: {reason}" if reason else spaces(teacher).caveat


def _own(teacher: Teacher, stored: StoredAs | None, spec: ModelSpec, config: SearchConfig) -> Deployment | None:
    """Return the deployment of the teacher's own GGUF file as it is, or else of its own codes; None if it has none."""
    file = as_given(teacher, spec, config.budget, config.kv_type)
    return file or (stored.deployment if stored else None)


def _not_ranked(own: Deployment, spec: ModelSpec, config: SearchConfig) -> str:
    """Return why the teacher's own file or codes cannot be a row of this search, or "" if they can."""
    if why := cannot_hold(spec, own):
        return why
    if config.served_by not in (None, own.runtime):
        return f"the search is for {config.served_by}, and {own.runtime} serves them"
    return "" if served((own,), config.budget) else f"the device has no {own.runtime}"


def _ranked(teacher: Teacher, stored: StoredAs | None, spec: ModelSpec, config: SearchConfig) -> str:
    """Return a sentence on whether the teacher's own file or codes are ranked with the students, or ""."""
    own = _own(teacher, stored, spec, config)
    if own is None:
        return ""
    what = "the weights of the teacher's own file" if own.file else "the teacher's own codes"
    if why := _not_ranked(own, spec, config):
        return f"{what} are not ranked here: {why}"
    return f"{what} are ranked beside the students, as teacher-{own.name}, and need no training"


def _template_note(model: str, info: RenderingInfo) -> str:
    note = (
        f"{model} reads its own chat template and is served with it: {info.shared:,} of its {info.answers:,} answer "
        "tokens are the same in every template in this search, and are learned from the teacher and scored; the others "
        f"are learned from the text alone; apart from their ends, the answers of {info.differing:,} of "
        f"{info.records:,} records are cut into different tokens"
    )
    theirs, own = info.ends
    return note if theirs == own else f"{note}; it ends an answer with {own}, and the teacher with {theirs}"
