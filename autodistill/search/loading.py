"""Teacher and data on this machine's disk, and how training is made to fit the machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.applied import check_rendering
from autodistill.contracts import ModelSpec
from autodistill.data import prepare
from autodistill.distillation.held import load_held
from autodistill.distillation.memory import share_bytes
from autodistill.distillation.pretrained import token_rows
from autodistill.distillation.signals import check_told
from autodistill.distillation.teacher import Teacher, materialise, resolve_teacher, stored_type, tokenizer_fingerprint
from autodistill.distillation.text_files import text_files
from autodistill.errors import InputError
from autodistill.estimate import spec_from_config
from autodistill.export.gguf_text import cannot_cut
from autodistill.export.gguf_tokenizer import spaces
from autodistill.formats import get_format
from autodistill.hardware import Machine, detect_for_training
from autodistill.records.json_files import read_json
from autodistill.rendering import Template
from autodistill.search.checked import Checked, check_students
from autodistill.search.possible import by_size
from autodistill.search.share import Share, Workers, process_bytes, share_out, train_in_bf16
from autodistill.search.trial_memory import TrialMemory, most_demanding
from autodistill.serving_memory import TRANSFORMERS_PROCESS_BYTES
from autodistill.space import Space
from autodistill.strategy import Alignment, Attention, Distillation, Lora, Strategy
from autodistill.templates import own_template
from autodistill.token_sets import Prepared, RenderingInfo, load_split
from autodistill.training_fit import TeacherFit, TrainingFit, fit_teacher, fit_training
from autodistill.training_memory import adapted_tensors


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Teacher, data and the pretrained models that students may start from, on this machine's disk.

    `renderings` are as `TrialSetting` has them; `templates` says of each model that has a chat template of its own what
    becomes of it, by the model's reference. `device` is where this process runs models, which of a cluster may be
    another than its trials' one, and `bf16` whether that computes in bfloat16 itself. `fit_step` says of tokens how an
    optimiser step of them is trained, and `fit` that of `step_tokens`: what was asked for, is stored, or is the least,
    until a measurement chooses. `largest` is the student, with its strategy, that a plan is made for: of the space, or
    where its training fits no machine here, of what can be trained, and `untrained` says so; no student that is trained
    has more weights than `most_parameters`. `memory` is a trial's.
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
    pretrained: Mapping[str, Path]
    renderings: Mapping[str, str]
    templates: Mapping[str, str]
    caveat: str = ""

    @property
    def outputs_of(self) -> str:
        """What the teacher's outputs are known by."""
        return self.teacher_fit.of(self.teacher.fingerprint)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of teacher and templates, in sentences."""
        caveat = (self.caveat,) if self.caveat else ()
        return (*_told_of_teacher(self.teacher), *caveat, *self.templates.values())

    def stepping(self, tokens: int) -> Loaded:
        """The same with optimiser steps of so many tokens."""
        return replace(self, step_tokens=tokens, fit=self.fit_step(tokens))

    def load_teacher(self, device: str = "cpu") -> Any:
        """The teacher, held as it fits and computing in float32."""
        return load_held(self.teacher.folder, self.teacher_fit.held, device)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a search runs.

    Attributes:
        here: This machine.
        machines: Those that trials run on: this one, or the nodes of a cluster.
        share: What of them each trial is given.
    """

    here: Machine
    machines: tuple[Machine, ...]
    share: Share

    @classmethod
    def alone(cls) -> Place:
        """This machine, each trial in one process."""
        here = detect_for_training()
        return cls(here=here, machines=(here,), share=Share())


