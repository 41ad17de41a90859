"""One optimizer step, pure in (state, batch): forward, losses, gradients, update, unless the guard refuses it.

Micro-batches are a scan over the accumulation axis. Losses on parameters alone are computed once per step, outside it.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from moe_erc.losses.load_balance import load_measures
from moe_erc.sharding import replicate, shard_batch
from moe_erc.training import router_state
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
        gradients, terms, (load_LE, active_L) = gradients_of(state, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = objective.decouple(optax.apply_updates(state.params, updates))
        router, scales = router_state.after_step(model.config, state.router, state.loss_scales, load_LE, active_L)
        metrics = {f"loss/{name}": value for name, value in terms.items()} | load_measures(load_LE)
        metrics |= {f"scale/{name}": value for name, value in scales.items()}
        metrics |= {
            "loss/total": objective.total(terms, state.loss_scales),
            "router/experts_per_token": active_L,
            "norm/gradient": optax.tree.norm(gradients),
            "norm/parameters": optax.tree.norm(params),
        }
        if schedule:
            metrics["optimizer/learning_rate"] = schedule(updates_done(state.opt_state))
        counts, after, told = judge(guard, state.guard, metrics)
        changed = {"params": params, "opt_state": opt_state, "router": router, "loss_scales": scales}
        kept = {name: getattr(state, name) for name in changed}
        changed = jax.tree.map(functools.partial(jnp.where, counts), changed, kept)
        return state.replace(step=state.step + 1, guard=after, **changed), metrics | told

    batch_shardings = shard_batch(model.mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_shardings),
        out_shardings=(state_shardings, replicate(model.mesh)),
    )


def step_gradients(model, objective, micro_batches):
    """(state, batch) -> (gradients, terms, (mean load, experts a token)) of one step, before anything is changed."""
    model = model.clone(observers=objective.observers)

    def gradients_of(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        router = router_state.for_step(model.config, state.router, jax.random.fold_in(rng, 0))
        of_batch = functools.partial(micro_batch_gradients, model, objective, state, router)
        gradients, terms, routing = batch_gradients(of_batch, split(batch, micro_batches))
        parameter_terms, parameter_gradients = parameter_only(objective, state.params, rng, state.loss_scales)
        return jax.tree.map(jnp.add, gradients, parameter_gradients), terms | parameter_terms, routing

    return gradients_of


def parameter_only(objective, params, rng, scales):
    """(terms, gradients) of the losses on parameters alone."""

    def loss(params):
        terms = objective.of_parameters(params, rng)
        return objective.total(terms, scales), terms

    (_, terms), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return terms, gradients


def split(batch, micro_batches):
    """(B, …) -> (M, B / M, …) with every micro-batch spread over all devices, as the batch is."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, micro_batches, *leaf.shape[1:]).swapaxes(0, 1), batch)


def batch_gradients(of_batch, micro_batches):
    """(gradients, terms, (mean load, experts a token)) over micro-batches, weighed by their shares of unmasked tokens.

    So the language-model loss and its gradient are those of the whole batch, whatever the number of micro-batches.
    `of_batch(batch, earlier)` takes the sum of the loads and experts a token of the earlier ones, None for the first.
    """
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    if len(micro_batches["mask_BT"]) == 1:  # spares two passes over memory as large as the parameters
        return of_batch(first, None)
    tokens_M = jnp.sum(micro_batches["mask_BT"], axis=(1, 2))
    shares_M = tokens_M / jnp.maximum(jnp.sum(tokens_M), 1)

    def accumulate(carry, share_and_batch):
        share, batch = share_and_batch
        gradients, terms, earlier = carry
        *extra, routing = of_batch(batch, earlier)
        total = jax.tree.map(lambda so_far, term: so_far + share * term, (gradients, terms), tuple(extra))
        return (*total, jax.tree.map(jnp.add, earlier, routing)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of_batch, first, None))
    (gradients, terms, routing), _ = jax.lax.scan(accumulate, zeros, (shares_M, micro_batches))
    return gradients, terms, jax.tree.map(lambda total: total / len(shares_M), routing)


def micro_batch_gradients(model, objective, state, router, batch, earlier):
    """(gradients, terms, (load, experts a token)) of one micro-batch."""

    def loss(params):
        output = model.apply({"params": params}, batch["inputs_BT"], batch["mask_BT"], router)
        terms = objective.of_batch(output, batch, earlier and earlier[0])
        routing = output.routing.load_E, output.routing.active
        return objective.total(terms, state.loss_scales), (terms, routing)

    (_, (terms, routing)), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    return gradients, terms, routing
