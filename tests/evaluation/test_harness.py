"""The harness's tasks and requests, for stand-ins whose answers are known; the scores are test_scoring's."""

import json
import math
import socket
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from moe_erc import evaluation, sharding
from moe_erc.data.tokenizer import ByteTokenizer
from moe_erc.diagnosis.report import write_report
from moe_erc.evaluation import generate, harness
from moe_erc.evaluation.tasks import PAPER, TaskScores, load_tasks, print_tasks, task_metrics
from moe_erc.model.transformer import Output
from moe_erc.training.state import Weights
from tests import script, tolerance
from tests.tolerance import assert_close

DIRECTORY = "tests/evaluation/tasks"
ALPHABET = ("alphabet_choice", "alphabet_cloze", "alphabet_text", "alphabet_writing")
NO_WEIGHTS = Weights({}, {})


class StandIn:
    """Stands in for a Transformer: the token that it expects has probability 1/2, any other 1/512."""

    def __init__(self, expect):
        self.mesh, self._expect = sharding.make_mesh(1, 1), expect

    def apply(self, variables, tokens_BT, mask_BT, router, context):
        expected_BT = self._expect(tokens_BT, context.positions_BT)
        return Output(math.log(256) * jax.nn.one_hot(expected_BT, 257), jnp.eye(257), None, {})


def next_letter(tokens_BT, positions_BT):
    return (tokens_BT + 1) % 257


def number_read(tokens_BT, positions_BT):
    """How many tokens there are so far: tells from how much context a token was predicted."""
    return 1 + positions_BT


def language_model(expect, shape_BT=(4, 16)):
    return harness.LanguageModel(StandIn(expect), NO_WEIGHTS, ByteTokenizer(), shape_BT)


