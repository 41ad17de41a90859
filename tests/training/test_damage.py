"""Damaged checkpoints are named and passed over: the newest intact one is used."""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from moe_erc.training.checkpoint import Checkpoints, prepare_directory

STEPS = (1, 2, 3)


def state(step):
    return {"w": jax.random.normal(jax.random.key(step), (64, 32)), "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory, keep=3) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state(step), {"step": step})
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def files(step):
    """The files of a checkpoint's state and meta, the largest first."""
    inside = [
        path for item in ("state", "meta") for path in (step / item).rglob("*") if path.is_file()
    ]
    return sorted(inside, key=lambda path: -path.stat().st_size)


def truncate(step):
    os.truncate(files(step)[0], files(step)[0].stat().st_size // 2)


def empty_a_file(step):
    files(step)[0].write_bytes(b"")


def flip(step):
    content = bytearray(files(step)[0].read_bytes())
    content[len(content) // 2] ^= 1
    files(step)[0].write_bytes(content)


def remove_a_file(step):
    files(step)[0].unlink()


def remove_the_metadata(step):
    (step / "meta" / "metadata").unlink()


def remove_an_item(step):
    shutil.rmtree(step / "state")


def empty_the_directory(step):
    shutil.rmtree(step)
    step.mkdir()


def replace_a_file_by_a_directory(step):
    (path := files(step)[0]).unlink()
    path.mkdir()


def spoil_the_digests(step):
    (step / "digests" / "files.json").write_text('{"state/')


def remove_the_digests(step):
    shutil.rmtree(step / "digests")


DAMAGES = (
    truncate, empty_a_file, flip, remove_a_file, remove_the_metadata, remove_an_item,
    empty_the_directory, replace_a_file_by_a_directory, spoil_the_digests, remove_the_digests,
)  # fmt: skip


def restored(checkpoints):
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.devices()[0])
        ),
        state(0),
    )
    return jax.device_get(checkpoints.restore(like)[0])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_the_newest_intact_one_is_used_and_the_damaged_one_named(damage, directory, capfd):
    damage(directory / "3")
    with Checkpoints(directory) as reader:
        assert reader.newest_intact() == 2
        assert reader.read_meta(2) == {"step": 2}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("checkpoint 3 is damaged (") and line.endswith("): step 2 is used")
    assert (directory / "3").exists()  # an evaluation changes nothing

    held = prepare_directory(directory)
    with Checkpoints(directory, keep=3) as writer:
        assert writer.newest_intact() == writer.newest == writer.latest_step() == 2
        jax.tree.map(np.testing.assert_array_equal, restored(writer), jax.device_get(state(2)))
        writer.save(3, state(3), {"step": 3})  # its place is free again
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        line.endswith("step 2 is used, it is kept as damaged-3")
        and (directory / "damaged-3").is_dir()
    )
    with Checkpoints(directory) as reader:
        assert reader.newest_intact() == 3
        jax.tree.map(np.testing.assert_array_equal, restored(reader), jax.device_get(state(3)))
    held.close()


def test_every_flipped_byte_is_found(directory):
    for path in files(directory / "3"):
        content = path.read_bytes()
        for place in {0, len(content) // 3, len(content) - 1}:
            flipped = bytearray(content)
            flipped[place] ^= 0x80
            path.write_bytes(flipped)
            with Checkpoints(directory) as reader:
                assert reader.newest_intact() == 2, (path, place)
        path.write_bytes(content)
    with Checkpoints(directory) as reader:
        assert reader.newest_intact() == 3


def test_without_any_intact_one_the_run_does_not_begin_anew(directory):
    flip(directory / "1")
    truncate(directory / "2")
    empty_the_directory(directory / "3")
    for keep in (None, 3):  # the second time finds the same, since nothing was set aside
        with Checkpoints(directory, keep) as checkpoints, pytest.raises(ValueError) as error:
            checkpoints.newest_intact()
        line = str(error.value)
        assert "\n" not in line and "no intact checkpoint in" in line
        assert (
            all(f"step {step}: " in line for step in STEPS)
            and " bytes of " in line
            and "is missing" in line
        )
        assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "3"]


