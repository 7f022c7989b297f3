"""Tasks answered with text: prompts, batches, answers and scores against loops over one text at a time."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import text_models as build
from scipy.stats import rankdata
from tokenizers import Tokenizer

from nufilt_jax.errors import CheckpointError, ConfigError, NufiltError
from nufilt_jax.evaluation.t5 import tasks as t5_tasks
from nufilt_jax.evaluation.t5.batches import bucketed_batches, mixed_batches
from nufilt_jax.evaluation.t5.spec import TextSpec
from nufilt_jax.evaluation.t5.tasks import generated, open_text_task, spearman
from nufilt_jax.evaluation.tokenizer import open_tokenizer
from nufilt_jax.models import parse_t5_config, t5_generate

PROMPT = "is {first} and {second}?"
YES_NO = build.params(7, ["▁yes", "▁no", "</s>"])
NUMBERS = build.params(9, [*"12345.", "</s>"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build.write_model(tmp_path_factory.mktemp("text") / "model", YES_NO)


def prompts(n, seed=0):
    """Columns of examples, and the prompts that they should give."""
    first, second = build.sentences(n, 2 * seed), build.sentences(n, 2 * seed + 1)
    texts = ["is " + a + " and " + b + "?" for a, b in zip(first, second, strict=True)]
    return {"first": first, "second": second}, texts


def one_by_one(params, model, texts, config=build.CONFIG):
    """The model's answers, each text alone."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        row = jnp.asarray([ids + [0] * (64 - len(ids))])  # one shape: compiled once
        [tokens] = t5_generate(params, row, row != 0, config, max_new_tokens=9)
        pieces = [build.PIECES[token] for token in tokens.tolist() if build.PIECES[token] not in build.SPECIAL]
        found.append("".join(pieces).replace("▁", " ").strip())
    return found


def opened(model, spec, **options):
    options = {"model_config": build.CONFIG, "tokenizer": functools.partial(open_tokenizer, model)} | options
    return open_text_task(spec, "mine", **options)


def yes_no_task(folder, model, answers, labels, columns, **options):
    build.write_data(folder, {**columns, "label": labels}, classes=["a", "b"])
    spec = TextSpec(dataset=str(folder), split="validation", prompt=PROMPT, answers=tuple(answers))
    return opened(model, spec, **options)


def yes_no_case(model, n=45):
    """Examples, the model's answers to them, and two of these as the answers that count."""
    columns, texts = prompts(n)
    given = one_by_one(YES_NO, model, texts)
    answers = sorted(set(given), key=given.count)[-2:]
    labels = np.random.default_rng(0).integers(0, 2, n).tolist()
    return columns, given, answers, labels


