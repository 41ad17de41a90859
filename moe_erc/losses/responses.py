"""How strongly every expert responds to every proxy token: the squared norms behind M.

    S[l, i, j] = |h_j(proxy[l, i])|^2,   h_j one of the activations of expert j of layer l

Squares rather than norms, because slices of the hidden axis F that lie on different devices are
added before the root.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.numerics import divide

# Hidden units, of several small experts or of slices of experts, that are worth one turn of a loop.
COLUMNS = 128

# {activation: the matrices of an expert that it reads}. The first one has the shape (D, F).
MATRICES = {
    "gate": ("w_gate",),
    "up": ("w_up",),
    "silu_gate": ("w_gate",),
    "swiglu": ("w_gate", "w_up"),
    "output": ("w_gate", "w_up", "w_down"),
}
# Activations x @ w. Their square has an exact expectation, and |w|_F is a scale to compare it with.
LINEAR = ("gate", "up")


class Proxies(NamedTuple):
    """The tokens that experts respond to; leaves are (L, E, D), or (E, D) inside a layer.

    spread: the variance of each coordinate, where the expectation of a squared response is taken;
    None where proxies are not random.
    """

    row: jax.Array
    spread: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Response:
    """A function: the squared response of one expert to every proxy of its layer.

    activation: a key of `MATRICES`.
    precision: of the matmuls.
    with_size: whether |w|_F^2 follows as row E; only for a linear activation.
    data_axis: the mesh axis over which F is split; None where an expert's matrices are whole.
    """

    activation: str
    precision: str
    with_size: bool = False
    data_axis: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the result has been summed over the slices of F, so that the caller must not."""
        return self.activation == "output"

    def __call__(self, proxies: Proxies, matrices: dict[str, jax.Array]) -> jax.Array:
        """(E,) float32, or (E + 1,) with size. `matrices` are one expert's, or slices of them."""
        squares_E = _squares(self._activations(proxies.row, matrices))
        if proxies.spread is None and not self.with_size:
            return squares_E
        [w_DF] = matrices.values()
        w_DF = w_DF.astype(jnp.float32)
        if proxies.spread is not None:
            # E |(x * noise) @ w|^2 for independent noise of mean 1 is the square of x @ w plus
            # what the variance of the noise adds.
            squares_E += self._matmul(proxies.spread, _squares(w_DF))
        if self.with_size:
            return jnp.append(squares_E, jnp.sum(jnp.square(w_DF)))
        return squares_E

    def _activations(self, x_ED, matrices):
        """h of every proxy: (E, F), a device's own slice of it, or (E, D) for "output"."""
        if self.activation == "up":
            return self._matmul(x_ED, matrices["w_up"])
        gate_EF = self._matmul(x_ED, matrices["w_gate"])
        if self.activation == "gate":
            return gate_EF
        if self.activation == "silu_gate":
            return jax.nn.silu(gate_EF)
        hidden_EF = jax.nn.silu(gate_EF) * self._matmul(x_ED, matrices["w_up"])
        if self.activation == "swiglu":
            return hidden_EF
        out_ED = self._matmul(hidden_EF, matrices["w_down"])
        # An output is a sum over F. Its slices have to be added before it is squared.
        return out_ED if self.data_axis is None else lax.psum(out_ED, self.data_axis)

    def _matmul(self, a, b):
        return jnp.matmul(a, b, precision=self.precision, preferred_element_type=jnp.float32)


