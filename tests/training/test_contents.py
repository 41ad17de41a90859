"""A checkpoint counts if it can be restored, whatever its directory's name or its digests say."""

import json
import shutil

import jax
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.training import contents, digests
from moe_erc.training.checkpoint import Checkpoints, SaveError, prepare_directory

NAMES = (
    "lr[1e-3]",
    "[!a]",
    "a*b",
    "a**b",
    "a?b",
    " a ",
    "%41 #1",
    "$HOME",
    "a:b,c=d",
    "ü",
    "x" * 200,
)


def state(step):
    """A matrix over eight devices, and a key that is stored with the name of its algorithm."""
    mesh = jax.make_mesh((4, 2), ("data", "expert"))
    drawn = {
        "w": jax.random.normal(jax.random.key(step), (16, 4)),
        "rng": jax.random.key(step, impl="rbg"),
    }
    return jax.device_put(
        drawn, {"w": NamedSharding(mesh, P("data", "expert")), "rng": NamedSharding(mesh, P())}
    )


def assert_restored(directory, step):
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0)
    )
    with Checkpoints(directory) as reader:
        assert reader.newest_intact() == step
        restored, _ = reader.restore(like, step)
    np.testing.assert_array_equal(restored["w"], state(step)["w"])
    assert (
        restored["rng"].dtype == state(step)["rng"].dtype
        and (restored["rng"] == state(step)["rng"]).all()
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, 1, 2)
    return directory


def save(directory, *steps):
    held = prepare_directory(directory)
    with Checkpoints(directory, keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"step": step})
    held.close()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_under_any_name_is_restored(name, saved, tmp_path):
    save(tmp_path / name / "checkpoints", 1)
    assert_restored(tmp_path / name / "checkpoints", 1)
    shutil.copytree(saved, tmp_path / f"{name}." / "checkpoints")  # moved there
    assert_restored(tmp_path / f"{name}." / "checkpoints", 2)


def test_what_a_killed_run_left_is_cleared_under_any_name(tmp_path):
    torn = tmp_path / "lr[1e-3]" / "checkpoints" / "4.orbax-checkpoint-tmp"
    torn.mkdir(parents=True)
    prepare_directory(torn.parent).close()
    assert not torn.exists()


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "a\udcff"])
def test_a_name_under_which_nothing_can_be_saved_is_refused(name, tmp_path):
    with pytest.raises(BadInput):
        prepare_directory(f"{tmp_path}/{name}/checkpoints")
    assert not list(tmp_path.iterdir())


def remove_the_merged_index(step):
    """Leaves what orbax leaves where it does not find the parts of the processes."""
    (step / "state" / "manifest.ocdbt").unlink()
    shutil.rmtree(step / "state" / "d")


def lose_a_chunk(step):
    """Removes one of eight shares of the matrix from the index, as if it had not been merged."""
    index = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{step / 'state'}/"}}
    tensorstore.KvStore.open(index).result().delete_range(
        tensorstore.KvStore.KeyRange("w/0.0", "w/0.00")
    ).result()


def lose_an_array(step):
    index = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{step / 'state'}/"}}
    tensorstore.KvStore.open(index).result().delete_range(
        tensorstore.KvStore.KeyRange("rng/", "rng0")
    ).result()


def spoil_the_list(step):
    (step / "state" / "_METADATA").write_text("{}")


def spoil_what_the_run_is(step):
    (step / "meta" / "metadata").write_text('{"step"')


def sign_again(step):
    """Writes digests of the files that are there now."""
    found = [path for item in ("meta", "state") for path in digests._files(step / item)]
    table = {path.relative_to(step).as_posix(): digests.digest(path) for path in found}
    (step / digests.ITEM / digests.FILE).write_text(json.dumps(table))


@pytest.mark.parametrize(
    "damage",
    [remove_the_merged_index, lose_a_chunk, lose_an_array, spoil_the_list, spoil_what_the_run_is],
    ids=lambda damage: damage.__name__,
)
def test_right_digests_do_not_make_a_checkpoint(damage, saved, tmp_path, capfd):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    damage(directory / "2")
    sign_again(directory / "2")
    with Checkpoints(directory) as reader:
        assert reader.newest_intact() == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert line.startswith("checkpoint 2 is damaged (") and line.endswith("): step 1 is used")
    with Checkpoints(directory, keep=3) as writer:
        assert writer.newest_intact() == 1
    assert (directory / "damaged-2").is_dir()
    assert_restored(directory, 1)


def test_signed_again_and_unchanged_is_intact(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    sign_again(tmp_path / "checkpoints" / "2")
    assert_restored(tmp_path / "checkpoints", 2)


def test_a_save_that_cannot_be_restored_is_an_error_and_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path / "checkpoints", 1)
    # With this, orbax finds no parts to merge.
    monkeypatch.setattr(paths.LiteralPath, "glob", lambda *_: iter(()))
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        checkpoints.save(2, state(2), {})
        with pytest.raises(
            SaveError, match=r"could not be written to .* \(it cannot be restored: NOT_FOUND"
        ):
            checkpoints.wait()
        assert checkpoints.newest == 1
    monkeypatch.undo()
    assert_restored(tmp_path / "checkpoints", 1)


def test_the_state_that_was_meant_is_compared(saved):
    expected = contents.shapes_on_disk(state(2))
    assert expected == [((4,), "uint32"), ((16, 4), "float32")]
    assert contents.find_gap(paths.absolute(saved) / "2", expected) == ""
    assert "2 arrays of 1" in contents.find_gap(paths.absolute(saved) / "2", expected[1:])


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, capfd):
    save(tmp_path / "checkpoints", 1)
    monkeypatch.setattr(paths.LiteralPath, "glob", lambda *_: iter(()))
    with (
        pytest.raises(KeyError, match="mine"),
        Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints,
    ):
        checkpoints.save(2, state(2), {})
        raise KeyError("mine")
    assert "error: a checkpoint could not be written" in capfd.readouterr().err
