"""Where families of MoE models keep routers and gates: one line a family.

A family is the `model_type` of config.json, or that of the language model in it, without "_text".
Names follow "model.layers.N.", or what stands for it; {expert} is a number if each expert has a
tensor of its own. A family has several names because released files and those that transformers
writes differ; a file has one of them.

To add a family, add its line. Shapes, dtypes and the numbers of layers and experts are checked
against config.json when a checkpoint is opened.
"""

from typing import NamedTuple

from moe_erc.checks import BadInput
from moe_erc.hf import layouts
from moe_erc.hf.layouts import LAYOUTS, Layout

Names = tuple[tuple[str, Layout], ...]


class Family(NamedTuple):
    """The names that a file may have for its routers and its gates, and how they lie."""

    routers: Names
    gates: Names
    # The names in config.json of what the router scores beside the routed experts. Its rows for
    # them come last, and are not read.
    further_rows: tuple[str, ...] = ()
    stored: str = "R"  # how many experts have a tensor of their own, where each has one


def _router(*names):
    return tuple((name, layouts.ROUTER) for name in names)


def _by_expert(*names):
    return tuple(
        (name, layout) for name in names for layout in (layouts.EXPERT, layouts.EXPERT_FLOAT8)
    )


def _halves(*names):
    return tuple((name, layouts.HALVES) for name in names)


