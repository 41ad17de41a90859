"""OLMoEs compute the same in transformers and here, whichever of the two has written them."""

import dataclasses
import json
import pathlib
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.hf.inspect import open_moe
from moe_erc.hf.olmoe import About, export_olmoe, import_olmoe
from moe_erc.hf.olmoe_config import model_fields
from moe_erc.hf.shards import find_tensors, read_config
from moe_erc.hf.tokenizer_files import BYTE_LEVEL, tokenizer_files, tokenizer_of
from moe_erc.losses.language_model import language_model, token_losses
from moe_erc.losses.load_balance import load as shares_of
from moe_erc.losses.load_balance import load_balance
from moe_erc.model.transformer import Transformer
from moe_erc.moe.routers.softmax import Softmax
from tests.hf import checkpoint, models
from tests.tolerance import assert_close

HERE = pathlib.Path(__file__).parent / "olmoe"
VARIANTS = ["plain", "renormalized", "grouped", "tied", "theta", "clipped"]
PACKED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def load(model_config):
    """(model, params) of a checkpoint."""

    def load(directory, mesh=(1, 1), **changes):
        fields = model_fields(read_config(directory))
        fields["renormalize"] = fields.pop("router").renormalize
        model = Transformer(model_config(**fields | changes), sharding.make_mesh(*mesh))
        return model, import_olmoe(directory, model.config, models.abstract(model))

    return load


@pytest.fixture(scope="module")
def trained(model_config):
    """(model, params), with parameters as large as after training."""

    def make(**changes):
        return models.trained(model_config(**changes))

    return make


