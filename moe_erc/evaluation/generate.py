"""Text from a model: the prompt runs through the whole decoder once per new token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.sharding import replicate


class Sampler:
    """Continues a prompt by `new_tokens` tokens drawn at a temperature."""

    def __init__(self, model, tokenizer, new_tokens, temperature):
        self._tokenizer, self._new_tokens = tokenizer, new_tokens

        @functools.partial(jax.jit, out_shardings=replicate(model.mesh))
        def extend(weights, tokens_BT, start, rng):
            def one(position, tokens_BT):
                everything_BT = jnp.ones_like(tokens_BT, bool)
                output = model.apply({"params": weights.params}, tokens_BT, everything_BT, weights.router)
                logits_BV = output.x_BTD[:, position - 1].astype(jnp.float32) @ output.head_VD.T
                known_BV = logits_BV[:, : tokenizer.vocab_size]  # the head may be padded beyond the tokenizer
                drawn_B = jax.random.categorical(jax.random.fold_in(rng, position), known_BV / temperature)
                return tokens_BT.at[:, position].set(drawn_B.astype(tokens_BT.dtype))

            return jax.lax.fori_loop(start, start + new_tokens, one, tokens_BT)

        self._extend = extend
        self._rows = model.mesh.size  # the batch must be spread over the devices, so every one draws its own

    def run(self, weights, prompt, rng):
        """The prompt and its continuation, as text; `weights` has `params` and `router`."""
        ids = np.asarray(self._tokenizer.encode(prompt), np.int32)
        tokens_BT = np.zeros((self._rows, len(ids) + self._new_tokens), np.int32)
        tokens_BT[:, : len(ids)] = ids
        return self._tokenizer.decode(jax.device_get(self._extend(weights, tokens_BT, len(ids), rng))[0])