def test_share_of_right_answers(model, tmp_path):
    columns, given, answers, labels = yes_no_case(model)
    told = []
    task = yes_no_task(tmp_path / "data", model, answers, labels, columns)
    hits = [given[i] == answers[labels[i]] for i in range(45)]
    assert 5 < sum(hits) < 40
    assert task.score(YES_NO, on_batch=lambda *news: told.append(news)) == sum(hits) / 45
    assert (task.name, task.n_examples) == ("mine", 45)
    assert told[-1] == ("mine", 45, 45) and [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    other = build.params(5, ["▁yes", "▁no", "</s>"])
    assert task.score(other) != task.score(YES_NO) == sum(hits) / 45


@pytest.mark.parametrize("limit", [33, 45, 100])
def test_a_limit_takes_examples_from_all_over_the_split(model, tmp_path, limit):
    columns, given, answers, _ = yes_no_case(model)
    rows = [number * 45 // 33 for number in range(33)] if limit == 33 else range(45)
    right = [given[i] in answers and i in rows for i in range(45)]  # the others would be wrong
    labels = [answers.index(given[i]) if right[i] else given[i] == answers[0] for i in range(45)]
    task = yes_no_task(tmp_path / "data", model, answers, [int(label) for label in labels], columns, limit=limit)
    assert task.n_examples == len(rows)
    assert task.score(YES_NO) == sum(right) / len(rows) > 0.6


def test_rank_correlation_of_numbers(model, tmp_path):
    columns, texts = prompts(40, seed=1)
    given = one_by_one(NUMBERS, model, texts)
    labels = np.random.default_rng(1).uniform(0, 5, 40).astype(np.float32)
    build.write_data(tmp_path / "data", {**columns, "label": labels})
    spec = TextSpec(dataset=str(tmp_path / "data"), split="validation", prompt=PROMPT, number="{:.1f}")
    parsed = np.array([float(text) if text.replace(".", "", 1).isdigit() else 0.0 for text in given])
    assert 0 < (parsed == 0).sum() < 20 and len(set(parsed)) > 3  # some are unreadable, the others differ
    ranks = np.stack([rankdata(parsed), rankdata(np.round(labels.astype(float), 1))])
    assert opened(model, spec).score(NUMBERS) == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-12)


def test_rank_correlation_of_odd_texts():
    assert spearman(["0.0", "nan", "inf", "", "1e9"], ["0", "0", "0", "0", "3.2"]) == 1.0
    assert spearman(["3", "3.0"], ["1", "2"]) == 0.0  # nothing is ranked
    assert spearman(["1", "2"], ["2", "2"]) == 0.0
    assert spearman(["2", "1", "3"], ["1.0", "2.0", "0.0"]) == pytest.approx(-1.0)


def test_half_precision_is_close(model, monkeypatch):
    dtypes = []
    generate = t5_tasks.t5_tree_generate

    def watched(tree, *arrays, **options):
        dtypes.append(tree["shared"]["embedding"].dtype)
        return generate(tree, *arrays, **options)

    monkeypatch.setattr(t5_tasks, "t5_tree_generate", watched)
    short = [text for text in prompts(45)[1] if text.count(" ") < 25]  # one program
    tokens = open_tokenizer(model)(short, truncation=True, max_length=512)["input_ids"]
    config = parse_t5_config(build.CONFIG)
    exact, half = (
        np.concatenate([answer for _, answer in generated(YES_NO, tokens, config, dtype=dtype)])
        for dtype in ("float32", "bfloat16")
    )
    # The first token of nearly all; later ones go their own way where two were about as likely.
    assert len(exact) > 15 and (exact[:, 0] == half[:, 0]).mean() > 0.9
    assert dtypes == [jnp.float32, jnp.bfloat16]


def test_models_with_experts_see_batches_of_32_in_order(model, tmp_path, monkeypatch):
    """Their answers depend on the batch: padded to 512, what is left over alone."""
    seen = []

    def silent(tree, ids, mask, *, config, max_new_tokens):
        seen.append((ids.shape, mask.sum(axis=1).tolist()))
        return jnp.zeros((len(ids), max_new_tokens), jnp.int32)

    monkeypatch.setattr(t5_tasks, "t5_tree_generate", silent)
    columns, texts = prompts(45)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rng = np.random.default_rng(0)
    dense = "encoder.block.0.layer.1.DenseReluDense"
    experts = {f"{dense}.gate.weight": (1, 12), f"{dense}.gate.bias": (1,)}
    experts |= {f"{dense}.wi_0.experts.0.a": (2, 12), f"{dense}.wi_0.experts.0.b": (14, 2)}
    mixed = YES_NO | {name: rng.standard_normal(shape).astype(np.float32) for name, shape in experts.items()}
    task = yes_no_task(tmp_path / "data", model, ["yes", "no"], [0] * 45, columns)
    task.score(mixed)
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    assert seen == [((32, 512), lengths[:32]), ((13, 512), lengths[32:])]


def test_batches_hold_every_text_once():
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 99, size).tolist() for size in [*rng.integers(1, 300, 70), 32, 33, 64, 65, 512]]
    batches = list(bucketed_batches(texts, pad=7, multiple_of=6))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(75))
    assert {batch.ids.shape[1] for batch in batches} <= {32, 64, 128, 256, 512}
    assert len({batch.ids.shape for batch in batches}) <= 5
    for batch in batches:
        longest = max(len(texts[row]) for row in batch.rows)
        assert len(batch.ids) % 6 == 0 and batch.ids.shape == batch.mask.shape
        assert batch.ids.shape[1] == 32 or batch.ids.shape[1] < 2 * longest
        for index in range(len(batch.ids)):
            text = texts[batch.rows[index] if index < len(batch.rows) else batch.rows[0]]
            assert batch.ids[index].tolist() == text + [7] * (batch.ids.shape[1] - len(text))
            assert batch.mask[index].tolist() == [1] * len(text) + [0] * (batch.ids.shape[1] - len(text))
    assert [len(batch.rows) for batch in mixed_batches(texts, pad=7)] == [32, 32, 11]


def test_few_programs(model, tmp_path):
    columns, _, answers, labels = yes_no_case(model)
    task = yes_no_task(tmp_path / "data", model, answers, labels, columns)
    before = t5_tasks.t5_tree_generate._cache_size()
    task.score(YES_NO)
    n_programs = t5_tasks.t5_tree_generate._cache_size()
    assert n_programs - before <= 2  # 32 and 64 tokens
    task.score(build.params(8, ["▁yes", "</s>"]))
    assert t5_tasks.t5_tree_generate._cache_size() == n_programs


