"""Eight virtual CPU devices for every test, so that sharded code runs anywhere; a small corpus and model to share.

Compiling is most of what a test costs: programs are compiled fast rather than well, unless a test
is `optimized`. Only the machine code differs: operations, buffers and what devices send each other
are settled before it is written.
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# Each of several parts of a program would be given passes of its own, and threads for which there
# is no core.
CHEAPLY_COMPILED = " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith(
    ("0.9.", "0.10.")
):  # XLA aborts at a flag that it does not know
    # Two to three times faster where optimizations are off; where they are on, slower.
    CHEAPLY_COMPILED += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + CHEAPLY_COMPILED

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update(
    "jax_enable_compilation_cache", False
)  # of this process; programs out of a cache tell less

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from configs import base  # noqa: E402
from moe_erc.model.config import ModelConfig  # noqa: E402

# The longest first, so that the workers end together: a long file that starts last has a worker to
# itself.
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
# Tracing makes many small objects that live on: the collector would walk over all of them, and over
# what was imported, hundreds of times a test.
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
    """Stable: other files stay in their order, behind."""
    places = {TESTS / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(FIRST)))


def pytest_configure(config):
    """One directory of compiled programs for all scripts that this session starts, in whichever worker."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = directory = tempfile.mkdtemp(
            prefix="moe_erc-programs-"
        )
        config.add_cleanup(lambda: shutil.rmtree(directory))


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_stays():
    """What the modules before have left is mostly programs: the garbage collector need not walk over it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_EVERY)


@pytest.fixture(autouse=True)
def optimized(request):
    """Of a test that is so marked: of the machine code itself, what it rounds or how fast it is."""
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
    """Makes a ModelConfig of size debug with some keys of `model` and options of its router changed."""

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
