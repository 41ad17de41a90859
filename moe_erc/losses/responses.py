"""How strongly every expert answers every proxy token: the squared norms behind the coupling matrix.

    S[l, i, j] = |h_j(proxy[l, i])|^2,   h_j one of the activations of expert j of layer l

Squares rather than norms, because slices of the hidden axis held by different devices add up before the root.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

COLUMNS = 128  # hidden units of several small experts, or of slices of experts, that are worth one turn of the loop


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def squared_responses(respond, inputs, weights):
    """S[l, i, j] = respond(inputs of layer l, weights of expert j)[i], a few experts at a time: nothing is (E, E, F).

    The backward recomputes a group's columns, and skips them when no hinge passes them a gradient, as most do once
    coupled. One loop runs over the groups of all layers: nested loops would hold a copy of a layer's weights.
    """
    layers, experts = weights[0].shape[:2]

    def columns(layer_and_experts):
        layer, matrices = layer_and_experts
        return _respond(respond, jax.tree.map(lambda leaf: leaf[layer], inputs), matrices)

    columns_GJE = lax.map(columns, _groups(weights))
    return columns_GJE.reshape(layers, experts, -1).swapaxes(1, 2)


def _forward(respond, inputs, weights):
    return squared_responses(respond, inputs, weights), (inputs, weights)


def _backward(respond, residuals, gradient_LEE):
    inputs, weights = residuals
    layer_of_group, groups = _groups(weights)

    def columns(input_gradients, layer_experts_and_gradient):
        layer, matrices, gradient_JE = layer_experts_and_gradient

        def active():
            of_layer = jax.tree.map(lambda leaf: leaf[layer], inputs)
            _, pull_back = jax.vjp(partial(_respond, respond), of_layer, matrices)
            extra, weight_gradients = pull_back(gradient_JE)
            return jax.tree.map(lambda total, term: total.at[layer].add(term), input_gradients, extra), weight_gradients

        def idle():
            return input_gradients, jax.tree.map(jnp.zeros_like, matrices)

        return lax.cond(jnp.any(gradient_JE != 0), active, idle)

    gradient_GJE = gradient_LEE.swapaxes(1, 2).reshape(len(layer_of_group), -1, gradient_LEE.shape[1])
    start = jax.tree.map(jnp.zeros_like, inputs)
    input_gradients, weight_gradients = lax.scan(columns, start, (layer_of_group, groups, gradient_GJE))
    return input_gradients, jax.tree.map(lambda g, w: g.reshape(w.shape), weight_gradients, weights)


squared_responses.defvjp(_forward, _backward)


def _respond(respond, inputs, matrices):
    """(J, E): what J experts answer, or (1, E) for the matrices of one."""
    if matrices[0].ndim == 2:
        return respond(inputs, *matrices)[None]
    return jax.vmap(respond, in_axes=(None, *(0,) * len(matrices)))(inputs, *matrices)


def _groups(weights):
    """(layer of each group, matrices as (groups, experts of a group, …)); a group lies within one layer.

    Groups of one have no axis of their own: XLA copies all weights for an axis of length 1.
    """
    layers, experts, _, hidden = weights[0].shape
    size = max(size for size in range(1, experts + 1) if experts % size == 0 and size * hidden <= max(COLUMNS, hidden))
    layer_of_group = jnp.repeat(jnp.arange(layers), experts // size)
    group = (-1, size) if size > 1 else (-1,)
    return layer_of_group, jax.tree.map(lambda leaf: leaf.reshape(*group, *leaf.shape[2:]), weights)


def _matmul(a, b, precision):
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _squares(hidden):
    return jnp.sum(jnp.square(hidden), axis=-1)


def linear(x_ED, w_DF, precision):
    """|x @ w|^2 of every row."""
    return _squares(_matmul(x_ED, w_DF, precision))


def expected_linear(inputs, w_DF, precision):
    """E |(x * noise) @ w|^2 for independent noise of mean 1: the clean square plus what its variance adds."""
    x_ED, spread_ED = inputs
    return linear(x_ED, w_DF, precision) + _matmul(spread_ED, _squares(w_DF.astype(jnp.float32)), precision)


def sized(respond, inputs, w_DF):
    """A linear response with |w|_F^2 as one more row: slices of it add up as the squares do."""
    return jnp.append(respond(inputs, w_DF), jnp.sum(jnp.square(w_DF.astype(jnp.float32))))


def relative(sized_LEE, length_LE, width):
    """Of roots of sized responses, sqrt(D) M[i, j] / (|proxy_i| |w_j|_F): 0 for zeros, NaN where a length is NaN.

    Shrinking router or gate gains nothing. Roots, because the derivative of 1 / square overflows for lengths of 1e-10.
    """
    M_LEE, size_L1E = sized_LEE[:, :-1], sized_LEE[:, -1:]
    return width**0.5 * M_LEE * _inverse(length_LE)[:, :, None] * _inverse(size_L1E)


def _inverse(x):
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def _silu_gate(x_ED, w_gate_DF, precision):
    return _squares(jax.nn.silu(_matmul(x_ED, w_gate_DF, precision)))


def _hidden(x_ED, w_gate_DF, w_up_DF, precision):
    return jax.nn.silu(_matmul(x_ED, w_gate_DF, precision)) * _matmul(x_ED, w_up_DF, precision)


def _swiglu(x_ED, w_gate_DF, w_up_DF, precision):
    return _squares(_hidden(x_ED, w_gate_DF, w_up_DF, precision))


def output(x_ED, w_gate_DF, w_up_DF, w_down_FD, precision, sum_slices=lambda out_ED: out_ED):
    """The one square of a sum over F: what slices of F give is added up by `sum_slices` before it is squared."""
    hidden_EF = _hidden(x_ED, w_gate_DF, w_up_DF, precision)
    return _squares(sum_slices(_matmul(hidden_EF, w_down_FD, precision)))


# activation -> (squared response of one expert to every proxy, at a `precision` of its matmuls; the weights it reads)
RESPONSES = {
    "gate": (linear, ("w_gate",)),
    "up": (linear, ("w_up",)),
    "silu_gate": (_silu_gate, ("w_gate",)),
    "swiglu": (_swiglu, ("w_gate", "w_up")),
    "output": (output, ("w_gate", "w_up", "w_down")),
}
