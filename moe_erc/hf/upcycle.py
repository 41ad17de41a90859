"""A Mixture of Experts out of a dense checkpoint: sparse upcycling (arXiv 2212.05055).

    params = open_upcycled(options, config, abstract, seed).read()

Every expert is a copy of the dense feed-forward network, and the router is drawn. The K experts of
a token then give the same answer:

    sum_k weight_k expert_k(x) = (sum_k weight_k) dense(x)

`w_down` is divided by the sum of the weights, so that the model computes what the dense one does. A
router whose weights have another sum for every token is refused.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_erc.checks import BadInput, check_fields, within
from moe_erc.data import paths
from moe_erc.hf.olmoe import Olmoe, tensors_of
from moe_erc.hf.olmoe_config import check_equal, model_fields
from moe_erc.hf.olmoe_names import TABLE, by_path, entries
from moe_erc.hf.shards import read_config
from moe_erc.model.config import ModelConfig
from moe_erc.moe.experts import GATED
from moe_erc.random_keys import named

# Fields in which the dense model and the model of its copies may differ.
MAY_DIFFER = ("experts", "experts_per_token", "router")


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """The block `init_upcycled` of the configuration."""

    path: str  # of the dense checkpoint; "" upcycles none
    # Every entry of every copy is multiplied by 1 + noise n, with n standard normal.
    noise: float = within(least=0, note="0 copies exactly")

    def __post_init__(self):
        check_fields(self, "init_upcycled")


@dataclasses.dataclass(frozen=True)
class Upcycled:
    """A dense checkpoint that fits a model; no number of it is read yet."""

    _copies: Olmoe
    _weight_sum: float
    _noise: float
    _seed: int

    def read(self) -> dict[str, Any]:
        """The tree of parameters without those of the router, each in its sharding, float32."""
        params = self._copies.read()
        moe = params["layers"]["moe"]
        key = named(jax.random.key(self._seed), "upcycling")
        for name in GATED:
            factor = 1 / self._weight_sum if name == "w_down" else 1.0
            if factor != 1 or self._noise:
                moe[name] = _changed(moe[name], factor, self._noise, named(key, name))
        return params


def open_upcycled(options: Upcycling, config: ModelConfig, abstract: Any, seed: int) -> Upcycled:
    """A dense checkpoint in a local directory, which has the layout of an OLMoE with one expert.

    Args:
      options: which checkpoint, and how it is copied
      config: of the model that will use the parameters
      abstract: the tree of its parameters, each a `jax.ShapeDtypeStruct` with a sharding
      seed: of the noise, the same on any mesh

    Raises:
      BadInput: for a checkpoint that is not dense, of other sizes or of another layout, and for a
        model that cannot compute what the dense one does.
    """
    directory = paths.local(options.path)
    weight_sum = _weight_sum(config)
    _check_dense(config, model_fields(read_config(directory)), directory)
    wanted = _without_router(config, abstract)
    tensors = tensors_of(directory, _one_expert(config, wanted))
    copies = {}
    for entry in entries(wanted):
        stored = TABLE[entry.path]
        index = (entry.index[0], 0) if stored.axes == 2 else entry.index
        copies[entry.name] = tensors[stored.name.format(*index)]
    return Upcycled(Olmoe(wanted, copies), weight_sum, options.noise, seed)


def _weight_sum(config: ModelConfig) -> float:
    """What the weights of every token sum to; BadInput if copies cannot compute the dense model."""
    router = config.router
    if router.gate_rank(config):
        raise BadInput(
            f"model.router: {router.name!r} cannot start from a dense model, "
            "because its gates have two factors; use 'softmax'"
        )
    if config.shared_experts:
        raise BadInput(
            f"model.shared_experts: {config.shared_experts} cannot start from a dense model, "
            "whose function they would add to; use 0"
        )
    if config.forced_balance:
        raise BadInput(
            "routers.forced_balance: True cannot start from a dense model, "
            "because its weights have another sum for every token; set it to False"
        )
    if router.weight_sum is None:
        raise BadInput(
            f"{router.key('renormalize')}: False cannot start from a dense model, "
            "because its weights have another sum for every token; set it to True"
        )
    return router.weight_sum


def _check_dense(
    config: ModelConfig, fields: Mapping[str, Any], directory: os.PathLike | str
) -> None:
    if fields["experts"] != 1:
        raise BadInput(
            f"init_upcycled.path: the model in {directory} has {fields['experts']} experts, and "
            "only a dense one, of 1 expert, is upcycled; start from this one with init_from"
        )
    shared = [field for field in fields if field not in MAY_DIFFER]
    found = {f"model.{field}": getattr(config, field) for field in shared}
    wanted = {f"model.{field}": fields[field] for field in shared}
    check_equal(found, wanted, directory)


def _without_router(config, abstract):
    """The tree of parameters without those of the router."""
    own = config.router.parameters(config)
    layers = abstract["layers"]
    moe = {name: leaf for name, leaf in layers["moe"].items() if name not in own}
    return abstract | {"layers": layers | {"moe": moe}}


def _one_expert(config, wanted):
    """{path: abstract parameter} of the dense model, whose router has one row."""
    dense = {}
    for path, leaf in by_path(wanted).items():
        shape = leaf.shape
        if TABLE[path].axes == 2:
            shape = (shape[0], 1, *shape[2:])
        dense[path] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    router_shape = (config.layers, 1, config.width)
    dense["layers.moe.router"] = jax.ShapeDtypeStruct(router_shape, jnp.float32)
    return dense


def _changed(array, factor, noise, key):
    """The copies times `factor` and, entry by entry, times 1 + noise n."""

    def change(array, key):
        array = array * factor
        if noise:
            array = array * (1 + noise * jax.random.normal(key, array.shape))
        return array

    # The copies without noise are given up, because there may be no memory for both.
    return jax.jit(change, out_shardings=array.sharding, donate_argnums=0)(array, key)
