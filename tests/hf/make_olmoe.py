"""Writes tests/hf/olmoe: small random OLMoEs, and what transformers computes with them.

    pip install -e ".[hf]" && python -m tests.hf.make_olmoe

transformers saves the models. Run this again when a variant is added, or when transformers changes
what it writes or computes. golden.npz holds ids (B, T), and from the saved weights in float32:

- logits (B, T, V);
- loss: the cross-entropy of the next token alone;
- pooled: the balance loss over all layers together, as transformers computes it; K when balanced;
- by_layer: the mean over layers of transformers' balance loss of each, over K; 1 when balanced.
"""

import pathlib
import shutil

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from tests.hf.make_families import MODEL

HERE = pathlib.Path(__file__).parent / "olmoe"
OLMOE = MODEL | {"num_experts": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
VARIANTS = {
    "plain": {},
    "renormalized": {"norm_topk_prob": True, "num_experts_per_tok": 3},
    "grouped": {"num_attention_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "theta": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "rms_norm_eps": 1e-3,
    },
    "clipped": {"clip_qkv": 0.5},
}
OPTIONS = {  # options of `save`; others are float32 in one file, one tensor per expert
    "renormalized": {"dtype": torch.bfloat16},
    "grouped": {"save_original_format": False},
    "tied": {"max_shard_size": "10KB"},
    "theta": {"dtype": torch.float16},
}


def save(variant, directory, dtype=torch.float32, **options):
    """Saves a model by transformers, with uneven routing and uneven attention, and golden.npz."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**OLMOE | VARIANTS[variant])).to(dtype)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(mean=float(weights.ndim == 1), std=0.3)
        model.save_pretrained(directory, **options)
        saved = OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float32)
        np.savez(directory / "golden.npz", **computed(saved.eval()))


def computed(model):
    """The arrays of golden.npz."""
    config, ids = model.config, torch.randint(model.config.vocab_size, (2, 12))
    found = model(ids, labels=ids, output_router_logits=True)
    K, L = config.num_experts_per_tok, config.num_hidden_layers
    by_layer = [
        load_balancing_loss_func((logits,), config.num_experts, K) for logits in found.router_logits
    ]
    loss = found.loss - config.router_aux_loss_coef * found.aux_loss
    values = {
        "logits": found.logits,
        "loss": loss,
        "pooled": found.aux_loss,
        "by_layer": sum(by_layer) / (L * K),
    }
    return {"ids": ids.numpy().astype(np.int32)} | {
        name: value.numpy() for name, value in values.items()
    }


if __name__ == "__main__":
    for variant in VARIANTS:
        shutil.rmtree(HERE / variant, ignore_errors=True)
        save(variant, HERE / variant, **OPTIONS.get(variant, {}))
