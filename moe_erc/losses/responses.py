"""How strongly every expert responds to every proxy token: the squared norms behind M.

    S[l, i, j] = |h_j(proxy[l, i])|^2,   h_j one of the activations of expert j of layer l

Squares rather than norms, because slices of the hidden axis F that lie on different devices are
added before the root.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.numerics import divide

# Hidden units, of several small experts or of slices of experts, that are worth one turn of a loop
# on a CPU.
COLUMNS = 128
# What the rows and the responses of a turn may take elsewhere. A matmul of one expert is too small
# to keep a GPU busy.
GROUP_BYTES = 32 * 10**6

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

    def __call__(
        self,
        proxies: Proxies,
        matrices: dict[str, jax.Array],
        products: tuple[jax.Array, ...] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """((E,) float32, or (E + 1,) with size; what the matmuls gave).

        matrices: one expert's, or slices of them. products: what the matmuls gave in an earlier
        call with the same arguments; they are then not computed again.
        """
        matmul = _Matmul(self.precision, products)
        squares_E = _squares(self._activations(proxies.row, matrices, matmul))
        if proxies.spread is not None or self.with_size:
            [w_DF] = matrices.values()
            w_DF = w_DF.astype(jnp.float32)
        if proxies.spread is not None:
            # E |(x * noise) @ w|^2 for independent noise of mean 1 is the square of x @ w plus
            # what the variance of the noise adds.
            squares_E += matmul(proxies.spread, _squares(w_DF))
        if self.with_size:
            squares_E = jnp.append(squares_E, jnp.sum(jnp.square(w_DF)))
        return squares_E, tuple(matmul.products)

    def of_group(
        self,
        proxies: Proxies,
        matrices: dict[str, jax.Array],
        products: tuple[jax.Array, ...] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The call for the B experts of a group: (B, E) or (B, E + 1), and products (B, …).

        The matrices of a group of one have no axis of experts, and neither have its products.
        """
        first = next(iter(matrices.values()))
        if first.ndim == 2:
            squares_E, products = self(proxies, matrices, products)
            return squares_E[None], products

        # Where one operand alone has the axis of experts, XLA copies that operand, which is the
        # larger one.
        def for_every_expert(leaf):
            return jnp.broadcast_to(leaf, (len(first), *leaf.shape))

        return jax.vmap(self)(jax.tree.map(for_every_expert, proxies), matrices, products)

    def _activations(self, x_ED, matrices, matmul):
        """h of every proxy: (E, F), a device's own slice of it, or (E, D) for "output"."""
        if self.activation == "up":
            return matmul(x_ED, matrices["w_up"])
        gate_EF = matmul(x_ED, matrices["w_gate"])
        if self.activation == "gate":
            return gate_EF
        if self.activation == "silu_gate":
            return jax.nn.silu(gate_EF)
        hidden_EF = jax.nn.silu(gate_EF) * matmul(x_ED, matrices["w_up"])
        if self.activation == "swiglu":
            return hidden_EF
        out_ED = matmul(hidden_EF, matrices["w_down"])
        # An output is a sum over F. Its slices have to be added before it is squared.
        return out_ED if self.data_axis is None else lax.psum(out_ED, self.data_axis)


def _squares(hidden):
    return jnp.sum(jnp.square(hidden), axis=-1)


class _Matmul:
    """Matmuls in float32 that note what they gave, or that give what was noted."""

    def __init__(self, precision, noted=None):
        self.precision = precision
        self.products = []
        self._noted = noted

    def __call__(self, a, b):
        if self._noted is None:
            product = _matmul(self.precision, a, b)
        else:
            product = _noted_matmul(self.precision, a, b, self._noted[len(self.products)])
        self.products.append(product)
        return product


def _matmul(precision, a, b):
    return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _noted_matmul(precision, a, b, product):
    """a @ b, which is `product`."""
    return product


def _noted_forward(precision, a, b, product):
    return product, (a, b)


def _noted_backward(precision, operands, gradient):
    _, pull_back = jax.vjp(partial(_matmul, precision), *operands)
    return *pull_back(gradient), None


_noted_matmul.defvjp(_noted_forward, _noted_backward)


def squared_responses(
    response: Response, proxies: Proxies, weights: dict[str, jax.Array], platform: str
) -> jax.Array:
    """S[l, j, i] = response(proxies of layer l, weights of expert j)[i], (L, J, E) float32.

    proxies: leaves (L, E, D). weights: by name, (L, J, …) with an axis of the J experts. platform:
    of the devices.

    A few experts are computed at a time: nothing is (E, E, F). The backward pass recomputes them.
    """

    # One loop runs over the groups of all layers: nested loops would hold a copy of a layer's
    # weights.
    @jax.checkpoint
    def columns(group):
        layer, matrices = group
        return response.of_group(at(layer, proxies), matrices)[0]

    layer_G, _, matrices_G = groups(response, proxies, weights, platform)
    columns_GBE = lax.map(columns, (layer_G, matrices_G))
    layers = len(proxies.row)
    return columns_GBE.reshape(layers, -1, columns_GBE.shape[-1])


def at(layer: jax.Array, tree: Any) -> Any:
    """One layer of leaves (L, …)."""

    def of_leaf(leaf):
        return leaf[layer]

    return jax.tree.map(of_leaf, tree)


def groups(
    response: Response, proxies: Proxies, weights: dict[str, jax.Array], platform: str
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(layer of each group (G,), places of its experts among the J (G, B), matrices (G, B, …)).

    A group lies within one layer. Groups of one have no axis of their own in the matrices: XLA
    copies all weights for an axis of length 1.
    """
    first = weights[MATRICES[response.activation][0]]
    layers, experts, width, hidden = first.shape
    if platform == "cpu":
        most = COLUMNS // hidden
    else:
        most = GROUP_BYTES // (4 * proxies.row.shape[1] * (width + hidden))
    sizes = [size for size in range(1, experts + 1) if experts % size == 0]
    size = max(size for size in sizes if size <= max(most, 1))
    layer_G = jnp.repeat(jnp.arange(layers), experts // size)
    place_GB = jnp.tile(jnp.arange(experts).reshape(-1, size), (layers, 1))
    group = (-1, size) if size > 1 else (-1,)

    def in_groups(leaf):
        return leaf.reshape(*group, *leaf.shape[2:])

    return layer_G, place_GB, jax.tree.map(in_groups, weights)


def relative(sized: jax.Array, length: jax.Array, width: int) -> jax.Array:
    """sqrt(D) M[i, j] / (|proxy_i| |w_j|_F): 0 for zeros, NaN where a length is NaN.

    sized: the roots of the responses of expert j, (…, E), with its size behind them, (…, E + 1).
    length: that of the proxies, (…, E). width: D.

    Shrinking router or gate gains nothing. Roots are divided and not squares, because the
    derivative of 1 / square overflows for lengths of 1e-10.
    """
    M = sized[..., :-1]
    size = sized[..., -1:]
    return width**0.5 * M * divide(1, length) * divide(1, size)
