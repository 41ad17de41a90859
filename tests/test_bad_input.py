"""Wrong input: one line that names it, exit code 2, before any compilation, and nothing left behind."""

import os

import pytest

from tests import script


@pytest.mark.parametrize("arguments, words", [
    (["--config.model.widht=3"], ["config.model.widht", "config.model.width"]),
    (["--config.losses.erc.alfa=3"], ["config.losses.erc.alfa", "config.losses.erc.alpha"]),
    (["--config.model.width=wide"], ["config.model.width", "wide"]),
    (["--confg=configs/erc.py"], ["confg"]),
    (["--config.model.experts_per_token=5"], ["model.experts_per_token", "5", "4"]),
    (["--config.model.heads=3"], ["model.width", "32", "3"]),
    (["--config.mesh.expert=5"], ["mesh", "5", "devices"]),
    (["--config.train.batch_size=6", "--config.train.micro_batches=4"], ["train.batch_size", "6", "4"]),
    (["--config.losses.erc.noise=gaussian"], ["losses.erc", "noise", "gaussian"]),
    (["--config.losses.erc.weight=-1.0"], ["losses.erc.weight", "-1.0"]),
    (["--config.model.router=aoe", "--config.model.gate_rank=8"], ["losses.erc.weight", "1.0", "'aoe'"]),
    (["--config.model.gate_rank=8"], ["model.gate_rank", "8", "'softmax'", "0"]),
    (["--config.optimizer.name=adamx"], ["optimizer.name", "adamx", "adamw"]),
    (["--config.eval.every=0"], ["eval.every", "0", "steps"]),
    (["--config.eval.temperature=-0.5"], ["temperature", "-0.5"]),
    (["--config.eval.tasks=('sciq',)", "--config.eval.task_dir=/no/tasks"], ["task_dir", "/no/tasks"]),
    (["--config.optimizer.warmup_steps=6"], ["optimizer.warmup_steps", "6"]),
    (["--config.data.sources=('/no/such/place',)"], ["data.sources", "/no/such/place"]),
    (["--config.data.sources=('wiki41b/en',)"], ["wiki41b", "wiki40b"]),
    (["--config.data.sources=('EMPTY',)"], ["EMPTY"]),
    (["--config.data.validation_fraction=0.0"], ["data.validation_fraction", "raise"]),
    (["--config.data.sequence_length=100000"], ["data.sequence_length", "100000"]),
    (["--config.data.tokenizer=/no/tokenizer.json"], ["/no/tokenizer.json"]),
    (["--config.data.tokenizer=BROKEN"], ["broken.json"]),
    (["--config.model.vocab_size=256"], ["model.vocab_size", "256", "257"]),
    (["--workdir=FILE"], ["file"]),
    (["--workdir=/proc/run"], ["/proc/run"]),
], ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "")  # fmt: skip
def test_training_refuses(arguments, words, text_directory, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.json").write_text('{"model": ')
    places = {"EMPTY": "empty", "BROKEN": "broken.json", "FILE": "file"}
    for name, place in places.items():
        arguments = [argument.replace(name, str(tmp_path / place)) for argument in arguments]
    defaults = [
        "--config=configs/erc.py:debug",
        f"--config.data.sources=('{text_directory}',)",
        "--config.data.validation_fraction=0.1",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        f"--workdir={tmp_path / 'run'}",
    ]
    code, printed = script.run("train.py", [*defaults, *arguments], tmp_path / "out")
    words = [places[word].lower() if word in places else word for word in words]
    last = printed.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and all(word in last for word in words), printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--config=configs/none.py"], ["configs/none.py"]),
    (["--config=configs/erc.py:huge"], ["huge", "debug, tiny"]),
])  # fmt: skip
def test_a_config_that_does_not_exist(arguments, words, tmp_path):
    code, printed = script.run("train.py", [*arguments, f"--workdir={tmp_path / 'run'}"], tmp_path / "out")
    assert code == 2 and all(word in printed.splitlines()[-1] for word in words), printed


@pytest.mark.parametrize("arguments, words", [
    ([], ["--workdir", "--checkpoint"]),
    (["--workdir=/no/run"], ["/no/run", "checkpoint"]),
    (["--workdir=/no/run", "--checkpoint=/no/model", "--coupling"], ["--workdir", "--checkpoint", "one of them"]),
    (["--checkpoint=/no/model"], ["/no/model", "--coupling", "--tasks", "--generate"]),
    (["--checkpoint=/no/model", "--coupling", "--figures"], ["/no/model", "--figures"]),
    (["--checkpoint=/no/model", "--coupling"], ["/no/model", "config.json"]),
    (["--checkpoint=/no/model", "--generate=def"], ["/no/model", "config.json"]),
    (["--workdir=/no/run", "--generate=def", "--temperature=-1"], ["temperature", "-1.0"]),
    (["--workdir=/no/run", "--tasks=sciq", "--task_dir=/no/tasks"], ["task_dir", "/no/tasks"]),
    (["--workdir=a,b", "--coupling", "--output=c"], ["--output=c", "one workdir"]),
])  # fmt: skip
def test_evaluation_refuses(arguments, words, tmp_path):
    code, printed = script.run("eval.py", arguments, tmp_path / "out")
    assert code == 2 and all(word in printed.splitlines()[-1] for word in words), printed
    assert not os.path.exists("/no")


def test_the_coupling_of_a_hugging_face_model(tmp_path):
    directory = script.ROOT / "tests" / "hf" / "families" / "olmoe"
    arguments = [f"--checkpoint={directory}", "--coupling", f"--output={tmp_path / 'found'}"]
    code, printed = script.run("eval.py", arguments, tmp_path / "out")
    assert code == 0 and "olmoe: " in printed and "layers are coupled" in printed, printed
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"coupling.json", "coupling.md", "figures"}
