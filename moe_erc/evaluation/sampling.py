"""How the next token is taken from its logits: the most probable one, or drawn at a temperature from the likely ones.

p = softmax(logits / temperature), cut to the top_k most probable, of them to the smallest prefix that sums to top_p
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.checks import BadInput


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is asked of a continuation."""

    new_tokens: int = 128  # at most
    temperature: float = 0.0  # 0 takes the most probable token
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all
    seed: int = 0
    stop: tuple = ()  # strings and token ids that end it, and are no part of it

    def __post_init__(self):
        for name, (holds, limit) in {
            "new_tokens": (self.new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "at least 0 and finite"),
            "top_k": (0 <= self.top_k < 2**31, "from 0 to 2^31 - 1 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1 keeps all)"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
            "stop": (not isinstance(self.stop, str) and "" not in self.stop, "a tuple of texts and token ids"),
        }.items():
            if not holds:
                raise BadInput(f"{name}: {getattr(self, name)!r} must be {limit}")

    @property
    def stop_texts(self):
        return [item for item in self.stop if isinstance(item, str)]

    @property
    def stop_ids(self):
        return [item for item in self.stop if not isinstance(item, str)]


def draw(logits_BV, keys_B, temperature, top_k, top_p):
    """A token for every row, with a key of its own."""

    def sample():
        # From the highest down, so that no temperature overflows.
        cold_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature
        return jax.vmap(jax.random.categorical)(keys_B, likely(cold_BV, top_k, top_p))

    return lax.cond(temperature > 0, sample, lambda: jnp.argmax(logits_BV, axis=-1))


def likely(logits_BV, top_k, top_p):
    """The logits, and -inf where a token is not among the top_k, or not in the prefix of these that reaches top_p."""
    rank_V = jnp.arange(logits_BV.shape[-1])
    among_V = (top_k == 0) | (rank_V < top_k)
    sorted_BV = jnp.where(among_V, jnp.sort(logits_BV, axis=-1, descending=True), -jnp.inf)
    share_BV = jax.nn.softmax(sorted_BV, axis=-1)
    needed_BV = among_V & ((top_p == 1) | (jnp.cumsum(share_BV, axis=-1) - share_BV < top_p))
    lowest_B1 = jnp.min(jnp.where(needed_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
