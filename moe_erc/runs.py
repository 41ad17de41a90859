"""A run of train.py, read back: its model as of the newest checkpoint, on the devices that are there."""

import functools
import json
from typing import NamedTuple

import jax
from etils import epath

from moe_erc import processes, sharding
from moe_erc.analysis.curves import read_metrics
from moe_erc.analysis.diagnosis import Diagnosis
from moe_erc.analysis.survey import survey
from moe_erc.data import text
from moe_erc.evaluation.expert_use import ExpertUse
from moe_erc.evaluation.ngram import ngram_losses
from moe_erc.evaluation.perplexity import Perplexity
from moe_erc.hf import model_card, olmoe, shard_writer, tokenizer_files
from moe_erc.losses.language_model import token_losses
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.checkpoint import Checkpoints
from moe_erc.training.state import Weights, abstract_state, init_weights


class Run(NamedTuple):
    """What an evaluation needs of a run."""

    workdir: epath.Path
    step: int
    config: dict  # as in configs/base.py
    corpus: text.Corpus
    model: Transformer
    weights: Weights

    def report(self, windows):
        """Validation on so many windows of each domain (0: all), baselines, coupling and specialisation."""
        losses = functools.partial(token_losses, chunk=self.config["losses"]["lm"]["chunk"])
        perplexity = Perplexity(self.model, self.corpus, losses, *self._batches())
        return {
            "step": self.step,
            "validation": perplexity.run(self.weights, windows),
            "baselines": ngram_losses(self.corpus),
        } | Diagnosis(self.model, perplexity.probe(self.model.mesh.size)).run(self.weights)

    def to_draw(self, report, windows):
        """What `run_figures` takes of a run, with its report: maps are of the clean router and of those windows."""
        use = ExpertUse(self.model, self.corpus, *self._batches()).run(self.weights, windows)
        found = {"report": report, "metrics": read_metrics(self.workdir / "metrics.jsonl"), "use": use}
        if report["coupling"]:
            layers = range(self.model.config.layers)
            found["coupling"] = {"layers": layers, "matrix_LEE": survey(self.router_and_gates(), draws=1)[1]["raw"]}
        if self.config["losses"]["erc"]["weight"]:
            found["alpha"] = self.config["losses"]["erc"]["alpha"]
        return found

    def _batches(self):
        """How a batch is placed, and its shape: the run's, filled up to a row for every device."""
        mesh = self.model.mesh
        rows = -(-self.config["eval"]["batch_size"] // mesh.size) * mesh.size
        return functools.partial(sharding.put_whole_batch, mesh), (rows, self.config["data"]["sequence_length"])

    def router_and_gates(self):
        """(router_ED, w_gate_EDF) by layer, on the host; ValueError for a router without rows."""
        rows_LED = self.model.router_rows(self.weights.params)
        if rows_LED is None:
            raise ValueError(f"model.router is {self.model.config.router!r}, which has no router rows to be coupled")
        arrays = rows_LED, self.weights.params["layers"]["moe"]["w_gate"]
        everywhere = sharding.replicate(self.model.mesh)
        take = jax.jit(lambda arrays, layer: [array[layer] for array in arrays], out_shardings=everywhere)
        return (jax.device_get(take(arrays, layer)) for layer in range(len(rows_LED)))

    def export(self, directory):
        """Writes the model for transformers, with its tokenizer and a card, into a new local directory."""
        with processes.first():  # nobody waits for a writer that is refused
            shard_writer.free_path(directory)
        model, tokenizer, data = self.model.config, self.corpus.tokenizer, self.config["data"]
        length, balance = data["sequence_length"], self.config["losses"]["load_balance"]["weight"]
        entries = {
            "eos_token_id": tokenizer.eos_id,
            "max_position_embeddings": length,
            "router_aux_loss_coef": balance / model.experts_per_token,  # of a loss that is K when balanced, not 1
        }
        card = model_card.model_card(epath.Path(directory).name, model, self.config, self.step, self._validation())
        files = tokenizer_files.tokenizer_files(data["tokenizer"], tokenizer.eos, length) | {"README.md": card}
        olmoe.export_olmoe(directory, self.model, self.weights.params, olmoe.About(entries, files))

    def _validation(self):
        """The loss that eval.py, or the end of training, wrote down for these weights; None if neither did."""
        for name, step in (("eval.json", self.step), ("report.json", self.config["train"]["steps"])):
            path = self.workdir / name
            report = json.loads(path.read_text()) if path.exists() else {}
            if report and report.get("step", step) == self.step:
                return report["validation"]["loss"]
        return None


def open_run(workdir) -> Run:
    """Of a directory or bucket (`etils.epath.Path`). Of several processes all open it, and the first fills the cache.

    ValueError or OSError of one line, before anything is compiled, where there is no such run or its data are gone.
    """
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
    mesh = sharding.fit_mesh(model_config)  # the machine need not be the one it was trained on
    model = Transformer(model_config, mesh)
    weights = checkpoints.restore_weights(abstract_state(lambda: init_weights(model, jax.random.key(0)), mesh))
    return Run(workdir, checkpoints.latest_step(), config, corpus, model, weights)
