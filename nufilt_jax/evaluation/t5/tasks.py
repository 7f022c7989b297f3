"""Tasks that a T5 answers with text: prompts in, greedy answers out, compared with the right ones."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Int

from nufilt_jax.config import ComputeType
from nufilt_jax.errors import CheckpointError, ConfigError, Problem, error_of, gathering, raise_all
from nufilt_jax.evaluation.data_sets import DataSet, open_data_set
from nufilt_jax.evaluation.ready import OnBatch, ReadyTask, evenly_spread
from nufilt_jax.evaluation.t5.batches import MAX_TOKENS, bucketed_batches, mixed_batches
from nufilt_jax.evaluation.t5.spec import TextSpec
from nufilt_jax.evaluation.tokenizer import Tokenizer
from nufilt_jax.models.experts import has_experts
from nufilt_jax.models.t5 import t5_tree_generate
from nufilt_jax.models.t5_config import T5Config, parse_t5_config
from nufilt_jax.models.t5_names import to_t5_tree

MAX_NEW_TOKENS = 9  # of an answer: with the start token the 10 that the authors' program allows


def open_text_task(
    spec: TextSpec,
    name: str,
    *,
    model_config: Mapping[str, Any],
    tokenizer: Callable[[], Tokenizer],
    limit: int | None = None,
    offline: bool = False,
    dtype: ComputeType = "float32",
) -> ReadyTask:
    """Finds a task's data set and checks what can be known without its examples.

    Args:
      spec: the task.
      name: key of its score.
      model_config: `config.json` of the models to come, or of their base.
      tokenizer: opens theirs.
      limit: at most so many examples, evenly spread over the split, for a quick look; None for all.
      offline: use what is on this machine and nothing else.
      dtype: in which the forward pass computes; norms, softmax and logits stay in float32.

    Raises:
      CheckpointError: the config is not of a T5 model.
      NufiltError: with all of this: the tokenizer cannot be had or is not the model's; the data set cannot be had or
        does not fit the task; a library is not installed.
    """
    config = parse_t5_config(model_config)
    problems: list[Problem] = []
    with gathering(problems):
        _check_model(config, len(tokenizer()))
    data = None
    with gathering(problems):
        data = _open_data(spec, f"task {name}", offline)
    if problems or data is None:
        raise error_of(problems)
    return _TextTask(spec, name, data, config, tokenizer(), evenly_spread(data.n_rows, limit), dtype)


def _check_model(config: T5Config, n_tokens: int) -> None:
    if config.decoder_start_token_id is None:
        fix = "state the token that every text starts with, T5's is 0"
        raise CheckpointError(Problem("config.json", "decoder_start_token_id is None, not a token id", fix))
    if n_tokens > config.vocab_size:
        what = f"has {n_tokens} tokens, the model {config.vocab_size}"
        raise CheckpointError(Problem("tokenizer.json", what, "use the tokenizer of the model"))


def _open_data(spec: TextSpec, where: str, offline: bool) -> DataSet:
    data = open_data_set(
        spec.dataset, split=spec.split, config=spec.config, revision=spec.revision, where=where, offline=offline
    )
    faults = _column_faults(spec, data.columns) + ([] if data.n_rows else ["the data set's split has no rows"])
    raise_all(ConfigError, (Problem(where, what, "see --tasks-file") for what in faults))
    return data


def _column_faults(spec: TextSpec, columns: Mapping[str, Any]) -> list[str]:
    """What the data set's columns have against the task."""
    found = [f"the data set has no column {name!r}" for name in (*spec.columns, spec.label) if name not in columns]
    if spec.label in columns:
        label = columns[spec.label]
        kind = str(getattr(label, "dtype", "nested"))
        if not kind.startswith(("int", "uint") if spec.number is None else ("int", "uint", "float")):
            found.append(f"column {spec.label!r} holds {kind}, not {'numbers' if spec.number else 'whole numbers'}")
        n_classes = getattr(label, "num_classes", None)
        if spec.answers is not None and n_classes not in (None, len(spec.answers)):
            found.append(f"the data set has {n_classes} classes, the task {len(spec.answers)} answers")
    return found


