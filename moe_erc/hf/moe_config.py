"""What config.json says of an MoE: the language model in it, its sizes, and which layers are MoE.

Families name the same things differently. A checkpoint has a few of the names, and each is read
where it stands. `tests/hf/layouts.json` has those of every family.
"""

import re
from collections.abc import Mapping
from typing import Any

from moe_erc.checks import BadInput
from moe_erc.hf.families import Family
from moe_erc.hf.layouts import Sizes

MOST = 2**20  # of layers, experts or width; no model has more
# Where configs of several modalities keep that of their language model, outermost first.
LANGUAGE_MODELS = ("thinker_config", "text_config", "llm_config", "language_config")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
WIDTH = ("d_model", "hidden_size")
EXPERT_WIDTH = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "intermediate_size",
)
DEPTH = ("num_hidden_layers", "num_layers", "n_layers")
PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules")
TYPES = ("mlp_layer_types", "layers_block_type", "layer_types")  # of layers, one word a layer
SPARSE = ("sparse", "moe", "hash_moe")
DENSE = ("dense", "mlp")
COMMA_SEPARATED = re.compile(r"\d{1,7}(,\d{1,7})*", re.ASCII)


def language_model(config: Mapping[str, Any]) -> tuple[list[str], Mapping[str, Any]]:
    """(model types, innermost first, and the config of the language model)."""
    types = [config.get("model_type")]
    for name in LANGUAGE_MODELS:
        if isinstance(config.get(name), Mapping):
            config = without_null(config[name])
            types.insert(0, config.get("model_type"))
    experts = config.get("ffn_config")
    if isinstance(experts, Mapping):  # dbrx
        config = {**without_null(experts), **config}
    return types, config


def without_null(config: Mapping[str, Any]) -> dict:
    """A config without the keys that are null."""
    return {name: value for name, value in config.items() if value is not None}


def sizes_of(config: Mapping[str, Any], family: Family, layer: int) -> Sizes:
    """The sizes of an MoE layer."""
    E = number(config, *EXPERTS, layer=layer)
    further = [number(config, name, least=0, default=0) for name in family.further_rows]
    return Sizes(
        E=E,
        D=number(config, *WIDTH),
        F=number(config, *EXPERT_WIDTH, layer=layer),
        R=E + sum(further),
    )


def depth(config: Mapping[str, Any]) -> int:
    """The number of layers, without those that predict several tokens ahead."""
    return number(config, *DEPTH)


def predicting_layers(config: Mapping[str, Any]) -> range:
    """The numbers of the layers behind the last one that predict several tokens ahead."""
    end = depth(config)
    return range(end, end + number(config, *PREDICTING, least=0, default=0))


def moe_layers(config: Mapping[str, Any]) -> set[int]:
    """The numbers of the MoE layers: all but those that config.json makes dense."""
    every = range(depth(config))
    if config.get("enable_moe_block") is False:  # Gemma 4
        return set()
    for name in TYPES:
        types = config.get(name)
        if isinstance(types, list) and any(word in types for word in (*SPARSE, *DENSE)):
            _check_length(name, types, len(every))
            return {layer for layer in every if types[layer] in SPARSE}
    listed = config.get("moe_layers", config.get("moe_layers_enum"))
    if listed is not None:
        return _whole_numbers("moe_layers", listed).intersection(every)
    dense = _whole_numbers("mlp_only_layers", config.get("mlp_only_layers", []))
    return (_from_first_to_last(config) & _in_steps(config) & _frequent(config)) - dense


def _from_first_to_last(config):
    """The layers behind the dense ones at the beginning, and before those at the end."""
    first = number(config, "first_k_dense_replace", "num_dense_layers", least=0, default=0)
    start = number(config, "moe_layer_start_index", least=0, default=0, layer=0)
    end = number(config, "moe_layer_end_index", least=-1, default=-1, layer=0)
    last = depth(config) - 1 if end == -1 else end
    return set(range(max(first, start), last + 1))


def _in_steps(config):
    """The layers that end a step, or are at the offset of a period; all if neither is set."""
    step = number(config, "decoder_sparse_step", "interleave_moe_layer_step", default=1)
    interval = number(config, "moe_layer_interval", default=1, layer=0)
    period = number(config, "expert_layer_period", default=1)
    offset = number(config, "expert_layer_offset", least=0, default=0)
    every = range(depth(config))
    by_steps = set(every[step - 1 :: step]).intersection(every[interval - 1 :: interval])
    return by_steps.intersection(every[offset % period :: period])


def _frequent(config):
    """The layers by `moe_layer_freq`, a number or a list of 0 and 1."""
    every = range(depth(config))
    frequency = config.get("moe_layer_freq")
    if isinstance(frequency, list):
        _check_length("moe_layer_freq", frequency, len(every))
        return {layer for layer in every if frequency[layer]}
    return set(every[:: number(config, "moe_layer_freq", default=1)])


def _check_length(name, values, layers):
    if len(values) < layers:
        raise BadInput(
            f"config.json: {name} has {len(values)} entries for {layers} layers; "
            "download config.json again"
        )


def _whole_numbers(name, listed):
    if isinstance(listed, str) and COMMA_SEPARATED.fullmatch(listed):  # as Step writes
        listed = [int(word) for word in listed.split(",")]
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise BadInput(f"config.json: {name} is {listed!r}; it must be a list of whole numbers")
    return set(listed)


def number(
    config: Mapping[str, Any],
    *names: str,
    least: int = 1,
    default: int | None = None,
    layer: int | None = None,
) -> int:
    """The value of the first of these names that config.json has.

    Args:
      config: of the language model
      names: by which families call the number
      least: the smallest value that is accepted
      default: where config.json has none of the names; None if the number is needed
      layer: of which the number may differ. A list has one value per layer, and a shorter list one
        per modality, text first.

    Raises:
      BadInput: if it is no whole number in its limits.
    """
    value = next((config[name] for name in names if name in config), default)
    if layer is not None and isinstance(value, list) and value:
        value = value[layer] if len(value) > layer and len(value) >= depth(config) else value[0]
    if type(value) is not int or not least <= value <= MOST:
        raise BadInput(
            f"config.json: {' or '.join(names)} is {value!r}; "
            f"the model needs a whole number of {least} to {MOST}"
        )
    return value
