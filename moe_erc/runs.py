"""Models to evaluate on the present devices: of a run of train.py, or of an OLMoE."""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from moe_erc import resume, sharding
from moe_erc.checks import BadInput
from moe_erc.data import paths, text
from moe_erc.data.tokenizer import Tokenizer
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

MAP_EXPERTS = 6
MAP_UNITS = 200  # of each expert in the map of gates; t-SNE takes minutes for thousands of points
MEND = "or evaluate the run where its cache is (MOE_ERC_CACHE)"
ROWS = 8  # of a batch for a checkpoint, whose config.json has no batch size


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model with its weights and its tokenizer."""

    step: int | None  # of its training, if that is known
    directory: epath.Path  # in which its results are written
    model: Transformer
    weights: Weights
    tokenizer: Tokenizer
    shape_BT: tuple[int, int]  # of a batch: rows for every device, the length of training

    def print_tasks(self, tasks: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """Print and return the scores of the model in tasks of `load_tasks`.

        `limit` bounds the documents of each task; 0 is all.
        """
        scores = TaskScores(tasks, limit, self.model, self.tokenizer, self.shape_BT)
        reached = scores.answer(self.weights)
        print_tasks(reached)
        return {"step": self.step} | reached


@dataclasses.dataclass(frozen=True)
class Run(Opened):
    """A run at its newest checkpoint."""

    config: dict  # as in configs/base.py
    corpus: text.Corpus | None  # None where it was opened without its text
    earlier: resume.Earlier  # what its checkpoint says of it

    def report(self, windows: int | None = None) -> dict[str, Any]:
        """Diagnosis, baselines and validation.

        `windows` of each domain are read; 0 is all, None is as many as the run's own report reads.
        """
        losses = functools.partial(token_losses, chunk=self.config["losses"]["lm"]["chunk"])
        windows_read = self._windows(windows)
        perplexity = Perplexity(
            self.model, self.corpus, losses, self._put, self.shape_BT, windows_read
        )
        diagnosis = Diagnosis(self.model, perplexity.probe(self.model.mesh.size))
        found = ngram_losses(self.corpus)
        found |= evaluators.evaluate([perplexity, diagnosis], self.weights)
        report = make_report(self.step, resume.history_lines(self.earlier.history), found)
        return report | {"text": self._text(windows)}

    def _text(self, windows):
        """The text on which a loss was measured, in words that are equal for equal text."""
        return f"{self.corpus.identity}, {self._windows(windows) or 'all'} windows of each domain"

    def compare_text(self, path: epath.Path, report: Mapping[str, Any]) -> str:
        """A warning if the report at `path`, which `report` replaces, is of other text; or ""."""
        before = None
        if path.exists():
            with contextlib.suppress(ValueError, AttributeError):  # a damaged report says nothing
                before = json.loads(path.read_text(encoding="utf-8")).get("text")
        if before in (None, report["text"]):
            return ""
        return (
            f"{path}: its results were measured on other text ({before}; now {report['text']}) "
            "and are replaced"
        )

    def to_draw(self, report: Mapping[str, Any], windows: int | None = None) -> dict[str, Any]:
        """The entry of this run in the argument of `run_figures`.

        Coupling is that of the clean router. Expert use is measured on `windows`, as in `report`.
        """
        use = ExpertUse(self.model, self.corpus, self._put, self.shape_BT, self._windows(windows))
        measures = report["measures"] | evaluators.evaluate([use], self.weights)
        found = {"measures": measures, "metrics": read_metrics(self.directory / "metrics.jsonl")}
        if self.model.config.router.has_rows:
            matrices = []
            for router_ED, w_gate_EDF in self.router_and_gates():
                matrices.append(coupling_matrix(router_ED, w_gate_EDF))
            measures[MATRIX.key] = np.stack(matrices)
            middle = self.model.config.layers // 2
            _, w_gate_EDF = next(itertools.islice(self.router_and_gates(), middle, None))
            experts = range(len(w_gate_EDF))[:MAP_EXPERTS]
            units_EDF = w_gate_EDF[..., :MAP_UNITS]
            points_N2, owner_N = gate_map(units_EDF, experts, perplexity=30, seed=0)
            found["gates"] = {"layer": middle, "points_N2": points_N2, "owner_N": owner_N}
        if self.config["losses"]["erc"]["weight"]:
            found["alpha"] = self.config["losses"]["erc"]["alpha"]
        return found

    def _windows(self, windows):
        return self.config["eval"]["report_windows"] if windows is None else windows

    @property
    def _put(self):
        return functools.partial(sharding.put_whole_batch, self.model.mesh)

    def router_and_gates(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(router_ED, w_gate_EDF) of every layer, on the host, one at a time.

        Raises:
          BadInput: for a router without rows, at the call and not at the first layer.
        """
        rows_LED = self.model.router_rows(self.weights.params)
        if rows_LED is None:
            raise BadInput(
                f"model.router is {self.model.config.router.name!r}, "
                "which has no router rows to be coupled"
            )
        w_gate_LEDF = self.weights.params["layers"]["moe"]["w_gate"]

        # One compiled program serves all layers.
        @functools.partial(jax.jit, out_shardings=sharding.replicate(self.model.mesh))
        def take(rows_LED, w_gate_LEDF, layer):
            return rows_LED[layer], w_gate_LEDF[layer]

        layers = range(len(rows_LED))
        return (jax.device_get(take(rows_LED, w_gate_LEDF, layer)) for layer in layers)