def _squares(hidden):
    return jnp.sum(jnp.square(hidden), axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def squared_responses(
    response: Response, proxies: Proxies, weights: dict[str, jax.Array]
) -> jax.Array:
    """S[l, i, j] = response(proxies of layer l, weights of expert j)[i], (L, E, J) float32.

    proxies: leaves (L, E, D). weights: by name, (L, J, …) with an axis of the J experts.

    A few experts are computed at a time: nothing is (E, E, F). The backward pass recomputes a
    group's columns. It skips them when no hinge passes them a gradient, as most do once coupled.
    One loop runs over the groups of all layers: nested loops would hold a copy of a layer's
    weights.
    """
    first = weights[MATRICES[response.activation][0]]
    layers, experts = first.shape[:2]

    def columns(layer_and_experts):
        layer, matrices = layer_and_experts
        return _of_group(response, _at(layer, proxies), matrices)

    columns_GJE = lax.map(columns, _groups(first, weights))
    return columns_GJE.reshape(layers, experts, -1).swapaxes(1, 2)


def _forward(response, proxies, weights):
    return squared_responses(response, proxies, weights), (proxies, weights)


def _backward(response, residuals, gradient_LEJ):
    proxies, weights = residuals
    first = weights[MATRICES[response.activation][0]]
    layer_of_group, groups = _groups(first, weights)

    def columns(proxy_gradients, layer_experts_and_gradient):
        layer, matrices, gradient_JE = layer_experts_and_gradient

        def active():
            respond = partial(_of_group, response)
            _, pull_back = jax.vjp(respond, _at(layer, proxies), matrices)
            extra, weight_gradients = pull_back(gradient_JE)

            def add(total, term):
                return total.at[layer].add(term)

            return jax.tree.map(add, proxy_gradients, extra), weight_gradients

        def idle():
            return proxy_gradients, jax.tree.map(jnp.zeros_like, matrices)

        return lax.cond(jnp.any(gradient_JE != 0), active, idle)

    experts = gradient_LEJ.shape[1]
    gradient_GJE = gradient_LEJ.swapaxes(1, 2).reshape(len(layer_of_group), -1, experts)
    start = jax.tree.map(jnp.zeros_like, proxies)
    slices = (layer_of_group, groups, gradient_GJE)
    proxy_gradients, weight_gradients = lax.scan(columns, start, slices)

    def in_shape_of(gradient, weight):
        return gradient.reshape(weight.shape)

    return proxy_gradients, jax.tree.map(in_shape_of, weight_gradients, weights)


squared_responses.defvjp(_forward, _backward)


def _at(layer, proxies):
    """The proxies of one layer."""

    def of_leaf(leaf):
        return leaf[layer]

    return jax.tree.map(of_leaf, proxies)


def _of_group(response, proxies, matrices):
    """(J, E): what the J experts of a group respond, (1, E) for the matrices of one."""
    if next(iter(matrices.values())).ndim == 2:
        return response(proxies, matrices)[None]
    return jax.vmap(response, in_axes=(None, 0))(proxies, matrices)


def _groups(first, weights):
    """(layer of each group, matrices as (groups, experts of a group, …)).

    `first` has shape (L, E, D, F). A group lies within one layer. Groups of one have no axis of
    their own: XLA copies all weights for an axis of length 1.
    """
    layers, experts, _, hidden = first.shape
    sizes = [size for size in range(1, experts + 1) if experts % size == 0]
    size = max(size for size in sizes if size * hidden <= max(COLUMNS, hidden))
    layer_of_group = jnp.repeat(jnp.arange(layers), experts // size)
    group = (-1, size) if size > 1 else (-1,)

    def in_groups(leaf):
        return leaf.reshape(*group, *leaf.shape[2:])

    return layer_of_group, jax.tree.map(in_groups, weights)


def relative(sized_LEJ: jax.Array, length_LE: jax.Array, width: int) -> jax.Array:
    """sqrt(D) M[i, j] / (|proxy_i| |w_j|_F): 0 for zeros, NaN where a length is NaN.

    sized_LEJ: the roots of responses with size, (L, E + 1, J). length_LE: that of the proxies.
    width: D.

    Shrinking router or gate gains nothing. Roots are divided and not squares, because the
    derivative of 1 / square overflows for lengths of 1e-10.
    """
    M_LEJ = sized_LEJ[:, :-1]
    size_L1J = sized_LEJ[:, -1:]
    return width**0.5 * M_LEJ * divide(1, length_LE)[:, :, None] * divide(1, size_L1J)
