"""Eight virtual CPU devices for every test, so that sharded code runs anywhere; a small corpus and model to share."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from configs import base  # noqa: E402
from moe_erc.model.config import ModelConfig  # noqa: E402

WORDS = ("the", "router", "sends", "every", "token", "to", "experts", "that", "know", "what", "it", "means")


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests of what is computed, not of how fast or in how much memory: compiling is most of what they cost."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory):
    """Sixty small documents of made-up sentences."""
    directory, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for number in range(60):
        (directory / f"{number:02}.txt").write_text(" ".join(rng.choice(WORDS, 120)))
    return directory


@pytest.fixture(scope="session")
def model_config():
    """Makes a ModelConfig of size debug with some fields changed."""

    def make(**changes):
        return ModelConfig(**(base.get_config("debug").model.to_dict() | changes))

    return make


@pytest.fixture(scope="session")
def token_batch():
    """Makes a random batch of the trainer's form; the last quarter of the last row is masked."""

    def make(batch_size, length, vocab_size=512):
        window_BT = np.random.default_rng(0).integers(0, vocab_size, (batch_size, length + 1), np.int32)
        mask_BT = np.ones((batch_size, length), bool)
        mask_BT[-1, -(length // 4) :] = False
        return {"inputs_BT": window_BT[:, :-1], "targets_BT": window_BT[:, 1:], "mask_BT": mask_BT}

    return make