def load(checked: Checked, place: Place) -> Loaded:
    """Teacher and data on this machine's disk, and how the machines are shared out.

    Raises:
        InputError: Data too short, a pretrained model of other tokens, nothing of the space whose training can be made
            to fit, or no deployment that can hold a student with the teacher's tokenizer.
        NothingFitsError: None of those that can fits the budget.
    """
    request = checked.request
    _compare_tokens(checked)
    teacher = materialise(checked.teacher, request.cache)
    spec = spec_from_config(read_json(teacher.folder / "config.json"))
    if reason := cannot_cut(teacher.folder):
        spec = replace(spec, text_not_in_gguf=reason)
        check_students(checked, spec)
    length = checked.sequence_length
    pretrained = {model: materialise(resolve_teacher(model), request.cache).folder for model in checked.space.models}
    rows = {model: token_rows(folder, teacher.folder).numpy() for model, folder in pretrained.items()}
    own, refused = _own_templates(checked, teacher.folder, pretrained)
    renderings = {model: template.name for model, template in own.items()}
    data = prepare(
        checked.source,
        teacher.folder,
        tokenizer_fingerprint(teacher.folder),
        length,
        request.cache,
        templates=tuple(own.values()),
    )
    check_told(checked.space.signal_cases(), data.splits["train"].told > 0)
    _check_sayable(checked, teacher.folder, data, rows, renderings)
    teacher_fit = fit_teacher(spec, stored=stored_type(teacher.folder), sequence_length=length, machine=place.here)
    whole = _memory(place, spec, teacher_fit)
    step_tokens = _step_tokens(checked, place)
    largest, most, fit_step, untrained = _planned_for(checked, whole, step_tokens)
    fit = fit_step(step_tokens)
    main_bytes = _main_bytes(checked.space, whole, most, teacher_fit, fit)
    return Loaded(
        teacher=teacher,
        data=data,
        spec=spec,
        workers=share_out(place.machines, main_bytes, request.runner, place.share),
        device="cuda" if place.here.gpus else "cpu",
        bf16=place.here.bf16,
        threads=place.here.cpus,
        step_tokens=step_tokens,
        fit=fit,
        fit_step=fit_step,
        largest=largest,
        most_parameters=most,
        memory=replace(
            whole, share_bytes=process_bytes(place.machines, whole.limit_bytes, main_bytes, request.runner, place.share)
        ),
        untrained=untrained,
        teacher_fit=teacher_fit,
        pretrained=pretrained,
        renderings=renderings,
        templates=refused | {model: _told_of(model, data.renderings[name]) for model, name in renderings.items()},
        caveat="" if reason or not _in_gguf(checked) else spaces(teacher.folder).caveat,
    )


def _compare_tokens(checked: Checked) -> None:
    """Refuses pretrained models of another tokenizer before any weight is obtained.

    Raises:
        InputError: As `token_rows`.
    """
    models = checked.space.models
    if not models:
        return
    with text_files(checked.teacher) as teacher:
        for model in models:
            with text_files(resolve_teacher(model)) as folder:
                token_rows(folder, teacher, model)


def trainable(checked: Checked, place: Place, line: Callable[[str], None]) -> Checked:
    """The request without its space's optional choices, where training their students fits no machine here.

    Args:
        checked: What is asked; of a run that is resumed the choices stay as they were.
        place: Where it runs.
        line: Is told of it.
    """
    required = checked.space.required()
    if required is checked.space or checked.stored is not None:
        return checked
    length = checked.sequence_length
    teacher_fit = fit_teacher(checked.spec, stored="float32", sequence_length=length, machine=place.here)
    memory, step_tokens = _memory(place, checked.spec, teacher_fit), _step_tokens(checked, place)
    try:
        _training(checked, memory, by_size(checked.space, checked.spec)[-1][1], step_tokens)
    except InputError as error:
        line(f"the largest students are left out: {error}")
        return replace(checked, space=required)
    return checked


