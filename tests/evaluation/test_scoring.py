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
from moe_erc.evaluation.scoring import ENDS, Scorer, choose_lengths, gather_rows
from moe_erc.model.transformer import Transformer
from moe_erc.training.state import init_weights
from tests import script

LIMIT, VOCABULARY = 32, 512


@functools.cache
def weights(config):
    """On the host, for any mesh."""
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
        output = model.apply({"params": weights.params}, ids_1T, jnp.ones_like(ids_1T, bool), weights.router)
        return output.x_BTD[0] @ output.head_VD.T

    return logits_TV


def logits_after(config, ids):
    """(len(ids), V); the row is filled up, the model being causal."""
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
    """Of all lengths, with shared contexts, more answers than share a row, and what the model would write itself."""
    rng = np.random.default_rng(0)

    def draw(count):
        return rng.integers(0, VOCABULARY, count).tolist()

    pairs = [(draw(context), draw(count)) for context, count in ((1, 1), (3, 2), (9, 16), (8, 17), (1, 32), (30, 3))]
    shared, start, written = draw(12), draw(5), []
    pairs += [(shared, [answer]) for answer in range(ENDS + 3)]
    pairs += [(shared, [7, 8, answer]) for answer in range(3)] + [([*shared, 7], [8, 0]), ([*shared, 7, 8], [0])]
    for _ in range(3):
        written.append(int(logits_after(config, [*start, *written])[-1].argmax()))
    return [*pairs, (start, written), (start, written[:1]), (start, [*written[:2], written[2] ^ 1])]


def assert_scores(config, requests, found):
    expected = [direct(config, *request) for request in requests]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-5, atol=1e-5)
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


# A process has one of the two devices, and an eighth row of a batch of seven is idle.
IN_TWO_PROCESSES = """
    import functools, json
    import jax
    from configs import base
    from moe_erc import processes, sharding
    from moe_erc.evaluation.scoring import Scorer
    from moe_erc.model.config import ModelConfig
    from moe_erc.model.transformer import Transformer
    from moe_erc.training.state import init_weights

    processes.initialize()
    config = ModelConfig(**base.get_config("debug").model.to_dict() | {"init_std": 0.3})
    model = Transformer(config, sharding.make_mesh(1, 2))
    everywhere = sharding.replicate(model.mesh)
    weights = jax.jit(functools.partial(init_weights, model), out_shardings=everywhere)(jax.random.key(0))
    print(json.dumps(Scorer(model, (7, 16)).run(weights, json.load(open(REQUESTS)))))
"""


def test_two_processes_tell_both_the_same(config, tmp_path):
    requests = [request for request in make_requests(config) if len(request[0] + request[1]) <= 17]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    program = textwrap.dedent(IN_TWO_PROCESSES).replace("REQUESTS", repr(str(tmp_path / "requests.json")))
    (tmp_path / "program.py").write_text(program)
    members = script.start_many(2, tmp_path / "program.py", [], tmp_path, JAX_NUM_CPU_DEVICES=1)
    assert script.join(members, 240) == [0, 0], "".join(path.read_text() for path in tmp_path.glob("out?"))
    for number in range(2):
        assert_scores(config, requests, json.loads((tmp_path / f"out{number}").read_text().splitlines()[-1]))


def test_too_long_a_context_loses_its_beginning(config, caplog):
    context, continuation = list(range(100)), [5, 6, 7]
    with caplog.at_level(logging.WARNING):
        requests = [(context, continuation), (context[:20], continuation), (context[:30], continuation)]
        found = scorer(config, (1, 1)).run(weights(config), requests)
    assert_scores(config, [(context[-30:], continuation), *requests[1:]], found)  # 30 + 3 less the last are 32
    assert [record.getMessage()[:7] for record in caplog.records] == ["1 of 3 "]


@pytest.mark.parametrize("count", [0, LIMIT + 1])
def test_a_continuation_that_no_row_can_hold_is_refused(count):
    with pytest.raises(ValueError, match=rf"continuation of {count} tokens .* 1 to {LIMIT} can"):
        gather_rows([([1], [2]), ([1], [2] * count)], LIMIT)


def test_requests_that_differ_in_their_last_token_share_a_row():
    rows = gather_rows([([1, 2], [3]), ([1, 2], [4]), ([1], [2, 3]), ([1], [2, 5]), ([9, 8, 7], [6, 5])], LIMIT)
    # read are 1 2 four times and 9 8 7 6; two are scored from the second time step on, two from the first
    assert [(row.tokens_T.tolist(), row.first, row.ends, row.requests) for row in rows] == [
        ([9, 8, 7, 6], 2, [5], [4]), ([1, 2], 1, [3, 4], [0, 1]), ([1, 2], 0, [3, 5], [2, 3]),
    ]  # fmt: skip
    many = gather_rows([([1, 2], [3])] * (ENDS + 1), LIMIT)
    assert [len(row.ends) for row in many] == [ENDS, 1]


def test_lengths_are_those_that_pad_the_least():
    # powers 16, 32, 32, 128, 1024; what two of them cost beside 1024: 16 and 32 16 + 2 * 32 + 2 * 1024, 16 and 128
    # 16 + 3 * 128 + 1024 = 1424, 32 and 128 3 * 32 + 128 + 1024 = 1248
    assert choose_lengths([5, 20, 30, 100, 1000], 4096) == (32, 128, 1024)
    assert choose_lengths([5, 20, 30, 100, 1000], 1000) == (32, 128, 1000)
    assert choose_lengths([3], 4096) == (16,)
    assert choose_lengths([], 4096) == (4096,)
