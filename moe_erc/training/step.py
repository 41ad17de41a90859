"""One optimizer step, pure in (state, batch): forward, losses, gradients, update.

Micro-batches are a scan over the accumulation axis. Losses on parameters alone are computed once per step, outside it.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from moe_erc.sharding import replicate, shard_batch


def make_train_step(model, objective, optimizer, micro_batches, state_shardings):
    """The jitted (state, batch) -> (state, metrics); the state is donated, the batch holds a step's micro-batches."""

    def train_step(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        gradients, terms, load_LE = batch_gradients(model, objective, state.params, split(batch, micro_batches))
        parameter_terms, parameter_gradients = parameter_only(objective, state.params, rng)
        terms |= parameter_terms
        gradients = jax.tree.map(jnp.add, gradients, parameter_gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {f"loss/{name}": value for name, value in terms.items()} | {
            "loss/total": objective.total(terms),
            "router/max_load": jnp.max(load_LE) * load_LE.shape[-1],
            "norm/gradient": optax.tree.norm(gradients),
            "norm/parameters": optax.tree.norm(params),
        }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    batch_shardings = shard_batch(model.mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_shardings),
        out_shardings=(state_shardings, replicate(model.mesh)),
    )


def parameter_only(objective, params, rng):
    """(terms, gradients) of the losses on parameters alone."""

    def loss(params):
        terms = objective.of_parameters(params, rng)
        return objective.total(terms), terms

    (_, terms), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return terms, gradients


def split(batch, micro_batches):
    """(B, …) -> (M, B / M, …) with every micro-batch spread over all devices, as the batch is."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, micro_batches, *leaf.shape[1:]).swapaxes(0, 1), batch)


def batch_gradients(model, objective, params, micro_batches):
    """(gradients, terms, mean load) over micro-batches, each weighed by its share of the unmasked tokens.

    So the language-model loss and its gradient are those of the whole batch, whatever the number of micro-batches.
    """
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    no_load_LE = jnp.zeros((model.config.layers, model.config.experts))
    one = functools.partial(micro_batch_gradients, model, objective, params)
    if len(micro_batches["mask_BT"]) == 1:  # spares two passes over memory as large as the parameters
        return one(first, no_load_LE)
    tokens_M = jnp.sum(micro_batches["mask_BT"], axis=(1, 2))
    shares_M = tokens_M / jnp.maximum(jnp.sum(tokens_M), 1)

    def accumulate(carry, share_and_batch):
        share, batch = share_and_batch
        gradients, terms, load_LE = carry
        *extra, extra_load_LE = one(batch, load_LE)
        total = jax.tree.map(lambda so_far, term: so_far + share * term, (gradients, terms), tuple(extra))
        return (*total, load_LE + extra_load_LE), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first, no_load_LE))
    (gradients, terms, load_LE), _ = jax.lax.scan(accumulate, zeros, (shares_M, micro_batches))
    return gradients, terms, load_LE / len(shares_M)


def micro_batch_gradients(model, objective, params, batch, earlier_load_LE):
    """(gradients, terms, load) of one micro-batch."""

    def loss(params):
        output = model.apply({"params": params}, batch["inputs_BT"], batch["mask_BT"])
        terms = objective.of_batch(output, batch, earlier_load_LE)
        return objective.total(terms), (terms, output.routing.load_E)

    (_, (terms, load_LE)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return gradients, terms, load_LE