def _planned_for(
    checked: Checked, memory: TrialMemory, step_tokens: int
) -> tuple[tuple[Strategy, ModelSpec], int, Callable[[int], TrainingFit], str]:
    """The student that a plan is made for, the most weights of any that is trained, how steps of so many tokens train
    it, and why others are not trained.

    It is the largest, with all that a trial may train it by; where that fits no machine here, it is what takes most of
    what does, and each strategy is asked for itself once it is proposed.

    Raises:
        InputError: Nothing of the space can be trained.
    """
    length, largest = checked.sequence_length, by_size(checked.space, memory.teacher)[-1]
    every = partial(_training, checked, memory, largest[1])
    try:
        every(step_tokens)
    except InputError as error:
        strategy, student, most = most_demanding(
            checked.space, memory, sequence_length=length, sequences=step_tokens // length
        )

        def one(tokens: int) -> TrainingFit:
            return memory.fit(strategy, student, sequence_length=length, sequences=tokens // length)

        return (strategy, student), most, one, f"what cannot be trained here is rejected when it is proposed: {error}"
    return largest, largest[1].parameters, every, ""


def _training(checked: Checked, memory: TrialMemory, largest: ModelSpec, step_tokens: int) -> TrainingFit:
    """How the largest student of the space is trained where trials run, in steps of so many tokens.

    Raises:
        InputError: It cannot be.
    """
    space, spec, length = checked.space, memory.teacher, checked.sequence_length
    return fit_training(
        largest,
        teacher=spec,
        alignments=_alignments(space, spec),
        lora=_lora(space, spec, largest),
        train_embeddings=any(recipe.train_embeddings for recipe in _recipes(space, spec, "train_embeddings")),
        sequence_length=length,
        sequences=step_tokens // length,
        limit_bytes=memory.limit_bytes - memory.beside_bytes(space.signal_cases()),
        processes=memory.processes,
        bf16=memory.bf16,
        on_grid=_on_grid(space, spec),
        device=memory.device,
        threads=memory.threads,
    )


def _step_tokens(checked: Checked, place: Place) -> int:
    """Tokens of an optimiser step: asked for, stored, or else a sequence for each process, the least there can be.

    Raises:
        InputError: They do not divide over the processes of a trial.
    """
    length, processes = checked.sequence_length, place.share.processes
    tokens = checked.request.step_tokens or processes * length
    if checked.stored:
        tokens = checked.stored["plan"]["batch_tokens"]
    if tokens % (processes * length):
        raise InputError(
            f"a step of {tokens} tokens does not divide over the {processes} processes of a trial: give --step-tokens "
            f"a multiple of {processes * length}"
        )
    return tokens


def _own_templates(
    checked: Checked, teacher: Path, pretrained: Mapping[str, Path]
) -> tuple[dict[str, Template], dict[str, str]]:
    """The chat templates of pretrained models that render the data otherwise than the teacher's, and why others are
    not used, both by the models' references.

    Raises:
        InputError: A strategy compares what renderings do not have in common.
    """
    own, refused = {}, {}
    conversations = checked.source.conversations
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
        for strategy in checked.space.cases(paths, 1) if checked.space.dimensions else checked.space.baselines.values():
            check_rendering(strategy, own)
    return own, refused


def _check_sayable(
    checked: Checked,
    teacher: Path,
    data: Prepared,
    rows: Mapping[str, npt.NDArray[np.int64]],
    renderings: Mapping[str, str],
) -> None:
    """Refuses a pretrained student that is to learn answers with tokens that its frozen table has no rows of.

    Args:
        checked: Has the space.
        teacher: Folder of the teacher, whose tokens all are.
        data: Its answers are learnt.
        rows: Of each model its row of each of the teacher's tokens, -1 for none.
        renderings: Of the models that read another one.

    Raises:
        InputError: Names such a token.
    """
    paths = {"init", "init.model", "distillation", "distillation.train_embeddings"}
    strategies = checked.space.cases(paths, 1) if checked.space.dimensions else checked.space.baselines.values()
    frozen = {one.init.model for one in strategies if one.init.model and not one.distillation.train_embeddings}
    for model in sorted(frozen):
        train = load_split(data.folder, "train", renderings.get(model, ""))
        if train.answers is None or (rows[model] >= 0).all():
            continue
        learnt = np.bincount(train.tokens[train.answers], minlength=len(rows[model]))
        lacking = np.flatnonzero((rows[model] < 0) & (learnt > 0))
        if len(lacking):
            from transformers import AutoTokenizer

            token = AutoTokenizer.from_pretrained(teacher).convert_ids_to_tokens(int(lacking[0]))
            raise InputError(
                f"{model} has no {token!r}, which the answers to learn hold {learnt[lacking[0]]:,} times, and with a "
                "frozen table it could never say it: set distillation.train_embeddings, or choose a model that has it"
            )


def _in_gguf(checked: Checked) -> bool:
    return any(get_format(one.format).container == "gguf" for one in checked.space.deployments)


def _told_of_teacher(teacher: Teacher) -> tuple[str, ...]:
    """What a teacher's figures mean, where its own file is quantised."""
    if teacher.quantised is None:
        return ()
    return (
        f"the teacher's file is quantised ({teacher.quantised}) and was dequantised: the teacher in 16 bits is that "
        "model, not the one it was quantised from",
    )


def _told_of(model: str, info: RenderingInfo) -> str:
    note = (
        f"{model} reads, and is served in, its own chat template: of its {info.answers:,} answer tokens "
        f"{info.shared:,} are those of every template in this search, learnt from the teacher and scored; the others "
        f"are learnt from the text alone; up to their ends, the answers of {info.differing:,} of {info.records:,} "
        "records are cut into tokens otherwise"
    )
    theirs, own = info.ends
    return note if theirs == own else f"{note}; where the teacher ends an answer with {theirs}, it does with {own}"


def _memory(place: Place, spec: ModelSpec, teacher_fit: TeacherFit) -> TrialMemory:
    """The memory of a process of a trial while no other is beside it on a machine's cores."""
    limit = _trial_memory(place)
    return TrialMemory(
        limit_bytes=limit,
        share_bytes=limit,
        device="cuda" if any(machine.gpus for machine in place.machines) else "cpu",
        threads=place.share.threads or 1,
        processes=place.share.processes,
        bf16=train_in_bf16(place.machines),
        teacher=spec,
        held_bytes=teacher_fit.held_bytes,
    )


def _trial_memory(place: Place) -> int:
    """Bytes that a process of a trial may take: of a machine, or its share of a GPU."""
    gpus = [gpu.memory_bytes for machine in place.machines for gpu in machine.gpus]
    if not gpus:
        return min(machine.memory_bytes for machine in place.machines)
    return min(gpus) if place.share.gpus == 1 else share_bytes(min(gpus), place.share.gpus)


def _main_bytes(space: Space, memory: TrialMemory, most: int, teacher_fit: TeacherFit, fit: TrainingFit) -> int:
    """Main memory of a process of a trial: of training and a teacher in it, or by a GPU of teacher and student.

    A student has no more weights than `most`.
    """
    if memory.device == "cpu":
        return fit.total_bytes + memory.beside_bytes(space.signal_cases())
    stored = (4 if teacher_fit.stored == "float32" else 2) * memory.teacher.parameters
    return stored + 4 * most + TRANSFORMERS_PROCESS_BYTES


def _recipes(space: Space, spec: ModelSpec, *fields: str) -> Iterator[Distillation]:
    """Of the space, with all that these fields may be."""
    paths = {"distillation", *(f"distillation.{name}" for name in fields)}
    # Without dimensions nothing is proposed, and the baselines are all there is.
    strategies = space.cases(paths, spec.layers) if space.dimensions else iter(space.baselines.values())
    return (strategy.distillation for strategy in strategies)


def _on_grid(space: Space, spec: ModelSpec) -> bool:
    """Whether a trial of the space may be trained on a grid."""
    strategies = space.cases({"finishing"}, spec.layers) if space.dimensions else space.baselines.values()
    return any(strategy.finishing is not None for strategy in strategies)


def _lora(space: Space, spec: ModelSpec, student: ModelSpec) -> Lora | None:
    """The low-rank changes of a trial that take most memory; None where a trial trains the weights themselves."""
    found = {recipe.lora for recipe in _recipes(space, spec, "lora", "lora.rank", "lora.layers")}
    changes = [lora for lora in found if lora is not None]
    if len(changes) < len(found):
        return None
    return max(changes, key=lambda lora: lora.rank * sum(sum(item.shape) for item in adapted_tensors(student, lora)))


def _alignments(space: Space, spec: ModelSpec) -> set[tuple[Alignment | None, Attention | None]]:
    """All that a trial of the space may align, as far as its memory depends on it."""
    fields = ("", ".layers", ".count", ".projection", ".rank", ".kind")
    recipes = _recipes(space, spec, *(f"{part}{name}" for part in ("alignment", "attention") for name in fields))
    return {(recipe.alignment, recipe.attention) for recipe in recipes}
