"""Evaluates a run: validation loss by domain, load by layer, and how coupled its router and experts are.

    python eval.py --workdir=runs/erc-tiny                      all tables, and runs/erc-tiny/eval.json
    python eval.py --workdir=runs/erc-tiny --windows=64         on 64 windows of each domain; 0 reads all

The model is the newest checkpoint's. The workdir may be gs://bucket/path; on several processes (docs/launch.md) the
first one prints and writes. Wrong input is one line and exit code 2.
"""

import functools

import jax
from absl import flags
from etils import epath

from moe_erc import command_line, processes, sharding
from moe_erc.analysis.diagnosis import Diagnosis
from moe_erc.analysis.report import print_report, write_report
from moe_erc.data import text
from moe_erc.evaluation.ngram import ngram_losses
from moe_erc.evaluation.perplexity import Perplexity
from moe_erc.losses.language_model import token_losses
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.checkpoint import Checkpoints
from moe_erc.training.state import abstract_state, init_weights

WORKDIR = flags.DEFINE_string("workdir", None, "the directory of a run of train.py", required=True)
WINDOWS = flags.DEFINE_integer(
    "windows", None, "windows of each domain; 0 is all; the run's eval.report_windows if unset"
)


def main(_):
    workdir = epath.Path(WORKDIR.value)

    with command_line.refusing_bad_input(), processes.ending_together():
        processes.initialize()
        sharding.use_cpu_cores()
        processes.mute_all_but_first()
        checkpoints = Checkpoints(workdir / "checkpoints")
        processes.agree({"checkpoint": checkpoints.latest_step()})
        meta = checkpoints.read_meta()
        config = meta["config"]
        with processes.first():
            corpus = text.prepare(text.DataConfig(**config["data"]))
        processes.agree({"data": corpus.identity})
        if corpus.tokenizer.identity != meta["data"]["tokenizer"]:
            raise ValueError(f"data.tokenizer: {config['data']['tokenizer']!r} is not the one the run was trained with")
        model_config = ModelConfig(**config["model"])
        mesh = sharding.fit_mesh(model_config)

    # The machine need not be the one it was trained on.
    batch_size = -(-config["eval"]["batch_size"] // mesh.size) * mesh.size
    model = Transformer(model_config, mesh)
    weights = checkpoints.restore_weights(abstract_state(lambda: init_weights(model, jax.random.key(0)), mesh))
    print(f"{workdir}: step {checkpoints.latest_step()}")

    losses = functools.partial(token_losses, chunk=config["losses"]["lm"]["chunk"])
    put = functools.partial(sharding.put_whole_batch, mesh)
    perplexity = Perplexity(model, corpus, losses, put, (batch_size, config["data"]["sequence_length"]))
    windows = config["eval"]["report_windows"] if WINDOWS.value is None else WINDOWS.value
    report = {
        "step": checkpoints.latest_step(),
        "validation": perplexity.run(weights, windows),
        "baselines": ngram_losses(corpus),
    } | Diagnosis(model, perplexity.probe(mesh.size)).run(weights)
    print_report(report)
    write_report(workdir / "eval.json", report)


if __name__ == "__main__":
    command_line.run(main)