def ask(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


def bits(scores):
    return [-score / math.log(2) for score in scores]


class Sampling(NamedTuple):
    new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple = ()


class AlphabetGenerator:
    """Stands in for the generator, as the alphabet goes on; keeps what it was asked."""

    asked: list  # of a test

    def __init__(self, model, tokenizer):
        pass

    def run(self, weights, prompts, sampling):
        self.asked.append((list(prompts), sampling))
        texts = ["".join(chr(ord(prompt[-1]) + step + 1) for step in range(sampling.new_tokens)) for prompt in prompts]
        return [min((text.split(stop)[0] for stop in sampling.stop), key=len) for text in texts]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, no index of the harness's own tasks; data sets are prepared in a directory of the test."""
    import datasets

    def connect(self, address, original=socket.socket.connect):
        assert self.family == socket.AF_UNIX, f"a connection to {address} was tried"
        original(self, address)

    indexed = []

    def manager(include_path, include_defaults=True, original=harness.TaskManager):
        indexed.append(include_defaults)
        return original(include_path=include_path, include_defaults=False)

    monkeypatch.chdir(script.ROOT)  # the files of data are named from there
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(harness, "TaskManager", manager)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(generate, "Generator", AlphabetGenerator, raising=False)
    monkeypatch.setattr(generate, "Sampling", Sampling, raising=False)
    AlphabetGenerator.asked = []
    return types.SimpleNamespace(indexed=indexed)


def reached(names, limit=0, **options):
    tasks = load_tasks(names, DIRECTORY, **options)
    return TaskScores(tasks, limit, StandIn(next_letter), ByteTokenizer(), (4, 16)).answer(NO_WEIGHTS)


def test_strings_become_the_tokens_that_are_scored():
    pairs = [("ab", "cd"), ("ab", " c"), ("b ", "c"), ("", "a"), ("ab", "cx")]
    found = language_model(next_letter).loglikelihood([ask("loglikelihood", *pair) for pair in pairs])
    # the space goes with what follows it, and the end of text precedes what follows nothing: neither is expected
    assert_close(np.float32(bits(score for score, _ in found)), [2, 18, 18, 9, 10], terms=16)
    assert [greedy for _, greedy in found] == [True, False, False, False, False]


def test_a_rolling_score_counts_every_token_once_with_all_the_context_that_fits():
    # Rows of 16: from the end of text 1 to 16, from the sixteenth again 1 to 16, and four more after twelve of context.
    texts = ["".join(map(chr, [*range(1, 17), *range(1, 17), *range(13, 17)])), "\1\2", "\2\2", ""]
    found = language_model(number_read).loglikelihood_rolling([ask("loglikelihood_rolling", text) for text in texts])
    assert_close(np.float32(bits(found)), [36, 2, 10, 0], terms=36)


def test_every_kind_of_task_by_hand(alone, capsys, tmp_path):
    found = reached(ALPHABET)
    metrics = task_metrics(found)
    # bits of an answer: 1 for a byte that is next, 9 for another. After tuv: v 9, wxyy 1 + 1 + 1 + 9 = 12, wz 1 + 9;
    # so v is chosen, and by length, 12 / 4 = 3 against 9 and 5, wxyy
    assert metrics["tasks/alphabet_choice/acc"] == pytest.approx(1 / 3)
    assert metrics["tasks/alphabet_choice/acc_norm"] == pytest.approx(2 / 3)
    # cdef after ab 4 bits, op after mn 2, sa after qr 1 + 9, which is not what it would have written
    assert metrics["tasks/alphabet_cloze/acc"] == pytest.approx(2 / 3)
    assert metrics["tasks/alphabet_cloze/perplexity"] == pytest.approx(2 ** (16 / 3), rel=tolerance.within(64))
    # Sums of 32 logarithms in float32; a power of two multiplies their error by its exponent.
    # a after the end of text 9 bits, 25 letters 1 each, in two windows; x 9, y z 2, a 9, b c 2: 56 in 32 bytes
    assert metrics["tasks/alphabet_text/bits_per_byte"] == pytest.approx(56 / 32, rel=tolerance.within(32))
    assert metrics["tasks/alphabet_text/byte_perplexity"] == pytest.approx(2 ** (56 / 32), rel=tolerance.within(64))
    assert metrics["tasks/alphabet_text/word_perplexity"] == pytest.approx(2**28, rel=tolerance.within(32 * 28))
    # cdefgh after ab; ij after gh, cut before k; opqrst after mn is wrong; tuvwxy after rs
    assert metrics["tasks/alphabet_writing/exact_match"] == pytest.approx(3 / 4)
    assert len(metrics) == 8 and alone.indexed == [False]
    print_tasks(found)
    printed = capsys.readouterr().out
    assert all(words in printed for words in (*ALPHABET, "acc_norm", "0.6667", "n-shot"))
    write_report(epath.Path(tmp_path) / "tasks.json", found)
    written = (tmp_path / "tasks.json").read_text()
    assert json.loads(written)["results"]["alphabet_writing"]["exact_match,none"] == 0.75
    assert str(script.ROOT) not in written and ".jsonl" not in written


def test_the_harness_itself_reaches_the_same(monkeypatch):
    from lm_eval import simple_evaluate

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda found: None)  # it asks the system for many seconds
    options = {"task_manager": harness.TaskManager(DIRECTORY), "bootstrap_iters": 10, "torch_random_seed": None}
    found = simple_evaluate(model=language_model(next_letter), tasks=list(ALPHABET), **options)
    assert task_metrics(found) == task_metrics(reached(ALPHABET))


def test_examples_limits_and_settings_reach_the_model():
    metrics = task_metrics(reached(["alphabet_writing"], limit=2, num_fewshot=1))
    assert metrics == {"tasks/alphabet_writing/exact_match": 1.0}
    ((prompts, sampling),) = AlphabetGenerator.asked
    assert sampling == Sampling(new_tokens=6, stop=("k", ";"))
    assert len(prompts) == 2 and all(prompt[-3] == ";" for prompt in prompts)
    tasks = load_tasks(["alphabet_writing"], DIRECTORY, num_fewshot=1)
    scores = TaskScores(tasks, 0, StandIn(next_letter), ByteTokenizer(), (4, 16))
    for _ in range(2):
        scores.run(NO_WEIGHTS)
    first, again = AlphabetGenerator.asked[1:]
    assert first == again  # at every evaluation the same examples


