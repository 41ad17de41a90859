"""One optimizer step, pure in (state, batch): forward, losses, gradients, update, unless the guard refuses it.

Micro-batches are a scan over the accumulation axis. Losses on parameters alone are computed once per step, outside it.
Whatever a step draws, it draws from a key of its own, named after its use (`random_keys.py`).
"""

import functools

import jax
import jax.numpy as jnp
import optax

from moe_erc.measures.load import EXPERTS_PER_TOKEN
from moe_erc.measures.registry import of_load
from moe_erc.measures.training import GRADIENT_NORM, LEARNING_RATE, LOSS, PARAMETER_NORM, SCALE, TOTAL
from moe_erc.model.context import of_batch
from moe_erc.moe.routers.base import RouterState
from moe_erc.moe.routing import StepCounts
from moe_erc.numerics import divide
from moe_erc.sharding import replicate, shard_batch
from moe_erc.training.guard import GuardConfig, judge
from moe_erc.training.optimizer import updates_done


def make_train_step(
    model,
    objective,
    optimizer,
    micro_batches,
    state_shardings,
    guard=GuardConfig(),  # noqa: B008
    schedule=None,
):
    """The jitted (state, batch) -> (state, metrics); the state is donated, the batch holds a step's micro-batches.

    schedule: of the learning rate of an optimizer of `make_optimizer`; where it is given, the rate is a metric.
    """
    gradients_of = step_gradients(model, objective, micro_batches)

    def train_step(state, batch):
        gradients, terms, counts = gradients_of(state, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = objective.decouple(optax.apply_updates(state.params, updates))
        before = RouterState(state.router, state.loss_scales)
        router, moved = model.config.router.after_step(model.config, before, counts)
        scales = state.loss_scales | moved
        metrics = {LOSS.of(name).key: value for name, value in terms.items()} | of_load(counts.assignments_LE)
        metrics |= {SCALE.of(name).key: value for name, value in scales.items()}
        metrics |= {
            TOTAL.key: objective.total(terms, state.loss_scales),
            EXPERTS_PER_TOKEN.key: counts.experts_per_token_L,
            GRADIENT_NORM.key: optax.tree.norm(gradients),
        }
        if schedule:
            metrics[LEARNING_RATE.key] = schedule(updates_done(state.opt_state))
        # The guard judges what goes into the update. Were it to wait for the norm of what comes out, the whole update
        # would be computed twice: once for the norm, once more for the choice between old and new.
        accepted, after, told = judge(guard, state.guard, metrics)
        changed = {"params": params, "opt_state": opt_state, "router": router, "loss_scales": scales}
        kept = {name: getattr(state, name) for name in changed}
        changed = jax.tree.map(functools.partial(jnp.where, accepted), changed, kept)
        metrics |= told | {PARAMETER_NORM.key: optax.tree.norm(changed["params"])}
        return state.replace(step=state.step + 1, guard=after, **changed), metrics

    batch_shardings = shard_batch(model.mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_shardings),
        out_shardings=(state_shardings, replicate(model.mesh)),
    )


def step_gradients(model, objective, micro_batches):
    """(state, batch) -> (gradients, terms, StepCounts) of one step, before anything is changed."""
    model = model.clone(observers=objective.observers)

    def gradients_of(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        router = model.config.router.before_step(model.config, state.router, rng)
        of_batch = functools.partial(micro_batch_gradients, model, objective, state, router)
        gradients, terms, counts = batch_gradients(of_batch, split(batch, micro_batches))
        shape_BT = batch["mask_BT"].shape
        parameter_terms, parameter_gradients = parameter_only(objective, state.params, rng, state.loss_scales, shape_BT)
        return jax.tree.map(jnp.add, gradients, parameter_gradients), terms | parameter_terms, counts

    return gradients_of


def parameter_only(objective, params, rng, scales, shape_BT=None):
    """(terms, gradients) of the losses on parameters alone, on a step of a batch of that shape."""

    def loss(params):
        terms = objective.of_parameters(params, rng, shape_BT)
        return objective.total(terms, scales), terms

    (_, terms), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return terms, gradients


def split(batch, micro_batches):
    """(B, …) -> (M, B / M, …) with every micro-batch spread over all devices, as the batch is."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, micro_batches, *leaf.shape[1:]).swapaxes(0, 1), batch)


def batch_gradients(of_batch, micro_batches):
    """(gradients, terms, StepCounts) over micro-batches: means by their shares of unmasked tokens, counts added up.

    So every loss that is a mean over tokens and its gradient are those of the whole batch, whatever the number of
    micro-batches. Those that are not additive say in their own file what they are then: `losses/load_balance.py`,
    `pairs.py`, `routing_variance.py`. `of_batch(batch, earlier)` takes the summed counts of the earlier ones, None
    where there is one micro-batch alone.
    """
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    if len(micro_batches["mask_BT"]) == 1:  # spares two passes over memory as large as the parameters
        return of_batch(first, None)
    tokens_M = jnp.sum(micro_batches["mask_BT"], axis=(1, 2))
    shares_M = divide(tokens_M, jnp.sum(tokens_M))

    def accumulate(carry, share_and_batch):
        share, batch = share_and_batch
        gradients, terms, earlier = carry
        *extra, counts = of_batch(batch, earlier)
        total = jax.tree.map(lambda so_far, term: so_far + share * term, (gradients, terms), tuple(extra))
        return (*total, jax.tree.map(jnp.add, earlier, counts)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_batch, first, None))
    (gradients, terms, counts), _ = jax.lax.scan(accumulate, zeros, (shares_M, micro_batches))
    return gradients, terms, counts


def micro_batch_gradients(model, objective, state, router, batch, earlier):
    """(gradients, terms, StepCounts) of one micro-batch."""

    def loss(params):
        output = model.apply({"params": params}, batch["inputs_BT"], batch["mask_BT"], router, of_batch(batch))
        terms = objective.of_batch(output, batch, earlier and earlier.assignments_LE)
        tokens = jnp.sum(batch["mask_BT"], dtype=jnp.int32)
        counts = StepCounts(output.routing.assignments_E, tokens)
        return objective.total(terms, state.loss_scales), (terms, counts)

    (_, (terms, counts)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    return gradients, terms, counts
