"""Trains a Mixture-of-Experts language model.

    python train.py                            configs/erc.py:tiny into runs/erc-tiny, minutes on a CPU
    python train.py --config=configs/vanilla.py:small --config.optimizer.learning_rate=3e-4

Started again on the same workdir, a directory or gs://bucket/path, a run continues where it stopped,
bit for bit, on any number of processes (docs/launch.md). Exit codes: docs/reliability.md. On a CPU
it asks for huge pages, which GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns off.
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs import base
from moe_erc import resume, sharding
from moe_erc.data import paths, text
from moe_erc.diagnosis.in_training import Diagnosis, headline
from moe_erc.diagnosis.report import make_report, read_report, write_report
from moe_erc.diagnosis.tables import print_found
from moe_erc.evaluation import evaluators
from moe_erc.evaluation.generate import Generator, Sample, Sampling
from moe_erc.evaluation.ngram import ngram_losses
from moe_erc.evaluation.perplexity import Perplexity
from moe_erc.evaluation.tasks import TaskScores, load_tasks
from moe_erc.hf import olmoe, tokenizer_files
from moe_erc.launch import command_line, compilation_cache, huge_pages, processes
from moe_erc.losses.language_model import token_losses
from moe_erc.measures import validation
from moe_erc.measures.registry import curves
from moe_erc.training.build import Training, build
from moe_erc.training.checkpoint import Checkpoints, holds_steps, prepare_directory
from moe_erc.training.environment import environment
from moe_erc.training.failure import EXPECTED, LastWords
from moe_erc.training.interrupt import StopRequest
from moe_erc.training.metrics import MetricWriter, check_package
from moe_erc.training.optimizer import updates_done
from moe_erc.training.progress import Progress
from moe_erc.training.trace import Trace

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Everything of the run goes here, as --workdir=runs/mine; runs/CONFIG-SIZE if not given",
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or behind the newest intact checkpoint of its workdir."""

    resuming: bool  # whether the workdir holds checkpoints
    step: int
    earlier: resume.Earlier
    checkpoints: Checkpoints | None  # None until a new run may write
    lock: Any  # held while this process lives, so that no other run writes there


@dataclasses.dataclass(frozen=True)
class Run:
    """What is settled before the first step."""

    config: ConfigDict
    workdir: pathlib.Path
    training: Training
    start: Start
    corpus: text.Corpus
    given: Any  # parameters of an OLMoE to start from, or None
    meta: dict  # what every checkpoint says of the run
    while_training: list  # evaluators
    at_the_end: list


def main(_):
    config = flags.FLAGS.config
    # What is refused ends here, in one line, before anything is compiled or written.
    with command_line.refusing_bad_input(), processes.ending_together():
        run = prepare(config)
    if run is None:
        return
    state = train(run, first_state(run))
    report(run, state)


# ------------------------------------------------------------------------------------ before the run


def prepare(config) -> Run | None:
    """Everything that can be refused; None where a finished run needs no more than its report."""
    workdir = paths.absolute(WORKDIR.value or f"runs/{command_line.config_name()}")
    training = set_up(config)
    model = training.model
    print(
        f"{workdir}: {model.config.parameters():,} parameters, "
        f"{model.config.active_parameters():,} active"
    )
    # The checkpoint comes before the text: a run continues with the text that it was begun with.
    start = find_start(config, workdir)
    corpus, other_text = open_text(config, workdir, start)
    if corpus is None:
        return None
    describe_text(config, model, corpus)
    while_training, at_the_end = make_evaluators(config, model, corpus)

    resume.check_state(start.earlier, model, training.abstract_state)
    source = None if start.step else config.init_from
    given = None
    if source:
        given = olmoe.open_olmoe(source, model.config, training.abstract_state.params)
    # A new run makes its directory last: what is refused leaves none.
    if not start.resuming:
        lock, checkpoints = open_checkpoints(workdir, config.checkpoint.keep)
        start = dataclasses.replace(start, lock=lock, checkpoints=checkpoints)

    settings = config.to_dict()
    changes = [*start.earlier.changes, *other_text]
    resume.print_changes(start.earlier, changes)
    history = start.earlier.history_with(changes)
    meta = {"config": settings, "data": corpus.record, "history": history}
    # All processes must mean the same run; one that does not would train on something else.
    position = [start.step, start.earlier.rows]
    processes.agree({"config": settings, "data": corpus.identity, "checkpoint": position})
    sharding.print_plan(training.abstract_state)
    return Run(config, workdir, training, start, corpus, given, meta, while_training, at_the_end)