QWEN = Family(
    _router("mlp.gate.weight"),
    _by_expert("mlp.experts.{expert}.gate_proj.weight") + _halves("mlp.experts.gate_up_proj"),
)
MIXTRAL = Family(
    _router("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    _by_expert("block_sparse_moe.experts.{expert}.w1.weight") + _halves("mlp.experts.gate_up_proj"),
)
GRANITE = Family(
    _router("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
    _halves("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
)
GEMMA = Family((("", layouts.ROUTER_SCALED),), (("", layouts.HALVES_SCALED),))
INKLING = Family(
    _router("mlp.gate.weight"),
    (
        ("mlp.experts.w13_weight", layouts.INTERLEAVED_ROWS),
        ("mlp.experts.gate_up_proj", layouts.HALVES),
    ),
)
LIKE_QWEN = (
    "olmoe",
    "flex_olmo",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "qwen3_omni_moe",
    "qwen4_exp",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_ocr2",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "dots1",
    "dots3_note",
    "ernie4_5_moe",
    "exaone_moe",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm5_next",
    "glm_moe_dsa",
    "hy_v4",
    "hy_v4_vl",
    "kolibri1",
    "laguna",
    "lara_mini",
    "mellum",
    "mimo_v2_flash",
    "mistral4",
    "sarvam_mla",
    "sarvam_moe",
    "solar_open",
    "unlimited_ocr",
    # Whose code is beside their released files, and not in transformers.
    "bailing_moe",
    "deepseek",
    "kimi_k2",
)

FAMILIES = {
    **dict.fromkeys(LIKE_QWEN, QWEN),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2", "minimax_m3_vl", "kimi_linear"), MIXTRAL),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"), GRANITE
    ),
    **dict.fromkeys(("gemma4", "diffusion_gemma"), GEMMA),
    "phimoe": Family(_router("block_sparse_moe.gate.weight", "mlp.router.weight"), MIXTRAL.gates),
    "afmoe": Family(_router("mlp.router.gate.weight"), QWEN.gates),
    "hy_v3": Family(_router("mlp.router.gate.weight", "mlp.gate.weight"), QWEN.gates),
    "hunyuan_v1_moe": Family(_router("mlp.gate.wg.weight"), QWEN.gates),
    "longcat_flash": Family(
        _router("mlp.router.classifier.weight"),
        (*QWEN.gates[:-1], ("mlp.experts.gate_up_proj", layouts.HALVES_OF_ROWS)),
        further_rows=("zero_expert_num",),  # experts that return their input
    ),
    "jamba": Family(
        _router("feed_forward.router.weight"),
        _by_expert("feed_forward.experts.{expert}.gate_proj.weight")
        + _halves("feed_forward.experts.gate_up_proj"),
    ),
    "lfm2_moe": Family(
        _router("feed_forward.gate.weight"),
        _by_expert("feed_forward.experts.{expert}.w1.weight")
        + _halves("feed_forward.experts.gate_up_proj"),
    ),
    "deepseek_v4": Family(
        _router("ffn.gate.weight", "mlp.gate.weight"),
        _by_expert("ffn.experts.{expert}.w1.weight") + _halves("mlp.experts.gate_up_proj"),
    ),
    "mistral_large4": Family(
        _router("gate.weight", "mlp.gate.weight"),
        _by_expert("experts.{expert}.w1.weight") + _halves("mlp.experts.gate_up_proj"),
    ),
    "step3p5": Family(
        _router("moe.gate.weight", "mlp.gate.weight"),
        (("moe.gate_proj.weight", layouts.GATES), *_halves("mlp.experts.gate_up_proj")),
    ),
    "jetmoe": Family(_router("mlp.router.layer.weight"), _halves("mlp.input_linear.weight")),
    "inkling": INKLING._replace(further_rows=("n_shared_experts",)),
    "inkling2": INKLING,
    "inkling2_loop": INKLING,
    "gpt_oss": Family(
        _router("mlp.router.weight"),
        (
            ("mlp.experts.gate_up_proj", layouts.INTERLEAVED_COLUMNS),
            ("mlp.experts.gate_up_proj", layouts.INTERLEAVED_MXFP4),
        ),
    ),
    "openai_privacy_filter": Family(
        _router("mlp.router.weight"), (("mlp.experts.gate_up_proj", layouts.COLUMN_HALVES),)
    ),
    "aria": Family(
        _router("mlp.router.weight"),
        (
            ("mlp.experts.fc1.weight", layouts.COLUMN_HALVES),
            ("mlp.experts.gate_up_proj", layouts.COLUMN_HALVES),
        ),
    ),
    "llama4": Family(
        _router("feed_forward.router.weight"),
        (("feed_forward.experts.gate_up_proj", layouts.COLUMN_HALVES),),
    ),
    # Released files and those that transformers writes have the same name and other axes.
    "qwen3_vl_moe": Family(
        QWEN.routers,
        (
            ("mlp.experts.gate_up_proj", layouts.COLUMN_HALVES),
            ("mlp.experts.gate_up_proj", layouts.HALVES),
        ),
    ),
    # The experts of text, which come first. Those of images have a router of their own.
    "ernie4_5_vl_moe": Family(
        (
            ("mlp.gate.weight", layouts.ROUTER_TRANSPOSED),
            ("mlp.text_moe.gate.weight", layouts.ROUTER),
        ),
        _by_expert("mlp.experts.{expert}.gate_proj.weight")
        + _halves("mlp.text_moe.experts.gate_up_proj"),
        stored="2R",
    ),
    "dbrx": Family(_router("ffn.router.layer.weight"), (("ffn.experts.mlp.w1", layouts.FLAT),)),
}

# Families that have experts, and no router row or no gate to read.
UNREADABLE = {
    "doge": "its router scores keys that experts share, so no router row belongs to one expert",
    "zaya": "its router is a network of several layers, so no router row belongs to one expert",
    "muse_spark": "its experts do not see what its router sees, but a normalised projection of it",
    "nemotron_h": "its experts have no gate, but one matrix before the activation",
    "nllb-moe": "its experts have no gate, but one matrix before the activation",
    "switch_transformers": "its experts have no gate, but one matrix before the activation",
    "vitpose_backbone": "it has no router: the data set of an image chooses the expert",
}


def read_line(line: str) -> Family:
    """A family from a user's line ROUTER,GATE,LAYOUT.

    For example "mlp.gate.weight,mlp.experts.{expert}.gate_proj.weight,expert".

    Raises:
      BadInput: if it is none of these.
    """
    words = [word.strip() for word in line.split(",")]
    if len(words) != 3 or not all(words) or words[2] not in LAYOUTS:
        raise BadInput(
            f"--family={line}: must be ROUTER,GATE,LAYOUT, two names of tensors without the part "
            f"before the number of the layer, and one of {', '.join(LAYOUTS)}"
        )
    router, gate, layout = words
    if ("{expert}" in gate) != layout.startswith("expert"):
        raise BadInput(
            f"--family={line}: the layout {layout} and {gate!r} do not agree; {{expert}} stands "
            "for the number of an expert that has a tensor of its own"
        )
    return Family(_router(router), ((gate, LAYOUTS[layout]),))
