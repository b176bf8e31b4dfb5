"""What a warm worker keeps from trial to trial, and a check that it has what a strategy needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from autodistill import plugins
from autodistill.data.dataset import TokenSet, fingerprint_of, load_split
from autodistill.distillation.losses.attention import TeacherBlock, teacher_layer
from autodistill.distillation.losses.hidden_states import layer_map
from autodistill.distillation.student.check import check_rendering
from autodistill.distillation.teacher.output_cache import CacheSettings, TeacherCache
from autodistill.distillation.teacher.target_sources import LiveTeacher, check_logprobs
from autodistill.distillation.training.fsdp import Sharding
from autodistill.errors import InputError
from autodistill.inference.half_precision import load_held
from autodistill.inference.outputs import TeacherReference
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.search.worker.messages import TrialSetting
from autodistill.strategy.strategy import Init, Strategy


@dataclass
class Workbench:
    """What a warm worker keeps from trial to trial.

    It keeps data and cache, mapped into memory, the reference of the validation split, and what its trials have needed
    of the teacher: the model or some of its layers. If several processes train one trial together, `sharding` describes
    them, and each process has its own bench.
    """

    setting: TrialSetting
    sharding: Sharding | None = None
    train: TokenSet = field(init=False)
    validation: TokenSet = field(init=False)
    cache: TeacherCache | None = field(init=False)
    teacher: LiveTeacher = field(init=False)
    reference: TeacherReference = field(init=False)
    _blocks: dict[int, TeacherBlock] = field(init=False, default_factory=dict)
    _splits: dict[tuple[str, str], TokenSet] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        torch.set_num_threads(self.setting.plan.threads)
        keep_freed_memory()
        setting = self.setting
        for one in setting.divergences:
            plugins.register("divergences", one.name, one, written_as=one.function)
        self.cache = TeacherCache(setting.cache, fingerprint_of(setting.data)) if setting.cache else None
        self.teacher = LiveTeacher(setting.teacher, setting.device, setting.plan.bf16, setting.held_type)
        # The cache may be shared and have more sequences. This search trains only on those that its own plan needs.
        self.train = self.read("train").head(self.setting.plan.most_tokens)
        self.validation = self.read("validation")
        self.reference = TeacherReference.load(self.setting.teacher_reference)

    def read(self, split: str, init: Init | None = None) -> TokenSet:
        """Return a split as a student reads it, or, without `init`, as the teacher reads it."""
        key = split, self.setting.rendering(init)
        if key not in self._splits:
            self._splits[key] = load_split(self.setting.data, *key)
        return self._splits[key]

    def teacher_block(self, layer: int) -> TeacherBlock:
        """Return one layer of the teacher, in float32 on the trials' device."""
        if layer not in self._blocks:
            model = load_held(self.setting.teacher, self.setting.held_type)
            self._blocks[layer] = TeacherBlock(model, layer, self.setting.device)
        return self._blocks[layer]

    def check(self, strategy: Strategy, kept_layers: tuple[int, ...]) -> None:
        """Refuse a strategy that needs something that the cache or the data do not have.

        Args:
            strategy: What is to be trained.
            kept_layers: For each layer of its student, the teacher layer that it was copied from or corresponds to.

        Raises:
            InputError: The message says what is missing.
        """
        recipe, layers = strategy.distillation, self.setting.teacher_spec.layers
        check_rendering(strategy, self.setting.renderings)
        check_logprobs([recipe], self.train.writer_logprobs is not None)
        cached = recipe.signal != "online"
        pairs = layer_map(recipe.alignment, kept_layers, layers) if recipe.alignment and cached else ()
        states = {pair.teacher_state for pair in pairs}
        if recipe.attention and cached:
            states.add(teacher_layer(recipe.attention, layers) - 1)
        needed = CacheSettings.for_recipes([recipe], states, self.setting.plan.bf16)
        held = self.cache.settings if self.cache else CacheSettings(top_k=0, temperatures=())
        lacking = held.lacks(needed)
        if lacking:
            raise InputError(
                f"the teacher cache lacks {', '.join(lacking)}, which the strategy reads: make the cache of a space "
                "that holds this strategy"
            )

    def held_out(self, tokens: int, init: Init | None = None) -> tuple[TokenSet, TeacherReference]:
        """Return the first validation sequences, at most `tokens` tokens, and the teacher's reference for them.

        Args:
            tokens: Tokens of the sequences.
            init: How the student that reads them begins; None for a student that reads what the teacher does.
        """
        data = self.read("validation", init).head(tokens)
        return data, self.reference.head(data.predicted)
