import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from moe_erc.data.paths import absolute
from moe_erc.diagnosis.report import write_report
from moe_erc.training.checkpoint import prepare_directory
from moe_erc.training.json_lines import LocalJsonLines, truncate
from moe_erc.training.metrics import MetricWriter, check_package, peak_flops


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def plain_writer(directory, first_step=0):
    return MetricWriter(directory, tensorboard=False, wandb_project="", config={}, first_step=first_step)


def test_every_write_is_one_json_line_on_disk_at_once(tmp_path):
    with plain_writer(tmp_path) as writer:
        writer.write(1, {"loss/lm": jnp.float32(1.5), "router/load": jnp.array([0.25, 0.75]), "speed/steps": 3})
        assert lines(tmp_path) == [{"step": 1, "loss/lm": 1.5, "router/load": [0.25, 0.75], "speed/steps": 3.0}]


def test_numbers_json_does_not_know_become_null(tmp_path):
    with plain_writer(tmp_path) as writer:
        writer.write(1, {"loss/lm": math.nan, "norm/layers": [1.0, math.inf]})
    assert lines(tmp_path) == [{"step": 1, "loss/lm": None, "norm/layers": [1.0, None]}]


def test_a_resumed_run_leaves_one_line_a_step(tmp_path):
    with plain_writer(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss/lm": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/l')  # torn by a full disk
    with plain_writer(tmp_path, first_step=3) as writer:
        writer.write(3, {"loss/lm": 30})
    assert lines(tmp_path) == [{"step": step, "loss/lm": value} for step, value in ((1, 1), (2, 2), (3, 30))]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncation_drops_a_torn_line_even_if_its_json_is_whole(tmp_path):
    # A number may be cut short and still be a number: only the newline proves that a line is complete.
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 1}')
    truncate(path, first_step=9)
    assert path.read_text() == '{"step": 1}\n'
    truncate(tmp_path / "absent.jsonl", first_step=0)


class Bucket(MemoryFileSystem):
    """What gs:// is for the tests below: a store in memory to which nothing can be appended."""

    store, pseudo_dirs = {}, [""]

    def __init__(self, finalize_on_close):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).partition("://")[2].strip("/") if "://" in str(path) else str(path)

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket():
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Bucket, clobber=True)
    return epath.Path("gs://bucket/run")


def test_in_a_bucket_the_file_is_written_whole_before_a_checkpoint(bucket):
    with plain_writer(bucket) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss/lm": step})
        writer.flush()
        assert [line["step"] for line in lines(bucket)] == [1, 2, 3]
        writer.write(4, {"loss/lm": 4})
    assert [line["step"] for line in lines(bucket)] == [1, 2, 3, 4]
    with plain_writer(bucket, first_step=3) as writer:
        writer.write(3, {"loss/lm": 30})
    assert lines(bucket) == [{"step": step, "loss/lm": value} for step, value in ((1, 1), (2, 2), (3, 30))]


def test_a_bucket_takes_the_report_and_is_shown_to_be_writable(bucket):
    assert prepare_directory(bucket / "checkpoints") is None  # nothing can be locked there
    write_report(bucket / "report.json", {"step": 3})
    assert json.loads((bucket / "report.json").read_text()) == {"step": 3}
    assert absolute(bucket) == bucket and absolute("runs").is_absolute()


KILLED_WHILE_WRITING = """
    import os, signal, sys
    from moe_erc.training.metrics import MetricWriter
    writer = MetricWriter(sys.argv[1], tensorboard=False, wandb_project="", config={})
    for step in range(50):
        writer.write(step, {"loss/lm": 1 / (step + 1)})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_has_lost_nothing(tmp_path):
    program = [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_WRITING), str(tmp_path)]
    killed = subprocess.run(program, env=os.environ | {"PYTHONPATH": os.getcwd()}, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in lines(tmp_path)] == list(range(50))


def tensorboard_scalars(directory):
    """{(tag, step): value} of an event file: records of length (8 bytes), checksum (4), payload, checksum (4)."""
    scalars = {}
    for path in sorted((directory / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            data = data[16 + size :]
    return scalars


def test_tensorboard_gets_a_curve_for_every_number(tmp_path):
    with MetricWriter(tmp_path, tensorboard=True, wandb_project="", config={}) as writer:
        writer.write(4, {"loss/lm": 1.5, "coupling/erc": np.array([0.25, 0.5])})
    assert tensorboard_scalars(tmp_path) == {
        ("loss/lm", 4): 1.5,
        ("coupling/erc/0", 4): 0.25,
        ("coupling/erc/1", 4): 0.5,
    }


def test_a_missing_wandb_is_one_line_with_its_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb_project: 'mine' needs wandb: pip install") as error:
        check_package("mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peak_flops_reads_the_names_jax_gives(kind, peak):
    assert peak_flops(kind) == peak


def test_a_copy_that_fails_is_switched_off_with_one_line_and_the_file_goes_on(tmp_path, monkeypatch, capfd):
    with MetricWriter(tmp_path, tensorboard=True, wandb_project="", config={}) as writer:
        monkeypatch.setattr(EventsWriter, "write_event", lambda *_: 1 / 0)
        for step in (1, 2, 3):
            writer.write(step, {"loss/lm": step})
        writer.check()
    assert capfd.readouterr().err == "TensorBoard is switched off (division by zero); metrics.jsonl goes on\n"
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_copy_that_cannot_begin_is_switched_off_as_well(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("a file, where a directory should be")
    with MetricWriter(tmp_path, tensorboard=True, wandb_project="", config={}) as writer:
        writer.write(1, {"loss/lm": 1})
    assert capfd.readouterr().err.startswith("TensorBoard is switched off (") and len(lines(tmp_path)) == 1


FULL_DISK = """
    import resource, signal, sys
    from moe_erc.training.metrics import MetricWriter
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    writer = MetricWriter(sys.argv[1], tensorboard=True, wandb_project="", config={})
    for step in range(100):
        writer.write(step, {"loss/lm": 1.5})
    writer.flush()
    print("written")
    try:
        writer.check()
    except OSError as error:
        print(error.strerror)
"""


def test_a_full_disk_is_told_when_it_is_asked_for_and_nothing_waits_for_ever(tmp_path):
    program = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(program, env=environment, timeout=120, capture_output=True, text=True)
    assert done.stdout == "written\nFile too large\n", done
    assert done.stderr.count("TensorBoard is switched off") == 1


def test_a_failed_file_is_an_error_of_the_check_and_hides_no_other(tmp_path, monkeypatch):
    failing = lambda *_: (_ for _ in ()).throw(OSError("no space"))  # noqa: E731
    monkeypatch.setattr(LocalJsonLines, "write", failing)
    with pytest.raises(OSError, match="no space"), plain_writer(tmp_path) as writer:
        writer.write(1, {"loss/lm": 1})
    with pytest.raises(KeyError, match="mine"), plain_writer(tmp_path) as writer:
        writer.write(1, {"loss/lm": 1})
        raise KeyError("mine")


def test_whether_a_metric_of_a_step_was_written(tmp_path):
    with plain_writer(tmp_path) as writer:
        writer.write(2, {"loss/lm": 1})
        assert writer.holds(2, "loss/lm") and not writer.holds(2, "validation/mean") and not writer.holds(1, "loss/lm")
    with plain_writer(tmp_path, first_step=3) as writer:
        assert writer.holds(2, "loss/lm")


def test_lines_that_are_none_of_ours_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n3\n{}\n{"step": "a"}\n{"step": 2}\n')
    plain_writer(tmp_path, first_step=9).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
