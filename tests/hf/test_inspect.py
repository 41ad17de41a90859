"""Routers and gates of whole checkpoints, as transformers and releases lay them out.

A misfit is reported in one line.
"""

import gc
import json
import re
import shutil
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest

from moe_erc.checks import BadInput
from moe_erc.hf.inspect import open_moe
from tests.hf import checkpoint

# Families of which a whole checkpoint is committed; `test_layouts.py` has every family.
COMMITTED = sorted(path.name for path in checkpoint.FAMILIES.iterdir())
SPARSE = {"qwen2_moe": [1], "qwen3_moe": [0, 2], "deepseek_v2": [1, 2], "deepseek_v3": [2]}
QWEN = ("mlp.gate.weight", "mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight")
MIXTRAL = tuple(
    f"block_sparse_moe.{name}.weight" for name in ("gate", "experts.{}.w1", "experts.{}.w3")
)


def assert_coupling(moe, directory):
    """Every layer is float32, and couples as torch computed it."""
    stored = np.load(directory / "coupling.npz", allow_pickle=False)
    checkpoint.assert_coupling(moe, {int(layer): M_EE for layer, M_EE in stored.items()})
    for router_ED, w_gate_EDF in moe:
        assert type(router_ED) is type(w_gate_EDF) is np.ndarray
        assert (
            router_ED.dtype == w_gate_EDF.dtype == np.float32
            and w_gate_EDF.shape[:2] == router_ED.shape
        )


def assert_same(moe, other):
    for ours, theirs in zip(moe, other, strict=True):
        for array, expected in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("family", COMMITTED)
def test_coupling_of_every_committed_checkpoint(family):
    moe = open_moe(checkpoint.FAMILIES / family)
    assert (moe.family, moe.name, moe.layers) == (family, family, SPARSE.get(family, [0, 1]))
    assert_coupling(moe, checkpoint.FAMILIES / family)


