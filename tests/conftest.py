"""Eight virtual CPU devices for every test, and a small corpus and model that tests share.

With eight devices, sharded code runs on any machine.

Compiling takes most of a test's time. Programs are therefore compiled quickly, with few
optimizations, unless a test is marked `optimized`. Only the machine code differs: operations,
buffers and transfers between devices are decided before the compiler writes machine code.
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# Several parts would each repeat the compiler's passes, in threads for which there is no core.
CHEAPLY_COMPILED = " --xla_cpu_parallel_codegen_split_count=1"
# XLA aborts at a flag that it does not know, so only versions that know this one get it.
if importlib.metadata.version("jaxlib").startswith(("0.9.", "0.10.")):
    # Compiling is two to three times faster with it where optimizations are off, and slower where
    # they are on.
    CHEAPLY_COMPILED += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + CHEAPLY_COMPILED

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
# The cache of this process is off: programs that are read from a cache report less.
jax.config.update("jax_enable_compilation_cache", False)

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from configs import base  # noqa: E402
from moe_erc.model.config import ModelConfig  # noqa: E402

# The longest files come first. A long file that starts last would run when the other workers are
# done.
FIRST = (
    "test_configs.py",
    "launch/test_processes.py",
    "test_resume.py",
    "test_resumed_changes.py",
    "test_notebooks.py",
    "training/test_step.py",
    "test_lost_work.py",
    "test_init_from.py",
    "test_output.py",
    "model/test_context.py",
    "hf/test_olmoe.py",
    "moe/test_expert_functions.py",
    "evaluation/test_generate.py",
    "test_bad_input.py",
    "losses/test_erc_over_a_mesh.py",
    "losses/test_erc.py",
    "training/test_router_state.py",
    "benchmarks/test_compile_ahead.py",
    "launch/test_compilation_cache.py",
)
TESTS = pathlib.Path(__file__).parent
# Tracing makes many small objects that stay alive. By default the collector would walk over all of
# them, and over all imported modules, hundreds of times per test.
COLLECT_EVERY = (100_000, 20, 50)
WORDS = (
    "the",
    "router",
    "sends",
    "every",
    "token",
    "to",
    "experts",
    "that",
    "know",
    "what",
    "it",
    "means",
)


def pytest_collection_modifyitems(items):
    """Puts the files of FIRST first; the other files follow in their order."""
    places = {TESTS / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(FIRST)))


def pytest_configure(config):
    """Makes one directory of compiled programs for the scripts that all workers start."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory = tempfile.mkdtemp(
            prefix="moe_erc-programs-"
        )
        config.add_cleanup(lambda: shutil.rmtree(directory))


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_stays():
    """Exempts what earlier modules left, mostly compiled programs, from garbage collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_EVERY)


@pytest.fixture(autouse=True)
def optimized(request):
    """Compiles with all optimizations where a test is marked `optimized`.

    Such a test is about the machine code itself: how it rounds, or how fast it is.
    """
    marked = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not marked)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory):
    """Sixty small documents of made-up sentences."""
    directory, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for number in range(60):
        (directory / f"{number:02}.txt").write_text(" ".join(rng.choice(WORDS, 120)))
    return directory


@pytest.fixture(scope="session")
def model_config():
    """Makes a ModelConfig of size debug with changed keys of `model` and options of its router."""

    def make(router="softmax", **changes):
        config = base.get_config("debug").to_dict()
        config["model"]["router"] = router
        for name, value in changes.items():
            block = (
                config["model"]
                if name in config["model"]
                else config["routers"].setdefault(router, {})
            )
            block[name] = value
        return ModelConfig.of(config)

    return make


@pytest.fixture(scope="session")
def token_batch():
    """Makes a random batch of the trainer's form; the last quarter of the last row is masked."""

    def make(batch_size, length, vocab_size=512):
        window_BT = np.random.default_rng(0).integers(
            0, vocab_size, (batch_size, length + 1), np.int32
        )
        mask_BT = np.ones((batch_size, length), bool)
        mask_BT[-1, -(length // 4) :] = False
        return {"inputs_BT": window_BT[:, :-1], "targets_BT": window_BT[:, 1:], "mask_BT": mask_BT}

    return make