def set_up(config) -> Training:
    """Devices, and everything that the configuration alone decides."""
    processes.initialize()
    compilation_cache.enable()
    command_line.check_numbers(config)
    check_package(config.log.wandb_project)
    settle_paths(config)
    # Before any array, because the number of CPU devices is settled once.
    micro_batch = config.train.batch_size // max(config.train.micro_batches, 1)
    sharding.use_cpu_cores(micro_batch, config.eval.batch_size, config.model.experts)
    training = build(config)
    processes.mute_all_but_first()
    return training


def settle_paths(config):
    """Absolute paths in place of those given: a run is evaluated in any directory."""
    if config.init_from:
        config.init_from = str(paths.local(config.init_from))
    tokenizer = tokenizer_files.tokenizer_of(config.init_from, config.data.tokenizer)
    if tokenizer != tokenizer_files.BYTES:
        tokenizer = str(paths.local(tokenizer))
    config.data.tokenizer = tokenizer


def find_start(config, workdir) -> Start:
    """Reads the newest intact checkpoint's account of the run, and compares this run with it."""
    resuming = holds_steps(workdir / "checkpoints")
    processes.agree({"checkpoint": resuming})
    lock = None
    checkpoints = None
    step = 0
    earlier = resume.Earlier()
    if resuming:
        lock, checkpoints = open_checkpoints(workdir, config.checkpoint.keep)
        step = checkpoints.newest_intact()
    if step:
        defaults = base.get_config().to_dict()
        earlier = resume.read(checkpoints.read_meta(step), step, defaults)
    earlier = resume.compare(earlier, config.to_dict())
    steps = config.train.steps
    if step > steps:
        print(f"train.steps: {steps} are fewer than the {step} that are done: nothing is trained")
    return Start(resuming, step, earlier, checkpoints, lock)


def open_checkpoints(workdir, keep):
    """(lock, checkpoints) of a writer. What a killed run left is cleared up; others are kept out."""
    with processes.first():
        lock = prepare_directory(workdir / "checkpoints")
    return lock, Checkpoints(workdir / "checkpoints", keep)


def open_text(config, workdir, start):
    """(corpus, changes of the text); (None, []) where the text of a finished run is gone.

    Such a run prints the report that it wrote.
    """
    finished = None
    if start.step >= config.train.steps:
        finished = read_report(workdir / "report.json", start.step)
    data_config = text.DataConfig(**config.data)
    # The first process fills the cache; the others read it.
    with processes.first():
        try:
            return resume.open_text(start.earlier, data_config, config.resume.allow)
        except resume.TextGone as gone:
            if not finished:
                raise
            print(f"{gone}; the report of step {start.step} is the one in report.json")
    print_found(finished["measures"])
    return None, []


def describe_text(config, model, corpus):
    """Says what is trained on; BadInput for more tokens than the model has rows."""
    length = config.data.sequence_length
    model.config.check_vocabulary(corpus.tokenizer.vocab_size)
    rows = config.train.steps * config.train.batch_size
    for line in text.describe(corpus, length, rows):
        print(line)
    if not config.data.attend_across_documents:
        documents = text.documents_per_window(corpus, length)
        print(f"attention within documents: {documents:.1f} in a window on average")


def make_evaluators(config, model, corpus):
    """(those that run while training, those of the report)."""
    put = functools.partial(sharding.put_whole_batch, model.mesh)
    losses = functools.partial(token_losses, chunk=config.losses.lm.chunk)
    shape_BT = (config.eval.batch_size, config.data.sequence_length)
    perplexity = Perplexity(model, corpus, losses, put, shape_BT, config.eval.windows)
    diagnosis = Diagnosis(model, perplexity.probe(model.mesh.size))
    tasks = load_tasks(config.eval.tasks, config.eval.task_dir)
    scores = TaskScores(tasks, config.eval.task_limit, model, corpus.tokenizer, shape_BT)
    sampling = Sampling(config.eval.sample_tokens, config.eval.temperature)
    sample = Sample(Generator(model, corpus.tokenizer), config.eval.prompt, sampling)
    while_training = [perplexity, diagnosis, scores, sample]
    return while_training, [perplexity.on(config.eval.report_windows), diagnosis]


# ----------------------------------------------------------------------------------------- the run


def first_state(run):
    """The state to go on from: of the checkpoint, of a given model, or drawn."""
    training = run.training
    start = run.start
    if start.step:
        state, _ = start.checkpoints.restore(training.abstract_state)
    else:
        state = training.create_state(run.given.read() if run.given else None)
    # Only now is it known what a loss is at step 0.
    with command_line.refusing_bad_input():
        training.objective.check_scales(state.loss_scales)
    resume.print_schedule(start.earlier, run.meta["config"], int(updates_done(state.opt_state)))
    return state


