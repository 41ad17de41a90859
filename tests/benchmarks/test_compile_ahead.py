"""What the benchmark that compiles for absent devices writes, and what it refuses in one line."""

import importlib.util
import json

import pytest

from moe_erc.losses.precision import erc_flops
from tests import script

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
MESH = ["--config.mesh.data=2", "--config.mesh.expert=4"]


def compile_ahead(arguments, directory, environment=None):
    """(exit code, everything printed, what it wrote)."""
    written = directory / "ahead.json"
    arguments = [*arguments, f"--json={written}"]
    code, printed = script.run(
        "benchmarks/compile_ahead.py", arguments, directory / "out", environment=environment
    )
    return code, printed, json.loads(written.read_text()) if written.exists() else None


def test_a_step_compiled_for_virtual_devices(tmp_path, model_config):
    arguments = ["--config=configs/erc.py:debug", "--devices=cpu:8", "--difference", *MESH]
    # A program that is read from a cache reports less, so the cache is off.
    code, printed, found = compile_ahead(
        arguments, tmp_path, {"JAX_ENABLE_COMPILATION_CACHE": False}
    )
    assert code == 0, printed
    facts, (step, alone, without) = found["facts"], found["programs"].values()
    assert facts["mesh"] == {"data": 2, "expert": 4} and facts["tokens"] == 8 * 32 / 8
    assert facts["model_flops"] == 3 * 32 * model_config().flops_per_token(32)
    # Attention, router and head of 32 tokens are counted. The experts are not: their loops have no
    # fixed length.
    assert step["cost"]["flops"] > facts["model_flops"] - 3 * 32 * 2 * 2 * 3 * 2 * 32 * 16
    assert any("moe" in origin for origin in step["cost"]["open_loops"])
    # The tokens of an expert group, four sequences of 32, are gathered and summed once per layer,
    # forward and backward.
    gathers = [one for one in step["cost"]["collectives"] if one["shapes"] == ["f32[4,32,32]"]]
    assert {one["kind"] for one in gathers} == {"all-gather"} and {
        one["group"] for one in gathers
    } == {4}
    assert sum(one["times"] for one in gathers) == 2 * 2
    # Every device does an eighth of the work.
    assert alone["cost"]["flops"] == erc_flops(model_config(), "gate") / 8
    assert step["cost"]["flops"] - without["cost"]["flops"] == alone["cost"]["flops"]
    assert 0 < alone["memory"]["temporaries"] < step["memory"]["temporaries"]
    assert step["estimate"] is None  # of a CPU there is none
    assert "moe/all_gather" in printed and "Losses on parameters" in printed


def test_what_does_not_fit_is_said_with_what_to_change(tmp_path):
    arguments = ["--config=configs/vanilla.py:debug", "--devices=cpu:8", "--memory=0.0001", *MESH]
    code, printed, found = compile_ahead(arguments, tmp_path)
    last = printed.splitlines()[-1]
    assert code == 1 and found is None
    assert (
        last.startswith("error: does not fit: ")
        and "train.micro_batches" in last
        and "than 8" in last
    )


@pytest.mark.parametrize("arguments, words", [
    ([], ["--topology", "--devices"]),
    (["--devices=cpu:8", "--topology=v5p:4x4x4"], ["--topology", "--devices"]),
    (["--devices=cpu"], ["--devices", "'cpu'", "cpu:64"]),
    (["--devices=gpu:8"], ["--devices", "gpu:8", "cpu:64"]),
    (["--devices=cpu:8", "--search"], ["--search", "--topology"]),
    (["--topology=v5p:4x4x4", "--slices=2", "--search"], ["--search", "one slice"]),
    (["--topology=v9:2x2"], ["--topology", "v9:2x2", "v5p"]),
    (["--topology=v5p:3x5"], ["--topology", "v5p:3x5"] if HAS_LIBTPU else ["libtpu", ".[tpu]"]),
    (["--devices=cpu:8", "--config.mesh.data=3"], ["mesh", "3", "8"]),
    (["--devices=cpu:8", *MESH, "--config.train.batch_size=12"], ["train.batch_size", "12", "8"]),
], ids=lambda value: " ".join(value) if not value or value[0].startswith("--") else "")  # fmt: skip
def test_wrong_input_is_one_line(arguments, words, tmp_path):
    code, printed, found = compile_ahead(["--config=configs/erc.py:debug", *arguments], tmp_path)
    last = printed.splitlines()[-1]
    assert code == 2 and found is None and "Traceback" not in printed, printed
    assert last.startswith("error: ") and all(word in last for word in words), printed


@pytest.mark.skipif(not HAS_LIBTPU, reason="compiles for TPU, which needs the extra `tpu`")
def test_a_step_compiled_for_tpus(tmp_path):
    arguments = ["--config=configs/erc.py:debug", "--topology=v5e:2x4", *MESH]
    code, printed, found = compile_ahead(arguments, tmp_path, script.AS_FOR_USERS)
    assert code == 0, printed
    step = found["programs"]["step"]
    estimate = step["estimate"]
    assert 0 < estimate["cycles"]["likely"] < estimate["step"]["best"] < estimate["step"]["worst"]
    assert "it is no speed" in printed and "libtpu's own cycles" in printed
    cost = step["cost"]
    assert cost["flops"] > 0 and not cost["kernels"] and not cost["open_loops"]
    # Grouped matmuls of two layers: 3 forward, 2 for the recomputed hidden rows, 3 for the
    # gradients of rows and 3 for those of matrices. An expert group has four sequences of 32 tokens
    # with two experts each.
    rows = 4 * 32 * 2
    assert cost["grouped_flops"] == 2 * (3 + 2 + 3 + 3) * 2 * rows * 32 * 16
