"""How the next token is taken from its logits.

It is the most probable token, or it is drawn from the likely ones with the probabilities

    p = softmax(logits / temperature)

The likely tokens are the `top_k` most probable ones, and of these the smallest prefix whose
probabilities sum to `top_p`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.checks import BadInput, check_fields, within


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options of a continuation; BadInput for a value beyond its limit."""

    new_tokens: int = within(least=1, default=128)  # at most
    temperature: float = within(least=0, default=0.0)  # 0 takes the most probable token
    top_k: int = within(0, 2**31 - 1, note="0 keeps all", default=0)
    top_p: float = within(above=0, most=1, note="1 keeps all", default=1.0)
    seed: int = within(0, 2**32 - 1, default=0)
    stop: tuple = ()  # strings and token ids that end it, and are no part of it

    def __post_init__(self):
        check_fields(self)
        if isinstance(self.stop, str) or "" in self.stop:
            raise BadInput(f"stop: {self.stop!r} must be a tuple of texts and token ids")

    @property
    def stop_texts(self) -> list[str]:
        return [item for item in self.stop if isinstance(item, str)]

    @property
    def stop_ids(self) -> list[int]:
        return [item for item in self.stop if not isinstance(item, str)]


def draw(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """A token for every row, (B,); each row draws with its own key."""

    def sample():
        # The highest logit becomes 0, so that a low temperature does not overflow.
        cold_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature
        return jax.vmap(jax.random.categorical)(keys_B, likely(cold_BV, top_k, top_p))

    def most_probable():
        return jnp.argmax(logits_BV, axis=-1)

    return lax.cond(temperature > 0, sample, most_probable)


def likely(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits of likely tokens, and -inf for all others.

    The likely tokens are the top_k, and of these the smallest prefix that reaches top_p.
    """
    rank_V = jnp.arange(logits_BV.shape[-1])
    among_V = (top_k == 0) | (rank_V < top_k)
    sorted_BV = jnp.where(among_V, jnp.sort(logits_BV, axis=-1, descending=True), -jnp.inf)
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    needed_BV = among_V & ((top_p == 1) | (jnp.cumsum(share_BV, axis=-1) - share_BV < top_p))
    lowest_B1 = jnp.min(jnp.where(needed_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
