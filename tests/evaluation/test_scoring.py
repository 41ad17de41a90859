"""Scores of continuations against the model's own log-probabilities, on two meshes."""

import functools
import json
import logging
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_erc import sharding
from moe_erc.evaluation.scoring import (
    OPEN,
    SHORTEST,
    Scorer,
    Tree,
    fill_rows,
    grow,
    row_length,
    split,
)
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import init_weights
from tests import script
from tests.tolerance import assert_close

LIMIT, VOCABULARY = 32, 512


@functools.cache
def weights(config):
    """Weights on the host, for any mesh."""
    model = Transformer(config, sharding.make_mesh(1, 1))
    return jax.device_get(jax.jit(functools.partial(init_weights, model))(jax.random.key(0)))


@functools.cache
def scorer(config, mesh_shape):
    return Scorer(Transformer(config, sharding.make_mesh(*mesh_shape)), (6, LIMIT))


@functools.cache
def jitted_logits(config):
    model = Transformer(config, sharding.make_mesh(1, 1))

    @jax.jit
    def logits_TV(weights, ids_1T):
        output = model.apply(
            {"params": weights.params}, ids_1T, jnp.ones_like(ids_1T, bool), weights.router
        )
        return output.x_BTD[0] @ output.head_VD.T

    return logits_TV


def logits_after(config, ids):
    """Logits (len(ids), V). The row may be padded, since the model is causal."""
    filled_1T = np.zeros((1, LIMIT), np.int32)
    filled_1T[0, : len(ids)] = ids
    return np.asarray(jitted_logits(config)(weights(config), filled_1T), np.float64)[: len(ids)]


def direct(config, context, continuation):
    """(log-probability, greedy) by the definition."""
    logits_NV = logits_after(config, [*context, *continuation][:-1])[len(context) - 1 :]
    chosen_N = logits_NV[np.arange(len(continuation)), continuation]
    total = (chosen_N - np.log(np.exp(logits_NV).sum(axis=1))).sum()
    return total, bool((logits_NV.argmax(axis=1) == continuation).all())


def make_requests(config):
    """Requests of all lengths.

    Some share a context, some have more answers than fit a row, and some ask for what the model
    itself would write.
    """
    rng = np.random.default_rng(0)

    def draw(count):
        return rng.integers(0, VOCABULARY, count).tolist()

    pairs = [
        (draw(context), draw(count))
        for context, count in ((1, 1), (3, 2), (9, 16), (8, 17), (1, 32), (30, 3))
    ]
    shared, start, written = draw(12), draw(5), []
    pairs += [(shared, [answer]) for answer in range(LIMIT + 3)]
    pairs += [(shared, [7, 8, answer]) for answer in range(3)] + [
        ([*shared, 7], [8, 0]),
        ([*shared, 7, 8], [0]),
    ]
    for _ in range(3):
        written.append(int(logits_after(config, [*start, *written])[-1].argmax()))
    return [*pairs, (start, written), (start, written[:1]), (start, [*written[:2], written[2] ^ 1])]


def assert_scores(config, requests, found):
    expected = [direct(config, *request) for request in requests]
    # Roundings: two layers with five sums over widths of at most 32 each, the head, and sums of at
    # most 32 log-probabilities.
    scores, right = (np.float32([score for score, _ in each]) for each in (found, expected))
    assert_close(scores, right, terms=2 * 5 * 32 + 64)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.fixture
def config(model_config):
    return model_config(init_std=0.3)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
def test_scores_are_sums_of_the_models_log_probabilities(mesh_shape, config):
    requests = make_requests(config)
    found = scorer(config, mesh_shape).run(weights(config), requests)
    assert_scores(config, requests, found)
    assert [greedy for _, greedy in found[-3:]] == [True, True, False]


def test_order_and_company_do_not_matter(config):
    requests, score = make_requests(config), scorer(config, (1, 1))
    shuffled = [requests[number] for number in np.random.default_rng(1).permutation(len(requests))]
    assert_scores(config, shuffled, score.run(weights(config), shuffled))
    for request in (requests[0], requests[3], requests[5]):
        assert_scores(config, [request], score.run(weights(config), [request]))
    assert score.run(weights(config), []) == []


# Each process has one of the two devices. The eighth row of a batch of seven is idle.
IN_TWO_PROCESSES = """
    import functools, json
    import jax
    from configs import base
    from moe_erc import sharding
    from moe_erc.launch import processes
    from moe_erc.evaluation.scoring import Scorer
    from moe_erc.model.config import ModelConfig
    from moe_erc.model.transformer import Transformer
    from moe_erc.training.state import init_weights

    processes.initialize()
    config = base.get_config("debug")
    config.model.init_std = 0.3
    model = Transformer(ModelConfig.of(config), sharding.make_mesh(1, 2))
    everywhere = sharding.replicate(model.mesh)
    draw_weights = jax.jit(functools.partial(init_weights, model), out_shardings=everywhere)
    weights = draw_weights(jax.random.key(0))
    print(json.dumps(Scorer(model, (7, 16)).run(weights, json.load(open(REQUESTS)))))
"""


