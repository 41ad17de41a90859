"""Models to evaluate, on the devices that are there: that of a run of train.py, read back, and that of an OLMoE."""

import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from moe_erc import resume, sharding
from moe_erc.checks import BadInput
from moe_erc.data import paths, text
from moe_erc.data.tokenizer import load as load_tokenizer
from moe_erc.diagnosis.curves import read_metrics
from moe_erc.diagnosis.gate_map import gate_map
from moe_erc.diagnosis.in_training import Diagnosis
from moe_erc.diagnosis.report import make_report
from moe_erc.evaluation import evaluators
from moe_erc.evaluation.expert_use import ExpertUse
from moe_erc.evaluation.ngram import ngram_losses
from moe_erc.evaluation.perplexity import Perplexity
from moe_erc.evaluation.tasks import TaskScores, print_tasks
from moe_erc.hf import olmoe, olmoe_config, shards, tokenizer_files
from moe_erc.launch import processes
from moe_erc.losses.erc import coupling_matrix
from moe_erc.losses.language_model import token_losses
from moe_erc.measures.coupling import MATRIX
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.checkpoint import Checkpoints
from moe_erc.training.state import Weights, abstract_state, init_weights

MAP_EXPERTS, MAP_UNITS = 6, 200  # in the map of gates; t-SNE takes minutes for thousands of points
MEND = "or evaluate the run where its cache is (MOE_ERC_CACHE)"
ROWS = 8  # of a batch for a checkpoint, which does not say


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model with its weights and its tokenizer."""

    step: int | None  # of its training, if that is known
    directory: epath.Path  # where what is found of it is written
    model: Transformer
    weights: Weights
    tokenizer: Any
    shape_BT: tuple[int, int]  # of a batch: a row for every device, the length it was trained with

    def print_tasks(self, tasks, limit):
        """Prints and returns what it reaches in tasks of `load_tasks`, on so many documents of each (0: all)."""
        reached = TaskScores(tasks, limit, self.model, self.tokenizer, self.shape_BT).answer(self.weights)
        print_tasks(reached)
        return {"step": self.step} | reached


@dataclasses.dataclass(frozen=True)
class Run(Opened):
    """A run, as of its newest checkpoint."""

    config: dict  # as in configs/base.py
    corpus: text.Corpus | None  # None where it was opened without its text
    earlier: resume.Earlier  # what its checkpoint says of it

    def report(self, windows=None):
        """Diagnosis, baselines, and validation on so many windows of each domain (0: all, None: the run's)."""
        losses = functools.partial(token_losses, chunk=self.config["losses"]["lm"]["chunk"])
        windows_read = self._windows(windows)
        perplexity = Perplexity(self.model, self.corpus, losses, self._put, self.shape_BT, windows_read)
        diagnosis = Diagnosis(self.model, perplexity.probe(self.model.mesh.size))
        found = ngram_losses(self.corpus) | evaluators.evaluate([perplexity, diagnosis], self.weights)
        report = make_report(self.step, resume.history_lines(self.earlier.history), found)
        return report | {"text": self._text(windows)}

    def _text(self, windows):
        """What a loss was measured on, in words that are equal for equal text."""
        return f"{self.corpus.identity}, {self._windows(windows) or 'all'} windows of each domain"

    def compare_text(self, path, report):
        """One line where the report at `path`, which this one is to replace, was measured on other text; or ""."""
        try:
            before = json.loads(path.read_text(encoding="utf-8")).get("text") if path.exists() else None
        except (ValueError, AttributeError):
            before = None
        if before in (None, report["text"]):
            return ""
        return f"{path}: its results were measured on other text ({before}; now {report['text']}) and are replaced"

    def to_draw(self, report, windows=None):
        """What `run_figures` takes of a run, with its report: maps are of the clean router and of those windows."""
        use = ExpertUse(self.model, self.corpus, self._put, self.shape_BT, self._windows(windows))
        measures = report["measures"] | evaluators.evaluate([use], self.weights)
        found = {"measures": measures, "metrics": read_metrics(self.directory / "metrics.jsonl")}
        if self.model.config.router.has_rows:
            measures[MATRIX.key] = np.stack([coupling_matrix(*layer) for layer in self.router_and_gates()])
            middle = self.model.config.layers // 2
            _, w_gate_EDF = next(itertools.islice(self.router_and_gates(), middle, None))
            points_N2, owner_N = gate_map(w_gate_EDF[..., :MAP_UNITS], range(len(w_gate_EDF))[:MAP_EXPERTS], 30, seed=0)
            found["gates"] = {"layer": middle, "points_N2": points_N2, "owner_N": owner_N}
        if self.config["losses"]["erc"]["weight"]:
            found["alpha"] = self.config["losses"]["erc"]["alpha"]
        return found

    def _windows(self, windows):
        return self.config["eval"]["report_windows"] if windows is None else windows

    @property
    def _put(self):
        return functools.partial(sharding.put_whole_batch, self.model.mesh)

    def router_and_gates(self):
        """(router_ED, w_gate_EDF) by layer, on the host; ValueError for a router without rows."""
        rows_LED = self.model.router_rows(self.weights.params)
        if rows_LED is None:
            raise BadInput(f"model.router is {self.model.config.router.name!r}, which has no router rows to be coupled")
        arrays = rows_LED, self.weights.params["layers"]["moe"]["w_gate"]
        everywhere = sharding.replicate(self.model.mesh)
        take = jax.jit(lambda arrays, layer: [array[layer] for array in arrays], out_shardings=everywhere)
        return (jax.device_get(take(arrays, layer)) for layer in range(len(rows_LED)))


def open_run(workdir, defaults=None, with_text=True) -> Run:
    """Of a directory or bucket. Of several processes all open it, and the first fills the cache.

    defaults: a whole configuration, for keys that are younger than the run. Its text is that of its beginning, out of
    the cache; without text a run can write, export, be asked tasks and tell of its coupling.

    BadInput or OSError of one line, before anything is compiled, where there is no such run or its data are gone.
    """
    directory = paths.absolute(workdir)
    checkpoints = Checkpoints(directory / "checkpoints")
    step = checkpoints.newest_intact()
    processes.agree({"checkpoint": step})
    earlier = resume.read(checkpoints.read_meta(step or None), step, defaults)
    config = earlier.config
    try:
        data_config, model_config = text.DataConfig(**config["data"]), ModelConfig.of(config)
    except (KeyError, TypeError) as error:
        raise BadInput(f"{workdir} is of another version of moe_erc ({error}); evaluate it with that one") from None
    config["data"] = dataclasses.asdict(data_config)  # with the keys that are younger than the run
    corpus, identity = None, earlier.data["tokenizer"]
    if with_text:
        with processes.first():
            corpus, _ = resume.open_text(earlier, data_config, mend=MEND)
        identity = corpus.identity
    tokenizer = resume.open_tokenizer(earlier, data_config, MEND)
    processes.agree({"data": identity})
    model, abstract = _lay_out(model_config)
    shape_BT = _rows(model, config["eval"]["batch_size"]), config["data"]["sequence_length"]
    weights = checkpoints.restore_weights(abstract, step)
    return Run(step, directory, model, weights, tokenizer, shape_BT, config, corpus, earlier)


def open_checkpoint(directory) -> Opened:
    """Of an OLMoE as Hugging Face has it.

    ValueError or OSError of one line for what is none, or has no tokenizer.json.
    """
    source = paths.local(directory)
    config = shards.read_config(source)
    model_config = ModelConfig(**olmoe_config.PLAIN | olmoe_config.model_fields(config))
    tokenizer = load_tokenizer(tokenizer_files.tokenizer_of(source, tokenizer_files.BYTES))
    model_config.check_vocabulary(tokenizer.vocab_size)
    model, abstract = _lay_out(model_config)
    weights = Weights(olmoe.import_olmoe(source, model_config, abstract.params), {})
    shape_BT = _rows(model, ROWS), olmoe_config.context_length(config)
    return Opened(None, paths.absolute("tasks") / source.name, model, weights, tokenizer, shape_BT)


def _lay_out(model_config):
    """(model, abstract weights) on the devices that are there: not those it was trained on."""
    mesh = sharding.fit_mesh(model_config)
    model = Transformer(model_config, mesh)
    return model, abstract_state(lambda: init_weights(model, jax.random.key(0)), model)


def _rows(model, count):
    """So many, filled up to a row for every device."""
    return -(-count // model.mesh.size) * model.mesh.size
