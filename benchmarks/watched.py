"""A run of train.py at size debug in a process of its own, watched from outside: by its files, and by /proc."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


class Watched:
    """Starts as often as it is told to, on this repository's own code, which is prepared in a second.

    What it prints is in `directory`/out; runs of one directory share corpus and compilation cache.
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
        """Starts it; it goes on where its checkpoints are."""
        with self._out.open("ab") as out:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=out, stderr=subprocess.STDOUT
            )

    def running(self):
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def send(self, number):
        """Sends a signal, if it still runs, and returns the exit code once it has ended."""
        if self.running():
            self._process.send_signal(number)
        return self._process.wait()

    def finish(self):
        """Waits for the end, which must be an orderly one."""
        if code := self._process.wait():
            raise SystemExit(f"train.py ended with {code}:\n{self._out.read_text()[-2000:]}")

    def text(self):
        """The metrics file as it is now."""
        path = self.workdir / "metrics.jsonl"
        return path.read_text() if path.exists() else ""

    def metrics(self):
        """Its complete lines, without what the clock says."""
        lines = [
            json.loads(line)
            for line in self.text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        return [
            {name: value for name, value in line.items() if not name.startswith("speed/")}
            for line in lines
        ]

    def speeds(self):
        """[(step, tokens a second)]."""
        lines = [
            json.loads(line)
            for line in self.text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        return [
            (line["step"], line["speed/tokens_per_s"])
            for line in lines
            if "speed/tokens_per_s" in line
        ]

    def resources(self):
        """(resident bytes, open files) of the process."""
        directory = pathlib.Path(f"/proc/{self._process.pid}")
        pages = int((directory / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(list((directory / "fd").iterdir()))
