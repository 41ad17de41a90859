"""Runs scripts and commands as a user does, each in its own process, forked after the imports.

A script does not compile again what another script of this session has compiled: `conftest.py`
says where compiled programs are kept.
"""

import gc
import json
import multiprocessing
import os
import pathlib
import runpy
import socket
import sys
import time

import jax

ROOT = pathlib.Path(__file__).parents[1]
# The server imports these modules once, before any backend exists, and forks for every script.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.script", "moe_erc.runs", "moe_erc.diagnosis.tables"])
# These options shorten compilation.
FAST = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": True,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
}
AS_FOR_USERS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": False,
    "JAX_ENABLE_COMPILATION_CACHE": False,
    "XLA_FLAGS": "",
}
OPTIONS = (
    "jax_num_cpu_devices",
    "jax_disable_most_optimizations",
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_log_compiles",
    "jax_persistent_cache_min_compile_time_secs",
)


def start(name, arguments, output, environment=None):
    """Starts a script, whose output goes to the file `output`.

    A value of None in `environment` resets an option of jax.
    """
    # The environment of the server is as old as the server, so the present one is passed on.
    environment = dict(os.environ) | FAST | (environment or {})
    everything = (str(name), [str(argument) for argument in arguments], str(output), environment)
    process = SERVER.Process(target=_run, args=everything)
    process.start()
    return process


def run(name, arguments, output, timeout=600, environment=None):
    """(exit code, everything printed) of a script that ends by itself."""
    process = start(name, arguments, output, environment)
    (code,) = join([process], timeout)
    assert code is not None, f"{name} {arguments} did not end in {timeout} s:\n{output.read_text()}"
    return code, output.read_text()


def start_many(count, name, arguments, directory, **environment):
    """Starts `count` processes of one run; they print to out0, out1, … of the directory."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count} | environment
    return [
        start(name, arguments, directory / f"out{number}", environment | {"JAX_PROCESS_ID": number})
        for number in range(count)
    ]


def hit(process, workdir, step, number):
    """Sends a signal to a run once its metrics file has passed a step; the exit code of the run."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 600
    while time.monotonic() < deadline and process.is_alive():
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            os.kill(process.pid, number)
            break
        time.sleep(0.001)
    process.join(600)
    return process.exitcode


def join(processes, timeout):
    """Waits for processes and returns their exit codes, None for one that had to be killed."""
    codes = []
    for process in processes:
        process.join(timeout)
        codes.append(process.exitcode)
    for process in processes:
        process.kill()  # SIGTERM would only be noted
    return codes


def _run(name, arguments, output, environment):
    gc.freeze()  # what the server has imported stays
    gc.disable()  # scripts end before their garbage is much
    os.chdir(ROOT)
    os.environ |= {
        variable: str(value) for variable, value in environment.items() if value is not None
    }
    for option in OPTIONS:
        if option.upper() in environment:  # jax, imported by now, reads none of them again
            jax.config.update(option, environment[option.upper()])
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [name, *arguments]
    try:
        if name.endswith(".py"):
            runpy.run_path(name, run_name="__main__")
        else:  # python -m
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        jax.distributed.shutdown()  # as jax does at exit, which multiprocessing skips