def compute(model, params, ids_BT):
    """(logits, output) with every token counted."""

    @jax.jit
    def run(params):
        output = model.apply({"params": params}, ids_BT, jnp.ones_like(ids_BT, bool), {})
        return output.x_BTD @ output.head_VD.T, output

    return run(params)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ------------------------------------------------------------ what transformers has


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_transformers_computes_the_same_here(load, variant):
    golden = np.load(HERE / variant / "golden.npz")
    model, params = load(HERE / variant)
    logits_BTV, output = compute(model, params, golden["ids"])
    # Roundings: layers with five sums over widths of at most 16 each, attention over the tokens,
    # and the head.
    terms = model.config.layers * (5 * 16 + golden["ids"].shape[1]) + 16
    assert_close(logits_BTV, golden["logits"], terms)
    losses_BT = token_losses(output.x_BTD[:, :-1], output.head_VD, golden["ids"][:, 1:], chunk=1024)
    assert_close(
        language_model(losses_BT, jnp.ones_like(losses_BT)), np.float32(golden["loss"]), terms
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_balance_loss_is_ours_layer_by_layer_and_k_times_that_of_the_mean_layer(load, variant):
    golden = np.load(HERE / variant / "golden.npz")
    model, params = load(HERE / variant)
    routing = compute(model, params, golden["ids"])[1].routing
    load_LE, probability_LE = shares_of(routing.assignments_E), routing.probability_E
    # Roundings: the layers before the probabilities, and a mean over tokens.
    terms = model.config.layers * 5 * 16 + golden["ids"].size
    assert_close(load_balance(load_LE, probability_LE), np.float32(golden["by_layer"]), terms)
    pooled = load_balance(load_LE.mean(0, keepdims=True), probability_LE.mean(0, keepdims=True))
    assert_close(model.config.experts_per_token * pooled, np.float32(golden["pooled"]), terms)
    assert abs(pooled - golden["by_layer"]) > 1e-3  # the two are not the same loss


def test_a_model_is_read_in_bfloat16_as_its_coupling_is(load):
    _, params = load(checkpoint.FAMILIES / "olmoe")
    moe = params["layers"]["moe"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    for layer, (router_ED, w_gate_EDF) in enumerate(open_moe(checkpoint.FAMILIES / "olmoe")):
        np.testing.assert_array_equal(moe["router"][layer], router_ED)
        np.testing.assert_array_equal(moe["w_gate"][layer], w_gate_EDF)


@pytest.mark.parametrize("variant", ["plain", "grouped", "tied"])
def test_every_device_has_its_share(load, variant):
    _, whole = load(HERE / variant)
    model, split = load(HERE / variant, mesh=(2, 4))
    for expected, found, wanted in zip(
        *map(jax.tree.leaves, (whole, split, models.abstract(model))), strict=True
    ):
        assert found.sharding == wanted.sharding
        np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------ export


@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_an_import_is_exported_as_transformers_wrote_it(load, variant, tmp_path):
    model, params = load(HERE / variant, mesh=(2, 4))
    export_olmoe(tmp_path / "out", model, params)
    written, original = find_tensors(tmp_path / "out"), find_tensors(HERE / variant)
    # A tied head is written out.
    original.setdefault("lm_head.weight", original["model.embed_tokens.weight"])
    assert written.keys() == original.keys()
    for name, tensor in written.items():
        assert tensor.dtype == original[name].dtype
        np.testing.assert_array_equal(tensor.map(), original[name].map())
    ours, theirs = (
        json.loads((place / "config.json").read_text())
        for place in (tmp_path / "out", HERE / variant)
    )
    not_ours = {
        "transformers_version",
        "output_router_logits",
        "max_position_embeddings",
        "router_aux_loss_coef",
    }
    assert theirs.keys() - ours.keys() == not_ours and ours.keys() - theirs.keys() == {"rope_theta"}
    differing = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    untied = {"tie_word_embeddings"} if variant == "tied" else set()
    assert differing - untied <= {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert ours["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "dtype, shard_bytes", [("float32", 10**9), ("float32", 20_000), ("bfloat16", 10_000)]
)
def test_what_was_exported_is_imported_and_exported_to_the_same_bytes(
    trained, load, dtype, shard_bytes, tmp_path
):
    model, params = trained(tie_embeddings=shard_bytes == 10_000, kv_heads=1)
    about = About({"eos_token_id": 7}, {"README.md": "é"})
    for number in range(2):
        export_olmoe(tmp_path / str(number), model, params, about, dtype, shard_bytes)
        model, params = load(tmp_path / str(number))
    first, second = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert first == second and first["README.md"].decode() == "é"
    shards = {name: content for name, content in first.items() if name.endswith(".safetensors")}
    assert (len(shards) > 3) == ("model.safetensors.index.json" in first) == (shard_bytes < 10**9)
    for name, content in shards.items():
        header, numbers = 8 + int.from_bytes(content[:8], "little"), len(content)
        assert header % 8 == 0 and numbers - header <= max(shard_bytes, 512 * 32 * 4), name
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


@pytest.mark.parametrize("dtype", [jnp.float32, ml_dtypes.bfloat16, np.float16])
def test_the_dtype_is_asked_for_or_what_the_model_computes_in(trained, load, dtype, tmp_path):
    name = np.dtype(dtype).name
    model, params = trained(**{"dtype": name} if name != "float16" else {})
    export_olmoe(tmp_path / "out", model, params, **{"dtype": name} if name == "float16" else {})
    assert read_config(tmp_path / "out")["dtype"] == name
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")[1], rounded)


def test_rows_of_power_iteration_are_written_out(trained, load, tmp_path):
    ids = np.random.default_rng(1).integers(0, 512, (2, 16), np.int32)
    model, params = trained(router="mpi")
    export_olmoe(tmp_path / "out", model, params)
    # Roundings: two layers with five sums over widths of at most 32 each, attention over 16
    # tokens, the head, and the power step.
    found, expected = (
        compute(*load(tmp_path / "out", mesh=(2, 1)), ids)[0],
        compute(model, params, ids)[0],
    )
    assert_close(found, expected, terms=2 * (5 * 32 + 16) + 32 + 48)
    written = find_tensors(tmp_path / "out")["model.layers.1.mlp.gate.weight"].map()
    assert np.abs(written - params["layers"]["moe"]["router"][1]).max() > 0.1
    assert_close(np.linalg.norm(written, axis=-1), model.config.router.scale / 2, terms=8)  # E is 4


def test_a_model_that_is_routed_evenly_whatever_its_router_says_is_not_exported(
    model_config, tmp_path
):
    config = dataclasses.replace(model_config(), forced_balance=True)
    with pytest.raises(BadInput, match=r"routers.forced_balance: True cannot be exported"):
        export_olmoe(tmp_path / "out", Transformer(config), {})
    assert not list(tmp_path.iterdir())


def test_an_export_takes_the_memory_of_a_layer(trained, tmp_path):
    model, params = trained(layers=24, expert_width=256)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    export_olmoe(tmp_path / "warm", model, params)
    tracemalloc.start()
    export_olmoe(tmp_path / "out", model, params)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 8, (peak, size)  # a layer is 1/24, names and headers are as much again


@pytest.mark.parametrize("changes, words", [
    ({"shared_experts": 1}, ["model.shared_experts", "1"]),
    ({"top_p": 0.5}, ["routers.softmax.top_p", "0.5"]),
    ({"bias_rate": 1e-3}, ["routers.softmax.bias_rate", "0.001"]),
    ({"router": "aoe", "rank": 8}, ["model.router", "'aoe'"]),
    ({"router": "routing_free", "rank": 8}, ["model.router", "'routing_free'"]),
    ({"router": "xmoe"}, ["model.router", "'xmoe'"]),
    ({"router": "sigmoid"}, ["model.router", "'sigmoid'", "softmax"]),
], ids=str)  # fmt: skip
def test_what_no_olmoe_computes_is_not_exported(model_config, changes, words, tmp_path):
    with pytest.raises(ValueError) as refusal:
        export_olmoe(tmp_path / "out", Transformer(model_config(**changes)), {})
    assert all(word in str(refusal.value) for word in (*words, "cannot be exported")), refusal
    assert not list(tmp_path.iterdir())


def test_a_directory_is_there_whole_or_not_at_all(trained, tmp_path):
    model, params = trained()
    (tmp_path / "empty").mkdir()
    export_olmoe(tmp_path / "empty", model, params)
    before = contents(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    for taken in ("empty", "file"):
        with pytest.raises(BadInput, match="there already"):
            export_olmoe(tmp_path / taken, model, params)
    with pytest.raises(ValueError, match="local directory"):
        export_olmoe("gs://bucket/model", model, params)
    too_large = params | {"head": params["head"] * 1e6}
    with pytest.raises(ValueError, match=r"^lm_head\.weight is not finite in float16"):
        export_olmoe(tmp_path / "large", model, too_large, dtype="float16")
    with pytest.raises(ValueError, match=r"'uint8' .* float32"):
        export_olmoe(tmp_path / "whole", model, params, dtype="uint8")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"} and contents(
        tmp_path / "empty"
    ) == before


# ------------------------------------------------------------ transformers


@pytest.mark.parametrize("changes", [
    {},
    {"kv_heads": 1, "renormalize": True},
    {"tie_embeddings": True, "rope_theta": 50.0, "norm_eps": 1e-3},
    {"router": "mpi"},
    {"router": "competition", "dtype": "bfloat16"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_transformers_computes_the_same_with_what_we_export(
    trained, changes, shard_bytes, tmp_path
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params = trained(**changes)
    about = About({"eos_token_id": 256}, tokenizer_files("bytes", "<|endoftext|>", 64))
    export_olmoe(tmp_path / "out", model, params, about, "float32", shard_bytes)
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(told[problem] for problem in told), told
    assert (
        type(theirs).__name__ == "OlmoeForCausalLM" and theirs.generation_config.eos_token_id == 256
    )
    assert theirs.model.embed_tokens.padding_idx is None  # no row without a gradient
    ids = np.random.default_rng(1).integers(0, 512, (2, 16), np.int32)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids)).logits.numpy()
    float32 = Transformer(dataclasses.replace(model.config, dtype="float32"), model.mesh)
    # Roundings: two layers with five sums over widths of at most 32 each, attention over 16
    # tokens, the head, and the power step.
    assert_close(compute(float32, params, ids)[0], expected, terms=2 * (5 * 32 + 16) + 32 + 48)


def test_transformers_reads_bytes_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in tokenizer_files("bytes", "<|endoftext|>", 64).items():
        (tmp_path / name).write_text(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_token_id, len(tokenizer), tokenizer.model_max_length) == (256, 258, 64)
    assert tokenizer.pad_token_id == 256
    found = tokenizer(EVERYTHING)
    assert found["input_ids"] == list(EVERYTHING.encode()) and "token_type_ids" not in found
    assert tokenizer.decode(tokenizer(EVERYTHING)["input_ids"]) == EVERYTHING


# ------------------------------------------------------------ tokenizer

EVERYTHING = "".join(map(chr, range(1, 0x800))) + " 漢 \U0001f600  \n\n don't  stop"


def test_bytes_are_a_tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(BYTE_LEVEL)
    assert tokenizer.encode(EVERYTHING).ids == list(EVERYTHING.encode())
    assert tokenizer.decode(list(EVERYTHING.encode())) == EVERYTHING
    assert tokenizer.get_vocab_size() == 258 and tokenizer.token_to_id("<|endoftext|>") == 256
    # The one merge is of two bytes that UTF-8 never has.
    assert tokenizer.token_to_id("\u00ff\u00ff") == 257
    assert tokenizer.decode([257]) == tokenizer.decode([255, 255])


def test_the_tokenizer_of_a_checkpoint_stands_in_for_bytes(tmp_path):
    assert tokenizer_of("", "bytes") == "bytes"
    assert tokenizer_of(tmp_path, "other.json") == "other.json"
    with pytest.raises(BadInput, match=r"no tokenizer\.json in .*data\.tokenizer"):
        tokenizer_of(tmp_path, "bytes")
    (tmp_path / "tokenizer.json").write_text(tokenizer_files("bytes", "</s>", 4)["tokenizer.json"])
    assert tokenizer_of(tmp_path, "bytes") == "bytes"  # which it is
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_of(tmp_path, "bytes") == str(tmp_path / "tokenizer.json")
    files = tokenizer_files(str(tmp_path / "tokenizer.json"), "</s>", 4)
    options = json.loads(files["tokenizer_config.json"])
    assert files["tokenizer.json"] == "{}"
    assert (options["eos_token"], options["pad_token"]) == ("</s>", "</s>")
    assert options["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_padding_token_of_the_tokenizer_is_used(tmp_path):
    added = {"added_tokens": [{"content": "</s>"}, {"content": "<pad>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    files = tokenizer_files(str(tmp_path / "tokenizer.json"), "</s>", 4)
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == "<pad>"


# ------------------------------------------------------------ what is not imported


@pytest.mark.parametrize("change, words", [
    ({"model_type": "mixtral"}, ["model_type", "'mixtral'", "'olmoe'"]),
    ({"model_type": None}, ["model_type", "None", "'olmoe'"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
    ({"attention_bias": True}, ["attention_bias", "True", "False"]),
    ({"sliding_window": 8}, ["sliding_window", "8"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
     ["rope_parameters", "'yarn'"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "'linear'"]),
    ({"rope_scaling": "linear"}, ["rope_scaling", "'linear'"]),
    ({"rope_theta": 5e5}, ["rope_theta", "500000.0", "10000.0"]),
    ({"hidden_size": None}, ["hidden_size", "None"]),
    ({"hidden_size": "16"}, ["hidden_size", "'16'"]),
    ({"num_hidden_layers": 2**40}, ["num_hidden_layers", str(2**40)]),
    ({"norm_topk_prob": 1}, ["norm_topk_prob", "1", "true"]),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'"]),
], ids=str)  # fmt: skip
def test_a_config_that_is_no_olmoe(change, words):
    config = json.loads((HERE / "plain" / "config.json").read_text()) | change
    with pytest.raises(ValueError) as refusal:
        model_fields({name: value for name, value in config.items() if value is not None})
    assert all(word in str(refusal.value) for word in ("config.json", *words)), refusal


@pytest.mark.parametrize("config", [
    {"rope_theta": 50.0}, {"rope_theta": 50}, {"rope_parameters": {"rope_theta": 50.0}},
    {"rope_theta": 50.0, "rope_scaling": {"type": "default"},
     "rope_parameters": {"rope_theta": 50.0}},
], ids=str)  # fmt: skip
def test_a_release_may_leave_out_what_has_a_default(config):
    sizes = json.loads((HERE / "plain" / "config.json").read_text())
    left_out = (
        "rope_parameters",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "norm_topk_prob",
    )
    fields = model_fields(
        {name: value for name, value in sizes.items() if name not in left_out and value} | config
    )
    assert fields["rope_theta"] == 50.0 and type(fields["rope_theta"]) is float
    assert (fields["kv_heads"], fields["norm_eps"], fields["tie_embeddings"], fields["router"]) == (
        2, 1e-5, False, Softmax(renormalize=False),
    )  # fmt: skip


@pytest.mark.parametrize("changes, words", [
    ({"width": 32}, ["model.width", "32", "16"]),
    ({"kv_heads": 1}, ["model.kv_heads", "1", "2"]),
    ({"norm_eps": 1e-6}, ["model.norm_eps", "1e-06", "1e-05"]),
    ({"renormalize": True}, ["routers.softmax.renormalize", "True", "False"]),
    ({"router": "mpi"}, ["model.router", "'mpi'", "softmax"]),
    ({"router": "aoe", "rank": 4}, ["model.router", "'aoe'", "softmax"]),
    ({"shared_experts": 1}, ["model.shared_experts", "1"]),
], ids=str)  # fmt: skip
def test_a_model_that_a_checkpoint_is_not_of(load, changes, words):
    with pytest.raises(ValueError) as refusal:
        load(HERE / "plain", **changes)
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value), (
        refusal
    )


def drop(name):
    return lambda tensors: tensors.pop(name)


def reshape(name):
    return lambda tensors: tensors.update({name: tensors[name].reshape(-1, tensors[name].shape[0])})


def convert(name):
    return lambda tensors: tensors.update({name: tensors[name].view(np.uint8)[..., ::4].copy()})


def add(name, like):
    return lambda tensors: tensors.update({name: tensors[like]})


@pytest.mark.parametrize("variant, change, words", [
    ("plain", drop("lm_head.weight"), ["'lm_head.weight'", "no tensor"]),
    ("plain", drop("model.layers.1.mlp.experts.3.up_proj.weight"),
     ["layers.1.mlp.experts.3.up_proj", "no tensor"]),
    ("plain", add("model.layers.2.mlp.gate.weight", "model.norm.weight"),
     ["layers.2.mlp.gate", "1 in all"]),
    ("plain", add("model.layers.0.self_attn.q_proj.bias", "model.norm.weight"),
     ["q_proj.bias", "1 in all"]),
    ("tied", add("lm_head.weight", "model.embed_tokens.weight"), ["lm_head", "1 in all"]),
    ("plain", reshape("model.layers.0.mlp.experts.0.down_proj.weight"),
     ["0.down_proj", "(12, 16)", "(16, 12)"]),
    ("plain", convert("model.norm.weight"), ["model.norm", "U8", "BF16"]),
    ("plain", add(PACKED, "model.norm.weight"), [PACKED, "1 in all"]),
    ("grouped", drop(PACKED), ["layers.0.mlp.experts.0.gate_proj", "no tensor"]),
    ("grouped", add("model.layers.0.mlp.experts.1.up_proj.weight", "model.norm.weight"),
     [PACKED, "both"]),
    ("grouped", reshape("model.layers.1.mlp.experts.down_proj"),
     ["layers.1.mlp.experts.0.down_proj", "no tensor"]),
], ids=lambda value: value[0] if isinstance(value, list) else None)  # fmt: skip
def test_tensors_that_are_not_what_config_json_announces(load, variant, change, words, tmp_path):
    config, tensors = checkpoint.load(HERE / variant)
    change(tensors)
    checkpoint.write(tmp_path / "changed", config, tensors)
    with pytest.raises(ValueError) as refusal:
        load(tmp_path / "changed")
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value), (
        refusal
    )


def test_files_that_are_not_there_or_cut(load, tmp_path):
    with pytest.raises(BadInput, match=r"no config\.json"):
        load(tmp_path)
    directory = shutil.copytree(HERE / "tied", tmp_path / "tied")
    cut = directory / "model-00002-of-00004.safetensors"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{len(whole) - 1} bytes"):
        load(directory)
    cut.unlink()
    with pytest.raises(BadInput, match=cut.name):
        load(directory)