FAULTS = {
    "column": ({"prompt": "is {third} {first}?"}, "task mine: the data set has no column 'third'"),
    "label": ({"label": "class"}, "task mine: the data set has no column 'class'"),
    "text as label": ({"label": "second"}, "task mine: column 'second' holds string, not whole numbers"),
    "number of answers": ({"answers": ("a", "b", "c")}, "task mine: the data set has 2 classes, the task 3 answers"),
    "split": ({"split": "test"}, "there is no split 'test'"),
    "data set": ({"dataset": "/nowhere"}, "task mine: data set /nowhere: there is no such folder"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_data_that_does_not_fit(model, tmp_path, case):
    changes, expected = FAULTS[case]
    columns, _ = prompts(4)
    build.write_data(tmp_path / "data", {**columns, "label": [0, 1, 1, 0]}, classes=["a", "b"])
    spec = {"dataset": str(tmp_path / "data"), "split": "validation", "prompt": PROMPT, "answers": ("a", "b")}
    with pytest.raises(NufiltError) as caught:
        opened(model, TextSpec(**spec | changes))
    [problem] = caught.value.problems
    assert expected in str(problem)


def test_everything_wrong_is_said_at_once(model, tmp_path):
    model = tmp_path / "model"
    build.write_model(model, YES_NO)
    (model / "tokenizer.json").unlink()
    spec = TextSpec(dataset="/nowhere", split="test", prompt=PROMPT, answers=("a", "b"))
    with pytest.raises(NufiltError) as caught:
        opened(model, spec)
    assert [problem.where for problem in caught.value.problems] == [str(model), "task mine: data set /nowhere"]


def test_hidden_labels_are_refused(model, tmp_path):
    columns, _ = prompts(3)
    task = yes_no_task(tmp_path / "data", model, ["a", "b"], [0, -1, 1], columns)
    with pytest.raises(ConfigError, match="task mine: a label is -1, and there are 2 answers"):
        task.score(YES_NO)
    build.write_data(tmp_path / "numbers", {**columns, "label": [0.5, None, 1.0]})
    spec = TextSpec(dataset=str(tmp_path / "numbers"), split="validation", prompt=PROMPT, number="{:.1f}")
    with pytest.raises(ConfigError, match="task mine: a label is None"):
        opened(model, spec).score(YES_NO)


def test_an_empty_split_is_refused(model, tmp_path):
    with pytest.raises(NufiltError, match="task mine: the data set's split has no rows"):
        yes_no_task(tmp_path / "data", model, ["a", "b"], [], {"first": [], "second": []})


UNKNOWN_MODEL = '{"version": "1.0", "added_tokens": [], "model": {"type": "Oracle"}}'


@pytest.mark.parametrize("content", [None, "{", '{"a": 1}', "[]", UNKNOWN_MODEL])
def test_tokenizers_that_cannot_be_read(model, tmp_path, content):
    folder = tmp_path / "model"
    build.write_model(folder, YES_NO)
    path = folder / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match="has no tokenizer.json" if content is None else "cannot be read"):
        open_tokenizer(folder)


def test_models_that_cannot_answer(model, tmp_path):
    spec = TextSpec(dataset="/nowhere", split="test", prompt=PROMPT, answers=("a", "b"))
    for change, expected in (
        ({"decoder_start_token_id": None}, "decoder_start_token_id is None"),
        ({"vocab_size": 19}, f"has {len(build.PIECES)} tokens, the model 19"),
        ({"model_type": "clip"}, "model_type is 'clip'"),
    ):
        with pytest.raises(NufiltError, match=expected):
            opened(model, spec, model_config=build.CONFIG | change)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"prompt": "no column"}, "prompt"),
        ({"prompt": "{0}"}, "prompt"),
        ({"prompt": "{a.b}"}, "prompt"),
        ({"prompt": "{a"}, "prompt"),
        ({"answers": None}, "answers"),
        ({"number": "{:.1f}"}, "answers"),
        ({"answers": ("yes",)}, "answers"),
        ({"answers": ("yes", "yes")}, "answers"),
        ({"answers": None, "number": "one"}, "number"),
        ({"answers": None, "number": "{:d}"}, "number"),
        ({"answers": None, "number": "{x}"}, "number"),
        ({"answers": None, "number": "5"}, "number"),
    ],
)
def test_unusable_descriptions(changes, key):
    usual = {"dataset": "glue", "split": "test", "prompt": "{a} or {b}", "answers": ("yes", "no")}
    assert TextSpec(**usual).faults() == {}
    assert TextSpec(**usual).columns == ("a", "b")
    assert list(TextSpec(**usual | changes).faults()) == [key]
