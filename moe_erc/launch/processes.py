"""Several processes as one run: how they find each other, what process 0 does first, and how they end together.

SLURM, Open MPI, Kubernetes and TPU pods are found by jax itself; processes started by hand are told by three
environment variables. A process started alone stays alone: it waits for nobody and asks nothing of the network.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moe_erc.checks import BadInput, is_refusal
from moe_erc.launch import rendezvous

BY_HAND = ADDRESS, COUNT, PROCESS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LIMIT = "MOE_ERC_COORDINATOR_TIMEOUT"  # seconds within which all processes must have come
_A_DAY = 24 * 60 * 60  # for a corpus to be prepared; that a process has died is noticed long before
_MESSAGE_BYTES = 16384
_exchanges = itertools.count()


class KnownToAll(BadInput):
    """Raised by every process at once: nobody is left to be told."""


class FaultElsewhere(RuntimeError):
    """Another process has failed by a fault of the program: here, too, it is no bad input."""


def initialize():
    """Joins the other processes of the run, if it has any, before any device is touched.

    ValueError, or one line and exit code 2, if they do not fit or stay away longer than `LIMIT`, 300 s by default.
    """
    limit = _whole_number(LIMIT, 1) if LIMIT in os.environ else 300
    if any(name in os.environ for name in BY_HAND):
        address, count, process = _variable(ADDRESS), _whole_number(COUNT, 1), _whole_number(PROCESS, 0)
        if process >= count:
            raise BadInput(f"{PROCESS}: {process} is not below {COUNT} = {count}; count from 0")
        if count > 1:
            rendezvous.meet(address, count, process, limit)
            told = {"coordinator_address": address, "num_processes": count, "process_id": process}
            _connect(limit, **told, cluster_detection_method="deactivate")
    elif not _started_alone():
        _connect(limit)


def mute_all_but_first():
    """Standard output of process 0 alone goes on, that of C++ included; errors of the others stay to be seen."""
    if jax.process_index() > 0:
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def first():
    """Process 0 goes through the block, then the others, and none on until all are through: one fills what all read."""
    if jax.process_index() > 0:
        _exchange({})
    yield
    if jax.process_index() == 0:
        _exchange({})
    _exchange({})


@contextlib.contextmanager
def ending_together():
    """What is wrong with one process inside ends all of them with its one line: nobody waits for one that has left."""
    try:
        yield
    except (KnownToAll, FaultElsewhere):
        raise
    except Exception as error:
        with contextlib.suppress(KnownToAll, FaultElsewhere):  # another one's error; each tells its own
            _exchange({"error": str(error)[:1000], "refusal": is_refusal(error)})
        raise


def agree(description):
    """ValueError, naming the first key that differs, unless every process has the same `description`, plain JSON."""
    digests = {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for key, value in description.items()
    }
    reference, *others = _exchange(digests)
    for process, other in enumerate(others, 1):
        for key in reference:
            if other[key] != reference[key]:
                raise KnownToAll(
                    f"processes 0 and {process} differ in {key}: start all with the same command, packages and workdir"
                )


def _exchange(message):
    """The messages of all processes, in order, once the last one has come.

    KnownToAll or FaultElsewhere if another one's is an error.
    """
    if not jax.distributed.is_initialized():
        return [message]
    # Device collectives have short time limits of their own: first wait where waiting is cheap.
    ocp.multihost.get_barrier_sync_fn()(key=f"moe_erc exchange {next(_exchanges)}", timeout_ms=1000 * _A_DAY)
    padded = json.dumps(message).encode().ljust(_MESSAGE_BYTES)
    rows = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    messages = [json.loads(row.tobytes()) for row in rows]
    for process, other in enumerate(messages):
        if "error" in other and process != jax.process_index():
            kind = KnownToAll if other["refusal"] else FaultElsewhere
            raise kind(f"process {process}: {other['error']}")
    return messages


def _connect(limit, **known):
    """Has jax connect the processes it is told of or detects; without any it has nothing to do."""
    late = threading.Timer(limit, _give_up, [limit])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(initialization_timeout=limit + 60, **known)
    except ValueError as error:
        if "coordinator_address" not in str(error):  # which jax misses where it detects no cluster
            raise
    except RuntimeError as error:
        raise BadInput(str(error)) from error
    finally:
        late.cancel()


def _give_up(limit):
    """Ahead of jax, which would end this process by an abort with a stack trace."""
    line = f"the processes of this run have not all come within {limit} s; {LIMIT} sets another limit"
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def _started_alone():
    """Whether jax would detect a cluster in what is one process: the only task of a job, or a pod that is in none."""
    tasks = {os.environ[name] for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE") if name in os.environ}
    pod_of_a_job = any(name in os.environ for name in ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"))
    return tasks == {"1"} or ("KUBERNETES_SERVICE_HOST" in os.environ and not pod_of_a_job)


def _variable(name):
    if name not in os.environ:
        raise BadInput(f"{name} is not set: processes started by hand need all of {', '.join(BY_HAND)}")
    return os.environ[name]


def _whole_number(name, least):
    value = _variable(name)
    if not value.isdecimal() or int(value) < least:
        raise BadInput(f"{name}: {value!r} is not a whole number from {least} up")
    return int(value)