@pytest.mark.parametrize("family", COMMITTED)
@pytest.mark.parametrize("options", [
    {},
    {"save_original_format": False},
    {"max_shard_size": "10KB", "dtype": "bfloat16"},
    {"max_shard_size": "10KB", "dtype": "float16", "save_original_format": False},
], ids=["released", "as_in_memory", "bfloat16", "float16"])  # fmt: skip
def test_what_transformers_saves_today(family, options, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.hf import make_families

    make_families.save(
        family, tmp_path, **options | {"dtype": getattr(torch, options.get("dtype", "float32"))}
    )
    assert (tmp_path / "model.safetensors.index.json").exists() == ("max_shard_size" in options)
    assert_coupling(open_moe(tmp_path), tmp_path)


@pytest.mark.parametrize("family, by_expert, router", [
    ("olmoe", QWEN, "mlp.gate.weight"),
    ("qwen2_moe", QWEN, "mlp.gate.weight"),
    ("deepseek_v2", QWEN, "mlp.gate.weight"),
    ("deepseek_v3", QWEN, "mlp.gate.weight"),
    ("mixtral", MIXTRAL, "mlp.gate.weight"),
    ("phimoe", MIXTRAL, "mlp.router.weight"),
])  # fmt: skip
def test_experts_packed_into_one_tensor(family, by_expert, router, tmp_path):
    config, tensors = checkpoint.load(family)
    released = open_moe(checkpoint.FAMILIES / family)
    for prefix in (f"model.layers.{layer}." for layer in released.layers):
        old_router, gate, up = (prefix + name for name in by_expert)
        gates, ups = ([tensors.pop(name.format(e)) for e in range(4)] for name in (gate, up))
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = np.concatenate([gates, ups], axis=1)
        tensors[prefix + router] = tensors.pop(old_router)
    assert_same(open_moe(checkpoint.write(tmp_path, config, tensors)), released)


def test_qwen3_by_expert_as_it_was_released(tmp_path):
    config, tensors = checkpoint.load("qwen3_moe")
    packed = open_moe(checkpoint.FAMILIES / "qwen3_moe")
    config["num_experts"] = config.pop("num_local_experts")
    for layer in packed.layers:
        gate_up = tensors.pop(f"model.layers.{layer}.mlp.experts.gate_up_proj")
        for expert in range(4):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors[f"{name}.gate_proj.weight"], tensors[f"{name}.up_proj.weight"] = np.split(
                gate_up[expert], 2
            )
    assert_same(open_moe(checkpoint.write(tmp_path, config, tensors)), packed)


def test_granite_as_it_was_released(tmp_path):
    config, tensors = checkpoint.load("granitemoe")
    names = {"router.weight": "router.layer.weight", "experts.gate_up_proj": "input_linear.weight"}
    for ours, released in names.items():
        tensors = {name.replace(ours, released): array for name, array in tensors.items()}
    directory = checkpoint.write(tmp_path, config, tensors)
    assert_same(open_moe(directory), open_moe(checkpoint.FAMILIES / "granitemoe"))


def test_gpt_oss_as_it_was_released(tmp_path):
    # Expert 1: row 2 of gate is row 4 of gate and up. The third byte of its second block, 0x2C,
    # holds columns 36 and 37: C is -2 and 2 is 1, both times 2^(129 - 127) = 4. Row 5 of gate and
    # up is row 2 of up, which is not read.
    blocks, scales = np.zeros((2, 6, 2, 16), np.uint8), np.full((2, 6, 2), 129, np.uint8)
    blocks[1, 4, 1, 2], blocks[1, 5, 1, 2] = 0x2C, 0xFF
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1, "num_local_experts": 2} | {
        "hidden_size": 64, "intermediate_size": 3, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    router_ED = np.arange(128, dtype=np.float32).reshape(2, 64)
    parts = {
        "router.weight": router_ED,
        "experts.gate_up_proj_blocks": blocks,
        "experts.gate_up_proj_scales": scales,
    }
    tensors = {f"model.layers.0.mlp.{name}": array for name, array in parts.items()}
    expected = np.zeros((2, 64, 3))
    expected[1, 36, 2], expected[1, 37, 2] = -8, 4
    assert_same(open_moe(checkpoint.write(tmp_path, config, tensors)), [(router_ED, expected)])
    with pytest.raises(ValueError, match="gate_up_proj_scales"):
        del tensors["model.layers.0.mlp.experts.gate_up_proj_scales"]
        open_moe(checkpoint.write(tmp_path, config, tensors))


def test_deepseek_v3_as_it_was_released(tmp_path):
    # The small gates are float8 with one scale each. Layer 3 predicts the token after the next.
    config, tensors = checkpoint.load("deepseek_v3")
    [(router_ED, w_gate_EDF)] = open_moe(checkpoint.FAMILIES / "deepseek_v3")
    for expert in range(4):
        name = f"model.layers.2.mlp.experts.{expert}.gate_proj.weight"
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = np.full((1, 1), 2.0**expert, np.float32)
    tensors["model.layers.3.mlp.gate.weight"] = np.zeros((4, 16), np.float32)
    scales_E11 = 2.0 ** np.arange(4)[:, None, None]
    expected = w_gate_EDF.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales_E11
    assert_same(open_moe(checkpoint.write(tmp_path, config, tensors)), [(router_ED, expected)])
    del tensors["model.layers.2.mlp.experts.3.gate_proj.weight_scale_inv"]
    with pytest.raises(ValueError, match=r"experts\.3\.gate_proj\.weight_scale_inv"):
        open_moe(checkpoint.write(tmp_path, config, tensors))


def test_nothing_but_routers_and_gates_is_needed(tmp_path):
    config, tensors = checkpoint.load("qwen2_moe")
    needed = re.compile(r"model\.layers\.1\.mlp\.(gate|experts\.\d\.gate_proj)\.weight")
    tensors = {name: array for name, array in tensors.items() if needed.fullmatch(name)}
    assert_same(
        open_moe(checkpoint.write(tmp_path, config, tensors)),
        open_moe(checkpoint.FAMILIES / "qwen2_moe"),
    )


def test_opening_reads_no_tensor(monkeypatch):
    monkeypatch.setattr(np, "memmap", None)
    moe = open_moe(checkpoint.FAMILIES / "mixtral")
    with pytest.raises(TypeError):
        next(iter(moe))


def test_two_layers_are_in_memory_at_most(tmp_path):
    E, D, F, layers = 4, 64, 64, 6
    tensors = {}
    for prefix in (f"model.layers.{layer}.mlp." for layer in range(layers)):
        tensors[f"{prefix}gate.weight"] = np.zeros((E, D), ml_dtypes.bfloat16)
        tensors[f"{prefix}experts.gate_up_proj"] = np.zeros((E, 2 * F, D), ml_dtypes.bfloat16)
    config = {
        "model_type": "olmoe",
        "num_hidden_layers": layers,
        "num_experts": E,
        "hidden_size": D,
    }
    moe = open_moe(checkpoint.write(tmp_path, config | {"intermediate_size": F}, tensors))
    earlier = []
    tracemalloc.start()
    for _, w_gate_EDF in moe:
        assert sum(gate() is not None for gate in earlier) <= 1
        earlier.append(weakref.ref(w_gate_EDF))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del w_gate_EDF
    gc.collect()
    assert len(earlier) == layers and not any(gate() is not None for gate in earlier)
    assert peak < 2.5 * E * D * F * 4
    assert_same(moe, moe)  # and it can be read again


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "bert"}, ["'bert'", "docs/huggingface.md", "mlp.gate.weight (4, 16)",
     "--family='mlp.gate.weight,mlp.experts.{expert}.gate_proj.weight,expert'"]),
    ({"model_type": None}, ["None", "docs/huggingface.md"]),
    ({"model_type": ["olmoe"]}, ["['olmoe']", "docs/huggingface.md"]),
    ({"model_type": "bert", "num_experts": 5},
     ["'bert'", "(5, 16)", "--family=ROUTER,GATE,LAYOUT"]),
    ({"model_type": "bert", "num_experts": None}, ["'bert'", "none of num_experts", "num_local"]),
    ({"model_type": "nemotron_h"}, ["'nemotron_h'", "no gate"]),
    ({"text_config": {"model_type": "zaya"}}, ["'zaya'", "no router row"]),
    ({"num_experts": None}, ["num_experts or num_local_experts or n_routed_experts", "None"]),
    ({"num_experts": "4"}, ["num_experts", "'4'"]),
    ({"num_experts": 0}, ["num_experts", "0", "1 to"]),
    ({"num_experts": 10**9}, ["num_experts", "1000000000", "to 1048576"]),
    ({"num_experts": 3}, ["3 experts", "experts.3.gate_proj"]),
    ({"num_experts": 5}, ["gate.weight", "(4, 16)", "(5, 16)"]),
    ({"hidden_size": 17}, ["gate.weight", "(4, 16)", "(4, 17)"]),
    ({"intermediate_size": 13}, ["experts.0.gate_proj.weight", "(12, 16)", "(13, 16)"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
    ({"num_hidden_layers": 1}, ["layers 1,", "router"]),
    ({"num_hidden_layers": 3}, ["layers 2,", "router"]),
    ({"num_hidden_layers": 2**20}, ["layers 2, 3, 4, 5, 6, 7, 8, 9, 1048574 in all"]),
    ({"first_k_dense_replace": 1}, ["layers 0,", "router"]),
    ({"first_k_dense_replace": -1}, ["first_k_dense_replace", "-1"]),
    ({"decoder_sparse_step": 0}, ["decoder_sparse_step", "0"]),
    ({"mlp_only_layers": 1}, ["mlp_only_layers", "1", "list"]),
    ({"mlp_only_layers": [[1]]}, ["mlp_only_layers", "[[1]]", "list"]),
    ({"mlp_layer_types": ["dense", "sparse"]}, ["layers 0,", "router"]),
    ({"mlp_layer_types": ["sparse"]}, ["mlp_layer_types", "1 entries", "2 layers"]),
    ({"moe_layers": [1]}, ["layers 0,", "router"]),
    ({"moe_layers_enum": "1"}, ["layers 0,", "router"]),
    ({"moe_layers_enum": "1,x"}, ["moe_layers", "'1,x'", "list"]),
    ({"moe_layer_freq": [0, 1]}, ["layers 0,", "router"]),
    ({"moe_layer_freq": 2}, ["layers 1,", "router"]),
    ({"moe_layer_freq": [1]}, ["moe_layer_freq", "1 entries"]),
    ({"moe_layer_start_index": 1}, ["layers 0,", "router"]),
    ({"moe_layer_end_index": 0}, ["layers 1,", "router"]),
    ({"moe_layer_interval": 2}, ["layers 0,", "router"]),
    ({"expert_layer_period": 2, "expert_layer_offset": 1}, ["layers 0,", "router"]),
    ({"interleave_moe_layer_step": 2}, ["layers 0,", "router"]),
    ({"num_dense_layers": 1}, ["layers 0,", "router"]),
    ({"enable_moe_block": False}, ["layers 0, 1,", "router"]),
])  # fmt: skip
def test_a_config_that_is_not_the_shards(changes, words, tmp_path):
    config, tensors = checkpoint.load("olmoe")
    refuses(checkpoint.write(tmp_path, config | changes, tensors), words)


