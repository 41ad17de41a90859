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
    logits_BCV = jnp.einsum("bcd,vd->bcv", x_BCD, head_VD.astype(x_BCD.dtype), preferred_element_type=jnp.float32)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC


def language_model(losses_BT, mask_BT):
    """Mean over the unmasked positions; 0 where all are masked."""
    return jnp.sum(losses_BT * mask_BT) / jnp.maximum(jnp.sum(mask_BT), 1)
