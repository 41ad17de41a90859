"""Counts against the parameters that exist, against numbers worked by hand, and against the published models."""

import jax
import jax.numpy as jnp
import pytest

from configs import base
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer

TINY = {"layers": 1, "width": 8, "heads": 2, "kv_heads": 2, "experts": 4, "experts_per_token": 2, "expert_width": 6}
TINY |= {"vocab_size": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 1},
        {"tie_embeddings": True},
        {"experts": 8, "layers": 3},
        {"shared_experts": 2},
        {"router": "aoe", "gate_rank": 5},
        {"router": "routing_free", "gate_rank": 5},
        {"router": "xmoe"},
        {"router": "xmoe", "experts": 5, "experts_per_token": 1},
        {"router": "mpi"},
        {"router": "competition"},
    ],
    ids=str,
)
def test_parameters_are_counted_exactly(model_config, changes):
    config, tokens = model_config(**changes), jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens > 0, {})
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.parameters()


def test_counts_by_hand(model_config):
    # D 32, F 16, E 4, K 2, L 2, V 512, two heads of width 16 sharing one key/value head
    # embeddings 2 * 512 * 32 = 32768; layer: query and output 2 * 1024, key and value 2 * 512, their norms 32 + 16,
    # router 128, experts 4 * 1536, norms 64: 3120 + 128 + 6144 + 64 = 9456; final norm 32
    assert model_config().parameters() == 32_768 + 2 * 9_456 + 32
    assert model_config().active_parameters() == 51_712 - 2 * 2 * 1536
    # a token, T = 7: projections 3072, scores and values 2 * 32 * 4, router 128, experts 2 * 1536; head 512 * 32
    assert model_config().flops_per_token(7) == 2 * (2 * (3072 + 256 + 128 + 3072) + 16384)


def test_counts_of_each_router_by_hand(model_config):
    # D 8, F 6, E 4, K 2, V 16, one layer; T = 3
    # embeddings 2 * 16 * 8 = 256, attention 4 * 64 + 2 * 8 = 272, norms 2 * 8 + 8 = 24: 552 outside the MoE
    # an expert 3 * 8 * 6 = 144; of rank 3, 2 * 48 + 3 * (8 + 6) = 138
    # a token outside the MoE: 256 of projections, 2 * 8 * 2 of scores and values, head 128: 416
    outside, work = 552, 416
    expected = {  # parameters, those a token meets, multiply-adds a token
        # rows 4 * 8
        "softmax": (32 + 4 * 144, 32 + 2 * 144, 32 + 2 * 144),
        # the power step is of parameters alone
        "mpi": (32 + 4 * 144, 32 + 2 * 144, 32 + 2 * 144),
        # no rows; of an expert not chosen a token meets the first factor, 8 * 3, which is counted with the chosen
        "aoe": (4 * 138, 2 * (138 - 24) + 4 * 24, 4 * 24 + 2 * (3 * 6 + 2 * 48)),
        # one threshold an expert
        "routing_free": (4 * 138 + 4, 2 * (138 - 24) + 4 * 24 + 4, 4 * 24 + 2 * (3 * 6 + 2 * 48)),
        # projection 8 * 2, embeddings 4 * 2, temperature
        "xmoe": (25 + 4 * 144, 25 + 2 * 144, 16 + 8 + 2 * 144),
        # the layer competes on a quarter of the steps: all experts, besides
        "competition": (32 + 4 * 144, 32 + 2 * 144, 32 + 2 * 144 + 0.25 * 4 * 144),
    }
    for router, (parameters, active, multiplied) in expected.items():
        rank = 3 if router in ("aoe", "routing_free") else 0
        config = model_config(**TINY, router=router, gate_rank=rank, competition_rate=0.25)
        assert config.parameters() == outside + parameters, router
        assert config.active_parameters() == outside + active, router
        assert config.flops_per_token(3) == 2 * (work + multiplied), router
    # 2 always on, 144 each, and 1 of 4
    shared = model_config(**TINY | {"experts_per_token": 1}, shared_experts=2)
    assert shared.parameters() == outside + 32 + 6 * 144 and shared.active_parameters() == outside + 32 + 3 * 144
    assert shared.flops_per_token(3) == 2 * (work + 32 + 3 * 144)


def test_the_work_of_competition_counts_its_limit_of_layers(model_config):
    # 3 layers, each competing with 1/2, at most 1: a step without has 1/8, so 7/8 of a layer's 4 * 144 competes
    tiny = TINY | {"layers": 3, "router": "competition", "competition_rate": 0.5, "competition_layers": 1}
    more = model_config(**tiny).flops_per_token(3) - model_config(**tiny | {"router": "softmax"}).flops_per_token(3)
    assert more == pytest.approx(2 * 7 / 8 * 4 * 144)


