"""`python -m moe_erc.data.tokenize` as users start it: killed, resumed, refused, under SLURM."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datatrove.io import get_datafolder

from moe_erc.checks import BadInput
from moe_erc.data import datatrove_steps, shard_plan
from moe_erc.data import tokenizer as tokenizers
from moe_erc.data.config import DataConfig
from tests import script

TOKENIZER = script.ROOT / "tests/data/shards/tokenizer.json"
SIZES = (300, 300, 900, 900, 900, 900)  # documents of each file
COMMAND = "moe_erc.data.tokenize"


@pytest.fixture
def text(tmp_path):
    """Six files, of which two tasks are done long before the others."""
    (tmp_path / "text").mkdir()
    for number, documents in enumerate(SIZES):
        with open(tmp_path / f"text/{number}.jsonl", "w", encoding="utf-8") as file:
            for place in range(documents):
                words = " ".join(f"token {place % 97} of expert {number}" for _ in range(20))
                file.write(json.dumps({"text": words}) + "\n")
    return tmp_path / "text"


def arguments(text, output, **others):
    flags = {"output": output, "tasks": len(SIZES)} | others
    return [
        f"--config.data.sources=('{text}',)",
        f"--config.data.tokenizer={TOKENIZER}",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


def start(flags, **environment):
    environment = os.environ | {"PYTHONPATH": str(script.ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, "-m", COMMAND, *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process):
    """What a process that must end by itself with 0 has printed."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def shards(output):
    """{path: content} of everything but logs."""
    files = [path for path in output.rglob("*") if path.is_file()]
    by_name = {path.relative_to(output).as_posix(): path for path in files}
    return {
        name: path.read_bytes() for name, path in by_name.items() if not name.startswith("logs/")
    }


def undisturbed(text, output, tasks, tokenizer):
    """The shards that tasks write one after the other in this process."""
    config = DataConfig((str(text),), (), str(tokenizer), "text", 0.02, 4, "")
    parts = list(shard_plan.parts_of(config))
    identity = tokenizers.load(config.tokenizer).identity
    folder = get_datafolder(str(output))
    steps = datatrove_steps.pipeline(parts, folder, config.tokenizer, identity, "text")
    for rank in range(tasks):
        data = None
        for step in steps:
            data = step(data, rank, tasks)
    return shards(output)


def completed(output):
    return {path.name for path in (output / "logs/completions").glob("*")}


EXECUTORS = ["local", pytest.param("ray", marks=pytest.mark.ray)]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_killed_and_resumed_the_shards_have_the_same_bytes(executor, text, tmp_path):
    output = tmp_path / "shards"
    flags = arguments(text, output, executor=executor)
    process = start(flags)
    deadline = time.monotonic() + 240
    while not completed(output) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = completed(output)
    assert 0 < len(done) < len(SIZES)
    before = {}
    for name in done:
        path = output / f"text/train/{name}_unshuffled.ds"
        before[path] = path.stat().st_mtime_ns
    said = ended(start(flags))
    assert len(completed(output)) == len(SIZES)
    for path, written in before.items():
        assert path.stat().st_mtime_ns == written
    found = shards(output)
    expected = undisturbed(text, tmp_path / "expected", len(SIZES), output / "tokenizer.json")
    assert found.pop("tokenizer.json") == TOKENIZER.read_bytes()
    assert found == expected
    tokens = sum(
        len(found[name]) // 2 for name in found if name.endswith(".ds") and "train" in name
    )
    assert f"text/train: 6 shards of {tokens:,} tokens" in said
    assert f"tokens:{output}/text/train/*.ds" in said


SBATCH = """#!/bin/bash
for file; do :; done
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$file")
if ! grep -q merge_stats "$file"; then
  for id in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$id bash "$file" >&2 || exit 1; done
fi
echo Submitted batch job 7
"""


