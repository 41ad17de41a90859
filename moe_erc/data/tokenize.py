"""Makes token shards of the text of a config, with datatrove, on one machine or on many.

    python -m moe_erc.data.tokenize --config.data.sources="('/data/c4',)" --output=/data/shards

A source is a directory or a URL (s3://, gs://, hf://) of .txt, .jsonl, .parquet, .arrow or .warc
files, or a TFDS data set. The shards of a source c4 are c4/train/*.ds and c4/validation/*.ds in the
output. The same command goes on after a crash, and says what there is when all tasks are done.
docs/data.md has the commands for SLURM and Ray.
"""

import importlib.util
import json
import os
import shutil
import sys
from typing import Any

from absl import flags

from moe_erc.checks import BadInput, Range, in_range
from moe_erc.data import paths, shard_plan
from moe_erc.data import tokenizer as tokenizers
from moe_erc.data.config import DataConfig
from moe_erc.launch import command_line

OUTPUT = flags.DEFINE_string(
    "output", None, "Directory or URL of the shards, as --output=/data/shards"
)
EXECUTOR = flags.DEFINE_enum(
    "executor", "local", ["local", "slurm", "ray"], "Where tasks run, as --executor=slurm"
)
TASKS = flags.DEFINE_integer(
    "tasks", 1, "Parts that are tokenised and resumed one by one, as --tasks=1000"
)
PARTITION = flags.DEFINE_string("partition", "", "Of SLURM, as --partition=cpu")
TIME = flags.DEFINE_string("time", "24:00:00", "Limit of a task under SLURM, as --time=04:00:00")
NUMBER_OF_TASKS = Range(least=1, note="parts that are tokenised and resumed one by one")


def main() -> None:
    """The command."""
    command_line.run(tokenize, default_config="configs/erc.py:tiny", block="data.")


def tokenize(_: list[str]) -> None:
    """Tokenise what is not yet tokenised of `config.data`, and say what the output holds."""
    with command_line.refusing_bad_input():
        _check_flags()
        folder = _output_folder()
        config = DataConfig(**flags.FLAGS.config.data)
        tokenizer = tokenizers.load(config.tokenizer)
        parts = list(shard_plan.parts_of(config))
        _check_parts(parts, config.text_key)
        _begin(folder, shard_plan.record(parts, config, tokenizer, TASKS.value))
        name = _tokenizer_name(folder, config.tokenizer, tokenizer)
        executor = _executor(folder, parts, name, tokenizer.identity, config.text_key)
        executor.run()
    left = len(executor.get_incomplete_ranks(skip_completed=True))
    if left:
        state = "are waiting or running" if EXECUTOR.value == "slurm" else "have failed"
        print(
            f"{left} of {TASKS.value} tasks {state} (logs in {OUTPUT.value}/logs); "
            "when none is running any more, the same command goes on"
        )
        sys.exit(0 if EXECUTOR.value == "slurm" else 1)
    _say(folder, parts, name)


def _check_flags() -> None:
    in_range("--tasks", TASKS.value, NUMBER_OF_TASKS)
    if not OUTPUT.value:
        raise BadInput("--output: no directory is given; name one, as --output=/data/shards")
    if EXECUTOR.value == "slurm" and not PARTITION.value:
        raise BadInput("--partition: SLURM needs one; name it, as --partition=cpu (see sinfo)")
    if EXECUTOR.value == "slurm" and not shutil.which("sbatch"):
        raise BadInput("--executor: slurm needs the command sbatch; start it where SLURM is")
    needed = ["datatrove"]
    if EXECUTOR.value == "ray":
        needed.append("ray")
    for package in needed:
        if not importlib.util.find_spec(package):
            raise BadInput(f"the library '{package}' is missing; pip install 'moe_erc[{package}]'")