@pytest.mark.parametrize("name, array, words", [
    ("mlp.gate.weight", None, ["layers 1,", "router"]),
    ("mlp.gate.weight", np.zeros((4, 17), np.float32), ["mlp.gate.weight", "(4, 17)", "(4, 16)"]),
    ("mlp.gate.weight", np.zeros((4, 16), np.uint8), ["mlp.gate.weight", "BF16/F16/F32"]),
    ("mlp.experts.2.gate_proj.weight", None,
     ["model.layers.1.mlp.experts.2.gate_proj.weight", "gate_up_proj"]),
    ("mlp.experts.2.gate_proj.weight", np.zeros((16, 12), np.float32),
     ["experts.2.", "(16, 12)", "(12, 16)"]),
    ("mlp.experts.2.gate_proj.weight", np.zeros((12, 16), np.uint8),
     ["experts.2.", "BF16/F16/F32", "F8_E4M3"]),
    ("mlp.experts.gate_up_proj", np.zeros((4, 24, 16), np.float32),
     ["experts.0.gate_proj", "gate_up_proj", "both"]),
    ("mlp.experts.4.gate_proj.weight", np.zeros((12, 16), np.float32),
     ["4 experts", "experts.4.gate_proj.weight"]),
])  # fmt: skip
def test_tensors_that_are_not_the_config_s(name, array, words, tmp_path):
    config, tensors = checkpoint.load("olmoe")
    tensors["model.layers.1." + name] = array
    tensors = {name: array for name, array in tensors.items() if array is not None}
    refuses(checkpoint.write(tmp_path, config, tensors), words)


