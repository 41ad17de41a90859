"""config.json of an OLMoE and the fields of our ModelConfig: one table, read both ways."""

import dataclasses

from moe_erc.checks import BadInput
from moe_erc.hf.layers import MOST
from moe_erc.model.config import ModelConfig

FIELDS = {  # config.json -> ModelConfig
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
    "intermediate_size": "expert_width",
    "norm_topk_prob": "renormalize",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "clip_qkv": "clip_qkv",
    "tie_word_embeddings": "tie_embeddings",
}
# What config.json does not say: an OLMoE has a softmax router and no more, and is computed alike.
PLAIN = {
    "router": "softmax",
    "router_init": "normal",
    "top_p": 1.0,
    "bias_rate": 0.0,
    "shared_experts": 0,
    "gate_rank": 0,
    "mpi_scale": 4.0,
    "competition_rate": 0.07,
    "competition_layers": 3,
    "theta": 0.05,
    "controller_rate": 0.02,
    "init_std": 0.02,
    "dtype": "float32",
    "remat": "none",
    "scan_unroll": 1,
    "attention_implementation": "auto",
    "experts_implementation": "auto",
}
# As transformers has them, whose clip_qkv is null where ours is 0.
DEFAULTS = {"norm_topk_prob": False, "rms_norm_eps": 1e-5, "clip_qkv": 0.0, "tie_word_embeddings": False}
FIXED = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"}
ABSENT = ("quantization_config", "sliding_window")
KINDS = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
ROUTERS = ("softmax", "competition")  # that compute what the router of an OLMoE does


def model_fields(config):
    """{field of ModelConfig: value} of a config.json; ValueError of one line for no OLMoE, or one that ours cannot be.

    A key that it leaves out or has as null means what it means to transformers.
    """
    if config.get("model_type") != "olmoe":
        raise BadInput(f"config.json: model_type is {config.get('model_type')!r}; only 'olmoe' can be read")
    for name, only in (FIXED | dict.fromkeys(ABSENT)).items():
        if config.get(name, only) != only:
            raise BadInput(f"config.json: {name} is {config[name]!r}; only {only!r} can be read")
    config = DEFAULTS | {"num_key_value_heads": config.get("num_attention_heads")} | config
    config |= {"rope_theta": _rope_theta(config)}
    return {field: _checked(name, config.get(name), KINDS[field]) for name, field in FIELDS.items()}


def context_length(config):
    """For how many tokens a config.json says that its model is; 4096, as OLMoE, if it does not."""
    return _checked("max_position_embeddings", config.get("max_position_embeddings", 4096), int)


def _rope_theta(config):
    """Of the releases, of transformers 5, or the default of both; scaled positions are refused."""
    thetas = [config["rope_theta"]] if "rope_theta" in config else []
    for name in ("rope_parameters", "rope_scaling"):
        options = config.get(name, {})
        if not isinstance(options, dict) or any(options[key] != "default" for key in options if key != "rope_theta"):
            raise BadInput(f"config.json: {name} is {options!r}; only rope_type 'default' can be read")
        thetas += [options["rope_theta"]] if "rope_theta" in options else []
    if any(theta != thetas[0] for theta in thetas):
        raise BadInput(f"config.json: rope_theta is both {thetas[0]!r} and {thetas[1]!r}; leave one of them")
    return thetas[0] if thetas else 1e4


def _checked(name, value, kind):
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is int and not 1 <= value <= MOST):
        wanted = {int: f"a whole number of 1 to {MOST}", float: "a number", bool: "true or false"}[kind]
        raise BadInput(f"config.json: {name} is {value!r}; the model needs {wanted}")
    return value


def check_same(config: ModelConfig, fields, directory):
    """ValueError, naming the first field that differs, unless parameters of an OLMoE of these fields fit `config`."""
    for field, value in fields.items():
        if getattr(config, field) != value:
            raise BadInput(
                f"model.{field}: {getattr(config, field)}, but the model in {directory} has {value}; set it to {value}"
            )
    for field, plain in (("router", ROUTERS), ("shared_experts", (0,))):
        if getattr(config, field) not in plain:
            raise BadInput(
                f"model.{field}: {getattr(config, field)!r} cannot start from an OLMoE; "
                f"use {' or '.join(map(str, plain))}"
            )


def check_plain(config: ModelConfig):
    """ValueError if the model routes as no OLMoE does; what its router is, `as_softmax_router` knows."""
    for field, plain, reason in (
        ("shared_experts", 0, "no experts that every token meets"),
        ("top_p", 1, "the same number of experts for every token"),
        ("bias_rate", 0, "no bias that turns the choice"),
    ):
        if getattr(config, field) != plain:
            raise BadInput(f"model.{field}: {getattr(config, field)} cannot be exported; an OLMoE has {reason}")


def config_json(config: ModelConfig, dtype):
    """The config.json of a model that `check_plain` lets pass; ids of special tokens are null, to be replaced."""
    fields = {name: getattr(config, field) for name, field in FIELDS.items()}
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **FIXED,
        **fields,
        "clip_qkv": config.clip_qkv or None,
        # transformers 5 reads rope_parameters; 4 reads rope_theta, and takes 1e4 where there is none.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "dtype": dtype,
        "use_cache": True,
        # Not null by default there: row 1 of the embedding would be padding, which has no gradient.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