def _output_folder() -> Any:
    """The output as a folder of datatrove."""
    from datatrove.io import get_datafolder

    if not paths.is_remote(OUTPUT.value):
        probe = paths.writable_file(os.path.join(OUTPUT.value, shard_plan.RECORD))
        return get_datafolder(str(probe.parents[1]))
    try:
        return get_datafolder(OUTPUT.value)
    except (ImportError, ValueError) as error:
        raise BadInput(
            f"--output: {OUTPUT.value!r} cannot be opened ({error}); "
            "install the package of fsspec for it, or give a directory"
        ) from None


def _check_parts(parts: list[shard_plan.Part], text_key: str) -> None:
    from moe_erc.data import datatrove_steps

    most = max(part.most_tasks for part in parts)
    if TASKS.value > most:
        raise BadInput(
            f"--tasks: {TASKS.value} tasks for text that can be divided among {most}, because one "
            f"task reads a file; give at most {most}"
        )
    datatrove_steps.check(parts, text_key)


def _begin(folder: Any, record: dict) -> None:
    """Keep what decides the shards. Refuse an output that holds anything else."""
    if folder.isfile(shard_plan.RECORD):
        try:
            before = json.loads(folder.cat_file(shard_plan.RECORD))
        except ValueError:  # the first command was killed while it wrote
            before = None
        ended = {int(name.rpartition("/")[2]) for name in folder.list_files("logs/completions")}
        shard_plan.check_same(before, record, ended, OUTPUT.value)
    elif folder.list_files():
        raise BadInput(
            f"--output: '{OUTPUT.value}' holds other files; name a new or empty directory"
        )
    with folder.open(shard_plan.RECORD, "wt", encoding="utf-8") as file:
        json.dump(record, file)


def _tokenizer_name(folder: Any, spec: str, tokenizer: tokenizers.Tokenizer) -> str:
    """What tasks open and shards name as their tokenizer; a copy of it lies in the output."""
    files = shard_plan.tokenizer_files(spec, tokenizer)
    for name, content in files.items():
        # Tasks that are running may read it.
        if not folder.isfile(name) or folder.cat_file(name) != content:
            with folder.open(name, "wb") as file:
                file.write(content)
    if not files:
        return spec
    # Tasks open it, and a tokenizer is opened from a local file alone.
    return folder.resolve_paths("tokenizer.json") if folder.is_local() else str(paths.local(spec))


def _executor(
    folder: Any, parts: list[shard_plan.Part], name: str, identity: str, text_key: str
) -> Any:
    """The executor of datatrove, with everything that its tasks do."""
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor

    from moe_erc.data import datatrove_steps

    steps = datatrove_steps.pipeline(parts, folder, name, identity, text_key)
    logs = folder.resolve_paths("logs")
    tasks = TASKS.value
    if EXECUTOR.value == "local":
        return LocalPipelineExecutor(steps, tasks, min(tasks, _cores()), logs)
    if EXECUTOR.value == "ray":
        return RayPipelineExecutor(steps, tasks, logging_dir=logs)
    return SlurmPipelineExecutor(
        steps,
        tasks,
        TIME.value,
        PARTITION.value,
        job_name="tokenize",
        qos="",  # the default of the cluster
        logging_dir=logs,
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _say(folder: Any, parts: list[shard_plan.Part], name: str) -> None:
    """Print what the output holds, and how a run is trained on it."""
    patterns: dict[str, list[str]] = {"train": [], "validation": []}
    for part in parts:
        shards = folder.list_files(part.folder, glob_pattern="*.ds.metadata")
        tokens = 0
        for shard in shards:
            tokens += int(folder.cat_file(shard).split(b"\n")[1])
        print(f"{part.folder}: {len(shards):,} shards of {tokens:,} tokens")
        if shards:
            place = folder.resolve_paths(part.folder)
            patterns[part.split].append(f"{place}/*.ds")
    sources = tuple(f"tokens:{pattern}" for pattern in patterns["train"])
    print(f'train on them: --config.data.sources="{sources}" --config.data.tokenizer={name}')
    if patterns["validation"]:
        print(f'  --config.data.tokens.validation="{tuple(patterns["validation"])}"')


if __name__ == "__main__":
    main()