def open_run(workdir: str, defaults: dict[str, Any] | None = None, with_text: bool = True) -> Run:
    """Open a run. All processes call this, and the first one fills the cache.

    Args:
      workdir: a directory or gs://bucket/path
      defaults: a whole configuration, for keys that are newer than the run
      with_text: whether the text on which the run began is opened, from the cache. Without it a
        run can generate text, be exported, be scored in tasks and be diagnosed.

    Raises:
      BadInput: before any compilation, if there is no such run, or its data are gone.
    """
    directory = paths.absolute(workdir)
    checkpoints = Checkpoints(directory / "checkpoints")
    step = checkpoints.newest_intact()
    processes.agree({"checkpoint": step})
    earlier = resume.read(checkpoints.read_meta(step or None), step, defaults)
    config = earlier.config
    try:
        data_config = text.DataConfig(**config["data"])
        model_config = ModelConfig.of(config)
    except (KeyError, TypeError) as error:
        raise BadInput(
            f"{workdir} is of another version of moe_erc ({error}); evaluate it with that one"
        ) from None
    config["data"] = dataclasses.asdict(data_config)  # with the keys that are newer than the run
    corpus = None
    identity = earlier.data["tokenizer"]
    if with_text:
        with processes.first():
            corpus, _ = resume.open_text(earlier, data_config, mend=MEND)
        identity = corpus.identity
    tokenizer = resume.open_tokenizer(earlier, data_config, MEND)
    processes.agree({"data": identity})
    model, abstract = _lay_out(model_config)
    rows = _rows(model, config["eval"]["batch_size"])
    shape_BT = (rows, config["data"]["sequence_length"])
    weights = checkpoints.restore_weights(abstract, step)
    return Run(step, directory, model, weights, tokenizer, shape_BT, config, corpus, earlier)


def open_checkpoint(directory: str) -> Opened:
    """Open an OLMoE in the form of Hugging Face.

    Raises:
      BadInput: for a directory that holds none, or no tokenizer.json.
    """
    source = paths.local(directory)
    config = shards.read_config(source)
    model_config = ModelConfig(**olmoe_config.PLAIN | olmoe_config.model_fields(config))
    tokenizer = load_tokenizer(tokenizer_files.tokenizer_of(source, tokenizer_files.BYTES))
    model_config.check_vocabulary(tokenizer.vocab_size)
    model, abstract = _lay_out(model_config)
    weights = Weights(olmoe.import_olmoe(source, model_config, abstract.params), {})
    shape_BT = (_rows(model, ROWS), olmoe_config.context_length(config))
    return Opened(None, paths.absolute("tasks") / source.name, model, weights, tokenizer, shape_BT)


def _lay_out(model_config):
    """(model, abstract weights) on the present devices, which may not be those of the training."""
    mesh = sharding.fit_mesh(model_config)
    model = Transformer(model_config, mesh)
    init = functools.partial(init_weights, model, jax.random.key(0))
    return model, abstract_state(init, model)


def _rows(model, count):
    """`count` rows, rounded up to a multiple of the number of devices."""
    return -(-count // model.mesh.size) * model.mesh.size
