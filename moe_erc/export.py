"""Writes the model of a run as an OLMoE, which transformers, vLLM and llama.cpp load.

    python -m moe_erc.export runs/erc-tiny DIR --license=apache-2.0

RUN is the workdir of a run, a directory or gs://bucket/path; DIR is a new or empty local directory.
The command writes the weights as safetensors, config.json, the tokenizer and a card. Nothing of the
losses remains. A model that OLMoE cannot express is refused with the reason. Where another engine
would compute another model than the run, a line and the card say so.
"""

import json
import re

from absl import flags

from moe_erc import sharding
from moe_erc.checks import BadInput
from moe_erc.data import paths
from moe_erc.hf import (
    engines,
    model_card,
    olmoe,
    olmoe_config,
    shard_writer,
    shards,
    tokenizer_files,
)
from moe_erc.launch import command_line, compilation_cache, processes
from moe_erc.measures.validation import LOSS, MEAN
from moe_erc.runs import Run, open_run

STRICT = flags.DEFINE_bool(
    "strict", False, "Refuse a model that another engine would serve differently, as --strict"
)
REPEAT_KV_HEADS = flags.DEFINE_bool(
    "repeat_kv_heads",
    False,
    "Write as many key and value heads as query heads, which llama.cpp needs, "
    "as --repeat_kv_heads; the model is the same, its cache is larger",
)
LICENSE = flags.DEFINE_string(
    "license", "unknown", "Of the weights, by its name on the Hub, as --license=apache-2.0"
)
LICENSE_FORM = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def main() -> None:
    """The command."""
    command_line.run(export, arguments=("RUN", "DIR"))


def export(argv: list[str]) -> None:
    """Write the run argv[1] into the directory argv[2]."""
    _, workdir, directory = argv
    with command_line.refusing_bad_input(), processes.ending_together():
        # A directory that is taken is refused before anything is opened.
        shard_writer.free_path(directory)
        if not LICENSE_FORM.fullmatch(LICENSE.value):
            raise BadInput(
                f"--license={LICENSE.value!r} is no name of a license; use one like apache-2.0"
            )
        processes.initialize()
        compilation_cache.enable()
        sharding.use_cpu_cores()
        processes.mute_all_but_first()
        run = open_run(workdir, with_text=False)
        lines = write_olmoe(run, directory, LICENSE.value, STRICT.value, REPEAT_KV_HEADS.value)
    for line in lines:
        print(line)
    print(f"{workdir}: step {run.step} is in {directory}")


def write_olmoe(
    run: Run,
    directory: str,
    license_id: str,
    strict: bool,
    repeat_kv_heads: bool,
) -> list[str]:
    """Write the model with its tokenizer and a card into a new local directory.

    Args:
      run: whose model it is
      directory: new or empty
      license_id: of the weights, as the Hub spells it
      strict: refuse a model that another engine would serve differently
      repeat_kv_heads: of `engines.for_engines`

    Returns:
      What the user has to know of the export, a line each.

    Raises:
      BadInput: for a directory that holds something, for a model that OLMoE cannot express, and
        under `strict`.
    """
    # The first process writes. If it is refused, the others must not wait for it.
    with processes.first():
        shard_writer.free_path(directory)
    model = run.model.config
    spec = run.config["data"]["tokenizer"]
    rows = tokenizer_files.rows_of(spec, run.tokenizer.vocab_size, model.vocab_size)
    written = engines.config_for_engines(model, len(rows), repeat_kv_heads)
    differences = engines.differences(written)
    if strict and differences:
        raise BadInput(f"{differences[0]}; without --strict it is exported, and the card says so")
    length, lines = _context_length(run)
    balance = run.config["losses"]["load_balance"]["weight"]
    entries = {
        "eos_token_id": run.tokenizer.eos_id,
        "max_position_embeddings": length,
        # The loss of transformers is K when balanced, ours is 1.
        "router_aux_loss_coef": balance / model.experts_per_token,
    }
    name = paths.local(directory).name
    files = tokenizer_files.tokenizer_files(spec, run.tokenizer.eos, length)
    files["README.md"] = model_card.model_card(
        name, model, written, run.earlier, _validation(run), license_id
    )
    about = olmoe.About(entries, files)
    olmoe.export_olmoe(
        directory,
        run.model,
        run.weights.params,
        about,
        rows=rows,
        repeat_kv_heads=repeat_kv_heads,
    )
    return [*map(str, differences), *lines]


def _context_length(run):
    """(tokens, what is to be said of it).

    A run that started from a checkpoint keeps the context of that, if it is longer than its own.
    """
    length = run.config["data"]["sequence_length"]
    started_from = run.config["init_from"] or run.config["init_upcycled"]["path"]
    if not started_from:
        return length, []
    source = paths.local(started_from)
    if not (source / "config.json").is_file():
        line = f"{source} is gone, from which the run started: max_position_embeddings is {length}"
        return length, [line]
    return max(length, olmoe_config.context_length(shards.read_config(source))), []


def _validation(run: Run) -> float | None:
    """The validation loss that eval.py, or the end of training, wrote for these weights."""
    for name, step in (("eval.json", run.step), ("report.json", run.config["train"]["steps"])):
        path = run.directory / name
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "measures" in report and report.get("step", step) == run.step:
            return report["measures"][LOSS.of(MEAN).key]
    return None


if __name__ == "__main__":
    main()
