"""How strongly every expert answers every proxy token: the squared norms behind the coupling matrix.

    S[l, i, j] = |h_j(proxy[l, i])|^2,   h_j one of the activations of expert j of layer l

Squares rather than norms, because slices of the hidden axis held by different devices add up before the root.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def squared_responses(respond, inputs, weights):
    """S[l, i, j] = respond(inputs of layer l, weights of expert j)[i], one expert at a time: no (E, E, F) array exists.

    The backward recomputes a column, and skips it when no hinge passes it a gradient, as most do once coupled.
    One loop runs over the experts of all layers: nested loops would hold a copy of a layer's weights.
    """
    layers, experts = weights[0].shape[:2]

    def column(layer_and_expert):
        layer, expert = layer_and_expert
        return respond(jax.tree.map(lambda leaf: leaf[layer], inputs), *expert)

    columns = lax.map(column, (_layer_of_column(layers, experts), _merge_layers(weights)))
    return columns.reshape(layers, experts, -1).swapaxes(1, 2)


def _forward(respond, inputs, weights):
    return squared_responses(respond, inputs, weights), (inputs, weights)


def _backward(respond, residuals, gradient_LEE):
    inputs, weights = residuals
    layers, experts = weights[0].shape[:2]

    def column(input_gradients, column_inputs):
        layer, expert, gradient_E = column_inputs

        def active():
            of_layer = jax.tree.map(lambda leaf: leaf[layer], inputs)
            _, pull_back = jax.vjp(lambda x, w: respond(x, *w), of_layer, expert)
            extra, weight_gradients = pull_back(gradient_E)
            return jax.tree.map(lambda total, term: total.at[layer].add(term), input_gradients, extra), weight_gradients

        def idle():
            return input_gradients, jax.tree.map(jnp.zeros_like, expert)

        return lax.cond(jnp.any(gradient_E != 0), active, idle)

    gradient_CE = gradient_LEE.swapaxes(1, 2).reshape(layers * experts, -1)
    columns = (_layer_of_column(layers, experts), _merge_layers(weights), gradient_CE)
    input_gradients, weight_gradients = lax.scan(column, jax.tree.map(jnp.zeros_like, inputs), columns)
    return input_gradients, jax.tree.map(lambda g, w: g.reshape(w.shape), weight_gradients, weights)


squared_responses.defvjp(_forward, _backward)


def _layer_of_column(layers, experts):
    return jnp.repeat(jnp.arange(layers), experts)


def _merge_layers(weights):
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), weights)


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _squares(hidden):
    return jnp.sum(jnp.square(hidden), axis=-1)


def linear(x_ED, w_DF):
    """|x @ w|^2 of every row."""
    return _squares(_matmul(x_ED, w_DF))


def expected_linear(inputs, w_DF):
    """E |(x * noise) @ w|^2 for independent noise of mean 1: the clean square plus what its variance adds."""
    x_ED, spread_ED = inputs
    return linear(x_ED, w_DF) + _matmul(spread_ED, _squares(w_DF.astype(jnp.float32)))


def per_frobenius(respond, inputs, w_DF):
    """A linear response in units of the matrix's own size: shrinking the matrix gains nothing; 0 for a zero one."""
    size2 = jnp.sum(jnp.square(w_DF.astype(jnp.float32)))
    return respond(inputs, w_DF) / jnp.where(size2 > 0, size2, jnp.inf)


def _silu_gate(x_ED, w_gate_DF):
    return _squares(jax.nn.silu(_matmul(x_ED, w_gate_DF)))


def _swiglu(x_ED, w_gate_DF, w_up_DF):
    return _squares(jax.nn.silu(_matmul(x_ED, w_gate_DF)) * _matmul(x_ED, w_up_DF))


def _output(x_ED, w_gate_DF, w_up_DF, w_down_FD):
    return _squares(_matmul(jax.nn.silu(_matmul(x_ED, w_gate_DF)) * _matmul(x_ED, w_up_DF), w_down_FD))


# activation -> (squared response of one expert to every proxy, the weights it reads)
RESPONSES = {
    "gate": (linear, ("w_gate",)),
    "up": (linear, ("w_up",)),
    "silu_gate": (_silu_gate, ("w_gate",)),
    "swiglu": (_swiglu, ("w_gate", "w_up")),
    "output": (_output, ("w_gate", "w_up", "w_down")),
}
