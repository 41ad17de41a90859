"""Whole scripts with attention within documents: trained so, evaluated so, and exported with a card that says so."""

import json
import re

import pytest

from moe_erc.data.text import DataConfig, documents_per_window, prepare
from tests import script

LENGTH = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The block of a configuration: 600 lines as documents, several in a window."""
    directory = tmp_path_factory.mktemp("lines")
    lines = (f'{{"text": "{"the router " * (number % 4)}{number}"}}\n' for number in range(600))
    (directory / "lines.jsonl").write_text("".join(lines))
    cache = str(tmp_path_factory.mktemp("cache"))
    return {"sources": (str(directory),), "cache_dir": cache, "validation_fraction": 0.1}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """(workdir, everything printed) of a run on two micro-batches, with every layer computed again."""
    workdir = tmp_path_factory.mktemp("run")
    flags = ["--config=configs/erc.py:debug", "--config.data.attend_across_documents=False"]
    flags += [f"--config.data.{name}={value}" for name, value in data.items()]
    flags += ["--config.train.micro_batches=2", "--config.model.remat=block"]
    flags += ["--config.eval.prompt=", "--config.log.tensorboard=False"]
    code, printed = script.run("train.py", [*flags, f"--workdir={workdir}"], workdir / "out")
    assert code == 0, printed
    return workdir, printed


def test_a_run_says_how_many_documents_a_window_holds(run, data):
    corpus = prepare(DataConfig(**data, weights=(), tokenizer="bytes", text_key="text", sequence_length=LENGTH))
    expected = documents_per_window(corpus, LENGTH)
    assert expected > 2
    assert float(re.search(r"attention within documents: (\S+) in a window", run[1])[1]) == pytest.approx(
        expected, abs=0.051
    )  # printed with one digit behind the point


def test_eval_keeps_to_documents_as_the_run_did(run):
    workdir, _ = run
    code, printed = script.run("eval.py", [f"--workdir={workdir}"], workdir / "out")
    assert code == 0, printed
    trained, found = (json.loads((workdir / name).read_text())["measures"] for name in ("report.json", "eval.json"))
    # 2^9 tokens of validation, whose sum another mesh takes in another order: 2^9 x 2^-24
    assert found["validation/mean"] == pytest.approx(trained["validation/mean"], rel=1e-4)


def test_an_export_says_how_attention_was_trained(run, tmp_path):
    code, printed = script.run("moe_erc.export", [run[0], tmp_path / "olmoe"], tmp_path / "out")
    assert code == 0, printed
    card = (tmp_path / "olmoe" / "README.md").read_text()
    assert "| attention | within documents, with positions that restart at each |" in card
