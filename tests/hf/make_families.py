"""Writes tests/hf/families: small random models of nine families, and their coupling matrices.

    pip install -e ".[hf]" && python -m tests.hf.make_families

transformers saves the models. Run this again when transformers changes what it writes; layouts.json
has every family. coupling.npz holds M[i, j] = |router_i @ w_gate_j| by layer, in float64. Where the
experts have an activation module, M is taken from what the model's own code hands to that module
when the router's rows are the tokens.
"""

import pathlib
import shutil

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.hf import transformers_models

HERE = pathlib.Path(__file__).parent / "families"
MODEL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LATENT = {
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    **LATENT,
}
QWEN = {"num_hidden_layers": 3, "moe_intermediate_size": 8, "num_experts": 4, "head_dim": 8}
FAMILIES = {
    "olmoe": {"num_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**QWEN, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**QWEN, "mlp_only_layers": [1]},
    "deepseek_v2": {**DEEPSEEK, "first_k_dense_replace": 1},
    "deepseek_v3": {**DEEPSEEK, "first_k_dense_replace": 2, "n_group": 2, "topk_group": 1},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
}
# Options of `save`. Other families are float32 in one file, in the layout of their release.
OPTIONS = {
    "olmoe": {"dtype": torch.bfloat16},
    "mixtral": {"max_shard_size": "10KB"},
    "qwen3_moe": {"save_original_format": False},
    "deepseek_v3": {"dtype": torch.bfloat16},
    "granitemoe": {"save_original_format": False},
    "phimoe": {"dtype": torch.float16},
}


def save(family, directory, dtype=torch.float32, **options):
    """Saves a model by transformers, with weights as large as after training, and coupling.npz."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **MODEL | FAMILIES[family])
    ).to(dtype)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_()
        model.save_pretrained(directory, **options)
        found = transformers_models.couplings(model)
        np.savez(directory / "coupling.npz", **{str(layer): M_EE for layer, M_EE in found.items()})


if __name__ == "__main__":
    for family in FAMILIES:
        shutil.rmtree(HERE / family, ignore_errors=True)
        save(family, HERE / family, **OPTIONS.get(family, {}))