def test_a_half_written_step_is_no_checkpoint(directory, capfd):
    shutil.copytree(directory / "3", directory / "4.orbax-checkpoint-tmp")
    shutil.rmtree(directory / "4.orbax-checkpoint-tmp" / "digests")
    with Checkpoints(directory) as reader:
        assert reader.newest_intact() == 3
    prepare_directory(directory)
    assert not (directory / "4.orbax-checkpoint-tmp").exists() and capfd.readouterr().err == ""


@pytest.fixture
def nobody():
    """(directory that all may read, become nobody, return to the user before).

    A user that may read everything, such as root, becomes nobody.
    """
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o777)
    root = os.geteuid() == 0
    yield (
        directory,
        (lambda: os.seteuid(65534)) if root else (lambda: None),
        lambda: os.seteuid(0) if root else None,
    )
    shutil.rmtree(directory)


def test_a_file_that_may_not_be_read_is_a_damage(saved, nobody, capfd):
    directory, become, return_to = nobody
    shutil.copytree(saved, directory / "checkpoints")
    (directory / "checkpoints").chmod(0o777)
    files(directory / "checkpoints" / "3")[0].chmod(0)
    become()
    try:
        with Checkpoints(directory / "checkpoints") as reader:
            assert reader.newest_intact() == 2
    finally:
        return_to()
    assert "cannot be read: Permission denied" in capfd.readouterr().err


# 0.3 MB fit on the disk or below the limit; 3 MB do not.
FULL_DISK = """
    import resource, signal, sys
    import jax
    from moe_erc.training.checkpoint import Checkpoints, SaveError
    if limit := int(sys.argv[2]):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    checkpoints.save(1, {"w": jax.random.normal(jax.random.key(0), (64, 1024))}, {})
    checkpoints.wait()
    try:
        checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (768, 1024))}, {})
        checkpoints.wait()
    except SaveError as error:
        print("SaveError:", error)
    print("newest", checkpoints.newest)
"""


@pytest.fixture(params=["full disk", "largest file"])
def small_disk(request, tmp_path):
    """(directory, limit of a file): a file system of 1 MB, if allowed to mount, or small files."""
    if request.param == "largest file":
        yield tmp_path, 1 << 20
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed")
    yield tmp_path, 0
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_save_that_does_not_fit_leaves_the_one_before(small_disk):
    directory, limit = small_disk
    program = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(directory), str(limit)]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(program, env=environment, timeout=120, capture_output=True, text=True)
    failure, newest = done.stdout.splitlines()
    assert (
        failure.startswith("SaveError: a checkpoint could not be written to ")
        and newest == "newest 1"
    ), done
    prepare_directory(directory)
    with Checkpoints(directory) as reader:
        assert reader.newest_intact() == 1


HOLDS_THE_LOCK = """
    import sys, time
    from moe_erc.training.checkpoint import prepare_directory
    held = prepare_directory(sys.argv[1])
    print("held", flush=True)
    time.sleep(100)
"""


def test_one_writer_at_a_time_and_a_killed_one_is_none(directory):
    torn = directory / "4.orbax-checkpoint-tmp"
    program = [sys.executable, "-c", textwrap.dedent(HOLDS_THE_LOCK), str(directory)]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            torn.mkdir()  # what the other one is writing
            refused = (
                rf"a run is writing to .* \(process {holder.pid} on .*\): "
                "wait for it or use another --workdir"
            )
            with pytest.raises(ValueError, match=refused):
                prepare_directory(directory)
            assert torn.exists()
            with Checkpoints(directory) as reader:
                assert reader.newest_intact() == 3
        finally:
            holder.kill()  # SIGKILL
        holder.wait()
    prepare_directory(directory).close()
    assert not torn.exists()
