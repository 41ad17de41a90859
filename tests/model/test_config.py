"""Counts against the parameters that exist, against numbers by hand, and published models."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import base
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.moe.routers import ROUTERS

TINY = {
    "layers": 1,
    "width": 8,
    "heads": 2,
    "kv_heads": 2,
    "experts": 4,
    "experts_per_token": 2,
    "expert_width": 6,
}
TINY |= {"vocab_size": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 1},
        {"tie_embeddings": True},
        {"experts": 8, "layers": 3},
        {"shared_experts": 2},
        {"router": "aoe", "rank": 5},
        {"router": "routing_free", "rank": 5},
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
    # D 32, F 16, E 4, K 2, L 2, V 512; two heads of width 16 share one key/value head
    # embeddings 2 * 512 * 32 = 32768
    # layer: query and output 2 * 1024, key and value 2 * 512, their norms 32 + 16,
    #        router 128, experts 4 * 1536, norms 64: 3120 + 128 + 6144 + 64 = 9456
    # final norm 32
    assert model_config().parameters() == 32_768 + 2 * 9_456 + 32
    assert model_config().active_parameters() == 51_712 - 2 * 2 * 1536
    # a token at T = 7:
    # layer: projections 3072, scores and values 2 * 32 * 4, router 128, experts 2 * 1536
    # head 512 * 32
    assert model_config().flops_per_token(7) == 2 * (2 * (3072 + 256 + 128 + 3072) + 16384)


def test_counts_of_each_router_by_hand(model_config):
    # D 8, F 6, E 4, K 2, V 16, one layer, T = 3
    # outside the MoE: embeddings 2 * 16 * 8 = 256, attention 4 * 64 + 2 * 8 = 272,
    #                  norms 2 * 8 + 8 = 24: 552
    # an expert: 3 * 8 * 6 = 144; of rank 3: 2 * 48 + 3 * (8 + 6) = 138
    # a token outside the MoE: projections 256, scores and values 2 * 8 * 2, head 128: 416
    outside, work = 552, 416
    expected = {  # parameters, those a token meets, multiply-adds a token
        # rows 4 * 8
        "softmax": (32 + 4 * 144, 32 + 2 * 144, 32 + 2 * 144),
        "sigmoid": (32 + 4 * 144, 32 + 2 * 144, 32 + 2 * 144),
        # The power step is computed on parameters alone, not per token.
        "mpi": (32 + 4 * 144, 32 + 2 * 144, 32 + 2 * 144),
        # There are no rows. A token meets the first factor, 8 * 3, of every expert, also of those
        # that are not chosen.
        "aoe": (4 * 138, 2 * (138 - 24) + 4 * 24, 4 * 24 + 2 * (3 * 6 + 2 * 48)),
        # Each expert has one threshold.
        "routing_free": (4 * 138 + 4, 2 * (138 - 24) + 4 * 24 + 4, 4 * 24 + 2 * (3 * 6 + 2 * 48)),
        # projection 8 * 2, embeddings 4 * 2, temperature
        "xmoe": (25 + 4 * 144, 25 + 2 * 144, 16 + 8 + 2 * 144),
        # The layer competes in a quarter of the steps, and then also computes all experts.
        "competition": (32 + 4 * 144, 32 + 2 * 144, 32 + 2 * 144 + 0.25 * 4 * 144),
    }
    for router, (parameters, active, multiplied) in expected.items():
        options = {
            "aoe": {"rank": 3},
            "routing_free": {"rank": 3},
            "competition": {"rate": 0.25},
        }.get(router, {})
        config = model_config(**TINY, router=router, **options)
        assert config.parameters() == outside + parameters, router
        assert config.active_parameters() == outside + active, router
        assert config.flops_per_token(3) == 2 * (work + multiplied), router
    # 2 experts of 144 are always on, and 1 of 4 is chosen.
    shared = model_config(**TINY | {"experts_per_token": 1}, shared_experts=2)
    assert (
        shared.parameters() == outside + 32 + 6 * 144
        and shared.active_parameters() == outside + 32 + 3 * 144
    )
    assert shared.flops_per_token(3) == 2 * (work + 32 + 3 * 144)


def test_the_work_of_competition_counts_its_limit_of_layers(model_config):
    # Each of 3 layers competes with probability 1/2, at most 1 at a time. No layer competes with
    # probability 1/8, so the 4 * 144 of one layer are computed with probability 7/8.
    tiny = TINY | {"layers": 3}
    competing = model_config(**tiny, router="competition", rate=0.5, max_layers=1)
    more = competing.flops_per_token(3) - model_config(**tiny).flops_per_token(3)
    assert more == pytest.approx(2 * 7 / 8 * 4 * 144)


@pytest.mark.parametrize(
    "size, total, active",
    [("olmoe_1b_7b", 6.92e9, 1.28e9), ("3b", 2.99e9, 0.61e9), ("15b", 14.97e9, 0.92e9)],
)
def test_published_sizes(size, total, active):
    config = ModelConfig.of(base.get_config(size))
    # The counts are exact. The papers print two or three digits.
    assert config.parameters() == pytest.approx(total, rel=0.002)
    assert config.active_parameters() == pytest.approx(active, rel=0.01)


FREE = {"router": "routing_free", "rank": 8}
UNKNOWN = "no such option"


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
    ({"init": "uniform"}, ["routers.softmax.init", "uniform", "orthogonal"]),
    ({"router": "aoe", "rank": -1}, ["routers.aoe.rank", "-1"]),
    ({"shared_experts": -1}, ["shared_experts", "-1"]),
    ({"rank": 8}, ["routers.softmax.rank", UNKNOWN]),
    ({"renormalise": True}, ["routers.softmax.renormalise", UNKNOWN, "'renormalize'"]),
    ({"top_p": 0.4, "bias_rate": 1e-3}, ["routers.softmax.bias_rate", "0.001", "top_p", "0.4"]),
    (FREE | {"top_p": 0.4}, ["routers.routing_free.top_p", UNKNOWN]),
    (FREE | {"bias_rate": 1e-3}, ["routers.routing_free.bias_rate", UNKNOWN]),
    (FREE | {"renormalize": True}, ["routers.routing_free.renormalize", UNKNOWN]),
    ({"router": "competition", "top_p": 0.4}, ["routers.competition.top_p", UNKNOWN]),
    ({"router": "competition", "bias_rate": 1e-3}, ["routers.competition.bias_rate", UNKNOWN]),
    (FREE | {"init": "orthogonal"}, ["routers.routing_free.init", UNKNOWN]),
    ({"router": "xmoe", "init": "orthogonal"}, ["routers.xmoe.init", UNKNOWN]),
    *(
        (
            {"router": "xmoe", "experts": few, "experts_per_token": 1},
            [f"model.experts: {few}", "xmoe", "at least 4"],
        )
        for few in (1, 2, 3)
    ),
    ({"top_p": 0.0}, ["top_p", "0.0", "above 0"]),
    ({"top_p": 1.1}, ["top_p", "1.1", "at most 1"]),
    ({"bias_rate": -1e-3}, ["bias_rate", "-0.001", "at least 0"]),
    ({"bias_rate": float("nan")}, ["bias_rate", "nan", "at least 0"]),
    ({"router": "mpi", "scale": 0.0}, ["routers.mpi.scale", "0.0", "positive"]),
    ({"router": "sigmoid", "scale": 0.0}, ["routers.sigmoid.scale", "0.0", "positive"]),
    ({"router": "sigmoid", "top_p": 0.4}, ["routers.sigmoid.top_p", UNKNOWN]),
    ({"router": "competition", "rate": 1.5}, ["routers.competition.rate", "1.5", "0 to 1"]),
    ({"router": "competition", "max_layers": 0}, ["routers.competition.max_layers", "0"]),
    (FREE | {"theta": 0.0}, ["routers.routing_free.theta", "0.0", "positive"]),
    (FREE | {"controller_rate": -0.1},
     ["routers.routing_free.controller_rate", "-0.1", "at least 0"]),
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


@pytest.mark.parametrize("router", ["aoe", "routing_free"])
def test_the_default_rank_keeps_the_size_of_whole_gates(model_config, router):
    config = model_config(router=router)
    assert config.router.gate_rank(config) == 10  # 32 * 16 / 48, rounded down
    assert model_config(router=router, rank=10).parameters() == config.parameters()


def test_an_option_of_a_router_that_is_not_in_use_is_checked_too():
    config = base.get_config("debug")
    config.routers.mpi.scale = -1.0
    with pytest.raises(ValueError, match=r"^routers\.mpi\.scale: -1\.0 must be positive"):
        ModelConfig.of(config)
    config = base.get_config("debug").to_dict()
    config["routers"]["mpy"] = {"scale": 4.0}
    with pytest.raises(ValueError, match=r"^routers\.mpy: .*'mpi'"):
        ModelConfig.of(config)


def test_the_base_config_has_every_option_with_the_default_of_its_router():
    defaults = {name: dataclasses.asdict(kind()) for name, kind in ROUTERS.items()}
    assert base.get_config().routers.to_dict() == {"forced_balance": False} | defaults
