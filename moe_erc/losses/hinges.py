"""The hinges of ERC on M, and their gradient in the pass over experts that computes M.

    bar[i] = alpha M[i, i]
    loss   = 1/E^2 sum_j sum_{i != j} relu(M[i, j] - bar[i]) + relu(M[i, j] - bar[j])

The loss is a scalar of a layer, so its gradient is known up to a factor when it is computed. The
forward pass therefore computes it, and the backward pass multiplies it by what arrives:

1. The diagonal: every row with its own expert, 1 / E of the work. It gives all bars.
2. One pass over experts. Column j of M and the bars give the hinges of column j, and the responses
   that made the column give its gradient: three matmuls an expert, and one for an expert without an
   active hinge. Responses live as long as the column.
3. How many hinges a bar holds is known after the pass. Each expert's own row adds to the gradient:
   a matrix of rank one where the activation is linear.

Where F is split over devices, a column is complete only after a sum over them. One sum then serves
all columns: the pass is cut in two, and what the matmuls gave is kept in between. It takes E / D of
the memory of the gradient.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.losses.devices import Devices
from moe_erc.losses.responses import Proxies, Response, at, groups, relative, squared_responses
from moe_erc.numerics import square_root
from moe_erc.sharding import platform_of


@dataclasses.dataclass(frozen=True)
class Matrix:
    """How M is computed, from the slices of the weights that a device has."""

    response: Response
    devices: Devices

    def complete(self, squares: jax.Array) -> jax.Array:
        """Squared responses to all of F."""
        return squares if self.response.is_whole else self.devices.sum_over_data(squares)

    def entries(self, squares: jax.Array, length: jax.Array | None, width: int) -> jax.Array:
        """M of complete squares (…, E), or (…, E + 1) with size; length: of the proxies, (…, E)."""
        roots = square_root(squares)
        return relative(roots, length, width) if self.response.with_size else roots

    def columns(
        self, proxies: Proxies, length_LE: jax.Array | None, weights: dict[str, jax.Array]
    ) -> jax.Array:
        """M transposed, (L, J, E): the columns of the J experts of this device."""
        platform = platform_of(self.devices.mesh)
        squares_LJE = squared_responses(self.response, proxies, weights, platform)
        length_L1E = None if length_LE is None else length_LE[:, None]
        return self.entries(self.complete(squares_LJE), length_L1E, proxies.row.shape[-1])


def penalty(M_LJE: jax.Array, alpha: float | jax.Array, devices: Devices) -> jax.Array:
    """The penalty of every layer, (L,), from the columns of M that a device has."""
    own_JE = _own(devices, *M_LJE.shape[1:])
    bars_LJE = alpha * jnp.where(own_JE, M_LJE, 0)
    bar_LE = devices.sum_over_experts(jnp.sum(bars_LJE, axis=1))
    bar_LJ = jnp.sum(bars_LJE, axis=2)
    return devices.sum_over_experts(_excess(M_LJE, bar_LE[:, None], bar_LJ, own_JE))


def _own(devices, own, experts):
    """Whether row and expert belong together, (J, E)."""
    return devices.own_experts(experts, own)[:, None] == jnp.arange(experts)


def _excess(M_JE, bar_E, bar_J, own_JE):
    """What foreign responses exceed both bars by, over E^2; axes in front of (J, E) are kept."""
    excess_JE = jax.nn.relu(M_JE - bar_E) + jax.nn.relu(M_JE - bar_J[..., None])
    total = jnp.sum(jnp.where(own_JE, 0, excess_JE), axis=(-2, -1))
    return total / own_JE.shape[-1] ** 2


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def penalty_of(
    matrix: Matrix,
    proxies: Proxies,
    length_LE: jax.Array | None,
    weights: dict[str, jax.Array],
    alpha: jax.Array,
) -> jax.Array:
    """The penalty of every layer, (L,), from proxies and weights.

    proxies: leaves (L, E, D), as each device's own (`Devices.as_own`). length_LE: their lengths,
    where M is relative to them, else None. weights: by name, (L, J, …), of the J experts of this
    device. alpha: a scalar.
    """
    return penalty(matrix.columns(proxies, length_LE, weights), alpha, matrix.devices)


def _forward(matrix, proxies, length_LE, weights, alpha):
    devices = matrix.devices
    # Sums over experts come once, after the pass: what goes into it is each device's own.
    length_LE = devices.as_own_of_experts(length_LE)
    diagonal = partial(_diagonal, matrix)
    own_LE, pull_back = jax.vjp(diagonal, proxies, length_LE, weights)
    bar_LE = devices.as_own_of_experts(alpha * own_LE)
    loss_L, of_bar_LE, gradients = _pass_over_experts(matrix, proxies, length_LE, weights, bar_LE)
    of_bar_LE = devices.sum_over_experts(of_bar_LE)

    def with_diagonal():
        return jax.tree.map(jnp.add, gradients, pull_back(alpha * of_bar_LE))

    def without():
        return gradients

    # All devices decide alike, because the sum is that of all.
    gradients = lax.cond(jnp.any(of_bar_LE != 0), with_diagonal, without)
    of_proxies, of_length_LE, of_weights = gradients
    if of_length_LE is not None:
        of_length_LE = devices.sum_over_experts(of_length_LE)
    of_alpha_L = jnp.sum(of_bar_LE * own_LE, axis=1)
    of_inputs = (of_proxies, of_length_LE, of_weights, of_alpha_L)
    return devices.sum_over_experts(loss_L), of_inputs


def _backward(matrix, of_inputs, gradient_L):
    *by_layer, of_alpha_L = of_inputs

    def scale(leaf):
        of_layer = gradient_L.reshape(-1, *(1,) * (leaf.ndim - 1))
        return (of_layer * leaf).astype(leaf.dtype)

    return *jax.tree.map(scale, by_layer), jnp.sum(gradient_L * of_alpha_L)


penalty_of.defvjp(_forward, _backward)


def _diagonal(matrix, proxies, length_LE, weights):
    """M[i, i] of all experts, (L, E), on every device."""
    experts, width = proxies.row.shape[1:]
    own = next(iter(weights.values())).shape[1]
    own_J = matrix.devices.own_experts(experts, own)

    def own_rows(leaf):
        return leaf[:, own_J, None]

    def of_expert(proxies, matrices):
        return matrix.response(proxies, matrices)[0]

    of_experts = jax.vmap(jax.vmap(of_expert))
    squares_LJ1 = matrix.complete(of_experts(jax.tree.map(own_rows, proxies), weights))
    length_LJ1 = None if length_LE is None else length_LE[:, own_J, None]
    M_LJ1 = matrix.entries(squares_LJ1, length_LJ1, width)
    M_LJE = jnp.where(_own(matrix.devices, own, experts), M_LJ1, 0)
    return matrix.devices.sum_over_experts(jnp.sum(M_LJE, axis=1))


def _pass_over_experts(matrix, proxies, length_LE, weights, bar_LE):
    """(penalties (L,), gradient of the bars (L, E), that of proxies, lengths and weights).

    All are sums over the device's own experts.
    """
    layers, experts, width = proxies.row.shape
    own = next(iter(weights.values())).shape[1]
    platform = platform_of(matrix.devices.mesh)
    layer_G, place_GB, matrices_G = groups(matrix.response, proxies, weights, platform)
    own_GB = matrix.devices.own_experts(experts, own)[place_GB]

    def of_group(of_proxies, group):
        layer, own_B, matrices, kept = group
        of_layer = at(layer, proxies)
        if kept is None:
            squares_BE, products = matrix.response.of_group(of_layer, matrices)
            kept = (matrix.complete(squares_BE), products)
        squares_BE, products = kept
        hinges = partial(_hinges_of_group, matrix, width, own_B)
        value_and_grad = jax.value_and_grad(hinges, argnums=(0, 1, 2))
        loss, of_inputs = value_and_grad(squares_BE, at(layer, length_LE), bar_LE[layer])
        of_squares_BE, of_length_E, of_bar_E = of_inputs

        def active():
            more, of_matrices = _pull_back(matrix, products, of_squares_BE, of_layer, matrices)

            def add(total, term):
                return total.at[layer].add(term)

            return jax.tree.map(add, of_proxies, more), of_matrices

        def idle():
            return of_proxies, jax.tree.map(jnp.zeros_like, matrices)

        of_proxies, of_matrices = lax.cond(jnp.any(of_squares_BE != 0), active, idle)
        return of_proxies, (loss, of_bar_E, of_length_E, of_matrices)

    kept_G = _responses_to_keep(matrix, proxies, layer_G, matrices_G)
    start = jax.tree.map(jnp.zeros_like, proxies)
    of_proxies, of_groups = lax.scan(of_group, start, (layer_G, own_GB, matrices_G, kept_G))
    loss_G, of_bar_GE, of_length_GE, of_matrices_G = of_groups

    def by_layer(leaf):
        return jnp.sum(leaf.reshape(layers, -1, *leaf.shape[1:]), axis=1)

    def in_shape_of(gradient, weight):
        return gradient.reshape(weight.shape)

    loss_L, of_bar_LE, of_length_LE = jax.tree.map(by_layer, (loss_G, of_bar_GE, of_length_GE))
    of_weights = jax.tree.map(in_shape_of, of_matrices_G, weights)
    return loss_L, of_bar_LE, (of_proxies, of_length_LE, of_weights)


def _responses_to_keep(matrix, proxies, layer_G, matrices_G):
    """(Complete squares (G, B, E), what the matmuls gave); None where F is not split.

    One sum over devices serves all columns.
    """
    if not matrix.devices.split_data:
        return None

    def respond(layer_and_matrices):
        layer, matrices = layer_and_matrices
        return matrix.response.of_group(at(layer, proxies), matrices)

    squares_GBE, products_G = lax.map(respond, (layer_G, matrices_G))
    return matrix.complete(squares_GBE), products_G


def _hinges_of_group(matrix, width, own_B, squares_BE, length_E, bar_E):
    """What the columns of the experts `own_B` exceed both bars by."""
    M_BE = matrix.entries(squares_BE, length_E, width)
    return _excess(M_BE, bar_E, bar_E[own_B], own_B[:, None] == jnp.arange(len(bar_E)))


def _pull_back(matrix, products, of_squares_BE, proxies, matrices):
    """The gradient of a group's squares for proxies and matrices, from what its matmuls gave."""

    def again(proxies, matrices):
        return matrix.complete(matrix.response.of_group(proxies, matrices, products)[0])

    _, pull_back = jax.vjp(again, proxies, matrices)
    return pull_back(of_squares_BE)