def test_a_model_without_moe_layers(tmp_path):
    config, tensors = checkpoint.load("qwen2_moe")
    tensors.pop("model.layers.1.mlp.gate.weight")
    refuses(
        checkpoint.write(tmp_path, config | {"mlp_only_layers": [1]}, tensors), ["none of 3 layers"]
    )


def test_two_routers_in_a_layer(tmp_path):
    config, tensors = checkpoint.load("mixtral")
    tensors["model.layers.0.mlp.gate.weight"] = tensors[
        "model.layers.0.block_sparse_moe.gate.weight"
    ]
    refuses(
        checkpoint.write(tmp_path, config, tensors),
        ["layers.0.mlp.gate", "layers.0.block_sparse_moe.gate", "both"],
    )


def test_routers_beside_the_language_model_are_not_read(tmp_path):
    config, tensors = checkpoint.load("olmoe")
    router = tensors["model.layers.0.mlp.gate.weight"]
    for stack in ("mtp.layers", "vision_tower.blocks", "model.talker.layers"):
        tensors[f"{stack}.0.mlp.gate.weight"] = router[:, :8]
    moe = open_moe(checkpoint.write(tmp_path, config, tensors))
    assert_same(moe, open_moe(checkpoint.FAMILIES / "olmoe"))
    tensors["other.layers.0.mlp.gate.weight"] = router
    refuses(checkpoint.write(tmp_path, config, tensors), ["'model.layers.'", "'other.layers.'"])


@pytest.mark.parametrize("prefix, nest", [
    ("language_model.", lambda text: {"model_type": "internvl_chat", "llm_config": text}),
    ("", lambda text: {"model_type": "olmoe", "text_config": text | {"model_type": "a_text"}}),
    ("thinker.", lambda text: {"model_type": "b", "thinker_config":
                               {"model_type": "b_thinker", "text_config": text}}),
])  # fmt: skip
def test_a_config_of_several_modalities(prefix, nest, tmp_path):
    config, tensors = checkpoint.load("olmoe")
    tensors = {prefix + name: array for name, array in tensors.items()}
    nested = nest(config) | {"num_hidden_layers": 7}  # of another modality
    moe = open_moe(checkpoint.write(tmp_path, nested, tensors))
    assert moe.family == "olmoe"
    assert_same(moe, open_moe(checkpoint.FAMILIES / "olmoe"))


def test_names_with_braces(tmp_path):
    config, tensors = checkpoint.load("olmoe")
    tensors = {"{0.a}{expert.b}{." + name: array for name, array in tensors.items()}
    moe = open_moe(checkpoint.write(tmp_path, config, tensors))
    assert_same(moe, open_moe(checkpoint.FAMILIES / "olmoe"))


def test_a_family_by_a_user_s_line(tmp_path):
    config, tensors = checkpoint.load("olmoe")
    renamed = {name.replace("mlp.gate.", "chooser."): tensors[name] for name in tensors}
    directory = checkpoint.write(tmp_path, config | {"model_type": "mine"}, renamed)
    line = "chooser.weight,mlp.experts.{expert}.gate_proj.weight,expert"
    refuses(directory, ["'mine'", f"--family='{line}'"])
    assert_same(open_moe(directory, line), open_moe(checkpoint.FAMILIES / "olmoe"))