def test_slurm_runs_the_tasks_of_an_array(text, tmp_path):
    """Commands stand in for those of SLURM: each task has its own process, as it has there."""
    commands = {
        "sbatch": SBATCH,
        "srun": '#!/bin/bash\nshift 3\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }
    (tmp_path / "bin").mkdir()
    for name, content in commands.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    path = os.pathsep.join(
        [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    output = tmp_path / "shards"
    flags = arguments(text, output, tasks=2, executor="slurm", partition="cpu")
    said = ended(start(flags, PATH=path, SLURM_NODELIST="here"))
    assert "text/train: 2 shards" in said
    found = shards(output)
    expected = undisturbed(text, tmp_path / "expected", 2, output / "tokenizer.json")
    assert found.pop("tokenizer.json") == TOKENIZER.read_bytes() and found == expected
    script_of_job = (output / "logs/launch_script.slurm").read_text()
    assert "#SBATCH --partition=cpu\n" in script_of_job
    assert "#SBATCH --time=24:00:00\n" in script_of_job


def refused(flags, tmp_path):
    code, said = script.run(COMMAND, flags, tmp_path / "said")
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert (code, len(lines)) == (2, 1), said
    return lines[0]


def test_bad_input_is_refused_in_one_line_before_any_task(text, tmp_path):
    output = tmp_path / "shards"
    for others, words in (
        ({"tasks": 0}, "--tasks: 0 must be at least 1"),
        ({"tasks": 7}, "can be divided among 6"),
        ({"executor": "slurm"}, "--partition"),
        ({"executor": "slurm", "partition": "cpu"}, "sbatch"),
        ({"config.data.tokenizer": "/nowhere"}, "no such file"),
    ):
        assert words in refused(arguments(text, output, **others), tmp_path)
    for place, words in (("", "--output: no directory"), (text, "holds other files")):
        assert words in refused(arguments(text, place), tmp_path)
    # What was refused leaves nothing that another command would go on with.
    assert "data.text_key" in refused(
        [*arguments(text, output), "--config.data.text_key=body"], tmp_path
    )
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_a_file_that_was_mended_before_its_task_ended_is_read_again(text):
    config = DataConfig((str(text),), (), "bytes", "text", 0.02, 4, "")
    tokenizer = tokenizers.load("bytes")
    before = shard_plan.record(list(shard_plan.parts_of(config)), config, tokenizer, 3)
    (text / "4.jsonl").write_text('{"text": "mended"}')
    now = shard_plan.record(list(shard_plan.parts_of(config)), config, tokenizer, 3)
    shard_plan.check_same(before, now, {0, 2}, "output")
    with pytest.raises(BadInput, match="files that have changed"):
        shard_plan.check_same(before, now, {1}, "output")  # task 1 of 3 reads the files 1 and 4


def test_an_output_goes_on_only_as_it_was_begun(text, tmp_path):
    output = tmp_path / "shards"
    config = DataConfig((str(text),), (), str(TOKENIZER), "text", 0.02, 4, "")
    parts = list(shard_plan.parts_of(config))
    record = shard_plan.record(parts, config, tokenizers.load(str(TOKENIZER)), len(SIZES))
    (output / "logs").mkdir(parents=True)
    (output / shard_plan.RECORD).write_text(json.dumps(record))
    others = arguments(text, output)
    assert "another --tasks" in refused(arguments(text, output, tasks=5), tmp_path)
    assert "another data.tokenizer" in refused([*others, "--config.data.tokenizer=bytes"], tmp_path)
    assert "data.validation_fraction" in refused(
        [*others, "--config.data.validation_fraction=0.5"], tmp_path
    )
    (output / "logs/completions").mkdir()
    (output / "logs/completions/00000").touch()
    with open(text / "0.jsonl", "a") as file:
        file.write("\n")
    assert "files that have changed" in refused(others, tmp_path)
    (output / shard_plan.RECORD).write_text("{")
    assert "another --tasks" in refused(others, tmp_path)
