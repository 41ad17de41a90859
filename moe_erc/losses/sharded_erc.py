"""ERC over a (data, expert) mesh: the loss of `erc.py`, at 1 / (dp ep) of its FLOPs on every device.

    S[:, local j] = sum over "data" of |proxy @ w_gate[local j, :, local F]|^2

Expert matrices stay where FSDP puts them, P(expert, None, data): none is gathered and their gradient is local. What
crosses devices, a layer: the (E, E/ep) sum over data; E bounds and E diagonal values over expert; the scalar; and the
(E, D) gradient of the router.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_erc.losses.erc import LAYER_REDUCTIONS, check_options, erc_loss, noise_bound, proxies, response, root, stack
from moe_erc.losses.responses import RESPONSES, linear, relative, squared_responses


def sharded_erc_loss(params, rng, mesh, **options):
    """`erc_loss(params, rng, **options)`, with its options and defaults, over a mesh of axes (data, expert).

    w_gate and w_up lie split by expert and along F over data, w_down by expert and along F; the router lies whole on
    every device.
    """
    options = erc_loss.__kwdefaults__ | options
    check_options(**options | {"alpha": 1.0})  # which may be traced
    data, expert = mesh.axis_names
    activation, noise = options["activation"], options["noise"]
    router_LED, weights, keys_L = stack(params, rng, activation, noise)
    router_LED = lax.stop_gradient(router_LED) if options["detach_router"] else router_LED

    def local(router_LED, weights, keys_L):
        ids_E, own = jnp.arange(router_LED.shape[1]), weights[0].shape[1]
        own_J = lax.axis_index(expert) * own + ids_E[:own]
        own_EJ = ids_E[:, None] == own_J
        bound_L1J = lax.map(lambda router_ED: noise_bound(router_ED, own_J), router_LED)[:, None, :]
        bound_LE = lax.psum(jnp.sum(jnp.where(own_EJ, bound_L1J, 0), axis=-1), expert)
        inputs, length2_LE = proxies(router_LED, bound_LE, keys_L, noise)
        respond = response(activation, noise, options["normalize"], options["precision"])
        if activation == "output":  # the one square of a sum over F: an (E, D) sum over its slices for every expert
            respond = partial(respond, sum_slices=partial(lax.psum, axis_name=data))
        squares_LEJ = squared_responses(respond, _varying(inputs, (data, expert)), weights)
        if activation != "output":
            squares_LEJ = lax.psum(squares_LEJ, data)
        M_LEJ = root(squares_LEJ)
        if options["normalize"]:
            M_LEJ = relative(M_LEJ, root(length2_LE), router_LED.shape[-1])
        return _penalty(M_LEJ, own_EJ, options["alpha"], expert)

    loss_L = _over(mesh, local, activation, P())(router_LED, weights, keys_L)
    return LAYER_REDUCTIONS[options["layer_reduction"]](loss_L)


def sharded_coupling_matrix(router_LED, w_gate_LEDF, mesh):
    """`coupling_matrix` of every layer, (L, E, E) with columns split over expert; in full float32, as that is."""
    data, expert = mesh.axis_names
    respond = partial(linear, precision="highest")

    def local(router_LED, weights, _):
        return root(lax.psum(squared_responses(respond, _varying(router_LED, mesh.axis_names), weights), data))

    return _over(mesh, local, "gate", P(None, None, expert))(router_LED.astype(jnp.float32), (w_gate_LEDF,), None)


def _over(mesh, local, activation, out_specs):
    """`local(router, weights, keys)` on every device's slices of the matrices that `activation` reads."""
    data, expert = mesh.axis_names
    slices = {
        "w_gate": P(None, expert, None, data),
        "w_up": P(None, expert, None, data),
        "w_down": P(None, expert, data),
    }
    specs = (P(), tuple(slices[name] for name in RESPONSES[activation][1]), P())
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs)


def _varying(inputs, axes):
    """Inputs as each device's own, so that there is one sum of their gradient."""
    return jax.tree.map(lambda leaf: lax.pcast(leaf, axes, to="varying"), inputs)


def _penalty(M_LEJ, own_EJ, alpha, expert):
    """`coupling_penalty` of every layer from the columns of M that each device has."""
    bars_LEJ = alpha * jnp.where(own_EJ, M_LEJ, 0)
    bar_LE, bar_LJ = lax.psum(jnp.sum(bars_LEJ, axis=2), expert), jnp.sum(bars_LEJ, axis=1)
    excess_LEJ = jax.nn.relu(M_LEJ - bar_LE[:, :, None]) + jax.nn.relu(M_LEJ - bar_LJ[:, None, :])
    return lax.psum(jnp.sum(jnp.where(own_EJ, 0, excess_LEJ), axis=(1, 2)), expert) / len(own_EJ) ** 2
