"""Writes the model of a run as an OLMoE, which transformers, vLLM and llama.cpp load.

    python -m moe_erc.export runs/erc-tiny DIR

RUN is the workdir of a run, a directory or gs://bucket/path; DIR is a new or empty local directory.
It gets the weights as safetensors, config.json, the tokenizer and a card. Nothing of the losses
remains in it. A model that no OLMoE can be is refused with the reason.
"""

import json

from moe_erc import sharding
from moe_erc.data import paths
from moe_erc.hf import model_card, olmoe, shard_writer, tokenizer_files
from moe_erc.launch import command_line, compilation_cache, processes
from moe_erc.measures.validation import LOSS, MEAN
from moe_erc.runs import Run, open_run


def main() -> None:
    """The command."""
    command_line.run(export, arguments=("RUN", "DIR"))


def export(argv: list[str]) -> None:
    """Writes the run argv[1] into the directory argv[2]."""
    _, workdir, directory = argv
    with command_line.refusing_bad_input(), processes.ending_together():
        # A directory that is taken is refused before anything is opened.
        shard_writer.free_path(directory)
        processes.initialize()
        compilation_cache.enable()
        sharding.use_cpu_cores()
        processes.mute_all_but_first()
        run = open_run(workdir, with_text=False)
        write_olmoe(run, directory)
    print(f"{workdir}: step {run.step} is in {directory}")


def write_olmoe(run: Run, directory: str) -> None:
    """Writes the model with its tokenizer and a card into a new local directory.

    Raises:
      BadInput: for a directory that holds something, and for a model that no OLMoE can be.
    """
    with processes.first():  # nobody waits for a writer that is refused
        shard_writer.free_path(directory)
    model = run.model.config
    length = run.config["data"]["sequence_length"]
    balance = run.config["losses"]["load_balance"]["weight"]
    entries = {
        "eos_token_id": run.tokenizer.eos_id,
        "max_position_embeddings": length,
        # Of a loss that is K when balanced, not 1.
        "router_aux_loss_coef": balance / model.experts_per_token,
    }
    name = paths.local(directory).name
    files = tokenizer_files.tokenizer_files(
        run.config["data"]["tokenizer"], run.tokenizer.eos, length
    )
    files["README.md"] = model_card.model_card(name, model, run.earlier, _validation(run))
    about = olmoe.About(entries, files)
    olmoe.export_olmoe(directory, run.model, run.weights.params, about)


def _validation(run: Run) -> float | None:
    """The loss that eval.py, or the end of training, wrote down for these weights."""
    for name, step in (("eval.json", run.step), ("report.json", run.config["train"]["steps"])):
        path = run.directory / name
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "measures" in report and report.get("step", step) == run.step:
            return report["measures"][LOSS.of(MEAN).key]
    return None


if __name__ == "__main__":
    main()
