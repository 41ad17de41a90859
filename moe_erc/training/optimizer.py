"""From gradients to updates: clip, choose a direction, decay the matrices, scale by the schedule.

    update = -rate(t) * (direction(clip(grad)) + weight_decay * matrix)

Clipping is by the global norm. Weight decay spares what is no matrix: scales of norms, biases,
thresholds, temperatures. OLMoE decayed the scales of its norms as well: `decay_norms`.

AdamW takes Adam's direction everywhere. Muon (Jordan et al., 2024) orthogonalises the momentum of
every hidden matrix, each layer's and each expert's on its own, and leaves embeddings, head, router
and norm scales to Adam. Its steps are scaled to the root mean square of Adam's (arXiv 2502.16982),
so both share one learning rate and one weight decay.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_erc.checks import BadInput, among, check_fields, within

MUON_MOMENTUM = 0.95  # the published value; it is no option, so that muon needs none
NORM = "_norm"  # how the name of a norm's scale ends
# The root mean square of Adam's direction in practice. That of an orthogonal (m, n) matrix is
# 1 / sqrt(max(m, n)).
ADAM_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The `optimizer` block of a config; BadInput for a value beyond its limit."""

    name: str = among("adamw", "muon")
    learning_rate: float = within(above=0)  # the peak
    schedule: str = among("constant", "cosine", "linear", "wsd")
    warmup_steps: int = within(least=0)
    # Of wsd alone: the last share of all steps, in which the rate falls.
    decay_fraction: float = within(above=0, most=1)
    final_fraction: float = within(least=0, most=1)  # the rate at the end, as a share of the peak
    b1: float = within(least=0, below=1)
    b2: float = within(least=0, below=1)
    eps: float = within(above=0)
    weight_decay: float = within(least=0)
    # The most that the norm of the gradient of all parameters together may be.
    clip_norm: float = within(above=0, finite=False, note="inf never clips")
    decay_norms: bool = False  # whether the scales of norms decay as matrices do

    def __post_init__(self):
        check_fields(self, "optimizer")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The rate of update t = 0 … steps - 1: linear warm-up, then the schedule.

    The schedule would reach its end at t = steps. Update 0 has the rate peak / (warmup_steps + 1),
    and update `warmup_steps` is the first at the peak. BadInput if the parts do not fit into the
    steps.
    """
    peak = config.learning_rate
    warmup = config.warmup_steps
    if warmup >= steps:
        raise BadInput(
            f"optimizer.warmup_steps: {warmup} must be below {steps}, the steps of the run; "
            "lower it"
        )
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, _after_warmup(config, steps)], boundaries=[warmup])


def updates_done(opt_state: Any) -> jax.Array:
    """The number of updates that the schedule has counted, int32, without skipped steps.

    opt_state: the state of the chain that `make_optimizer` makes, whose last link is the schedule.
    """
    return opt_state[-1].count


def _after_warmup(config, steps):
    peak = config.learning_rate
    final = config.learning_rate * config.final_fraction
    remaining = steps - config.warmup_steps
    match config.schedule:
        case "constant":
            return optax.constant_schedule(peak)
        case "cosine":
            return optax.cosine_decay_schedule(peak, remaining, alpha=config.final_fraction)
        case "linear":
            return optax.linear_schedule(peak, final, remaining)
        case "wsd":
            decay = max(1, round(config.decay_fraction * steps))
            if decay > remaining:
                raise BadInput(
                    f"optimizer.decay_fraction: {config.decay_fraction} decays over {decay} of "
                    f"{steps} steps, but only {remaining} follow optimizer.warmup_steps = "
                    f"{config.warmup_steps}; lower one of the two"
                )
            return optax.linear_schedule(peak, final, decay, transition_begin=remaining - decay)


def _names(path):
    return tuple(key.key for key in path)


def _is_matrix(path, leaf):
    """Whether a leaf is a matrix or a stack of them."""
    # Below `layers`, the leading axis counts layers, not rows.
    axes = leaf.ndim - 1 if "layers" in _names(path) else leaf.ndim
    return axes >= 2


def decay_mask(params: Any, norms: bool = False) -> Any:
    """A tree of booleans: which parameters weight decay applies to.

    True for matrices and, with `norms`, for the scales of norms. False for all else, such as biases
    and the thresholds and temperatures of routers.
    """

    def is_decayed(path, leaf):
        is_norm = _names(path)[-1].endswith(NORM)
        return _is_matrix(path, leaf) or (norms and is_norm)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def directions(params: Any, router_parameters: Mapping) -> Any:
    """A tree of labels for Muon: "muon" for the hidden matrices, "adam" for the rest.

    router_parameters: {name: Parameter} of the router. Rows of a router are no hidden map: they are
        compared one by one with tokens and experts, so they keep Adam.
    """
    rows = {name for name, parameter in router_parameters.items() if not parameter.orthogonalized}

    def label(path, leaf):
        is_hidden = "layers" in _names(path) and rows.isdisjoint(_names(path))
        return "muon" if is_hidden and _is_matrix(path, leaf) else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _last_two_axes(params):
    """For every leaf, a stack of (input, output) matrices, the axes that Muon orthogonalises.

    The matrices of the axes before them are orthogonalised one by one.
    """

    def last_two(_):
        return optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    return jax.tree.map(last_two, params)


def _to_adam_rms(updates, params=None):
    """The updates of Muon, scaled to the root mean square of Adam's."""
    del params  # optax hands them over; only shapes matter here

    def scale(update):
        return ADAM_RMS * jnp.sqrt(max(update.shape[-2:])) * update

    return jax.tree.map(scale, updates)


def make_optimizer(config: OptimizerConfig, steps: int, model: Any) -> optax.GradientTransformation:
    """The optax chain of the module's equation; its state has the dtype of the parameters.

    model: the ModelConfig, whose router says which of its parameters Muon leaves to Adam.
    """
    direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "muon":
        orthogonal = optax.chain(
            optax.contrib.scale_by_muon(
                beta=MUON_MOMENTUM, weight_dimension_numbers=_last_two_axes
            ),
            optax.stateless(_to_adam_rms),
        )
        label = functools.partial(directions, router_parameters=model.router.parameters(model))
        direction = optax.partition({"muon": orthogonal, "adam": direction}, label)
    mask = functools.partial(decay_mask, norms=config.decay_norms)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        direction,
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )
