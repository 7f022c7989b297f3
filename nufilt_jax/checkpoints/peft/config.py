"""`adapter_config.json`: what an adapter's factors mean, or why they cannot be merged.

Matching of names follows peft 0.21, `check_target_module_exists` and `get_pattern_key`.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from nufilt_jax.checkpoints.peft.expressions import EndlessError, matched
from nufilt_jax.errors import CheckpointError, Problem, raise_all
from nufilt_jax.strict_json import shown

CONFIG = "adapter_config.json"
MERGE = "load it with peft, call merge_and_unload() and save the whole model"
LEAVE = "it is no change of the base's weights: leave this task out"
_ALL_LINEAR = "all-linear"

# Variants that compute something else than W + s B A, by the field that turns them on.
_VARIANTS = {
    "use_dora": "DoRA, which scales the columns of the sum",
    "use_qalora": "QA-LoRA, which pools its inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "lora_bias": "LoRA with biases of its own",
    "layer_replication": "a model with replicated layers",
    "target_parameters": "LoRA of bare parameters, as stacks of experts",
    "trainable_token_indices": "LoRA with trained tokens",
    "alora_invocation_tokens": "activated LoRA, which begins at a token",
    "arrow_config": "a router over adapters",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "lora_ga_config": "LoRA-GA, which changes the base when it begins",
}
# Of these and of other adapters, those that peft cannot put into the weights: they depend on the input, or add to it.
_NO_CHANGES = ("layer_replication", "alora_invocation_tokens", "arrow_config")
_NO_CHANGE_TYPES = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "POLY", "XLORA", "LILY", "SHADOW",
)  # fmt: skip
_OF_TRAINING = frozenset(  # what has no part in W + s B A, or is read elsewhere
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config", "megatron_core",
        "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
        "runtime_config", "target_modules", "task_type", "use_rslora", "inference", "merge_weights",
        "enable_lora", "ephemeral_gpu_offload",
    }
)  # fmt: skip
# Beginnings after which the base is what it was. Those of PiSSA and its like take a part of W into the factors.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The settings of a LoRA adapter that its weights are read by.

    Attributes:
      content: the file, as it stands.
      where: what to call it in messages.
      rank: r where `ranks` says nothing.
      alpha: likewise.
      ranks: r by pattern.
      alphas: alpha by pattern.
      is_rank_stabilised: whether s is α/√r in place of α/r.
    """

    content: Mapping[str, Any]
    where: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    is_rank_stabilised: bool

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str) -> "LoraConfig":
        """The settings in a file.

        Args:
          content: of `adapter_config.json`.
          where: what to call it in messages.

        Raises:
          CheckpointError: with everything in it that cannot be merged.
        """
        raise_all(CheckpointError, _problems(content, where))
        return cls(
            content=content,
            where=where,
            rank=content["r"],
            alpha=float(content.get("lora_alpha", 8)),
            ranks=content.get("rank_pattern") or {},
            alphas={key: float(x) for key, x in (content.get("alpha_pattern") or {}).items()},
            is_rank_stabilised=bool(content.get("use_rslora")),
        )

    @property
    def base(self) -> str:
        """The model that it says it was trained on; empty if it says nothing."""
        return str(self.content.get("base_model_name_or_path") or "")

    def ranks_of(self, modules: Sequence[str]) -> dict[str, int]:
        """R of every module."""
        return {module: self.ranks.get(key, self.rank) for module, key in self._keys(self.ranks, modules).items()}

    def scales_of(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """S of every module, in W + s B A, from its r."""
        keys = self._keys(self.alphas, tuple(ranks))
        return {
            module: self.alphas.get(keys[module], self.alpha) / (math.sqrt(r) if self.is_rank_stabilised else r)
            for module, r in ranks.items()
        }

    def covered(self, modules: Sequence[str]) -> set[str]:
        """The modules that peft would load factors of: by `target_modules`, `exclude_modules`, layers."""
        content, targets = self.content, self.content.get("target_modules")
        found = set(modules) - self._named(content.get("exclude_modules"), modules)
        if targets is None or targets == _ALL_LINEAR:
            return found
        found &= self._named(targets, modules)
        layers = content.get("layers_to_transform")
        if isinstance(targets, str) or layers is None or layers == []:
            return found
        wanted, numbers = [layers] if type(layers) is int else layers, self._layers_of(modules)
        return {module for module in found if module in targets or numbers.get(module) in wanted}

    @property
    def says_which(self) -> bool:
        """Whether it names the modules that have factors."""
        return self.content.get("target_modules") not in (None, _ALL_LINEAR)

    def _keys(self, patterns: Collection[str], modules: Sequence[str]) -> dict[str, str]:
        """Of every module the first pattern that matches it or the end of its name; itself if none does."""
        found = self._matched(patterns, modules, at_the_end=True)
        return {module: next((key for key in patterns if module in found[key]), module) for module in modules}

    def _named(self, targets: object, modules: Sequence[str]) -> set[str]:
        if isinstance(targets, str):
            return set(self._matched([targets], modules)[targets]) if targets else set()
        names = targets if isinstance(targets, list) else []
        return {module for module in modules if any(module == name or module.endswith(f".{name}") for name in names)}

    def _layers_of(self, modules: Sequence[str]) -> dict[str, int]:
        patterns = self.content.get("layers_pattern") or []
        named = [patterns] if isinstance(patterns, str) else patterns
        forms = [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\..*" for name in named] or [r".*?\.[^.]*\.(?P<idx>\d+)\..*"]
        found, numbers = self._matched(forms, modules), dict[str, int]()
        for form in forms:
            numbers = {module: int(text) for module, text in found[form].items() if text.isdecimal()} | numbers
        return numbers

    def _matched(
        self, expressions: Collection[str], modules: Sequence[str], *, at_the_end: bool = False
    ) -> Mapping[str, Mapping[str, str]]:
        try:
            return matched(expressions, modules, at_the_end=at_the_end)
        except EndlessError as error:
            what = f"takes too long to match with the names of modules: {', '.join(map(shown, expressions))}"
            raise CheckpointError(Problem(self.where, what, "write the names out")) from error


def _problems(content: Mapping[str, Any], where: str) -> Iterator[Problem]:
    kind = content.get("peft_type")
    if kind != "LORA":
        what = f"is an adapter of type {shown(kind)}, and only plain LoRA and rsLoRA can be merged"
        yield Problem(where, what, LEAVE if kind in _NO_CHANGE_TYPES else MERGE)
        return  # other types have fields of their own
    for field, variant in _VARIANTS.items():
        if content.get(field):
            fix = LEAVE if field in _NO_CHANGES else MERGE
            yield Problem(where, f"{field} is {shown(content[field])}: {variant}, cannot be merged", fix)
    start = content.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        what = f"init_lora_weights is {shown(start)}: its factors hold a part of the base"
        yield Problem(where, what, "save it with path_initial_model_for_weight_conversion, which makes it plain LoRA")
    for field in content.keys() - _OF_TRAINING - _VARIANTS.keys():
        if content[field]:
            what = f"has the unknown setting {field} = {shown(content[field])}, which may change what the factors mean"
            yield Problem(where, what, MERGE)
    yield from _number_problems(content, where)
    yield from _pattern_problems(content, where)


def _number_problems(content: Mapping[str, Any], where: str) -> Iterator[Problem]:
    ranks = {"r": content.get("r"), **_table(content, "rank_pattern")}
    for key, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            named = key if key == "r" else f"rank_pattern {key}"
            yield Problem(where, f"{named} must be a whole number from 1, got {shown(rank)}")
    alphas = {"lora_alpha": content.get("lora_alpha", 8), **_table(content, "alpha_pattern")}
    for key, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            named = key if key == "lora_alpha" else f"alpha_pattern {key}"
            yield Problem(where, f"{named} must be a finite number, got {shown(alpha)}")


def _table(content: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = content.get(field)
    return value if isinstance(value, dict) else {}


def _pattern_problems(content: Mapping[str, Any], where: str) -> Iterator[Problem]:
    for field in ("rank_pattern", "alpha_pattern"):
        if content.get(field) and not isinstance(content[field], dict):
            yield Problem(where, f"{field} must be an object, got {shown(content[field])}")
    expressions: list[tuple[str, str]] = [
        (field, key) for field in ("rank_pattern", "alpha_pattern") for key in _table(content, field)
    ]
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        value = content.get(field)
        names = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(name, str) for name in names):
            yield Problem(where, f"{field} must be a text or a list of texts, got {shown(value)}")
        elif value is not None and (isinstance(value, str) or field == "layers_pattern"):
            expressions += [(field, str(name)) for name in names if name != _ALL_LINEAR]
    for field, expression in expressions:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            yield Problem(where, f"{field}: {shown(expression)} is no regular expression: {error}")
    layers = content.get("layers_to_transform")
    if layers is not None and not all(type(x) is int for x in (layers if isinstance(layers, list) else [layers])):
        yield Problem(where, f"layers_to_transform must be whole numbers, got {shown(layers)}")
