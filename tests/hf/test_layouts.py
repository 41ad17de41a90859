"""Every family as transformers lays it out: files by hand, with its names, shapes and config.

`layouts.json` has them of every model of transformers with routed experts; `make_layouts.py` wrote
it, and compared each with torch. Here each is filled with routers and gates that are known.
"""

import pathlib

import numpy as np
import pytest

from moe_erc.checks import BadInput
from moe_erc.hf.families import FAMILIES, UNREADABLE
from moe_erc.hf.inspect import open_moe
from moe_erc.hf.layouts import LAYOUTS
from tests.hf import checkpoint, layout_table

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "huggingface.md"
RECORDED = layout_table.load()["models"]
E, D = 4, 16  # of every recorded model
# Families of released files, which transformers does not have: like others by their files.
NOT_RECORDED = {"bailing_moe", "deepseek", "kimi_k2"}


def interleave(gates_EFD, ups_EFD):
    pairs = np.stack([gates_EFD, ups_EFD], axis=2)
    return pairs.reshape(E, -1, D)


# How gates and ups lie, written down once more. A further row has gates of its own.
PACKED = {
    "gates": lambda gates, ups: gates,
    "flat": lambda gates, ups: gates.reshape(-1, D),
    "halves": lambda gates, ups: np.concatenate([gates, ups], axis=1),
    "halves_of_rows": lambda gates, ups: np.pad(
        np.concatenate([gates, ups], axis=1), ((0, 2), (0, 0), (0, 0)), constant_values=9
    ),
    "halves_scaled": lambda gates, ups: np.concatenate([gates, ups], axis=1),
    "interleaved_rows": interleave,
    "column_halves": lambda gates, ups: np.concatenate([gates, ups], axis=1).swapaxes(1, 2),
    "interleaved_columns": lambda gates, ups: interleave(gates, ups).swapaxes(1, 2),
}


def drawn(*shape):
    """Numbers that bfloat16 and every product here hold exactly."""
    return np.random.default_rng(0).integers(-8, 8, shape).astype(np.float32)


def fill(form):
    """(tensors of a form, what is to be read of each layer: (router_ED, w_gate_EDF))."""
    tensors, expected = {}, []
    for layer in form["layers"]:
        router_ED = drawn(E, D) + layer
        gates_EFD = drawn(E, width(form), D) + 2 * layer
        tensors |= routers(form, layer, router_ED) | gates(form, layer, gates_EFD)
        if form["gate_layout"] == "halves_scaled":  # both as they act on the normalised token
            router_ED = router_ED * 2 / D**0.5
            gates_EFD = gates_EFD * 4
        expected.append((router_ED, gates_EFD.swapaxes(1, 2)))
    for name, shape in form["others"].items():
        full = name.format(layer=form["layers"][0], expert=0)
        tensors[full] = np.full(shape, 9, np.float32)
    return tensors, expected


def width(form):
    """F, from the shape of the gates."""
    shape = next(iter(form["gate"].values()))
    return {
        "expert": shape[0],
        "gates": shape[1],
        "flat": shape[0] // E,
        "column_halves": shape[-1] // 2,
        "interleaved_columns": shape[-1] // 2,
    }.get(form["gate_layout"], shape[1] // 2)


def routers(form, layer, router_ED):
    (name, shape), *scale = form["router"].items()
    rows = router_ED
    if form["router_layout"] == "router_transposed":
        rows = router_ED.T
    elif len(router_ED) < shape[0]:  # rows of what is no routed expert come last
        rows = np.pad(router_ED, ((0, shape[0] - E), (0, 0)), constant_values=9)
    assert list(rows.shape) == shape
    made = {name.format(layer=layer): rows}
    return made | {name.format(layer=layer): np.full(shape, 2, np.float32) for name, shape in scale}


def gates(form, layer, gates_EFD):
    (name, shape), *scale = form["gate"].items()
    if form["gate_layout"] == "expert":
        assert list(gates_EFD.shape[1:]) == shape
        return {
            name.format(layer=layer, expert=expert): gate_FD
            for expert, gate_FD in enumerate(gates_EFD)
        }
    packed = PACKED[form["gate_layout"]](gates_EFD, np.full_like(gates_EFD, 9))
    assert list(packed.shape) == shape
    made = {name.format(layer=layer): packed}
    return made | {name.format(layer=layer): np.full(shape, 4, np.float32) for name, shape in scale}


@pytest.mark.parametrize("model_type", RECORDED)
def test_routers_and_gates_are_read_from_every_form(model_type, tmp_path):
    record = RECORDED[model_type]
    for number, form in enumerate(record["forms"]):
        tensors, expected = fill(form)
        directory = checkpoint.write(tmp_path / str(number), record["config"], tensors)
        moe = open_moe(directory)
        assert (moe.family, moe.layers) == (record["family"], form["layers"])
        for (router_ED, w_gate_EDF), (rows_ED, gates_EDF) in zip(moe, expected, strict=True):
            np.testing.assert_array_equal(router_ED, rows_ED)
            np.testing.assert_array_equal(w_gate_EDF, gates_EDF)


def test_every_family_is_recorded():
    assert {record["family"] for record in RECORDED.values()} | NOT_RECORDED == set(FAMILIES)


def test_the_page_has_every_family():
    page = PAGE.read_text(encoding="utf-8")
    assert layout_table.markdown() in page, "print it: python -m tests.hf.layout_table"
    for word in LAYOUTS:
        assert f"| `{word}` |" in page
    for family, reason in UNREADABLE.items():
        assert f"| `{family}` | {reason} |" in page


@pytest.mark.parametrize("family", UNREADABLE)
def test_a_family_without_rows_or_gates_says_so(family, tmp_path):
    directory = checkpoint.write(tmp_path, {"model_type": family}, {})
    with pytest.raises(BadInput) as refusal:
        open_moe(directory)
    assert family in str(refusal.value) and UNREADABLE[family] in str(refusal.value)