class _TextTask:
    """A task whose examples are read and tokenised at the first score, and kept."""

    def __init__(
        self,
        spec: TextSpec,
        name: str,
        data: DataSet,
        config: T5Config,
        tokenizer: Tokenizer,
        chosen: Sequence[int],
        dtype: ComputeType,
    ) -> None:
        self.name, self.n_examples, self._chosen = name, len(chosen), chosen
        self._spec, self._data, self._config, self._tokenizer = spec, data, config, tokenizer
        self._dtype: ComputeType = dtype

    def score(self, params: Mapping[str, ArrayLike], *, on_batch: OnBatch | None = None) -> float:
        """Share of right answers, or Spearman's rank correlation; see `ReadyTask`."""
        texts, right = self._examples
        answers, n_done = [""] * len(texts), 0
        for rows, tokens in generated(params, texts, self._config, dtype=self._dtype):
            for row, answer in zip(rows, self._tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                answers[row] = answer.strip()
            n_done += len(rows)
            if on_batch is not None:
                on_batch(self.name, n_done, len(texts))
        if self._spec.number is not None:
            return spearman(answers, right)
        return sum(map(str.__eq__, answers, right)) / len(right)

    @functools.cached_property
    def _examples(self) -> tuple[list[list[int]], list[str]]:
        """Tokens of the prompts, and the right answers."""
        spec, rows = self._spec, self._data.rows().select(self._chosen).to_list()
        right = [_right_answer(spec, row[spec.label], f"task {self.name}") for row in rows]
        prompts = [spec.prompt.format(**{column: row[column] for column in spec.columns}) for row in rows]
        return self._tokenizer(prompts, truncation=True, max_length=MAX_TOKENS)["input_ids"], right


def _right_answer(spec: TextSpec, label: Any, where: str) -> str:
    if label is not None and spec.number is not None:
        return spec.number.format(label)
    if label is None or spec.answers is None or not 0 <= label < len(spec.answers):
        known = f", and there are {len(spec.answers)} answers" if spec.answers else ""
        raise ConfigError(Problem(where, f"a label is {label}{known}", "take a split whose labels are known"))
    return spec.answers[label]


def generated(
    params: Mapping[str, ArrayLike], texts: Sequence[Sequence[int]], config: T5Config, *, dtype: ComputeType
) -> Iterator[tuple[tuple[int, ...], Int[np.ndarray, "b n"]]]:
    """Greedy answers, batch by batch: which texts, and the tokens. While one batch is awaited, the next is under way.

    Batches are split over this host's devices, but for models with experts, whose answers depend on the batch.
    """
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices), ("texts",))
    everywhere, split = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("texts")))
    pad = config.pad_token_id
    if has_experts(params):
        batches, sharding = mixed_batches(texts, pad=pad), everywhere
    else:
        batches, sharding = bucketed_batches(texts, pad=pad, multiple_of=len(devices)), split
    tree = jax.device_put(to_t5_tree(params, config, dtype=dtype), everywhere)
    generate = functools.partial(t5_tree_generate, config=config, max_new_tokens=MAX_NEW_TOKENS)
    started = ((batch.rows, generate(tree, *jax.device_put((batch.ids, batch.mask), sharding))) for batch in batches)
    for present, _ in itertools.pairwise(itertools.chain(started, [None])):
        assert present is not None  # for the type checker: only the last is
        rows, tokens = present
        yield rows, np.asarray(tokens)[: len(rows)]


def spearman(answers: Sequence[str], right: Sequence[str]) -> float:
    """Spearman's rho between the numbers in two lists of texts.

    A text that is no finite number counts as 0, as in the authors' program. Where a list has one number only, nothing
    is ranked, and rho is 0.

    >>> spearman(["1", "2.5", "well", "4"], ["1.0", "3.0", "0.0", "5.0"])
    1.0
    """
    from scipy.stats import spearmanr

    given, wanted = ([_number(text) for text in texts] for texts in (answers, right))
    if len(set(given)) < 2 or len(set(wanted)) < 2:
        return 0.0
    rho: Any = spearmanr(given, wanted)
    return float(rho.statistic)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