def test_two_processes_tell_both_the_same(config, tmp_path):
    requests = [request for request in make_requests(config) if len(request[0] + request[1]) <= 17]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    program = textwrap.dedent(IN_TWO_PROCESSES).replace(
        "REQUESTS", repr(str(tmp_path / "requests.json"))
    )
    (tmp_path / "program.py").write_text(program)
    members = script.start_many(2, tmp_path / "program.py", [], tmp_path, JAX_NUM_CPU_DEVICES=1)
    assert script.join(members, 240) == [0, 0], "".join(
        path.read_text() for path in tmp_path.glob("out?")
    )
    for number in range(2):
        assert_scores(
            config, requests, json.loads((tmp_path / f"out{number}").read_text().splitlines()[-1])
        )


def test_too_long_a_context_loses_its_beginning(config, caplog):
    context, continuation = list(range(100)), [5, 6, 7]
    with caplog.at_level(logging.WARNING):
        requests = [
            (context, continuation),
            (context[:20], continuation),
            (context[:30], continuation),
        ]
        found = scorer(config, (1, 1)).run(weights(config), requests)
    # 30 + 3 tokens without the last are 32.
    assert_scores(config, [(context[-30:], continuation), *requests[1:]], found)
    assert [record.getMessage()[:7] for record in caplog.records] == ["1 of 3 "]


@pytest.mark.parametrize("count", [0, LIMIT + 1])
def test_a_continuation_that_no_row_can_hold_is_refused(count):
    with pytest.raises(ValueError, match=rf"continuation of {count} tokens .* 1 to {LIMIT} can"):
        grow([([1], [2]), ([1], [2] * count)], LIMIT)


def test_a_request_without_a_context_is_refused():
    with pytest.raises(ValueError, match="without a context"):
        grow([([], [2])], LIMIT)


def test_continuations_of_one_context_share_a_tree():
    trees = grow([([1, 2], [3]), ([1], [2, 3]), ([1, 2], [4, 5, 6]), ([9, 8, 7], [6, 5])], 4)
    # Two tokens of context fit beside 4 5 6. The context 9 8 7 and the first token 6 are four.
    assert trees == [
        Tree((1, 2), [[3], [4, 5, 6]], [0, 2]),
        Tree((1,), [[2, 3]], [1]),
        Tree((9, 8, 7), [[6, 5]], [3]),
    ]
    assert [(tree.read, tree.scored) for tree in trees] == [(4, 4), (2, 2), (4, 2)]


def test_a_tree_that_is_too_large_becomes_several_of_its_context():
    # Read are 1 2, then 3 3 and 4 4: six. With 5 5 they would be eight. Scored are 3 + 3, and 3.
    parts = split(Tree((1, 2), [[3] * 3, [4] * 3, [5] * 3], [7, 8, 9]), 7)
    assert [(part.context, part.requests) for part in parts] == [((1, 2), [7, 8]), ((1, 2), [9])]
    # Only two tokens are read, but at most four are scored.
    single = split(Tree((1, 2), [[3]] * 6, list(range(6))), 4)
    assert [part.requests for part in single] == [[0, 1, 2, 3], [4, 5]]


def test_rows_are_filled_by_the_largest_first():
    trees = [Tree((1,) * size, [[2]], [size]) for size in (3, 9, 5, 7, 2, 1)]
    # Rows of 10 hold trees of 9 and 1, 7 and 3, 5 and 2 tokens.
    assert [[len(tree.context) for tree in row] for row in fill_rows(trees, 10)] == [
        [9, 1],
        [7, 3],
        [5, 2],
    ]
    many = fill_rows([Tree((1,) * 10, [[2]], [0])] * OPEN + [Tree((1,) * 5, [[2]], [0])], 15)
    assert len(many) == OPEN and len(many[0]) == 2


def test_rows_are_as_long_as_the_longest_path():
    assert row_length(grow([([1] * 60, [2] * 5)], 4096), 4096) == 64
    # 65 tokens are read.
    assert row_length(grow([([1] * 60, [2] * 5), ([1] * 60, [2] * 6)], 4096), 4096) == 128
    assert row_length(grow([([1] * 60, [2] * 6)], 100), 100) == 100
    assert row_length([], 4096) == SHORTEST
