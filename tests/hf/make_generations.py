"""Writes tests/hf/generations: small random OLMoEs, and what transformers generates with them.

    pip install -e ".[hf]" && python -m tests.hf.make_generations

Run this again when a variant is added. It writes one file per variant, which holds:

- "weights/…": the weights, named and laid out as our parameters;
- "tokens", with the attention masks "left" and "right" and the positions "packed";
- "logits/left", "logits/right", "logits/packed": the logits under each of them;
- "greedy": the tokens that follow those of "left". Each row ends at its first end-of-text token
  or with the longest row.
"""

import pathlib

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

HERE = pathlib.Path(__file__).parent / "generations"
MODEL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "eos_token_id": 63,
    "attn_implementation": "eager",
}
VARIANTS = {
    "default": {},
    "norm_topk_prob": {"norm_topk_prob": True},
    "clip_qkv": {"clip_qkv": 0.5},
    "grouped_query": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
}
ROWS, LENGTH, NEW_TOKENS = 3, 12, 24
PADDING = (0, 3, 7)  # of each row
PACKED = (5, 6, 1)  # sequences of every row


def record(changes, seed=0):
    """The arrays of one variant's file."""
    torch.manual_seed(seed)
    model = OlmoeForCausalLM(OlmoeConfig(**MODEL | changes)).eval()
    tokens, place = torch.randint(1, 63, (ROWS, LENGTH)), torch.arange(LENGTH)
    padding = torch.tensor(PADDING)[:, None]
    left, right = (place >= padding).long(), (place < LENGTH - padding).long()
    packed = torch.cat([torch.arange(length) for length in PACKED]).expand(ROWS, -1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(std=0.5)
        logits = {
            "left": model(tokens, attention_mask=left).logits,
            "right": model(tokens, attention_mask=right).logits,
            # A cache does not support packing.
            "packed": model(tokens, position_ids=packed, use_cache=False).logits,
        }
        longer = model.generate(
            tokens, attention_mask=left, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        found = {
            "tokens": tokens,
            "left": left,
            "right": right,
            "packed": packed,
            "greedy": longer[:, LENGTH:],
        }
        found |= {f"logits/{name}": value for name, value in logits.items()}
        found |= {f"weights/{name}": value for name, value in parameters(model).items()}
    return {name: value.detach().numpy() for name, value in found.items()}


def parameters(model):
    """The parameters in our layout, by path."""
    inner, layers = model.model, model.model.layers
    found = {"embed": inner.embed_tokens.weight, "final_norm": inner.norm.weight}
    if not model.config.tie_word_embeddings:
        found["head"] = model.lm_head.weight
    by_layer = [
        {
            "attention_norm": layer.input_layernorm.weight,
            "moe_norm": layer.post_attention_layernorm.weight,
            "attention/query": layer.self_attn.q_proj.weight.T,
            "attention/key": layer.self_attn.k_proj.weight.T,
            "attention/value": layer.self_attn.v_proj.weight.T,
            "attention/output": layer.self_attn.o_proj.weight.T,
            "attention/query_norm": layer.self_attn.q_norm.weight,
            "attention/key_norm": layer.self_attn.k_norm.weight,
            "moe/router": layer.mlp.gate.weight,
            "moe/w_gate": layer.mlp.experts.gate_up_proj.chunk(2, dim=1)[0].mT,
            "moe/w_up": layer.mlp.experts.gate_up_proj.chunk(2, dim=1)[1].mT,
            "moe/w_down": layer.mlp.experts.down_proj.mT,
        }
        for layer in layers
    ]
    return found | {
        f"layers/{name}": torch.stack([layer[name] for layer in by_layer]) for name in by_layer[0]
    }


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, changes in VARIANTS.items():
        np.savez_compressed(HERE / f"{name}.npz", **record(changes))