@pytest.mark.parametrize(
    "size, total, active", [("olmoe_1b_7b", 6.92e9, 1.28e9), ("3b", 2.99e9, 0.61e9), ("15b", 14.97e9, 0.92e9)]
)
def test_published_sizes(size, total, active):
    config = ModelConfig(**base.get_config(size).model)
    # counts of integers, against what papers print with three digits and two
    assert config.parameters() == pytest.approx(total, rel=0.002)
    assert config.active_parameters() == pytest.approx(active, rel=0.01)


FREE = {"router": "routing_free", "gate_rank": 8}


@pytest.mark.parametrize("changes, words", [
    ({"experts_per_token": 5}, ["experts_per_token", "5", "4"]),
    ({"width": 33}, ["width", "33", "2"]),
    ({"width": 6, "heads": 2}, ["width", "3", "even"]),
    ({"kv_heads": 3, "heads": 2}, ["kv_heads", "2", "3"]),
    ({"layers": 0}, ["layers", "0"]),
    ({"dtype": "float16"}, ["dtype", "float16", "bfloat16"]),
    ({"remat": "all"}, ["remat", "all", "block"]),
    ({"experts_implementation": "fast"}, ["experts_implementation", "fast", "block_loop"]),
    ({"router": "sotfmax"}, ["router", "sotfmax", "softmax"]),
    ({"router_init": "uniform"}, ["router_init", "uniform", "orthogonal"]),
    ({"gate_rank": -1}, ["gate_rank", "-1"]),
    ({"shared_experts": -1}, ["shared_experts", "-1"]),
    ({"gate_rank": 8}, ["gate_rank", "8", "softmax", "set it to 0"]),
    ({"router": "aoe"}, ["gate_rank", "aoe", "10"]),  # 32 * 16 / 48, rounded down
    ({"router": "routing_free"}, ["gate_rank", "routing_free", "10"]),
    ({"top_p": 0.4, "bias_rate": 1e-3}, ["bias_rate", "0.001", "top_p", "0.4"]),
    (FREE | {"top_p": 0.4}, ["top_p", "0.4", "routing_free", "set it to 1"]),
    (FREE | {"bias_rate": 1e-3}, ["bias_rate", "0.001", "routing_free", "set it to 0"]),
    (FREE | {"renormalize": True}, ["renormalize", "routing_free", "set it to False"]),
    ({"router": "competition", "top_p": 0.4}, ["top_p", "0.4", "competition", "set it to 1"]),
    ({"router": "competition", "bias_rate": 1e-3}, ["bias_rate", "competition", "set it to 0"]),
    (FREE | {"router_init": "orthogonal"}, ["router_init", "orthogonal", "routing_free", "rows"]),
    ({"router": "xmoe", "router_init": "orthogonal"}, ["router_init", "orthogonal", "xmoe", "rows"]),
    *(({"router": "xmoe", "experts": few, "experts_per_token": 1}, [f"model.experts: {few}", "xmoe", "at least 4"])
      for few in (1, 2, 3)),
    ({"top_p": 0.0}, ["top_p", "0.0", "above 0"]),
    ({"top_p": 1.1}, ["top_p", "1.1", "at most 1"]),
    ({"bias_rate": -1e-3}, ["bias_rate", "-0.001", "at least 0"]),
    ({"bias_rate": float("nan")}, ["bias_rate", "nan", "at least 0"]),
    ({"mpi_scale": 0.0}, ["mpi_scale", "0.0", "positive"]),
    ({"competition_rate": 1.5}, ["competition_rate", "1.5", "0 to 1"]),
    ({"competition_layers": 0}, ["competition_layers", "0"]),
    ({"theta": 0.0}, ["theta", "0.0", "positive"]),
    ({"controller_rate": -0.1}, ["controller_rate", "-0.1", "at least 0"]),
    ({"clip_qkv": -8.0}, ["clip_qkv", "-8.0", "at least 0"]),
])  # fmt: skip
def test_a_model_that_cannot_be_built_is_refused(model_config, changes, words):
    with pytest.raises(ValueError) as refusal:
        model_config(**changes)
    assert all(word in str(refusal.value) for word in words)


def test_a_larger_vocabulary_than_the_models_is_refused(model_config):
    model_config().check_vocabulary(512)
    with pytest.raises(ValueError, match="513"):
        model_config().check_vocabulary(513)


def test_identity_ignores_how_the_model_is_computed(model_config):
    assert model_config(dtype="bfloat16", remat="block").identity() == model_config().identity()
    for changes in ({"renormalize": True}, {"router": "mpi"}, {"bias_rate": 1e-3}, {"shared_experts": 1}):
        assert model_config(**changes).identity() != model_config().identity()