def train(run, state):
    """The state after the last step. Exits where the run is stopped or cannot go on."""
    config = run.config
    training = run.training
    checkpoints = run.start.checkpoints
    first = run.start.step
    steps = config.train.steps
    put = functools.partial(sharding.put_batch, training.mesh)
    batches = batches_from(run, first, sharding.local_rows(training.mesh, config.train.batch_size))
    trace = Trace(run.workdir / "profile", config.train.profile_step, (first, steps))
    step = first
    try:
        writer = metric_writer(run)
        progress = Progress(
            writer, config.log.every, (first, steps), step_size(run), training.guard
        )
        evaluation = Evaluation(run, writer, progress)
        with checkpoints, writer, progress, StopRequest() as stop:
            evaluation.make_up_for(first, state)
            for step in range(first + 1, steps + 1):
                trace.before(step)
                state, metrics = training.step(state, put(next(batches)))
                progress.add(step, metrics)
                leaving = step == steps or stop.reached(step)
                saving = leaving or step % config.checkpoint.every == 0
                if saving or step % config.log.every == 0:
                    progress.flush()
                trace.after(step)
                # Saved before anything that may fail: evaluators, and what writers of logs met with.
                if saving:
                    writer.flush()
                    checkpoints.save(step, state, run.meta | {"rows": rows_read(run, step)})
                writer.check()
                # A run that is stopped is evaluated when it returns.
                if evaluation.is_due(step) and (step == steps or not leaving):
                    evaluation.run(step, state)
                if leaving:
                    break
    except EXPECTED as error:
        sys.exit(last_words(run).say(error, state, checkpoints.newest))
    if stop and step < steps:
        sys.exit(128 + stop.signal)
    return state


def batches_from(run, step, rows=None):
    """Batches from the one after `step` on; `rows` of them are this process's, all if None."""
    config = run.config
    return text.train_batches(
        run.corpus,
        config.data.sequence_length,
        config.train.batch_size,
        config.seed,
        start_row=rows_read(run, step),
        rows=rows,
    )


def rows_read(run, step):
    """How many rows are read by the end of a step."""
    return run.start.earlier.row_at(step, run.config.train.batch_size)


def last_words(run):
    """What to say of a run that cannot go on."""
    batches = functools.partial(batches_from, run)
    return LastWords(run.workdir, run.training.gradients, batches)


def metric_writer(run):
    """Writes metrics.jsonl, and curves where they are asked for, from the next step on."""
    log = run.config.log
    settings = run.meta["config"]
    return MetricWriter(
        run.workdir, log.tensorboard, log.wandb_project, settings, run.start.step + 1
    )


def step_size(run):
    """(tokens, FLOPs) of a step; the backward pass takes twice the FLOPs of the forward pass."""
    length = run.config.data.sequence_length
    tokens = run.config.train.batch_size * length
    return tokens, 3 * tokens * run.training.model.config.flops_per_token(length)


class Evaluation:
    """Evaluates on steps that are due, and writes and prints what was found."""

    def __init__(self, run, writer, progress):
        self._run = run
        self._writer = writer
        self._progress = progress

    def is_due(self, step):
        return step == self._run.config.train.steps or step % self._run.config.eval.every == 0

    def make_up_for(self, step, state):
        """Evaluates a checkpoint whose run was killed between saving and evaluating it."""
        validation_loss = validation.LOSS.of(validation.MEAN).key
        if step and self.is_due(step) and not self._writer.holds(step, validation_loss):
            self.run(step, state)

    def run(self, step, state):
        with self._progress.paused():
            found = evaluators.evaluate(self._run.while_training, state.weights)
            self._writer.write(step, curves(found))
            self._writer.flush()
            self._writer.check()
            print(f"step {step}: {headline(found)}")
            prompt = self._run.config.eval.prompt
            if prompt:
                print(repr(found[validation.SAMPLE.of(prompt).key]))


# --------------------------------------------------------------------------------------- its report


def report(run, state):
    """Evaluates the last state, writes report.json and prints its tables."""
    found = ngram_losses(run.corpus) | evaluators.evaluate(run.at_the_end, state.weights)
    history = resume.history_lines(run.meta["history"])
    step = max(run.start.step, run.config.train.steps)
    written = make_report(step, history, found)
    # What a study keeps of a run beside what it found.
    written |= {"environment": environment(run.training.mesh), "corpus": run.corpus.identity}
    try:
        write_report(run.workdir / "report.json", written)
    except OSError as error:
        sys.exit(last_words(run).say(error, state, run.start.checkpoints.newest))
    finally:
        # A full disk leaves the tables.
        print_found(written["measures"])


if __name__ == "__main__":
    # It may start the program anew, so it comes first.
    huge_pages.enable()
    command_line.run(main, default_config="configs/erc.py:tiny")