@pytest.mark.parametrize("gate, line", [
    ("experts.gate_up_proj", "experts.gate_up_proj,halves' or --family='router.weight,"
     "experts.gate_up_proj,interleaved_rows"),
    ("experts.gate_proj", "experts.gate_proj,gates"),
    ("experts.w1", "experts.w1,flat"),
    ("experts.w13", "experts.w13,column_halves"),
])  # fmt: skip
def test_the_line_that_is_proposed(gate, line, tmp_path):
    shapes = {
        "experts.gate_up_proj": (4, 24, 16),
        "experts.gate_proj": (4, 12, 16),
        "experts.w1": (48, 16),
        "experts.w13": (4, 16, 24),
    }
    config = checkpoint.load("olmoe")[0] | {"model_type": "mine", "num_hidden_layers": 1}
    tensors = {
        "model.layers.0.router.weight": np.ones((4, 16), np.float32),
        "model.layers.0.self_attn.gate_proj.weight": np.ones((4, 16), np.float32),
        "model.layers.0.mlp.gate_proj.weight": np.ones((12, 16), np.float32),
        "model.layers.0.another": np.ones((4, 16), np.float32),
        f"model.layers.0.{gate}": np.ones(shapes[gate], np.float32),
    }
    directory = checkpoint.write(tmp_path, config, tensors)
    refuses(directory, [f"{gate} {shapes[gate]}", f"--family='router.weight,{line}"])
    proposed = f"router.weight,{line}".split("'")[0]
    assert [gates.shape for _, gates in open_moe(directory, proposed)] == [(4, 16, 12)]


@pytest.mark.parametrize("line", [
    "", "mlp.gate.weight", "a,b,c", "a,b,expert", "a,{expert}.b,halves", ",b,halves",
])  # fmt: skip
def test_a_line_that_is_none(line):
    with pytest.raises(BadInput, match="--family=") as refusal:
        open_moe(checkpoint.FAMILIES / "olmoe", line)
    assert line in str(refusal.value)


def test_qwen3_vl_as_it_was_released(tmp_path):
    # (E, D, 2F), where transformers has (E, 2F, D) by the same name.
    config = {"model_type": "qwen3_vl_moe", "num_hidden_layers": 1, "num_experts": 2}
    config |= {"hidden_size": 8, "moe_intermediate_size": 3}
    router_ED = np.arange(16, dtype=np.float32).reshape(2, 8)
    gate_EDF = np.arange(48, dtype=np.float32).reshape(2, 8, 3)
    tensors = {
        "model.language_model.layers.0.mlp.gate.weight": router_ED,
        "model.language_model.layers.0.mlp.experts.gate_up_proj": np.concatenate(
            [gate_EDF, np.full_like(gate_EDF, 99)], axis=2
        ),
    }
    directory = checkpoint.write(tmp_path, config, tensors)
    assert_same(open_moe(directory), [(router_ED, gate_EDF)])


def test_gates_whose_axes_cannot_be_told_apart(tmp_path):
    # D is 2F: (E, D, 2F) and (E, 2F, D) are one shape.
    config = {"model_type": "qwen3_vl_moe", "num_hidden_layers": 1, "num_experts": 2}
    config |= {"hidden_size": 8, "moe_intermediate_size": 4}
    tensors = {
        "model.layers.0.mlp.gate.weight": np.ones((2, 8), np.float32),
        "model.layers.0.mlp.experts.gate_up_proj": np.ones((2, 8, 8), np.float32),
    }
    directory = checkpoint.write(tmp_path, config, tensors)
    refuses(directory, ["gate_up_proj", "(E D 2F)", "(E 2F D)", "--family"])
    open_moe(directory, "mlp.gate.weight,mlp.experts.gate_up_proj,halves")


@pytest.mark.parametrize("text, words", [
    ("", ["config.json", "JSON"]),
    ('{"model_type": ', ["config.json", "JSON"]),
    ("[]", ["config.json", "list"]),
    ("\udcff", ["config.json", "JSON"]),
])  # fmt: skip
def test_a_config_that_is_no_json_object(text, words, tmp_path):
    shutil.copy(checkpoint.FAMILIES / "olmoe" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refuses(tmp_path, words)


def test_a_directory_that_is_no_model(tmp_path):
    refuses(tmp_path / "none", [str(tmp_path / "none"), "config.json"], BadInput)
    refuses(tmp_path, [str(tmp_path), "config.json"], BadInput)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.load("olmoe")[0]))
    refuses(tmp_path, [str(tmp_path), "model.safetensors"], BadInput)


def refuses(directory, words, error=ValueError):
    with pytest.raises(error) as refusal:
        open_moe(directory)
    message = str(refusal.value)
    assert "\n" not in message and all(word in message for word in words), message
