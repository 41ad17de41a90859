"""`--help` of each script prints every flag of its own with an example, and exits with code 0."""

import importlib
import re
import subprocess
import sys

import pytest

from tests import script

TRAIN = ("config", "workdir")
EVALUATE = (
    "checkpoint",
    "figures",
    "limit",
    "num_fewshot",
    "output",
    "task_dir",
    "tasks",
    "windows",
    "workdir",
)


def asked(name, flag, tmp_path):
    code, printed = script.run(name, [flag], tmp_path / "out")
    assert code == 0, printed
    return printed


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "-?", "--helpshort", "--helpfull"])
def test_training_names_its_flags_and_where_keys_are_listed(flag, tmp_path):
    printed = asked("train.py", flag, tmp_path)
    assert "Trains a Mixture-of-Experts" in printed and "configs/base.py" in printed
    assert "--config.a.b=VALUE" in printed and "--config.train.steps=100" in printed
    assert_examples(printed, TRAIN)
    assert ("--config.model.width=128" in printed) == (flag == "--helpfull")


def test_evaluation_names_its_flags(tmp_path):
    printed = asked("eval.py", "--help", tmp_path)
    assert "Evaluates a run" in printed
    assert_examples(printed, EVALUATE)


def test_study_names_its_flags(tmp_path):
    printed = asked("study.py", "--help", tmp_path)
    assert printed.startswith("Is the difference real?")
    for flag in ("study", "jobs", "seeds", "report", "runs", "docs"):
        assert f"--{flag}\n" in printed


@pytest.mark.parametrize(("name", "says", "names"), [
    ("diagnose", "Is the router of an MoE coupled", ("family", "output")),
    ("export", "Writes the model of a run as an OLMoE", ("license", "repeat_kv_heads", "strict")),
    ("generate", "Continues a prompt", ("new_tokens", "seed", "temperature", "top_k", "top_p")),
])  # fmt: skip
def test_commands_of_the_package_name_their_flags(name, says, names, tmp_path):
    printed = asked(f"moe_erc.{name}", "--help", tmp_path)
    assert says in printed and f"python -m moe_erc.{name} runs/erc-tiny " in printed
    assert_examples(printed, names)


def test_commands_of_the_package_are_installed_under_their_names():
    """Each entry of `setup.py` names a function without arguments."""
    text = (script.ROOT / "setup.py").read_text()
    found = re.findall(r'"moe_erc-(\w+) = moe_erc\.(\w+):main"', text)
    assert {"diagnose", "export", "generate"} <= {module for _, module in found}
    for command, module in found:
        assert command == module
        assert callable(importlib.import_module(f"moe_erc.{module}").main)


def assert_examples(printed, names):
    listed = printed.split("Flags:")[1]
    found = re.findall(r"^  --(\w+)$", listed, re.MULTILINE)
    assert tuple(found) == tuple(names)
    for name, text in zip(
        found, re.split(r"^  --\w+$", listed, flags=re.MULTILINE)[1:], strict=True
    ):
        assert f"--{name}" in text, name
    assert max(map(len, listed.splitlines())) <= 110


def test_help_is_printed_beside_what_is_wrong(tmp_path):
    code, printed = script.run(
        "train.py", ["--config=none.py", "--wrong", "--help"], tmp_path / "out"
    )
    assert code == 0 and "error" not in printed


def test_learning_a_tokenizer_names_its_flags():
    command = [sys.executable, "-m", "moe_erc.train_tokenizer", "--help"]
    done = subprocess.run(command, cwd=script.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert "Learns a byte-pair tokenizer" in done.stdout
    assert_examples(done.stdout, ("config", "output", "vocab_size"))


def test_making_token_shards_names_its_flags(tmp_path):
    printed = asked("moe_erc.data.tokenize", "--help", tmp_path)
    assert printed.startswith("Makes token shards")
    assert_examples(printed, ("config", "executor", "output", "partition", "tasks", "time"))
