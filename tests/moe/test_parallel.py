"""The experts of a mesh compute what one device computes: outputs and every gradient, also when all meet one expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc import sharding
from moe_erc.moe import parallel
from moe_erc.moe.experts import IMPLEMENTATIONS, ExpertWeights, dense
from moe_erc.moe.routing import Routing

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, T, K, E, D, F = 8, 6, 2, 8, 16, 8


def arguments(spread):
    keys = jax.random.split(jax.random.key(0), 6)
    weights_BTK, experts_BTK = jax.lax.top_k(jax.random.uniform(keys[0], (B, T, E)), K)
    experts_BTK = experts_BTK if spread == "random" else jnp.full_like(experts_BTK, 5)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    matrices = (0.3 * jax.random.normal(key, shape) for key, shape in zip(keys[1:4], shapes, strict=True))
    return jax.random.normal(keys[4], (B, T, D)), Routing(weights_BTK, experts_BTK), ExpertWeights(*matrices)


@functools.cache
def run(mesh, experts, spread):
    x_BTD, routing, expert_weights = arguments(spread)

    def loss(x_BTD, weights_BTK, expert_weights):
        y_BTD = parallel.apply(experts, mesh, x_BTD, routing._replace(weights_BTK=weights_BTK), expert_weights)
        return jnp.sum(jnp.sin(y_BTD)), y_BTD

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return jax.device_get(gradients(x_BTD, routing.weights_BTK, expert_weights))


@pytest.mark.parametrize("spread", ["random", "one expert"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2), (1, 8)], ids=str)
def test_any_mesh_equals_the_oracle_on_one_device(shape, spread):
    expected = run(None, dense, spread)
    found = run(sharding.make_mesh(*shape), IMPLEMENTATIONS["block_loop"], spread)
    # float32 sums over tokens in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4), expected, found)


@pytest.mark.optimized
@pytest.mark.parametrize("shape", [(1, 8), (2, 4)], ids=str)
def test_memory_is_bounded_by_a_groups_tokens_and_knows_no_routing(shape):
    mesh, (rows, length, chosen), (experts, width, hidden) = sharding.make_mesh(*shape), (8, 64, 4), (16, 64, 32)

    def abstract(of, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(of, dtype, sharding=NamedSharding(mesh, spec))

    def loss(x_BTD, routing, weights):
        return jnp.sum(parallel.apply(IMPLEMENTATIONS["block_loop"], mesh, x_BTD, routing, weights) ** 2)

    x_BTD = abstract((rows, length, width), P(sharding.BATCH))
    routing = Routing(*(abstract((rows, length, chosen), P(sharding.BATCH), of) for of in (jnp.float32, jnp.int32)))
    up, down = (experts, width, hidden), (experts, hidden, width)
    specs = (sharding.PARAMETERS[name] for name in ("w_gate", "w_up", "w_down"))
    weights = ExpertWeights(*(abstract(of, spec) for of, spec in zip((up, up, down), specs, strict=True)))
    gradients = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(x_BTD, routing, weights).compile()
    # Tokens, outputs and their gradients, gathered; the device's experts and their gradients. Buffers large enough for
    # every token at each of the device's 2 or 4 experts would be so many times the tokens more.
    of_group, of_experts = 4 * rows * length * width // shape[0], 4 * 3 * experts * width * hidden // shape[1]
    assert gradients.memory_analysis().temp_size_in_bytes < 5 * of_group + 2 * of_experts
