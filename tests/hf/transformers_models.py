"""Small random models of every family with routed experts that transformers has.

They have torch's own routers and experts in their own layers. Attention, towers of other
modalities and shared experts are left out of the files where they are large: the diagnosis reads
none of them.
"""

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

LAYERS = 4
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "d_model": 16,
    "intermediate_size": 10,
    "ffn_hidden_size": 10,
    "moe_intermediate_size": 12,
    "expert_ffn_hidden_size": 12,
    "shared_expert_intermediate_size": 4,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "n_layers": LAYERS,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "zero_expert_num": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_attention_heads": 2,
    "n_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 8,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
# What a family needs beside, and where dense layers are told, some that are.
OPTIONS = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "hidden_size": 16},
    },
    "deepseek_ocr2": {"mlp_layer_types": DENSE_FIRST},
    "dots3_note": {"num_key_value_heads": 2},
    "ernie4_5_moe": {"moe_layer_interval": 2, "moe_layer_end_index": 2},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [12, 6], "head_dim": 128},
    "gemma4": {"enable_moe_block": True},
    "glm5_next": {"num_key_value_heads": 2, "index_topk": 16, "qk_rope_head_dim": 0},
    "hy_v4_vl": {"qk_rope_head_dim": 64},
    "inkling": {"mlp_layer_types": DENSE_FIRST},
    "inkling2": {"vocab_size": 64, "unpadded_vocab_size": 32},
    "inkling2_loop": {"vocab_size": 64, "unpadded_vocab_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "llama4": {"interleave_moe_layer_step": 2},
    "minimax_m3_vl": {"mlp_layer_types": DENSE_FIRST},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen3_next": {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen3_vl_moe": {"mlp_only_layers": [1]},
    "qwen4_exp": {
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
    },
}
# Fields of the other modalities that must be the width of the language model.
WIDTHS = {
    "dots3_note": (("vision_config", "adapter_out_dim"), ("audio_config", "adapter_out_dim")),
    "inkling2": (("vision_config", "text_hidden_size"),),
    "inkling2_loop": (("vision_config", "text_hidden_size"),),
}
# Model types of text alone, and those whose config has another for the language model.
TEXT = (
    "afmoe",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling_text",
    "inkling2_text",
    "inkling2_loop_text",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lara_mini",
    "lfm2_moe",
    "llama4_text",
    "longcat_flash",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mistral4",
    "mixtral",
    "olmoe",
    "openai_privacy_filter",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp_text",
    "sarvam_mla",
    "sarvam_moe",
    "solar_open",
)
NESTED = (
    "aria",
    "deepseek_ocr2",
    "diffusion_gemma",
    "dots3_note",
    "ernie4_5_vl_moe",
    "gemma4",
    "glm4v_moe",
    "glm5_next",
    "hy_v4_vl",
    "inkling2",
    "inkling2_loop",
    "inkling_mm_model",
    "kimi_k25",
    "llama4",
    "minimax_m3_vl",
    "mistral_large4",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl_moe",
    "step3p7",
    "unlimited_ocr",
)
# Experts whose activation is no module, and whose gate is the first half of the rows.
FIRST_HALF = ("MiniMaxM3VLExperts", "HYV4Experts", "HYV4VLExperts", "Glm5NextTextExperts")
CLASSES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
)
LARGE = 100_000  # numbers; nothing of this size is saved


def build(model_type):
    """A random model in float32."""
    config = make_config(model_type)
    # Nothing is allocated before the large parts are gone.
    with torch.device("meta"):
        model = model_class(model_type)(config)
    drop_what_is_large(model)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.zero_()
    return model.float()


def make_config(model_type):
    config = AutoConfig.for_model(model_type)
    options = OPTIONS.get(model_type.removesuffix("_text"), {})
    if model_type not in NESTED:
        return small(type(config), options)
    config.text_config = small(type(config.text_config), options)
    for part, field in WIDTHS.get(model_type, ()):
        setattr(getattr(config, part), field, SMALL["hidden_size"])
    return config


def small(config_class, options):
    names = {*config_class().to_dict(), *config_class.attribute_map}
    return config_class(**{name: SMALL[name] for name in names & set(SMALL)} | options)


def model_class(model_type):
    order = CLASSES[1:] if model_type in NESTED else CLASSES
    for mapping in order:
        names = getattr(modeling_auto, mapping)
        if model_type in names:
            return getattr(transformers, names[model_type])
    raise LookupError(model_type)


