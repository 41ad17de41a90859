"""Expert-router coupling: an E x E loss on parameters alone, whatever the batch.

ERC, arXiv 2512.23447:

    bound[i]  = min_{j != i} |router[i] - router[j]| / (2 |router[i]|)                     (eq. 4)
    proxy[i]  = router[i] * sg(noise[i]),   noise[i] ~ Uniform(1 - bound[i], 1 + bound[i])
    M[i, j]   = |proxy[i] @ w_gate[j]|
    loss      = 1/E^2 sum_{i != j} relu(M[i, j] - alpha M[i, i]) + relu(M[j, i] - alpha M[i, i])
                                                                                           (eq. 3)

Each coordinate of a row has a noise of its own. A router row stands for the tokens it attracts. The
loss is 0 when such a token excites its own expert most, and an expert is excited most by its own
tokens, by the factor alpha. Routing itself keeps the clean router.

The path of the loss: `erc_loss` checks its options and stacks the layers, `devices.py` hands every
device its slices, `_losses_of_layers` computes bounds and proxies, `hinges.py` the hinges and their
gradient from M (`responses.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput, Range, among, check_fields, in_range, one_of
from moe_erc.losses.base import Loss, Needs
from moe_erc.losses.devices import Devices
from moe_erc.losses.hinges import Matrix, penalty, penalty_of
from moe_erc.losses.precision import PRECISIONS, resolve
from moe_erc.losses.responses import LINEAR, MATRICES, Proxies, Response
from moe_erc.numerics import divide, length, square_root

NOISES = ("uniform", "expected", "none")
LAYER_REDUCTIONS = {"mean": jnp.mean, "sum": jnp.sum}
# The relative rounding error of bound, draw and product together, with room.
ROUNDING = 2.0**-21
# The largest bound. That of a row of length 1e-38 among others of length 10 would be no float32.
LARGEST = 1e18


@dataclasses.dataclass(frozen=True)
class ErcOptions:
    """The options of `erc_loss`, which explains them. In a config, precision may be "auto".

    alpha may be a traced number, which is not checked.
    """

    alpha: float | jax.Array
    noise: str = among(*NOISES)
    activation: str = among(*MATRICES)
    detach_router: bool
    normalize: bool
    layer_reduction: str = among(*LAYER_REDUCTIONS)
    precision: str = among("auto", *PRECISIONS)

    def __post_init__(self):
        check_fields(self)
        if not isinstance(self.alpha, jax.core.Tracer):
            in_range("alpha", float(self.alpha), Range(least=0))
        if self.activation in LINEAR:
            return
        reason = f"needs a linear activation ({' or '.join(LINEAR)}), not {self.activation!r}"
        if self.noise == "expected":
            raise BadInput(f"noise: 'expected' {reason}")
        if self.normalize:
            raise BadInput(f"normalize: True {reason}")


# ------------------------------------------------------------------------------ noise and proxies
def noise_bound(router_ED: jax.Array, rows_R: jax.Array | None = None) -> jax.Array:
    """Half the relative distance to the nearest other row (eq. 4), (E,) float32.

    It is the largest jitter that cannot swap two clusters. It is constant under differentiation,
    and 0 for an all-zero row, for a row with a twin, and for E = 1.

    rows_R: the numbers of the rows that are wanted, (R,); the result is then (R,).
    """
    router_ED = lax.stop_gradient(jnp.asarray(router_ED, jnp.float32))
    ids_E = jnp.arange(len(router_ED))
    rows_R = ids_E if rows_R is None else rows_R

    def nearest(row):
        # Direct differences, one row at a time. The Gram form |a|^2 + |b|^2 - 2ab loses close rows
        # to cancellation.
        distance_E = length(router_ED - router_ED[row])
        return jnp.min(jnp.where(ids_E == row, jnp.inf, distance_E))

    nearest_R = lax.map(nearest, rows_R)
    length_R = length(router_ED[rows_R])
    has_bound_R = (length_R > 0) & jnp.isfinite(nearest_R)
    bound_R = jnp.where(has_bound_R, divide(nearest_R, 2 * length_R), 0)
    return jnp.minimum(bound_R, LARGEST)


def perturb(router_ED: jax.Array, rng: jax.Array) -> jax.Array:
    """Proxy tokens, (E, D): row i scaled by noise in [1 - bound[i], 1 + bound[i]).

    Each coordinate has a noise of its own, constant to the gradient.
    """
    return _jitter(router_ED, noise_bound(router_ED), rng)


def _jitter(router_ED, bound_E, rng):
    bound_E1 = bound_E[:, None]
    noise_ED = 1 - bound_E1 + 2 * bound_E1 * jax.random.uniform(rng, router_ED.shape)
    # The interval is shortened at both ends by what float32 may have rounded, so that no draw ends
    # up between two clusters.
    inside_E1 = jnp.maximum(bound_E1 - ROUNDING * (1 + bound_E1), 0)
    return router_ED * lax.stop_gradient(jnp.clip(noise_ED, 1 - inside_E1, 1 + inside_E1))


def _proxies(router_LED, bound_LE, keys_L, noise):
    """(Proxies, their squared lengths (L, E)); the noise is drawn, absent or in expectation."""
    if noise == "expected":
        # The variance of a uniform draw of half-width bound * router. The product is squared, since
        # the square of the bound alone may overflow.
        spread_LED = jnp.square(bound_LE[..., None] * router_LED) / 3
        return Proxies(router_LED, spread_LED), jnp.sum(router_LED**2 + spread_LED, axis=-1)
    row_LED = router_LED
    if noise == "uniform":

        def of_layer(layer):
            router_ED, bound_E, key = layer
            return _jitter(router_ED, bound_E, key)

        row_LED = lax.map(of_layer, (router_LED, bound_LE, keys_L))
    return Proxies(row_LED), jnp.sum(row_LED**2, axis=-1)


# ----------------------------------------------------------------------------- matrix and penalty
def coupling_matrix(
    proxy_ED: jax.Array, w_gate_EDF: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
    """M[i, j] = |proxy_i @ w_gate_j|: how strongly the tokens of expert i excite expert j.

    (E, E) float32, or (L, E, E) where both arrays have a leading layer axis L. It serves diagnosis
    and is computed in full float32 on every platform. Over a mesh of axes (data, expert) the
    columns stay split by expert.
    """
    proxy_LED = jnp.asarray(proxy_ED, jnp.float32)
    w_gate_LEDF = jnp.asarray(w_gate_EDF)
    is_one_layer = proxy_LED.ndim == 2
    if is_one_layer:
        proxy_LED = proxy_LED[None]
        w_gate_LEDF = w_gate_LEDF[None]
    devices = Devices(mesh)
    out_spec = P(None, None, devices.expert_axis)

    def local(proxy_LED, weights, _):
        matrix = Matrix(Response("gate", "highest"), devices)
        M_LJE = matrix.columns(devices.as_own(Proxies(proxy_LED)), None, weights)
        return M_LJE.swapaxes(1, 2)

    M_LEE = devices.run(local, out_spec, proxy_LED, {"w_gate": w_gate_LEDF}, None)
    return M_LEE[0] if is_one_layer else M_LEE


def coupling_penalty(M_EE: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """Mean over E^2 pairs of what M[i, j] exceeds alpha M[i, i] and alpha M[j, j] by (eq. 3).

    0 when router and experts are fully coupled.
    """
    return penalty(M_EE.T[None], alpha, Devices())[0]


# ---------------------------------------------------------------------------------------- the loss
def erc_loss(
    params: dict[str, jax.Array],
    rng: jax.Array | None,
    *,
    alpha: float | jax.Array = 1.0,
    noise: str = "uniform",
    activation: str = "gate",
    detach_router: bool = False,
    normalize: bool = False,
    layer_reduction: str = "mean",
    precision: str = "high",
    mesh: Mesh | None = None,
) -> jax.Array:
    """The ERC loss of one MoE layer, or of a stack of layers, as a scalar.

    Args:
      params: {"router": (E, D), "w_gate": (E, D, F)}, with "w_up" (E, D, F) and "w_down" (E, F, D)
        where `activation` needs them; or all of them with a leading layer axis L, and layer l
        draws from `jax.random.split(rng, L)[l]`.
      rng: a typed key; may be None unless `noise` is "uniform".
      alpha: the share of the matching response that a foreign one may reach unpenalised; the paper
        uses 1 at E = 64.
      noise: "uniform" (a draw), "expected" (M is the root of the exact expectation of its square)
        or "none".
      activation: what |.| measures: "gate", "up", "silu_gate", "swiglu" or "output" of the expert.
      detach_router: train the experts alone (another reading of the paper's pseudocode).
      normalize: make the loss scale-free: hinges on sqrt(D) M[i, j] / (|proxy_i| |w_j|_F), which
        is 1 for an isotropic matrix; with noise "expected", |proxy_i| is the root of E |proxy_i|^2.
      layer_reduction: "mean" keeps the weight comparable with a layer-averaged balance loss; "sum".
      precision: of the matmuls on a TPU or GPU: "default" (one bfloat16 pass on a TPU), "high"
        (three), "highest" (six: float32). On a CPU all are float32. Configs say "auto", which
        `precision.py` resolves; what a step costs is unknown here.
      mesh: of axes (data, expert); None is one device. It only decides where a sum is taken.
        w_gate and w_up lie split by expert and along F over data, w_down by expert and along F;
        the router lies whole on every device.

    Loss and gradients are finite while M stays below 1e18, and with `normalize` or noise "expected"
    |proxy| and |w_j|_F as well: their squares are float32, where what is below 1e-18 may count as
    0. The loss of one expert is 0; that of more is not finite where a parameter that is read is
    not.

    Raises:
      BadInput: for a word that is none of the above, for one that has no meaning with a non-linear
        activation, and for noise "uniform" without a key.
    """
    one_of("precision", precision, PRECISIONS)
    options = ErcOptions(
        alpha=alpha,
        noise=noise,
        activation=activation,
        detach_router=detach_router,
        normalize=normalize,
        layer_reduction=layer_reduction,
        precision=precision,
    )
    devices = Devices(mesh)
    router_LED, weights, keys_L = _stack(params, rng, options)
    if detach_router:
        router_LED = lax.stop_gradient(router_LED)

    def local(router_LED, weights, keys_L):
        return _losses_of_layers(options, devices, router_LED, weights, keys_L)

    loss_L = devices.run(local, P(), router_LED, weights, keys_L)
    return LAYER_REDUCTIONS[layer_reduction](loss_L)


def _stack(params, rng, options):
    """(router_LED, the matrices that are read, keys_L or None); one layer is a stack of one."""
    is_drawn = options.noise == "uniform"
    if is_drawn and rng is None:
        raise BadInput(
            "noise 'uniform' draws from rng, which is None; "
            "pass a key, or noise 'expected' or 'none'"
        )
    router = jnp.asarray(params["router"], jnp.float32)
    weights = {name: jnp.asarray(params[name]) for name in MATRICES[options.activation]}
    if router.ndim == 2:
        # One layer draws from the key itself.
        keys_L = rng[None] if is_drawn else None
        weights = {name: leaf[None] for name, leaf in weights.items()}
        return router[None], weights, keys_L
    keys_L = jax.random.split(rng, len(router)) if is_drawn else None
    return router, weights, keys_L


def _losses_of_layers(options, devices, router_LED, weights, keys_L):
    """(L,): the loss of every layer, from a device's own slices of the weights."""
    experts = router_LED.shape[1]
    own = weights[MATRICES[options.activation][0]].shape[1]
    own_J = devices.own_experts(experts, own)
    own_EJ = jnp.arange(experts)[:, None] == own_J

    # Each device computes the bounds of its own experts, and receives the others'.
    def own_bounds(router_ED):
        return noise_bound(router_ED, own_J)

    bound_LJ = lax.map(own_bounds, router_LED)
    bound_LEJ = jnp.where(own_EJ, bound_LJ[:, None, :], 0)
    bound_LE = devices.sum_over_experts(jnp.sum(bound_LEJ, axis=-1))
    proxies, length2_LE = _proxies(router_LED, bound_LE, keys_L, options.noise)

    response = Response(
        activation=options.activation,
        precision=options.precision,
        with_size=options.normalize,
        data_axis=devices.data_axis,
    )
    length_LE = square_root(length2_LE) if options.normalize else None
    alpha = jnp.asarray(options.alpha, jnp.float32)
    proxies = devices.as_own(proxies)
    return penalty_of(Matrix(response, devices), proxies, length_LE, weights, alpha)


# ---------------------------------------------------------------------------- the trainer's record
def compute(
    options: ErcOptions,
    params: Any,
    rng: jax.Array | None,
    model: Any,
    shape_BT: tuple[int, int] | None,
) -> jax.Array:
    """The loss of all layers of the model, over the mesh on which its parameters lie."""
    of_layers = params["layers"]["moe"] | {"router": model.router_rows(params)}
    chosen = dataclasses.asdict(options)
    chosen["precision"] = resolve(options.precision, model.config, options.activation, shape_BT)
    return erc_loss(of_layers, rng, mesh=model.mesh, **chosen)


LOSS = Loss(
    kind="parameters",
    compute=compute,
    options=ErcOptions,
    needs=Needs("has_rows", "couples router rows with experts"),
)
