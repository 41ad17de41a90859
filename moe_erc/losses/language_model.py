"""Next-token cross-entropy from hidden states, in slices of time: logits of size (B, T, V) never exist at once.

loss = mean over unmasked positions of  logsumexp(x @ head.T) - (x @ head.T)[target]
"""

import jax
import jax.numpy as jnp
from jax import lax


def token_losses(x_BTD, head_VD, targets_BT, chunk):
    """Negative log-likelihood of every target, (B, T) float32; the logits of `chunk` time steps exist at a time."""
    batch, time, _ = x_BTD.shape
    if time <= chunk:
        return _chunk_losses(x_BTD, head_VD, targets_BT)
    chunks = -(-time // chunk)
    padding = ((0, 0), (0, chunks * chunk - time))

    def split(leaf):
        padded = jnp.pad(leaf, padding + ((0, 0),) * (leaf.ndim - 2))
        return padded.reshape(batch, chunks, chunk, *leaf.shape[2:]).swapaxes(0, 1)

    losses = lax.map(
        lambda slices: jax.checkpoint(_chunk_losses)(slices[0], head_VD, slices[1]), (split(x_BTD), split(targets_BT))
    )
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


def language_model(losses_BT, mask_BT):
    """Mean over the unmasked positions; 0 where all are masked."""
    return jnp.sum(losses_BT * mask_BT) / jnp.maximum(jnp.sum(mask_BT), 1)