def drop_what_is_large(model):
    """Replaces the outermost large modules that hold no routed experts."""
    for name, child in list(model.named_children()):
        numbers = sum(parameter.numel() for parameter in child.parameters())
        if numbers < LARGE:
            continue
        has_experts = any("experts" in inner for inner, _ in child.named_parameters())
        if has_experts and name not in ("vision_tower", "visual", "talker"):
            drop_what_is_large(child)
        else:
            setattr(model, name, torch.nn.Identity())


def couplings(model):
    """{number of the layer: M (E, E), float64} by torch's own routers and experts."""
    model = model.double()
    found = {}
    for name, module in model.named_modules():
        words = name.split(".")
        is_layer = len(words) > 1 and words[-1].isdecimal() and words[-2] in ("layers", "blocks")
        is_beside = any(word in name for word in ("vision", "visual", "audio", "talker", "mtp"))
        if is_layer and not is_beside and is_sparse(module):
            found[int(words[-1])] = coupling(module).detach().numpy()
    return found


def is_sparse(layer):
    return any("expert" in name or "input_linear" in name for name, _ in mlp(layer).named_modules())


def mlp(layer):
    """The module of a layer that has router and experts."""
    names = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
    if hasattr(layer, "router"):  # Gemma 4 has both beside a dense block
        return layer
    found = next((getattr(layer, name) for name in names if hasattr(layer, name)), layer)
    return getattr(found, "text_moe", found)


def coupling(layer):
    block = mlp(layer)
    router = block.router if hasattr(block, "router") else block.gate
    rows_ED = router_rows(router)
    if hasattr(layer, "pre_feedforward_layernorm_2"):  # both as they act on the normalised token
        rows_ED = rows_ED * router.scale * router.scalar_root_size
        rows_ED = rows_ED * layer.pre_feedforward_layernorm_2.weight
    return gate_responses(rows_ED, block).norm(dim=-1)


def router_rows(router):
    for name in ("", "gate", "wg", "layer", "classifier", "proj"):
        module = getattr(router, name, None) if name else router
        weight = getattr(module, "weight", None)
        if weight is not None:
            break
    experts = getattr(router, "num_experts", None) or len(weight)
    return weight[:experts]


def gate_responses(rows_ED, block):
    """What every expert's activation is given if the rows are the tokens, (E, E, F)."""
    if hasattr(block, "input_linear"):  # JetMoE, whose experts are two modules of the block
        gate_up = torch.einsum("id,jfd->ijf", rows_ED, block.input_linear.weight)
        return gate_up.chunk(2, dim=-1)[0]
    experts = block.experts
    if hasattr(experts, "act_fn") or hasattr(experts, "mlp"):
        return activation_inputs(rows_ED, experts)
    # The activation is no module, or gets a bias as well: the parameters as the forward has them.
    name = type(experts).__name__
    if name == "GptOssExperts":
        return torch.einsum("id,jdf->ijf", rows_ED, experts.gate_up_proj[..., ::2])
    if name == "OpenAIPrivacyFilterExperts":
        gate_up = torch.einsum("id,jdf->ijf", rows_ED, experts.gate_up_proj)
    else:
        assert name in FIRST_HALF, name
        gate_up = torch.einsum("id,jfd->ijf", rows_ED, experts.gate_up_proj)
    return gate_up.chunk(2, dim=-1)[0]


def activation_inputs(rows_ED, experts):
    """What the activation module is given, (E, E, F), by the experts' own forward."""
    for limit in ("limit", "swiglu_limit"):
        if hasattr(experts, limit):
            setattr(experts, limit, 1e9)
    inputs = []
    activation = experts.mlp.activation_fn if hasattr(experts, "mlp") else experts.act_fn
    if isinstance(activation, torch.nn.Module):
        activation.register_forward_hook(lambda module, given, output: inputs.append(given[0]))
    else:
        experts.act_fn = lambda gate: inputs.append(gate) or activation(gate)
    E = len(rows_ED)
    if type(experts).__name__ == "Llama4TextExperts":  # every expert has its tokens in turn
        experts(rows_ED.repeat(E, 1))
        return inputs[0].transpose(0, 1)
    if hasattr(experts, "config"):
        experts.config._experts_implementation = "eager"
    # LongCat's forward needs two experts a token; expert E returns its input.
    others = (E,) if hasattr(experts, "identity_expert") else ()
    for expert in range(E):
        chosen_EK = torch.tensor([(expert, *others)] * E)
        experts(rows_ED, chosen_EK, torch.ones(chosen_EK.shape, dtype=rows_ED.dtype))
    return torch.stack(inputs, dim=1)
