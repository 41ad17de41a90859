"""config.json of an OLMoE and the fields of our ModelConfig: one table, read both ways."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from moe_erc.checks import BadInput
from moe_erc.hf.moe_config import MOST
from moe_erc.model.config import ModelConfig
from moe_erc.moe.routers.softmax import Softmax

FIELDS = {  # config.json -> ModelConfig
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
    "intermediate_size": "expert_width",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "clip_qkv": "clip_qkv",
    "tie_word_embeddings": "tie_embeddings",
}
RENORMALIZE = "norm_topk_prob"  # an option of the router
# Fields of a model to be run that config.json does not have.
PLAIN = {
    "forced_balance": False,
    "shared_experts": 0,
    "init_std": 0.02,
    "dtype": "float32",
    "remat": "none",
    "scan_unroll": 1,
    "attention_implementation": "auto",
    "experts_implementation": "auto",
}
# The defaults of transformers; its clip_qkv is null where ours is 0.
DEFAULTS = {
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-5,
    "clip_qkv": 0.0,
    "tie_word_embeddings": False,
}
FIXED = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"}
ABSENT = ("quantization_config", "sliding_window")
POST_NORM = "normalises what attention and experts give, and OLMoE what they take"
NORM_BY_HEAD = "normalises queries and keys head by head, and OLMoE over all heads together"
NO_QUERY_NORM = "does not normalise queries and keys, and OLMoE does"
# Decoders that look alike, by model_type, and why no parameters of OLMoE compute what they do.
OTHER_FUNCTIONS = {
    "flex_olmo": POST_NORM,
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "qwen3": NORM_BY_HEAD,
    "qwen3_moe": NORM_BY_HEAD,
    "llama": NO_QUERY_NORM,
    "mistral": NO_QUERY_NORM,
    "mixtral": NO_QUERY_NORM,
    "olmo": NO_QUERY_NORM,
    "qwen2": NO_QUERY_NORM,
    "qwen2_moe": NO_QUERY_NORM,
}
KINDS = {field.name: field.type for field in dataclasses.fields(ModelConfig)}


def model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """{field of ModelConfig: value} of a config.json.

    A key that is absent or null has the default of transformers.

    Raises:
      BadInput: for a model that is no OLMoE, or that our model cannot express.
    """
    family = config.get("model_type")
    if family != "olmoe":
        reason = OTHER_FUNCTIONS.get(str(family))
        because = f", because this one {reason}" if reason else ""
        raise BadInput(f"config.json: model_type is {family!r}; only 'olmoe' can be read{because}")
    for name, only in (FIXED | dict.fromkeys(ABSENT)).items():
        if config.get(name, only) != only:
            raise BadInput(f"config.json: {name} is {config[name]!r}; only {only!r} can be read")
    config = DEFAULTS | {"num_key_value_heads": config.get("num_attention_heads")} | dict(config)
    config["rope_theta"] = _rope_theta(config)
    fields = {}
    for name, field in FIELDS.items():
        fields[field] = _checked(name, config.get(name), KINDS[field])
    renormalize = _checked(RENORMALIZE, config[RENORMALIZE], bool)
    return fields | {"router": Softmax(renormalize=renormalize)}


def context_length(config: Mapping[str, Any]) -> int:
    """The context length in tokens that config.json gives; without one that of OLMoE, 4096."""
    return _checked("max_position_embeddings", config.get("max_position_embeddings", 4096), int)


def _rope_theta(config):
    """rope_theta as releases write it, or as transformers 5 does, or the default of both.

    Scaled positions are refused.
    """
    thetas = [config["rope_theta"]] if "rope_theta" in config else []
    for name in ("rope_parameters", "rope_scaling"):
        options = config.get(name, {})
        is_plain = isinstance(options, dict) and all(
            options[key] == "default" for key in options if key != "rope_theta"
        )
        if not is_plain:
            raise BadInput(
                f"config.json: {name} is {options!r}; only rope_type 'default' can be read"
            )
        thetas += [options["rope_theta"]] if "rope_theta" in options else []
    if any(theta != thetas[0] for theta in thetas):
        raise BadInput(
            f"config.json: rope_theta is both {thetas[0]!r} and {thetas[1]!r}; leave one of them"
        )
    return thetas[0] if thetas else 1e4


def _checked(name, value, kind):
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is int and not 1 <= value <= MOST):
        wanted = {int: f"a whole number of 1 to {MOST}", float: "a number", bool: "true or false"}
        raise BadInput(f"config.json: {name} is {value!r}; the model needs {wanted[kind]}")
    return value


def check_same(
    config: ModelConfig, fields: Mapping[str, Any], directory: os.PathLike | str
) -> None:
    """Refuse an OLMoE of these fields whose parameters do not fit `config`.

    Raises:
      BadInput: with the first field that differs.
    """
    router = config.router
    if not router.is_softmax:
        raise BadInput(
            f"model.router: {router.name!r} cannot start from an OLMoE, "
            "whose router is softmax; use that"
        )
    if config.shared_experts:
        raise BadInput(
            f"model.shared_experts: {config.shared_experts} cannot start from an OLMoE; use 0"
        )
    found = {f"model.{field}": getattr(config, field) for field in fields if field != "router"}
    wanted = {f"model.{field}": value for field, value in fields.items() if field != "router"}
    found[router.key("renormalize")] = router.renormalize
    wanted[router.key("renormalize")] = fields["router"].renormalize
    check_equal(found, wanted, directory)


def check_equal(
    found: Mapping[str, Any], wanted: Mapping[str, Any], directory: os.PathLike | str
) -> None:
    """Refuse a configuration, {key: value}, that differs from that of the model in `directory`."""
    for key, value in wanted.items():
        if found[key] != value:
            raise BadInput(
                f"{key}: {found[key]}, but the model in {directory} has {value}; set it to {value}"
            )


def check_plain(config: ModelConfig) -> None:
    """Refuse a model with parts that no OLMoE has, but for its router.

    The router itself says whether it can be exported: `Router.exports_as`.
    """
    if config.shared_experts:
        raise BadInput(
            f"model.shared_experts: {config.shared_experts} cannot be exported; "
            "an OLMoE has no experts that every token meets"
        )
    if config.forced_balance:
        raise BadInput(
            "routers.forced_balance: True cannot be exported; "
            "the router of an OLMoE chooses the experts"
        )


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model of `as_softmax_router` that passed `check_plain`.

    The ids of special tokens are null; the caller replaces those that it knows.
    """
    fields = {name: getattr(config, field) for name, field in FIELDS.items()}
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **FIXED,
        **fields,
        RENORMALIZE: config.router.renormalize,
        "clip_qkv": config.clip_qkv or None,
        # transformers 5 reads rope_parameters. Version 4 reads rope_theta; its default is 1e4.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "dtype": dtype,
        "use_cache": True,
        # The default of transformers is not null: row 1 of the embedding would be padding, and
        # padding has no gradient.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
