"""Next-token cross-entropy from hidden states, computed in slices of time.

    loss = mean over unmasked positions of  logsumexp(x @ head.T) - (x @ head.T)[target]

Logits of size (B, T, V) never exist at once.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moe_erc.checks import check_fields, within
from moe_erc.losses.base import Loss
from moe_erc.numerics import masked_mean


@dataclasses.dataclass(frozen=True)
class LanguageModelOptions:
    """chunk: time steps whose logits exist at once."""

    chunk: int = within(least=1)

    def __post_init__(self):
        check_fields(self)


def token_losses(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    """Negative log-likelihood of every target in nats, (B, T) float32.

    The logits of `chunk` time steps exist at a time.
    """
    batch, time, _ = x_BTD.shape
    if time <= chunk:
        return _chunk_losses(x_BTD, head_VD, targets_BT)
    chunks = -(-time // chunk)
    padding = ((0, 0), (0, chunks * chunk - time))

    def split(leaf):
        padded = jnp.pad(leaf, padding + ((0, 0),) * (leaf.ndim - 2))
        return padded.reshape(batch, chunks, chunk, *leaf.shape[2:]).swapaxes(0, 1)

    def of_chunk(slices):
        x_BCD, targets_BC = slices
        # The backward pass recomputes the logits of a slice: kept, they would be (B, T, V).
        return jax.checkpoint(_chunk_losses)(x_BCD, head_VD, targets_BC)

    losses = lax.map(of_chunk, (split(x_BTD), split(targets_BT)))
    return losses.swapaxes(0, 1).reshape(batch, -1)[:, :time]


def _chunk_losses(x_BCD, head_VD, targets_BC):
    logits_BCV = _logits(x_BCD, head_VD)
    # A comparison, not a gather: the gradient of a gather is a scatter into zeros as large as the logits.
    is_target_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
    target_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0), axis=-1)
    return jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC


@jax.custom_vjp
def _logits(x_BCD, head_VD):
    """x @ head.T, (B, C, V) float32. All three matmuls multiply in the dtype of x and add up in float32.

    Left to itself, the gradient's float32 would widen both of its matmuls to float32.
    """
    return jnp.einsum("bcd,vd->bcv", x_BCD, head_VD.astype(x_BCD.dtype), preferred_element_type=jnp.float32)


def _logits_forward(x_BCD, head_VD):
    return _logits(x_BCD, head_VD), (x_BCD, head_VD)


def _logits_backward(inputs, d_BCV):
    x_BCD, head_VD = inputs
    d_BCV = d_BCV.astype(x_BCD.dtype)
    head = head_VD.astype(x_BCD.dtype)
    dx_BCD = jnp.einsum("bcv,vd->bcd", d_BCV, head, preferred_element_type=jnp.float32)
    dhead_VD = jnp.einsum("bcv,bcd->vd", d_BCV, x_BCD, preferred_element_type=jnp.float32)
    return dx_BCD.astype(x_BCD.dtype), dhead_VD.astype(head_VD.dtype)


_logits.defvjp(_logits_forward, _logits_backward)


def language_model(losses_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over the unmasked positions; 0 where all are masked."""
    return masked_mean(losses_BT, mask_BT)


def compute(options: LanguageModelOptions, output, batch, earlier_LE) -> jax.Array:
    """The mean loss of a micro-batch's tokens."""
    losses_BT = token_losses(output.x_BTD, output.head_VD, batch["targets_BT"], options.chunk)
    return language_model(losses_BT, batch["mask_BT"])


LOSS = Loss(kind="batch", compute=compute, options=LanguageModelOptions)
