"""Every family of transformers with routed experts, saved by it and read.

    pip install -e ".[hf]" && pytest tests/hf/test_every_family.py

Without torch and transformers it is skipped, and says so; `test_layouts.py` has what was found.
"""

import pathlib
import re

import pytest

from moe_erc.hf.families import UNREADABLE
from moe_erc.hf.inspect import open_moe

torch = pytest.importorskip("torch", reason="needs the extra `hf`")
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")

from tests.hf import checkpoint, transformers_models  # noqa: E402

MODELS = (*transformers_models.TEXT, *transformers_models.NESTED)
EXPERTS = re.compile(r"self\.\w*experts = |class \w+Experts\(|self\.router_gate = ")


@pytest.mark.parametrize("released", [True, False], ids=["released", "as_in_memory"])
@pytest.mark.parametrize("model_type", MODELS)
def test_its_coupling_is_that_of_torch(model_type, released, tmp_path):
    model = transformers_models.build(model_type)
    model.save_pretrained(tmp_path, save_original_format=released)
    checkpoint.assert_coupling(open_moe(tmp_path), transformers_models.couplings(model))


def test_no_family_of_transformers_is_left_out():
    """Every folder of transformers.models with experts has a model above, or cannot be read."""
    models = pathlib.Path(transformers.__file__).with_name("models")
    with_experts = set()
    for path in models.glob("*/modeling_*.py"):
        if EXPERTS.search(path.read_text(encoding="utf-8")):
            with_experts.add(path.parent.name)
    tried = {folder(model_type) for model_type in (*MODELS, *UNREADABLE)}
    assert with_experts <= tried, sorted(with_experts - tried)


def folder(model_type):
    config = transformers.AutoConfig.for_model(model_type)
    return type(config).__module__.split(".")[-2]
