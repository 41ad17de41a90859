"""A second start compiles nothing. A cache directory that jax was told before stays in use."""

import os
import pathlib

import pytest

from moe_erc.launch import compilation_cache
from tests import script

WHERE = """
import jax
from moe_erc.launch import compilation_cache, processes
processes.initialize()
compilation_cache.enable()
jax.jit(lambda x: x + 1)(1)
print("kept in", jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def program(tmp_path):
    """A script that compiles one function and says where it is kept."""
    path = tmp_path / "program.py"
    path.write_text(WHERE)
    return path


def kept(directory):
    """Every file of the programs in a cache directory and when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("programs/*/*")}


def test_a_second_start_compiles_nothing(text_directory, tmp_path):
    cache = tmp_path / "cache"
    arguments = [
        "--config=configs/vanilla.py:debug",
        f"--config.data.sources=('{text_directory}',)",
        "--config.data.validation_fraction=0.1",
        "--config.train.steps=1",
        "--config.optimizer.warmup_steps=0",
        "--config.eval.prompt=",
        "--config.log.tensorboard=False",
    ]
    environment = {
        "MOE_ERC_CACHE": cache,
        "JAX_COMPILATION_CACHE_DIR": None,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 1.0,  # jax's own
    }
    found = []
    for name in ("first", "second"):
        everything = [*arguments, f"--workdir={tmp_path / name}"]
        code, printed = script.run(
            "train.py", everything, tmp_path / "out", environment=environment
        )
        assert code == 0, printed
        found.append(kept(cache))
    assert (
        sum(name.startswith(("jit_init-", "jit_train_step-", "jit_measure-")) for name in found[0])
        == 3
    )
    # Even small programs are kept, so programs that the second start compiled would lie there too.
    assert len(found[0]) > 10
    assert found[0] == found[1]
    reports = [(tmp_path / name / "report.json").read_bytes() for name in ("first", "second")]
    assert reports[0] == reports[1]


def test_what_jax_was_told_is_respected(program, tmp_path):
    environment = {
        "MOE_ERC_CACHE": tmp_path / "cache",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own"),
    }
    code, printed = script.run(program, [], tmp_path / "out", environment=environment)
    assert code == 0 and f"kept in {tmp_path / 'own'}\n" in printed, printed
    assert list((tmp_path / "own").iterdir()) and not (tmp_path / "cache").exists()


def test_where_nothing_can_be_written_nothing_is_kept(program, tmp_path):
    environment = {"MOE_ERC_CACHE": "/proc/cache", "JAX_COMPILATION_CACHE_DIR": None}
    assert script.run(program, [], tmp_path / "out", environment=environment) == (
        0,
        "kept in None\n",
    )


def test_several_processes_keep_nothing_unless_told_where(program, tmp_path):
    environment = {"MOE_ERC_CACHE": tmp_path / "cache", "JAX_COMPILATION_CACHE_DIR": None}
    assert script.join(script.start_many(2, program, [], tmp_path, **environment), 100) == [0, 0]
    assert all("kept in None\n" in (tmp_path / f"out{number}").read_text() for number in range(2))
    assert not (tmp_path / "cache").exists()


def test_a_folder_is_of_one_kind_of_processor(monkeypatch):
    def folder(cores=8, flags="sse avx", clock="2000"):
        described = f"processor : 0\nmodel name : Z\ncpu MHz : {clock}\nflags : {flags}\n"
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(pathlib.Path, "read_text", lambda path, encoding: described)
        return compilation_cache._processor()

    assert folder() == folder(clock="3000")
    assert len({folder(), folder(cores=4), folder(flags="sse avx avx512f")}) == 3
