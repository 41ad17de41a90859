"""Expert-router coupling: an E x E loss on parameters alone, whatever the batch (ERC, arXiv 2512.23447).

    bound[i]  = min_{j != i} |router[i] - router[j]| / (2 |router[i]|)                              (eq. 4)
    proxy[i]  = router[i] * sg(noise[i]),   noise[i] ~ Uniform(1 - bound[i], 1 + bound[i]) per coordinate
    M[i, j]   = |proxy[i] @ w_gate[j]|
    loss      = 1/E^2 sum_{i != j} relu(M[i, j] - alpha M[i, i]) + relu(M[j, i] - alpha M[i, i])    (eq. 3)

A router row stands for the tokens it attracts. The loss asks that such a token excite its own expert most, and
that an expert be excited most by its own tokens. Routing itself keeps the clean router.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.losses.responses import RESPONSES, expected_linear, linear, per_frobenius, squared_responses


def noise_bound(router_ED):
    """Half the relative distance to the nearest other row: the largest jitter that cannot swap two clusters (eq. 4).

    Returns (E,) float32, constant under differentiation; 0 for an all-zero row, for a row with a twin, and for E = 1.
    """
    router_ED = lax.stop_gradient(jnp.asarray(router_ED, jnp.float32))
    # Direct differences, one row at a time: the Gram form |a|^2 + |b|^2 - 2ab loses close rows to cancellation.
    distance_EE = lax.map(lambda row_D: jnp.linalg.norm(router_ED - row_D, axis=-1), router_ED)
    nearest_E = jnp.min(jnp.where(jnp.eye(len(router_ED), dtype=bool), jnp.inf, distance_EE), axis=-1)
    length_E = jnp.linalg.norm(router_ED, axis=-1)
    defined_E = (length_E > 0) & jnp.isfinite(nearest_E)
    return jnp.where(defined_E, nearest_E, 0) / (2 * jnp.where(defined_E, length_E, 1))


def perturb(router_ED, rng):
    """Proxy tokens: coordinates of row i scaled by noise in [1 - bound[i], 1 + bound[i]), constant to the gradient."""
    bound_E1 = noise_bound(router_ED)[:, None]
    noise_ED = 1 - bound_E1 + 2 * bound_E1 * jax.random.uniform(rng, router_ED.shape)
    return router_ED * lax.stop_gradient(noise_ED)


def coupling_matrix(proxy_ED, w_gate_EDF):
    """M[i, j] = |proxy_i @ w_gate_j|: how strongly the tokens of expert i excite expert j; (E, E) float32."""
    proxy_ED, w_gate_EDF = jnp.asarray(proxy_ED, jnp.float32), jnp.asarray(w_gate_EDF)
    return _root(squared_responses(linear, proxy_ED[None], (w_gate_EDF[None],)))[0]


def coupling_penalty(M_EE, alpha):
    """Mean over E^2 pairs of what M[i, j] exceeds alpha M[i, i] and alpha M[j, j] by (eq. 3); 0 when fully coupled."""
    experts = len(M_EE)
    bar_E = alpha * jnp.diagonal(M_EE)
    excess_EE = jax.nn.relu(M_EE - bar_E[:, None]) + jax.nn.relu(M_EE - bar_E[None, :])
    return jnp.sum(jnp.where(jnp.eye(experts, dtype=bool), 0, excess_EE)) / experts**2


def erc_loss(
    params,
    rng,
    *,
    alpha=1.0,
    noise="uniform",
    activation="gate",
    detach_router=False,
    normalize=False,
    layer_reduction="mean",
):
    """The ERC loss of one MoE layer, or of a stack of layers, as a scalar.

    Args:
      params: {"router": (E, D), "w_gate": (E, D, F)}, with "w_up" (E, D, F) and "w_down" (E, F, D) where `activation`
        needs them; or all of them with a leading layer axis L, and layer l draws from `jax.random.split(rng, L)[l]`.
      rng: a typed key; may be None unless `noise` is "uniform".
      alpha: the share of the matching response that a foreign one may reach unpenalised; the paper uses 1 at E = 64.
      noise: "uniform" (a draw), "expected" (M is the root of the exact expectation of its square) or "none".
      activation: what |.| measures: "gate", "up", "silu_gate", "swiglu" or "output" of the expert.
      detach_router: train the experts alone (another reading of the paper's pseudocode).
      normalize: make the loss scale-free: hinges on sqrt(D) M[i, j] / (|proxy_i| |w_j|_F), 1 for an isotropic matrix.
      layer_reduction: "mean" keeps the weight comparable with a layer-averaged balance loss; "sum".

    Raises:
      ValueError: for a word that is none of the above, or one that has no meaning with a non-linear activation.
    """
    check_options(noise=noise, activation=activation, normalize=normalize, layer_reduction=layer_reduction)
    if noise == "uniform" and rng is None:
        raise ValueError("noise 'uniform' draws from rng, which is None; pass a key, or noise 'expected' or 'none'")
    respond, names = RESPONSES[activation]
    router, weights = jnp.asarray(params["router"], jnp.float32), tuple(jnp.asarray(params[name]) for name in names)
    keys = rng
    if router.ndim == 2:  # one layer is a stack of one that draws from the key itself
        router, weights, keys = jax.tree.map(lambda leaf: leaf[None], (router, weights, keys))
    elif noise == "uniform":
        keys = jax.random.split(rng, len(router))
    router = lax.stop_gradient(router) if detach_router else router

    inputs, length2_LE = _proxies(router, keys, noise)
    respond = expected_linear if noise == "expected" else respond
    if normalize:
        row_scale_LE = router.shape[-1] / jnp.where(length2_LE > 0, length2_LE, jnp.inf)
        squares_LEE = row_scale_LE[:, :, None] * squared_responses(partial(per_frobenius, respond), inputs, weights)
    else:
        squares_LEE = squared_responses(respond, inputs, weights)
    loss_L = jax.vmap(coupling_penalty, in_axes=(0, None))(_root(squares_LEE), alpha)
    return jnp.mean(loss_L) if layer_reduction == "mean" else jnp.sum(loss_L)


def check_options(*, alpha=1.0, noise, activation, normalize, layer_reduction, **_):
    """Refuses words that `erc_loss` does not know, and options that only a linear activation has."""
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}; it must be a finite number >= 0")
    for name, value, known in (
        ("noise", noise, ("uniform", "expected", "none")),
        ("activation", activation, tuple(RESPONSES)),
        ("layer_reduction", layer_reduction, ("mean", "sum")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}")
    if RESPONSES[activation][0] is not linear and (noise == "expected" or normalize):
        option = "noise 'expected'" if noise == "expected" else "normalize"
        raise ValueError(f"{option} needs a linear activation (gate or up), not {activation!r}")


def _proxies(router_LED, keys_L, noise):
    """What the responses read, and the squared lengths of the proxies: drawn, clean, or in expectation."""
    if noise == "expected":
        variance_LE = lax.map(noise_bound, router_LED) ** 2 / 3  # of a uniform draw of half-width bound
        spread_LED = variance_LE[..., None] * router_LED**2
        return (router_LED, spread_LED), jnp.sum(router_LED**2 + spread_LED, axis=-1)
    draw = noise == "uniform"
    proxies_LED = lax.map(lambda arguments: perturb(*arguments), (router_LED, keys_L)) if draw else router_LED
    return proxies_LED, jnp.sum(proxies_LED**2, axis=-1)


def _root(squares):
    """Square root with gradient 0 at 0, where the norm has none."""
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
