"""Every optional package that the README names, as it is installed: nothing stands in for one.

Each package has its own process, since other tests register their stores and packages start
threads.
"""

import http.server
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import urllib.parse

import pytest

from tests import script

PLAIN = {"PYTHONPATH": str(script.ROOT), "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}


def run(program, *arguments, **environment):
    """Runs a program, which must exit with 0, and returns what it prints."""
    everything = os.environ | PLAIN | environment
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, env=everything, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


WANDB = """
    import sys
    from moe_erc.training.metrics import MetricWriter, check_package
    check_package("mine")
    first = int(sys.argv[2])
    with MetricWriter(sys.argv[1], False, "mine", {"model": {"experts": 4}}, first) as writer:
        for step in range(first, first + 3):
            writer.write(step, {"loss/lm": 1.5, "router/load": [0.25, 0.75]})
"""


def test_wandb_writes_a_run_offline_and_goes_on_with_its_id(tmp_path):
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    said = run(WANDB, tmp_path, 0, **offline)
    identity = (tmp_path / "wandb_id").read_text()
    assert re.fullmatch("[0-9a-f]{8}", identity) and "switched off" not in said
    said = run(WANDB, tmp_path, 3, **offline)
    assert (tmp_path / "wandb_id").read_text() == identity and "switched off" not in said
    (written,) = {
        path.stem.removeprefix("run-")
        for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    }
    assert written == identity
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_wandb_that_cannot_begin_is_switched_off(tmp_path):
    said = run(WANDB, tmp_path, 0, WANDB_MODE="nonsense")
    assert said.count("Weights & Biases is switched off (") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


class Bucket(http.server.BaseHTTPRequestHandler):
    """The part of Cloud Storage's JSON interface that files need, in memory.

    The server holds `objects`.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, query = self._read()
        if path.endswith("/o"):
            return self._answer(self._listed(query.get("prefix", "")))
        if path.endswith("/b/bucket"):
            return self._answer(
                {"kind": "storage#bucket", "name": "bucket", "locationType": "region"}
            )
        name = urllib.parse.unquote(path.rpartition("/o/")[2])
        content = self.server.objects.get(name)
        if content is None:
            return self._answer({}, 404)
        if query.get("alt") != "media":
            return self._answer(described(name, content))
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not part:
            return self._answer(content)
        return self._answer(content[int(part[1]) : int(part[2]) + 1], 206)

    def do_POST(self):
        path, query = self._read()
        if "/moveTo/" in path:
            source, _, target = (
                urllib.parse.unquote(part)
                for part in path.partition("/o/")[2].partition("/moveTo/o/")
            )
            return self._store(target, self.server.objects.pop(source))
        if path == "/upload":  # the address that the answer below gives
            return self._store(query["name"], self.body)
        name = query.get("name") or json.loads(re.search(rb"\{.*?\}", self.body)[0])["name"]
        if query["uploadType"] == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            content = self.body.split(b"--" + boundary)[2].partition(b"\n\n")[2].removesuffix(b"\n")
            return self._store(name, content)
        return self._answer(
            {},
            headers={"Location": f"{self.server.address}/upload?name={urllib.parse.quote(name)}"},
        )

    def do_DELETE(self):
        path, _ = self._read()
        found = self.server.objects.pop(urllib.parse.unquote(path.rpartition("/o/")[2]), None)
        self._answer({}, 404 if found is None else 204)

    def log_message(self, *_):
        """Prints nothing."""

    def _read(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        return url.path, dict(urllib.parse.parse_qsl(url.query))

    def _listed(self, prefix):
        names = [name for name in self.server.objects if name.startswith(prefix)]
        below = {
            prefix + name[len(prefix) :].partition("/")[0] + "/"
            for name in names
            if "/" in name[len(prefix) :]
        }
        items = [
            described(name, self.server.objects[name])
            for name in names
            if "/" not in name[len(prefix) :]
        ]
        return {"items": items, "prefixes": sorted(below)}

    def _store(self, name, content):
        self.server.objects[name] = content
        self._answer(described(name, content))

    def _answer(self, content, code=200, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        content = b"" if code == 204 else content
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def described(name, content):
    times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00Z")
    return {
        "kind": "storage#object",
        "bucket": "bucket",
        "name": name,
        "size": str(len(content)),
    } | times


@pytest.fixture
def bucket():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.objects, server.address = {}, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


GCSFS = """
    from moe_erc.data import paths
    from moe_erc.diagnosis.report import write_report
    from moe_erc.training.checkpoint import holds_steps, prepare_directory
    from moe_erc.training.metrics import MetricWriter

    workdir = paths.absolute("gs://bucket/run")
    for first in (1, 2, 2):  # begun, gone on, and gone on again from the same checkpoint
        assert prepare_directory(workdir / "checkpoints") is None
        assert not holds_steps(workdir / "checkpoints")
        with MetricWriter(workdir, False, "", {}, first) as writer:
            writer.write(first, {"loss/lm": first})
        write_report(workdir / "report.json", {"step": first})
"""


def test_gcsfs_keeps_metrics_and_reports_in_a_bucket(bucket):
    # Without the last variable, gcsfs would ask Google with credentials which kind of bucket this
    # is.
    run(GCSFS, STORAGE_EMULATOR_HOST=bucket.address, GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false")
    kept = {name: content for name, content in bucket.objects.items() if not name.endswith("/")}
    assert {name.rpartition("/")[2] for name in kept} == {"metrics.jsonl", "report.json"}
    lines = [json.loads(line) for line in kept["run/metrics.jsonl"].splitlines()]
    assert lines == [{"step": 1, "loss/lm": 1.0}, {"step": 2, "loss/lm": 2.0}]
    assert json.loads(kept["run/report.json"]) == {"step": 2}


SHARDS = """
    import sys
    from moe_erc.data.text import DataConfig, prepare, train_batches

    source = "tokens:gs://bucket/mix/*.npy"
    corpus = prepare(DataConfig((source,), (), "bytes", "text", 0.1, 4, sys.argv[1]))
    print(corpus.streams["train"]["mix"].tokens_N[:].tolist())
    print(next(train_batches(corpus, 4, 2, 0))["inputs_BT"].shape)
"""


def test_gcsfs_reads_token_shards_by_ranges(bucket, tmp_path):
    for number in range(2):
        content = bytes(byte for token in range(30) for byte in (token + number, 0))
        bucket.objects[f"mix/{number}.npy"] = content
    said = run(
        SHARDS,
        tmp_path,
        STORAGE_EMULATOR_HOST=bucket.address,
        GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
    )
    train = [*range(27), *range(1, 28)]  # a tenth of each is held out
    assert said.splitlines()[:2] == [str(train), "(2, 4)"]


TOKAMAX = """
    import jax, jax.numpy as jnp, numpy as np
    from moe_erc.moe.grouped_matmul import grouped_matmul, tokamax_matmul

    # Small whole numbers: every sum is exact in float32, whatever its order.
    x_MD = jax.random.randint(jax.random.key(0), (24, 8), -3, 4).astype(jnp.float32)
    w_EDF = jax.random.randint(jax.random.key(1), (3, 8, 16), -3, 4).astype(jnp.float32)
    sizes_E = jnp.array([10, 0, 14])
    rows = np.repeat(np.arange(3), sizes_E)
    expected_MF = np.einsum("md,mdf->mf", x_MD, np.asarray(w_EDF)[rows])
    for matmul in (grouped_matmul, tokamax_matmul):
        np.testing.assert_array_equal(matmul(x_MD, w_EDF, sizes_E), expected_MF)
"""


def test_tokamax_multiplies_by_groups():
    run(TOKAMAX)


TOKENIZERS = """
    import sys
    from moe_erc.data import bpe, tokenizer

    path = sys.argv[1]
    trained = bpe.train(["the router sends every token to experts"] * 50, 300)
    bpe.save(trained, __import__("pathlib").Path(path))
    found = tokenizer.load(path)
    assert found.decode(found.encode("the router")) == "the router"
    assert len(found.encode("the router")) < len("the router")
"""


def test_tokenizers_learns_and_reads_a_tokenizer(tmp_path):
    run(TOKENIZERS, tmp_path / "tokenizer.json")


PLOT = """
    import sys
    import numpy as np
    from matplotlib.figure import Figure
    from moe_erc.diagnosis.figures import png
    from moe_erc.diagnosis.gate_map import gate_map

    gates = np.random.default_rng(0).normal(size=(2, 8, 8))
    points_N2, owner_N = gate_map(gates, range(2), 5, seed=0)
    assert points_N2.shape == (16, 2) and np.isfinite(points_N2).all() and len(owner_N) == 16
    figure = Figure()
    figure.subplots().scatter(*points_N2.T)
    assert png(figure).startswith(b"\\x89PNG")
"""


def test_plot_maps_and_draws():
    run(PLOT)


EVAL = """
    import sys
    from moe_erc.evaluation.tasks import load_tasks

    assert list(load_tasks(["alphabet_choice"], sys.argv[1])["tasks"]) == ["alphabet_choice"]
"""


def test_eval_reads_a_task(tmp_path):
    run(
        EVAL,
        script.ROOT / "tests" / "evaluation" / "tasks",
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
    )
