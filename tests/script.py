"""Runs train.py and eval.py as a user does, in a process of their own, without paying for the imports each time."""

import multiprocessing
import os
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).parents[1]
# The server imports these once, before any backend exists, and forks for every script.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["tests.script", "moe_erc.data.text", "moe_erc.training.checkpoint", "moe_erc.model.transformer"]
)


def start(name, arguments, output):
    """A running script; what it prints goes to the file `output`."""
    process = SERVER.Process(target=_run, args=(name, [str(argument) for argument in arguments], str(output)))
    process.start()
    return process


def run(name, arguments, output, timeout=300):
    """(exit code, everything printed) of a script that ends by itself."""
    process = start(name, arguments, output)
    process.join(timeout)
    assert process.exitcode is not None, f"{name} {arguments} did not end in {timeout} s:\n{output.read_text()}"
    return process.exitcode, output.read_text()


def _run(name, arguments, output):
    os.chdir(ROOT)
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [name, *arguments]
    runpy.run_path(name, run_name="__main__")
