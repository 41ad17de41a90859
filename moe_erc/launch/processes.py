"""Several processes as one run: how they find each other, what process 0 does first, how they end.

jax itself finds the processes of SLURM, Open MPI, Kubernetes and TPU pods. Three environment
variables connect processes that are started by hand. A process that is started alone waits for
nobody and does not use the network.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moe_erc.checks import BadInput, is_refusal

ADDRESS = "JAX_COORDINATOR_ADDRESS"
COUNT = "JAX_NUM_PROCESSES"
PROCESS = "JAX_PROCESS_ID"
BY_HAND = (ADDRESS, COUNT, PROCESS)
LIMIT = "MOE_ERC_COORDINATOR_TIMEOUT"  # seconds within which all processes must have met
# Seconds for process 0 to prepare a corpus. A process that has died is noticed long before.
_A_DAY = 24 * 60 * 60
_LATER = 60  # seconds by which the limit of jax is later than ours
_MESSAGE_BYTES = 16384
_exchanges = itertools.count()


class KnownToAll(BadInput):
    """A refusal that every process raises at the same time, so that none must be told."""


class FaultElsewhere(RuntimeError):
    """Another process has failed by a fault of the program, which is no bad input here either."""


def initialize() -> None:
    """Join the other processes of the run, if it has any, before any device is used.

    If the processes have not all met within `LIMIT` seconds, 300 by default, each of them ends with
    one line and exit code 2.

    Raises:
      BadInput: for environment variables that do not define a run.
    """
    limit = _whole_number(LIMIT, 1) if LIMIT in os.environ else 300
    if any(name in os.environ for name in BY_HAND):
        address = _variable(ADDRESS)
        count = _whole_number(COUNT, 1)
        process = _whole_number(PROCESS, 0)
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise BadInput(f"{ADDRESS}: {address!r} is not HOST:PORT; give both, as 10.0.0.1:12355")
        if process >= count:
            raise BadInput(f"{PROCESS}: {process} is not below {COUNT} = {count}; count from 0")
        if count > 1:
            _connect(
                limit,
                f"process {process} of {COUNT} = {count} at {address}",
                coordinator_address=address,
                num_processes=count,
                process_id=process,
                cluster_detection_method="deactivate",
            )
    elif not _started_alone():
        _connect(limit, "this process")


def mute_all_but_first() -> None:
    """Close standard output, also for C++, on all processes but process 0.

    Standard error stays open on all processes.
    """
    if jax.process_index() > 0:
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def first() -> Iterator[None]:
    """A context that process 0 runs first, and then the others; none leaves before all are done.

    Process 0 can fill a cache in it that the others read.
    """
    if jax.process_index() > 0:
        _exchange({})
    yield
    if jax.process_index() == 0:
        _exchange({})
    _exchange({})


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A context in which an error of one process ends all processes, with the line of that one."""
    try:
        yield
    except (KnownToAll, FaultElsewhere):
        raise
    except Exception as error:
        # Another process may have failed as well. Then each raises its own error.
        with contextlib.suppress(KnownToAll, FaultElsewhere):
            _exchange({"error": str(error)[:1000], "refusal": is_refusal(error)})
        raise


def agree(description: Mapping[str, object]) -> None:
    """Refuse processes that differ in `description`, which is plain JSON.

    Raises:
      KnownToAll: on every process, with the first key that differs.
    """
    # jax also connects processes that were given different numbers of processes.
    description = {COUNT: os.environ.get(COUNT)} | description
    digests = {}
    for key, value in description.items():
        digests[key] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    reference, *others = _exchange(digests)
    for process, other in enumerate(others, 1):
        for key in reference:
            if other[key] != reference[key]:
                raise KnownToAll(
                    f"processes 0 and {process} differ in {key}: "
                    "start all with the same command, packages and workdir"
                )


def _exchange(message: dict) -> list[dict]:
    """The messages of all processes, in order; this waits for the last one.

    Raises:
      KnownToAll, FaultElsewhere: if the message of another process is an error.
    """
    if not jax.distributed.is_initialized():
        return [message]
    # Device collectives have short time limits of their own, so a barrier without one comes first.
    wait_for_all = ocp.multihost.get_barrier_sync_fn()
    wait_for_all(key=f"moe_erc exchange {next(_exchanges)}", timeout_ms=1000 * _A_DAY)
    padded = json.dumps(message).encode().ljust(_MESSAGE_BYTES)
    rows = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    messages = [json.loads(row.tobytes()) for row in rows]
    for process, other in enumerate(messages):
        if "error" in other and process != jax.process_index():
            kind = KnownToAll if other["refusal"] else FaultElsewhere
            raise kind(f"process {process}: {other['error']}")
    return messages


def _connect(limit: int, who: str, **known) -> None:
    """Let jax connect the processes that it is told of or detects; one alone is left alone.

    After its own limit jax aborts a process with a stack trace (exit code 134). A timer ends the
    process before that, with one line.
    """
    late = threading.Timer(limit, _give_up, [limit, who])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(initialization_timeout=limit + _LATER, **known)
    except ValueError as error:
        # jax complains of a missing address if it detects no cluster: this process is alone.
        if "coordinator_address" not in str(error):
            raise
    except RuntimeError as error:
        raise BadInput(str(error)) from error
    finally:
        late.cancel()


def _give_up(limit: int, who: str) -> None:
    line = f"{who} has not met all others in time, {limit} s; {LIMIT} sets another limit"
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def _started_alone():
    """Whether jax would detect a cluster though this process is alone.

    It is then the only task of a job, or a pod outside of a job.
    """
    numbers = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    tasks = {os.environ[name] for name in numbers if name in os.environ}
    of_a_job = ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
    is_in_job = any(name in os.environ for name in of_a_job)
    is_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    return tasks == {"1"} or (is_pod and not is_in_job)


def _variable(name):
    if name not in os.environ:
        raise BadInput(
            f"{name} is not set: processes started by hand need all of {', '.join(BY_HAND)}"
        )
    return os.environ[name]


def _whole_number(name, least):
    value = _variable(name)
    if not value.isdecimal() or int(value) < least:
        raise BadInput(f"{name}: {value!r} is not a whole number from {least} up")
    return int(value)