def test_prompts_are_grouped_by_settings_cut_and_drawn_apart():
    small = language_model(next_letter, (2, 16))
    warm = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_gen_toks": 4, "until": []}
    asked = [("ab", {"until": ["z"]}), ("c" * 20, warm), ("a", warm), ("f", warm)]
    AlphabetGenerator.run, run = lambda self, weights, prompts, sampling: (
        self.asked.append((list(prompts), sampling)) or [prompt[-1] for prompt in prompts]
    ), AlphabetGenerator.run  # fmt: skip
    try:
        found = small.generate_until([ask("generate_until", *arguments) for arguments in asked])
    finally:
        AlphabetGenerator.run = run
    assert found == ["b", "c", "a", "f"]
    drawn = Sampling(4, 0.5, 0, 0.9)
    assert AlphabetGenerator.asked == [
        (["ab"], Sampling(8, stop=("z",))),
        (["c" * 12, "a"], drawn),
        (["f"], drawn._replace(seed=2)),
    ]
    with pytest.raises(ValueError, match="16 new tokens leave no room for a prompt in 16"):
        small.generate_until([ask("generate_until", "a", {"max_gen_toks": 16})])


def test_an_unknown_task_is_refused_with_the_nearest(alone):
    with pytest.raises(ValueError, match="no 'alphabet_choise'; the nearest are alphabet_choice"):
        load_tasks(["alphabet_cloze", "alphabet_choise"], DIRECTORY)
    assert alone.indexed == [False, True]
    with pytest.raises(ValueError, match="task_dir: no such directory '/no/tasks'"):
        load_tasks(["alphabet_choice"], "/no/tasks")
    with pytest.raises(ValueError, match=f"no '{PAPER['paper_3b'][0]}'"):  # the name stands for the tasks
        load_tasks(["paper_3b"], DIRECTORY)


@pytest.mark.parametrize("name, length, line", [
    ("alphabet_choice", 3, "a continuation of 4 tokens cannot be scored, 1 to 3 can; leave it out"),
    ("alphabet_cloze", 3, "a continuation of 4 tokens cannot be scored, 1 to 3 can; leave it out"),
    ("alphabet_writing", 6, "6 new tokens leave no room for a prompt in 6; leave it out"),
])  # fmt: skip
def test_what_rows_cannot_hold_is_refused_before_the_model_is_asked(name, length, line):
    stand_in = StandIn(lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match=f"tasks: {name}: {line}"):
        TaskScores(load_tasks([name], DIRECTORY), 0, stand_in, ByteTokenizer(), (4, length))
    TaskScores(load_tasks([name], DIRECTORY), 0, stand_in, ByteTokenizer(), (4, length + 1))


def test_what_windows_always_hold_is_not_refused():
    TaskScores(load_tasks(["alphabet_text"], DIRECTORY), 0, StandIn(next_letter), ByteTokenizer(), (4, 2))


def test_a_missing_harness_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.delattr(evaluation, "harness")
    monkeypatch.delitem(sys.modules, "moe_erc.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[eval\]"'):
        load_tasks(["alphabet_choice"], DIRECTORY)


def test_no_task_is_no_work():
    scores = TaskScores(load_tasks(()), 0, None, None, None)
    assert scores.run(None) == {} and task_metrics({}) == {}


# --------------------------------------------------------------------------------------------------------- in training
@pytest.mark.slow
def test_training_writes_what_is_reached_beside_the_validation(text_directory, tmp_path):
    arguments = [
        "--config=configs/erc.py:debug",
        f"--config.data.sources=('{text_directory}',)",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.data.validation_fraction=0.1",
        "--config.train.steps=3",
        "--config.eval.prompt=",
        "--config.eval.tasks=('alphabet_choice','alphabet_text')",
        f"--config.eval.task_dir={DIRECTORY}",
        "--config.log.tensorboard=False",
        f"--workdir={tmp_path / 'run'}",
    ]
    environment = {"HF_HOME": tmp_path / "hf", "HF_HUB_OFFLINE": 1}
    code, printed = script.run("train.py", arguments, tmp_path / "out", environment=environment)
    assert code == 0, printed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [line for line in lines if "validation/mean" in line]
    found = {name: value for name, value in evaluation.items() if name.startswith("tasks/")}
    assert {name.split("/")[1] for name in found} == {"alphabet_choice", "alphabet_text"}
    # a byte is a token of about log2(512) bits: little is learned in three steps
    assert found["tasks/alphabet_text/bits_per_byte"] == pytest.approx(9, abs=0.5)
