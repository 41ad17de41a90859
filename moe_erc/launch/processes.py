"""Several processes as one run: how they find each other, what process 0 does first, how they end.

jax itself finds the processes of SLURM, Open MPI, Kubernetes and TPU pods. Processes started by
hand are told by three environment variables. A process started alone stays alone: it waits for
nobody and asks nothing of the network.
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
LIMIT = "MOE_ERC_COORDINATOR_TIMEOUT"  # seconds within which all processes must have come
_A_DAY = 24 * 60 * 60  # for a corpus to be prepared; a process that died is noticed long before
_LATER = 60  # seconds by which the limit of jax is beyond ours
_MESSAGE_BYTES = 16384
_exchanges = itertools.count()


class KnownToAll(BadInput):
    """Raised by every process at once: nobody is left to be told."""


class FaultElsewhere(RuntimeError):
    """Another process has failed by a fault of the program: here, too, it is no bad input."""


def initialize() -> None:
    """Joins the other processes of the run, if it has any, before any device is touched.

    Raises:
      BadInput: for environment variables that do not make a run.

    If the processes have not all come within `LIMIT` seconds, 300 by default, every one of them
    ends with one line and exit code 2.
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
    """Standard output of process 0 alone goes on, that of C++ included; standard error of all."""
    if jax.process_index() > 0:
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Process 0 goes through the block, then the others; none goes on until all are through.

    Process 0 fills what all others read.
    """
    if jax.process_index() > 0:
        _exchange({})
    yield
    if jax.process_index() == 0:
        _exchange({})
    _exchange({})


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """What is wrong with one process inside ends all of them with the line of that process."""
    try:
        yield
    except (KnownToAll, FaultElsewhere):
        raise
    except Exception as error:
        # Another process may have failed as well: each tells its own error.
        with contextlib.suppress(KnownToAll, FaultElsewhere):
            _exchange({"error": str(error)[:1000], "refusal": is_refusal(error)})
        raise


def agree(description: Mapping[str, object]) -> None:
    """Refuses processes that differ in `description`, which is plain JSON.

    Raises:
      KnownToAll: on every process, with the first key that differs.
    """
    # jax connects processes that were told different numbers of processes.
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
    """The messages of all processes, in order, once the last one has come.

    Raises:
      KnownToAll, FaultElsewhere: if the message of another process is an error.
    """
    if not jax.distributed.is_initialized():
        return [message]
    # Device collectives have short time limits of their own: first wait where waiting is cheap.
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
    """Has jax connect the processes it is told of or detects; without any it does nothing.

    jax ends a process whose time is up by an abort with a stack trace (exit code 134). A timer
    ends it before, with a line.
    """
    late = threading.Timer(limit, _give_up, [limit, who])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(initialization_timeout=limit + _LATER, **known)
    except ValueError as error:
        # jax misses the address where it detects no cluster.
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
    """Whether jax would detect a cluster in what is one process.

    That is the only task of a job, or a pod that is in no job.
    """
    numbers = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    tasks = {os.environ[name] for name in numbers if name in os.environ}
    of_a_job = ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
    pod_of_a_job = any(name in os.environ for name in of_a_job)
    return tasks == {"1"} or ("KUBERNETES_SERVICE_HOST" in os.environ and not pod_of_a_job)


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
