"""A run of train.py at size debug in a process of its own, watched by its files and by /proc."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


class Watched:
    """A run that can be started again and again.

    Its text is the code of this repository, which is prepared in a second. Its output is in
    `directory`/out. Runs of one directory share the corpus and the compilation cache.
    """

    def __init__(self, directory, workdir, **settings):
        self.workdir = pathlib.Path(workdir)
        self.cache = pathlib.Path(directory) / "cache"
        self._out = pathlib.Path(directory) / "out"
        text = pathlib.Path(directory) / "text"
        text.mkdir(exist_ok=True)
        for number, path in enumerate(sorted((ROOT / "moe_erc").rglob("*.py"))):
            (text / f"{number:03}.txt").write_bytes(path.read_bytes())
        settings |= {"data.sources": f"('{text}',)", "data.validation_fraction": 0.1}
        self._command = [
            sys.executable,
            "train.py",
            "--config=configs/erc.py:debug",
            f"--workdir={workdir}",
        ]
        self._command += [f"--config.{key}={value}" for key, value in settings.items()]
        self._command += [f"--config.data.cache_dir={self.cache}", "--config.log.tensorboard=False"]
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(directory) / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        self._process = None

    def start(self):
        """Start the run; it continues at its newest checkpoint."""
        with self._out.open("ab") as out:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=out, stderr=subprocess.STDOUT
            )

    def running(self):
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def send(self, number):
        """Send a signal if the process still runs; returns its exit code."""
        if self.running():
            self._process.send_signal(number)
        return self._process.wait()

    def finish(self):
        """Wait for the end of the process, which must have the exit code 0."""
        code = self._process.wait()
        if code:
            raise SystemExit(f"train.py ended with {code}:\n{self._out.read_text()[-2000:]}")

    def text(self):
        """The present content of the metrics file."""
        path = self.workdir / "metrics.jsonl"
        return path.read_text() if path.exists() else ""

    def metrics(self):
        """The complete lines of metrics, without those that depend on the clock."""
        found = []
        for line in self._lines():
            kept = {}
            for name, value in line.items():
                if not name.startswith("speed/"):
                    kept[name] = value
            found.append(kept)
        return found

    def speeds(self):
        """[(step, tokens per second)]."""
        key = "speed/tokens_per_s"
        return [(line["step"], line[key]) for line in self._lines() if key in line]

    def _lines(self):
        lines = self.text().splitlines(keepends=True)
        # The last line may still be incomplete.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def resources(self):
        """(resident bytes, open files) of the process."""
        directory = pathlib.Path(f"/proc/{self._process.pid}")
        pages = int((directory / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(list((directory / "fd").iterdir()))
