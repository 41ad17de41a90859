"""Every family of transformers with routed experts, saved by it and read."""

import pytest

from moe_erc.hf.inspect import open_moe
from tests.tolerance import assert_close

import numpy as np

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.hf import transformers_models  # noqa: E402

MODELS = [*transformers_models.TEXT, *transformers_models.NESTED]


@pytest.mark.parametrize("released", [True, False], ids=["released", "as_in_memory"])
@pytest.mark.parametrize("model_type", MODELS)
def test_its_coupling_is_that_of_torch(model_type, released, tmp_path):
    model = transformers_models.build(model_type)
    model.save_pretrained(tmp_path, save_original_format=released)
    moe = open_moe(tmp_path)
    expected = transformers_models.couplings(model)
    assert moe.layers == list(expected) and len(moe) > 0
    for (router_ED, w_gate_EDF), M_EE in zip(moe, expected.values(), strict=True):
        found_EE = np.linalg.norm(router_ED @ w_gate_EDF, axis=-1).T
        assert_close(found_EE, M_EE, terms=sum(w_gate_EDF.shape[1:]))
