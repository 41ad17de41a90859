"""Of several processes one has a run; what the dead had may be taken over."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_erc.study import claims


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "erc-1000"


def process(code):
    return subprocess.Popen([sys.executable, "-c", code])


def written(prefix, **changes):
    """A claim of another process, which has ended if it is of this machine."""
    content = {"machine": claims.machine(), "study": [2**22 + 1, "dead"]} | changes
    prefix.with_name(f"{prefix.name}.claim-0").write_text(json.dumps(content), encoding="utf-8")


def test_a_claimed_run_is_not_free_until_it_is_released(prefix):
    claim = claims.take(prefix)
    assert claim and claims.take(prefix) is None and claims.state(prefix) == "held"
    claim.release()
    assert claims.state(prefix) == "free" and not list(prefix.parent.iterdir())
    assert claims.take(prefix)


def test_a_claim_of_the_dead_is_taken_over_at_once_on_their_machine(prefix):
    child = process("pass")
    dead = claims.process(child.pid)
    child.wait()
    written(prefix, study=dead)
    assert claims.state(prefix) == "free"
    claim = claims.take(prefix)
    assert claim.path.name == "erc-1000.claim-1" and claims.take(prefix) is None
    claim.release()
    assert not list(prefix.parent.glob("*.claim-*"))


def test_training_without_its_study_is_waited_for_from_its_first_moment(prefix):
    code = (
        "import os, pathlib, subprocess, sys\n"
        "from moe_erc.study import claims\n"
        f"claim = claims.take(pathlib.Path({str(prefix)!r}))\n"
        "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL,"
        " pass_fds=[claim.descriptor])\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    study = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    training = int(study.stdout)
    try:
        assert claims.state(prefix) == "orphaned" and claims.take(prefix) is None
    finally:
        os.kill(training, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while claims.state(prefix) == "orphaned" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert claims.state(prefix) == "free"


def test_a_claim_of_another_machine_is_stale_once_it_was_not_touched_for_long(prefix):
    written(prefix, machine="elsewhere", study=[1, "1"])
    path = prefix.with_name("erc-1000.claim-0")
    assert claims.state(prefix) == "held"
    old = path.stat().st_mtime - claims.STALE - 1
    os.utime(path, (old, old))
    assert claims.state(prefix) == "free" and claims.take(prefix)


def test_a_claim_is_touched_now_and_then(prefix, monkeypatch):
    claim = claims.take(prefix)
    os.utime(claim.path, (1, 1))
    claim.beat()
    assert claim.path.stat().st_mtime == 1
    monkeypatch.setattr(claims, "BEAT", 0.0)
    claim.beat()
    assert claim.path.stat().st_mtime > 1


def test_a_claim_that_cannot_be_written_is_none_and_leaves_nothing(prefix, monkeypatch):
    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(claims.os, "link", fail)
    with pytest.raises(OSError, match="full"):
        claims.take(prefix)
    assert claims.state(prefix) == "free" and not list(prefix.parent.iterdir())


def test_of_many_that_try_at_once_one_has_it(prefix):
    for stale in (False, True):
        if stale:
            written(prefix)
        gate = threading.Barrier(8)

        def take(_, gate=gate):
            gate.wait()
            return claims.take(prefix)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(take, range(8)))
        assert sum(claim is not None for claim in found) == 1
        for path in prefix.parent.iterdir():
            path.unlink()
