"""Who takes part in a run whose processes were started by hand, settled over plain sockets before jax connects.

jax ends a process that waits in vain, or whose number nobody expects, by an abort with a stack trace, and does not
notice differing numbers of processes at all. So each process first tells process 0 who it is, and gets a verdict.
"""

import json
import socket
import time

from moe_erc.checks import BadInput


def meet(address, count, process, limit):
    """Returns once all `count` processes have come to `address`; ValueError, on all, if they do not fit or are late."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise BadInput(f"JAX_COORDINATOR_ADDRESS: {address!r} is not HOST:PORT")
    deadline = time.monotonic() + limit
    if process == 0:
        verdict = _receive(int(port), count, deadline)
    else:
        verdict = _call((host.strip("[]"), int(port)), (count, process), deadline)
    if verdict:
        raise BadInput(verdict)


def _receive(port, count, deadline):
    """As process 0: takes the others in and tells them all, in one line, what is wrong, or "" if nothing is."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    callers, verdict = {}, ""
    with socket.create_server(("", port), family=family, backlog=count, dualstack_ipv6=dual) as server:
        while len(callers) < count - 1 and not verdict:
            server.settimeout(_remaining(deadline))
            try:
                caller = server.accept()[0]
                its_count, process = _read(caller, deadline)
            except TimeoutError:
                missing = sorted(set(range(1, count)) - set(callers))
                verdict = f"of JAX_NUM_PROCESSES = {count} processes these did not come in time: {missing}"
            except ValueError:
                continue  # somebody else, who looks for open ports
            else:
                if its_count != count:
                    verdict = f"JAX_NUM_PROCESSES is {count} on process 0 and {its_count} on process {process}"
                elif process in callers:
                    verdict = f"two processes have JAX_PROCESS_ID = {process}"
                callers[caller if verdict else process] = caller
        for caller in callers.values():
            caller.sendall(_line(verdict))
            caller.close()
    return verdict


def _call(address, count_and_process, deadline):
    """As any other process: the verdict of process 0, however late that one begins to listen."""
    where = ":".join(map(str, address))
    while True:
        try:
            connection = socket.create_connection(address, _remaining(deadline))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise BadInput(f"no coordinator at {where} in time ({error.strerror or error})") from None
            time.sleep(0.1)
    with connection:
        connection.sendall(_line(count_and_process))
        try:
            return _read(connection, deadline + 5)  # process 0 itself may say that time is up
        except (OSError, ValueError):
            raise BadInput(f"what answers at {where} is not process 0 of this run; name a free port") from None


def _read(connection, deadline):
    connection.settimeout(_remaining(deadline))
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline(1000))


def _line(value):
    return json.dumps(value).encode() + b"\n"


def _remaining(deadline):
    return max(deadline - time.monotonic(), 0.001)  # 0 would mean not to wait at all
