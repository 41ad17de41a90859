import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput
from moe_erc.training.checkpoint import Checkpoints, prepare_directory
from moe_erc.training.identity import check_same_run
from moe_erc.training.state import Weights


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    router: dict
    rng: jax.Array


def place(tree, mesh_shape, spec):
    """Splits matrices by `spec` over a mesh of this shape, and replicates everything else."""
    mesh = jax.make_mesh(mesh_shape, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec if leaf.ndim == 2 else P()), tree)


def abstract(state, mesh_shape, spec):
    shardings = place(state, mesh_shape, spec)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


@pytest.fixture
def state():
    weights = jax.random.normal(jax.random.key(1), (64, 32))
    router = {"bias": jnp.linspace(-1, 1, 7)}
    state = State(
        jnp.int32(3), {"w": weights, "scale": jnp.full(5, jnp.pi)}, router, jax.random.key(7)
    )
    return jax.device_put(state, place(state, (4, 2), P("data", "expert")))


def bits(tree):
    """Every leaf as host integers: equal only if the arrays agree bit for bit."""

    def host(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if is_key else leaf).view(np.uint32)

    return jax.tree.map(host, tree)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, bits(a), bits(b))


def test_restore_is_bit_exact_on_another_mesh(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(3, state, {"data": {"position": 12}})
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta = checkpoints.restore(abstract(state, (2, 4), P(None, "expert")))
    assert meta == {"data": {"position": 12}}
    assert isinstance(restored, State)
    assert restored.params["w"].sharding.shard_shape((64, 32)) == (64, 8)
    assert_same_bits(restored, state)
    assert jax.random.uniform(restored.rng) == jax.random.uniform(state.rng)  # a typed key again


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_a_key_returns_with_its_algorithm(tmp_path, state, implementation):
    state = state.replace(
        rng=jax.device_put(jax.random.key(7, impl=implementation), state.rng.sharding)
    )
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(abstract(state, (4, 2), P()))
    assert restored.rng.dtype == state.rng.dtype


def test_buffers_may_be_donated_while_the_save_is_running(tmp_path):
    state = State(
        jnp.int32(0),
        {"w": jax.random.normal(jax.random.key(0), (2048, 2048))},
        {},
        jax.random.key(7),
    )
    state = jax.device_put(state, place(state, (4, 2), P("data", "expert")))
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: x if x.ndim == 0 else -x, s), donate_argnums=0
    )
    spare = jax.tree.map(jnp.copy, state)
    jax.block_until_ready(overwrite(spare))  # compiled now, so that the call below races the write
    assert spare.params["w"].is_deleted()
    expected, like = bits(state), abstract(state, (4, 2), P("data", "expert"))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        restored, _ = checkpoints.restore(like)
    jax.tree.map(np.testing.assert_array_equal, bits(restored), expected)


def test_the_newest_steps_are_kept_and_an_old_one_is_not_rewritten(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 15):
            checkpoints.save(step, state, {"saved": step})
        checkpoints.save(15, state, {"saved": "again"})
        checkpoints.wait()
        assert checkpoints.latest_step() == 15
        assert checkpoints.read_meta() == {"saved": 15}
        assert checkpoints.read_meta(10) == {"saved": 10}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "15"]


@pytest.mark.parametrize("router", [True, False], ids=["with a bias", "without"])
def test_weights_are_restored_without_the_rest(tmp_path, state, router):
    state = state if router else state.replace(router={})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    like = abstract(state, (2, 4), P("expert"))
    with Checkpoints(tmp_path) as checkpoints:
        weights = checkpoints.restore_weights(Weights(like.params, like.router))
    assert isinstance(weights, Weights)
    assert weights.params["w"].sharding.shard_shape((64, 32)) == (16, 32)
    assert_same_bits(weights, Weights(state.params, state.router))


def test_a_writer_removes_what_a_killed_run_left_and_a_reader_does_not(tmp_path):
    torn = tmp_path / "9.orbax-checkpoint-tmp"
    (torn / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        assert torn.exists()
    prepare_directory(tmp_path)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() is None
        assert not torn.exists()


def test_a_reader_makes_no_directory_and_says_what_is_missing(tmp_path, state):
    missing = pytest.raises(BadInput, match=r"no checkpoint in .*absent: train there first")
    with Checkpoints(tmp_path / "absent") as checkpoints, missing:
        checkpoints.read_meta()
    assert not (tmp_path / "absent").exists()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, state, {})
        with pytest.raises(BadInput, match=r"no checkpoint of step 7 in .*: it holds \[4\]"):
            checkpoints.read_meta(7)


def test_a_directory_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            BadInput, match=r"cannot write to .*file.*: name a writable directory"
        ) as error:
            prepare_directory(directory)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"checkpoint\.keep: 0 must be at least 1"):
        Checkpoints(tmp_path, keep=0)


KILLED_WHILE_SAVING = """
    import os, signal, sys
    import jax, jax.numpy as jnp
    from moe_erc.training.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=3)
    checkpoints.save(1, {"w": jnp.arange(4.0)}, {"step": 1})
    checkpoints.wait()
    checkpoints.save(2, {"w": jnp.zeros((4096, 2048))}, {"step": 2})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_during_a_save_leaves_the_last_checkpoint_whole(tmp_path):
    program = [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_SAVING), str(tmp_path)]
    killed = subprocess.run(
        program, cwd=os.getcwd(), env=os.environ | {"PYTHONPATH": os.getcwd()}, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    mesh = jax.make_mesh((1, 1), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    like = {"w": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, P()))}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.latest_step() == 1
        restored, meta = checkpoints.restore(like)
        np.testing.assert_array_equal(restored["w"], [0, 1, 2, 3])
        assert meta == {"step": 1}


def test_the_first_setting_that_differs_is_named_with_both_values():
    saved = {"model": {"experts": 8, "width": 64}, "data": {"sources": ["a", "b"]}, "position": 5}
    check_same_run(saved, {"model": {"experts": 8, "width": 64}, "data": {"sources": ("a", "b")}})
    with pytest.raises(
        ValueError, match=r"model\.experts = 8, this run has 16: use another --workdir"
    ):
        check_same_run(saved, {"model": {"experts": 16, "width": 128}})
    with pytest.raises(ValueError, match=r"model\.width = 64, this run has absent"):
        check_same_run(saved, {"model": {"experts": 8}})
    with pytest.raises(ValueError, match=r"tokenizer = absent, this run has bytes"):
        check_same_run(saved, {"tokenizer": "bytes"})
