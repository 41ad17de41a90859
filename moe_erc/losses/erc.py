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

from moe_erc.checks import BadInput
from moe_erc.losses.precision import PRECISIONS
from moe_erc.losses.responses import RESPONSES, expected_linear, linear, relative, sized, squared_responses

ROUNDING = 2.0**-21  # of bound, draw and product together, with room
LARGEST = 1e18  # bound: that of a row of 1e-38 among others of 10 would be no float32


def noise_bound(router_ED, rows_R=None):
    """Half the relative distance to the nearest other row: the largest jitter that cannot swap two clusters (eq. 4).

    Returns (E,) float32, or (R,) for those rows alone, constant under differentiation; 0 for an all-zero row, for a
    row with a twin, and for E = 1.
    """
    router_ED = lax.stop_gradient(jnp.asarray(router_ED, jnp.float32))
    ids_E = jnp.arange(len(router_ED))
    rows_R = ids_E if rows_R is None else rows_R

    def nearest(row):
        # Direct differences, one row at a time: the Gram form |a|^2 + |b|^2 - 2ab loses close rows to cancellation.
        distance_E = _length(router_ED - router_ED[row])
        return jnp.min(jnp.where(ids_E == row, jnp.inf, distance_E))

    nearest_R, length_R = lax.map(nearest, rows_R), _length(router_ED[rows_R])
    defined_R = (length_R > 0) & jnp.isfinite(nearest_R)
    bound_R = jnp.where(defined_R, nearest_R, 0) / (2 * jnp.where(defined_R, length_R, 1))
    return jnp.minimum(bound_R, LARGEST)


def _length(rows):
    """Euclidean, of components whose squares float32 does not hold as well."""
    largest = jnp.max(jnp.abs(rows), axis=-1)
    scale = jnp.where(largest == 0, 1, largest)
    return scale * jnp.linalg.norm(rows / scale[..., None], axis=-1)


def perturb(router_ED, rng):
    """Proxy tokens: coordinates of row i scaled by noise in [1 - bound[i], 1 + bound[i]), constant to the gradient."""
    return _jitter(router_ED, noise_bound(router_ED), rng)


def coupling_matrix(proxy_ED, w_gate_EDF):
    """M[i, j] = |proxy_i @ w_gate_j|: how strongly the tokens of expert i excite expert j; (E, E) float32.

    A diagnosis: in full float32 on every platform.
    """
    proxy_ED, w_gate_EDF = jnp.asarray(proxy_ED, jnp.float32), jnp.asarray(w_gate_EDF)
    return root(squared_responses(partial(linear, precision="highest"), proxy_ED[None], (w_gate_EDF[None],)))[0]


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
    precision="high",
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
      normalize: make the loss scale-free: hinges on sqrt(D) M[i, j] / (|proxy_i| |w_j|_F), 1 for an isotropic matrix;
        with noise "expected", |proxy_i| is the root of E |proxy_i|^2.
      layer_reduction: "mean" keeps the weight comparable with a layer-averaged balance loss; "sum".
      precision: of the matmuls on a TPU or GPU: "default" (one bfloat16 pass on a TPU), "high" (three), "highest" (six:
        float32). Configs say "auto", which `precision.py` resolves. On a CPU all are float32.

    Loss and gradients are finite while M stays below 1e18, and with `normalize` or noise "expected" |proxy| and |w_j|_F
    as well: their squares are float32, where what is below 1e-18 may count as 0. The loss of one expert is 0; that of
    more is not finite where a parameter that is read is not.

    Raises:
      ValueError: for a word that is none of the above, or one that has no meaning with a non-linear activation.
    """
    words = {"noise": noise, "activation": activation, "layer_reduction": layer_reduction, "precision": precision}
    check_options(**words, normalize=normalize)
    router_LED, weights, keys_L = stack(params, rng, activation, noise)
    router_LED = lax.stop_gradient(router_LED) if detach_router else router_LED
    inputs, length2_LE = proxies(router_LED, lax.map(noise_bound, router_LED), keys_L, noise)
    M_LEE = root(squared_responses(response(activation, noise, normalize, precision), inputs, weights))
    if normalize:
        M_LEE = relative(M_LEE, root(length2_LE), router_LED.shape[-1])
    loss_L = jax.vmap(coupling_penalty, in_axes=(0, None))(M_LEE, alpha)
    return LAYER_REDUCTIONS[layer_reduction](loss_L)


def check_options(*, alpha=1.0, noise, activation, detach_router=False, normalize, layer_reduction, precision="high"):
    """Refuses words that `erc_loss` does not know, and options that only a linear activation has."""
    del detach_router  # either value will do
    if not 0 <= alpha < float("inf"):
        raise BadInput(f"alpha is {alpha}; it must be a finite number >= 0")
    for name, value, known in (
        ("noise", noise, ("uniform", "expected", "none")),
        ("activation", activation, tuple(RESPONSES)),
        ("layer_reduction", layer_reduction, tuple(LAYER_REDUCTIONS)),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise BadInput(f"{name} is {value!r}; use one of {', '.join(known)}")
    if RESPONSES[activation][0] is not linear and (noise == "expected" or normalize):
        option = "noise 'expected'" if noise == "expected" else "normalize"
        raise BadInput(f"{option} needs a linear activation (gate or up), not {activation!r}")


def stack(params, rng, activation, noise):
    """(router_LED, the matrices that `activation` reads, keys_L): one layer becomes a stack of one."""
    if noise == "uniform" and rng is None:
        raise BadInput("noise 'uniform' draws from rng, which is None; pass a key, or noise 'expected' or 'none'")
    router, names = jnp.asarray(params["router"], jnp.float32), RESPONSES[activation][1]
    weights = tuple(jnp.asarray(params[name]) for name in names)
    if router.ndim == 2:  # it draws from the key itself
        return jax.tree.map(lambda leaf: leaf[None], (router, weights, rng))
    return router, weights, jax.random.split(rng, len(router)) if noise == "uniform" else rng


def proxies(router_LED, bound_LE, keys_L, noise):
    """What the responses read, and the squared lengths of the proxies: drawn, clean, or in expectation."""
    if noise == "expected":
        # The variance of a uniform draw of half-width bound * router; the square of a bound alone may overflow.
        spread_LED = jnp.square(bound_LE[..., None] * router_LED) / 3
        return (router_LED, spread_LED), jnp.sum(router_LED**2 + spread_LED, axis=-1)
    if noise == "uniform":
        router_LED = lax.map(lambda arguments: _jitter(*arguments), (router_LED, bound_LE, keys_L))
    return router_LED, jnp.sum(router_LED**2, axis=-1)


def _jitter(router_ED, bound_E, rng):
    bound_E1 = bound_E[:, None]
    noise_ED = 1 - bound_E1 + 2 * bound_E1 * jax.random.uniform(rng, router_ED.shape)
    # At its very ends the interval is as much shorter as float32 may have rounded: none ends up between two clusters.
    inside_E1 = jnp.maximum(bound_E1 - ROUNDING * (1 + bound_E1), 0)
    return router_ED * lax.stop_gradient(jnp.clip(noise_ED, 1 - inside_E1, 1 + inside_E1))


def response(activation, noise, normalize, precision):
    """What `squared_responses` asks of one expert."""
    respond = expected_linear if noise == "expected" else RESPONSES[activation][0]
    respond = partial(respond, precision=precision)
    return partial(sized, respond) if normalize else respond


def root(squares):
    """Square root with gradient 0 at 0, where the norm has none; of NaN it is NaN."""
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


LAYER_REDUCTIONS = {"mean": jnp.mean, "sum": jnp.sum}
