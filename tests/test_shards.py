"""A run on token shards is, bit for bit, the run on the text that they were made of."""

import signal

import jax
import numpy as np
import pytest

from moe_erc.data.config import DataConfig
from moe_erc.data.text import prepare
from tests import script
from tests.written import metrics, saved_state

STEPS = 24
SAVED = 4  # steps between checkpoints


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains a workdir up to a step on some sources."""
    cache = tmp_path_factory.mktemp("cache")

    def run(workdir, steps, *arguments, code=0, killed_at=None):
        everything = [
            "--config=configs/erc.py:debug",
            f"--config.data.cache_dir={cache}",
            f"--config.train.steps={steps}",
            f"--config.checkpoint.every={SAVED}",
            "--config.optimizer.schedule=constant",  # its rate does not depend on the last step
            "--config.eval.every=1000",
            "--config.eval.prompt=",
            "--config.log.every=1",
            "--config.log.tensorboard=False",
            f"--workdir={workdir}",
            *arguments,
        ]
        output = workdir.with_suffix(".out")
        if killed_at is None:
            found, printed = script.run("train.py", everything, output)
            assert found == code, printed
            return printed
        process = script.start("tests/train_slowly.py", everything, output)
        assert script.hit(process, workdir, killed_at, signal.SIGKILL) == -signal.SIGKILL
        return output.read_text()

    run.cache = cache
    return run


@pytest.fixture(scope="module")
def shards(train, text_directory, tmp_path_factory):
    """The streams of the text, in shards that are cut anywhere: the arguments of a run on them."""
    directory = tmp_path_factory.mktemp("shards")
    corpus = prepare(
        DataConfig((str(text_directory),), (), "bytes", "text", 0.1, 32, str(train.cache))
    )
    for split, [stream] in ((name, found.values()) for name, found in corpus.streams.items()):
        (directory / split).mkdir()
        for number, part in enumerate(np.array_split(stream.tokens_N[:], 7)):
            part.astype("<u2").tofile(directory / split / f"{number:02}.npy")
    return directory, [
        f"--config.data.sources=('tokens:{directory}/train/*.npy',)",
        f"--config.data.tokens.validation=('{directory}/validation/*.npy',)",
    ]


def test_a_run_that_is_killed_and_resumed_on_shards_ends_as_that_on_text(
    train, shards, text_directory, tmp_path
):
    directory, arguments = shards
    text = [f"--config.data.sources=('{text_directory}',)", "--config.data.validation_fraction=0.1"]
    train(tmp_path / "text", STEPS, *text)
    said = train(tmp_path / "shards", STEPS, *arguments, killed_at=2 * SAVED)
    assert "7 flat array shards of uint16: what data.tokens.validation names is held out, 0" in said
    train(tmp_path / "shards", STEPS, *arguments)
    ours, theirs = (saved_state(tmp_path / name, STEPS) for name in ("shards", "text"))
    assert ours[0] == theirs[0] == STEPS
    for mine, other in zip(*map(jax.tree.leaves, (ours[1], theirs[1])), strict=True):
        np.testing.assert_array_equal(mine, other)

    def losses(name):
        return [line["loss/lm"] for line in metrics(tmp_path / name) if "loss/lm" in line]

    assert losses("shards") == losses("text") and len(losses("text")) == STEPS
    # Other shards are refused in one line, before anything is compiled.
    (directory / "train" / "06.npy").rename(directory / "06.npy")
    said = train(tmp_path / "shards", STEPS + 1, *arguments, code=2)
    assert "have changed since the run was begun (1 file removed (06.npy))" in said.splitlines()[-1]
