"""One optimizer step, pure in (state, batch): forward, losses, gradients, update.

The guard decides whether the update is taken. Micro-batches are a scan over the accumulation axis.
Losses on parameters alone are computed once per step, outside the scan. Every use of randomness has
a key of its own, named after the use (`random_keys.py`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_erc.losses.objective import Objective
from moe_erc.measures.load import EXPERTS_PER_TOKEN
from moe_erc.measures.registry import of_load
from moe_erc.measures.training import (
    GRADIENT_NORM,
    LEARNING_RATE,
    LOSS,
    PARAMETER_NORM,
    SCALE,
    TOTAL,
)
from moe_erc.model.context import of_batch
from moe_erc.model.transformer import Transformer
from moe_erc.moe.routers.base import RouterState
from moe_erc.moe.routing import StepCounts
from moe_erc.numerics import divide
from moe_erc.sharding import replicate, shard_batch
from moe_erc.training.guard import GuardConfig, judge
from moe_erc.training.optimizer import updates_done
from moe_erc.training.state import TrainState


def make_train_step(
    model: Transformer,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    micro_batches: int,
    state_shardings: Any,
    guard: GuardConfig = GuardConfig(),  # noqa: B008
    schedule: optax.Schedule | None = None,
) -> Callable:
    """The jitted function (state, batch) -> (state, metrics). The state is donated.

    batch: all sequences of the step, which `micro_batches` divides.
    schedule: that of the learning rate, of an optimizer of `make_optimizer`. Where it is given, the
        rate is a metric.
    """
    gradients_of = step_gradients(model, objective, micro_batches)

    def train_step(state, batch):
        gradients, terms, counts = gradients_of(state, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = objective.decouple(optax.apply_updates(state.params, updates))
        before = RouterState(state.router, state.loss_scales)
        router, moved = model.config.router.after_step(model.config, before, counts)
        scales = state.loss_scales | moved

        metrics = {LOSS.of(name).key: value for name, value in terms.items()}
        metrics |= of_load(counts.assignments_LE)
        metrics |= {SCALE.of(name).key: value for name, value in scales.items()}
        metrics[TOTAL.key] = objective.total(terms, state.loss_scales)
        metrics[EXPERTS_PER_TOKEN.key] = counts.experts_per_token_L
        metrics[GRADIENT_NORM.key] = optax.tree.norm(gradients)
        if schedule is not None:
            metrics[LEARNING_RATE.key] = schedule(updates_done(state.opt_state))
        # The guard judges what goes into the update. If it judged the norm of what comes out, the
        # whole update would be computed twice: for the norm, and for the choice between old and
        # new.
        accepted, guard_after, told = judge(guard, state.guard, metrics)
        changed = {
            "params": params,
            "opt_state": opt_state,
            "router": router,
            "loss_scales": scales,
        }
        kept = {name: getattr(state, name) for name in changed}
        changed = jax.tree.map(functools.partial(jnp.where, accepted), changed, kept)
        metrics |= told
        metrics[PARAMETER_NORM.key] = optax.tree.norm(changed["params"])
        return state.replace(step=state.step + 1, guard=guard_after, **changed), metrics

    batch_shardings = shard_batch(model.mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_shardings),
        out_shardings=(state_shardings, replicate(model.mesh)),
    )


def step_gradients(model: Transformer, objective: Objective, micro_batches: int) -> Callable:
    """A function (state, batch) -> (gradients, terms, StepCounts) of one step.

    It changes nothing: `make_train_step` makes the update.
    """
    model = model.clone(observers=objective.observers)

    def gradients_of(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        router = model.config.router.before_step(model.config, state.router, rng)
        of_batch = functools.partial(micro_batch_gradients, model, objective, state, router)
        config = model.config
        no_counts = StepCounts(jnp.zeros((config.layers, config.experts), jnp.int32), jnp.int32(0))
        parts = split(batch, micro_batches)
        gradients, terms, counts = batch_gradients(of_batch, parts, no_counts)
        shape_BT = batch["mask_BT"].shape
        parameter_terms, parameter_gradients = parameter_only(
            objective, state.params, rng, state.loss_scales, shape_BT
        )
        gradients = jax.tree.map(jnp.add, gradients, parameter_gradients)
        return gradients, terms | parameter_terms, counts

    return gradients_of


def parameter_only(
    objective: Objective,
    params: Any,
    rng: jax.Array,
    scales: Mapping,
    shape_BT: tuple[int, int] | None = None,
) -> tuple[dict, Any]:
    """(terms, gradients) of the losses on parameters alone.

    scales: {loss: factor of its weight}. shape_BT: that of the step's batch, if there is one.
    """

    def loss(params):
        terms = objective.of_parameters(params, rng, shape_BT)
        return objective.total(terms, scales), terms

    (_, terms), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return terms, gradients


def split(batch: Mapping, micro_batches: int) -> Mapping:
    """(B, …) -> (M, B / M, …) with every micro-batch spread over all devices, as the batch is."""

    def of_leaf(leaf):
        return leaf.reshape(-1, micro_batches, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(of_leaf, batch)


def batch_gradients(
    of_batch: Callable, micro_batches: Mapping, no_counts: StepCounts
) -> tuple[Any, dict, StepCounts]:
    """(gradients, terms, StepCounts) over all micro-batches of a step.

    of_batch: of_batch(batch, earlier) gives the three for one micro-batch. `earlier` is the summed
        counts of the micro-batches before; None where there is one micro-batch alone.
    micro_batches: leaves (M, B / M, …), as `split` gives them.
    no_counts: the counts before the first micro-batch, zeros.

    Counts are added up. Gradients and terms are means, weighed by the shares of unmasked tokens. So
    a loss that is a mean over tokens, and its gradient, are those of the whole batch, whatever the
    number of micro-batches. Losses that are not additive say in their own file what they are then:
    `losses/load_balance.py`, `pairs.py`, `routing_variance.py`.
    """

    def first_of(leaf):
        return leaf[0]

    first = jax.tree.map(first_of, micro_batches)
    # One micro-batch needs no sums, which spares two passes over memory as large as the parameters.
    if len(micro_batches["mask_BT"]) == 1:
        return of_batch(first, None)
    tokens_M = jnp.sum(micro_batches["mask_BT"], axis=(1, 2))
    shares_M = divide(tokens_M, jnp.sum(tokens_M))
    # The model is traced once, for the shapes of the sums and for the scan.
    of_batch = jax.jit(of_batch, inline=True)

    def accumulate(carry, share_and_batch):
        share, batch = share_and_batch
        gradients, terms, earlier = carry
        more_gradients, more_terms, counts = of_batch(batch, earlier)

        def add(so_far, one):
            return so_far + share * one

        gradients = jax.tree.map(add, gradients, more_gradients)
        terms = jax.tree.map(add, terms, more_terms)
        return (gradients, terms, jax.tree.map(jnp.add, earlier, counts)), None

    def zeros(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)

    start = jax.tree.map(zeros, jax.eval_shape(of_batch, first, no_counts))
    (gradients, terms, counts), _ = jax.lax.scan(accumulate, start, (shares_M, micro_batches))
    return gradients, terms, counts


def micro_batch_gradients(
    model: Transformer,
    objective: Objective,
    state: TrainState,
    router: Any,
    batch: Mapping,
    earlier: StepCounts | None,
) -> tuple[Any, dict, StepCounts]:
    """(gradients, terms, StepCounts) of one micro-batch.

    router: what the layers read beside their parameters. earlier: the counts of the step's
    micro-batches before; None where there is one alone.
    """

    def loss(params):
        output = model.apply(
            {"params": params}, batch["inputs_BT"], batch["mask_BT"], router, of_batch(batch)
        )
        earlier_LE = None if earlier is None else earlier.assignments_LE
        terms = objective.of_batch(output, batch, earlier_LE)
        tokens = jnp.sum(batch["mask_BT"], dtype=jnp.int32)
        counts = StepCounts(output.routing.assignments_E, tokens)
        return objective.total(terms, state.loss_scales), (terms, counts)

    (_, (terms, counts)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    return gradients, terms, counts
