"""Trains a Mixture-of-Experts language model.

    python train.py              trains configs/erc.py:tiny into runs/erc-tiny, in minutes on a CPU
    python train.py --config=configs/vanilla.py:small --config.optimizer.learning_rate=3e-4

If the command is run again on the same workdir, a directory or gs://bucket/path, the run continues
where it stopped, bit for bit, on any number of processes (docs/launch.md). Exit codes are listed in
docs/reliability.md. On a CPU the program asks for huge pages, which
GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns off.
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
from moe_erc.checks import BadInput
from moe_erc.data import paths, text
from moe_erc.data.shards import group, storage
from moe_erc.diagnosis.in_training import Diagnosis, headline
from moe_erc.diagnosis.report import make_report, read_report, write_report
from moe_erc.diagnosis.tables import print_found
from moe_erc.evaluation import evaluators
from moe_erc.evaluation.generate import Generator, Sample, Sampling
from moe_erc.evaluation.ngram import ngram_losses
from moe_erc.evaluation.perplexity import Perplexity
from moe_erc.evaluation.tasks import TaskScores, load_tasks
from moe_erc.hf import olmoe, tokenizer_files, upcycle
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
    "The directory of the run, as --workdir=runs/mine; runs/CONFIG-SIZE if not given",
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or after the newest intact checkpoint of its workdir."""

    is_resumed: bool  # whether the workdir holds checkpoints
    step: int
    earlier: resume.Earlier
    checkpoints: Checkpoints | None  # None until a new run may write
    lock: Any  # held as long as this process lives, so that no other run writes there


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that is known before the first step."""

    config: ConfigDict
    workdir: pathlib.Path
    training: Training
    start: Start
    corpus: text.Corpus
    given: Any  # parameters of a checkpoint to start from, or None
    meta: dict  # the account of the run that every checkpoint keeps
    while_training: list  # evaluators
    at_the_end: list


def main(_):
    config = flags.FLAGS.config
    # Bad input ends here, in one line, before anything is compiled or written.
    with command_line.refusing_bad_input(), processes.ending_together():
        run = prepare(config)
    if run is None:
        return
    state = train(run, first_state(run))
    report(run, state)


# ----------------------------------------------------------------------------------- before the run


def prepare(config) -> Run | None:
    """Check and open everything; None if a finished run only had to print its report again."""
    workdir = paths.absolute(WORKDIR.value or f"runs/{command_line.config_name()}")
    training = set_up(config)
    model = training.model
    print(
        f"{workdir}: {model.config.parameters():,} parameters, "
        f"{model.config.active_parameters():,} active"
    )
    # The checkpoint comes before the text, because a run continues with the text of its beginning.
    start = find_start(config, workdir)
    corpus, other_text = open_text(config, workdir, start)
    if corpus is None:
        return None
    describe_text(config, model, corpus)
    while_training, at_the_end = make_evaluators(config, model, corpus)

    resume.check_state(start.earlier, model, training.abstract_state)
    given = None if start.step else open_given(config, training)
    # A new run makes its directory last, so that bad input leaves none.
    if not start.is_resumed:
        lock, checkpoints = open_checkpoints(workdir, config.checkpoint.keep)
        start = dataclasses.replace(start, lock=lock, checkpoints=checkpoints)

    settings = config.to_dict()
    changes = [*start.earlier.changes, *other_text]
    resume.print_changes(start.earlier, changes)
    history = start.earlier.history_with(changes)
    meta = {"config": settings, "data": corpus.record, "history": history}
    # All processes must agree on the run; one that differs would train on something else.
    position = [start.step, start.earlier.rows]
    processes.agree({"config": settings, "data": corpus.identity, "checkpoint": position})
    sharding.print_plan(training.abstract_state)
    return Run(config, workdir, training, start, corpus, given, meta, while_training, at_the_end)


def set_up(config) -> Training:
    """Set up devices, and everything that depends on the configuration alone."""
    processes.initialize()
    compilation_cache.enable()
    command_line.check_numbers(config)
    check_package(config.log.wandb_project)
    settle_paths(config)
    # This comes before any array, because the number of CPU devices can be set only once.
    micro_batch = config.train.batch_size // max(config.train.micro_batches, 1)
    sharding.use_cpu_cores(micro_batch, config.eval.batch_size, config.model.experts)
    training = build(config)
    processes.mute_all_but_first()
    return training


def settle_paths(config):
    """Make the paths of the config absolute, so that a run can be evaluated from any directory."""
    dense = config.init_upcycled.path
    if config.init_from and dense:
        raise BadInput(
            f"init_upcycled.path: {dense} beside init_from {config.init_from}; use one of the two"
        )
    if config.init_from:
        config.init_from = str(paths.local(config.init_from))
    if dense:
        config.init_upcycled.path = str(paths.local(dense))
    source = config.init_from or config.init_upcycled.path
    tokenizer = tokenizer_files.tokenizer_of(source, config.data.tokenizer)
    if tokenizer != tokenizer_files.BYTES:
        tokenizer = str(paths.local(tokenizer))
    config.data.tokenizer = tokenizer
    text.DataConfig(**config.data)  # refuses what is no list of names
    config.data.sources = tuple(map(group.absolute, config.data.sources))
    config.data.tokens.validation = tuple(map(storage.absolute, config.data.tokens.validation))


def open_given(config, training):
    """The checkpoint that gives step 0 its parameters, opened; None if all are drawn."""
    abstract = training.abstract_state.params
    upcycling = upcycle.Upcycling(**config.init_upcycled)
    if upcycling.path:
        return upcycle.open_upcycled(upcycling, training.model.config, abstract, config.seed)
    if config.init_from:
        return olmoe.open_olmoe(config.init_from, training.model.config, abstract)
    return None


def find_start(config, workdir) -> Start:
    """Read the account of the run in the newest intact checkpoint, and compare this run with it."""
    is_resumed = holds_steps(workdir / "checkpoints")
    processes.agree({"checkpoint": is_resumed})
    lock = None
    checkpoints = None
    step = 0
    earlier = resume.Earlier()
    if is_resumed:
        lock, checkpoints = open_checkpoints(workdir, config.checkpoint.keep)
        step = checkpoints.newest_intact()
    if step:
        defaults = base.get_config().to_dict()
        earlier = resume.read(checkpoints.read_meta(step), step, defaults)
    earlier = resume.compare(earlier, config.to_dict())
    steps = config.train.steps
    if step > steps:
        print(f"train.steps: {steps} are fewer than the {step} that are done: nothing is trained")
    return Start(is_resumed, step, earlier, checkpoints, lock)


def open_checkpoints(workdir, keep):
    """(lock, checkpoints) of a writer.

    The lock keeps other runs out. Files that a killed run left unfinished are removed.
    """
    with processes.first():
        lock = prepare_directory(workdir / "checkpoints")
    return lock, Checkpoints(workdir / "checkpoints", keep)


def open_text(config, workdir, start):
    """(corpus, changes of the text), or (None, []) if the text of a finished run is gone.

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
    """Print the text of the training; BadInput if it has more token ids than the model has rows."""
    length = config.data.sequence_length
    model.config.check_vocabulary(corpus.tokenizer.vocab_size)
    rows = config.train.steps * config.train.batch_size
    for line in text.describe(corpus, length, rows):
        print(line)
    if not config.data.attend_across_documents:
        documents = text.documents_per_window(corpus, length)
        print(f"attention within documents: {documents:.1f} in a window on average")


def make_evaluators(config, model, corpus):
    """(evaluators that run while training, evaluators of the report)."""
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
    """The state before the first step: of the checkpoint, of a given model, or drawn."""
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
    """The state after the last step; exits if the run is stopped or cannot go on."""
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
                # Saving comes before everything that may fail: evaluators, and the check of the
                # writers of logs.
                if saving:
                    writer.flush()
                    checkpoints.save(step, state, run.meta | {"rows": rows_read(run, step)})
                writer.check()
                # A run that is stopped is evaluated when it is started again.
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
    """The batches after `step`, of which this process reads `rows`; None is all rows."""
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
    """The messages for a run that cannot go on."""
    batches = functools.partial(batches_from, run)
    return LastWords(run.workdir, run.training.gradients, batches)


def metric_writer(run):
    """The writer of metrics.jsonl, and of curves if the config asks for them."""
    log = run.config.log
    settings = run.meta["config"]
    return MetricWriter(
        run.workdir, log.tensorboard, log.wandb_project, settings, run.start.step + 1
    )


def step_size(run):
    """(tokens, FLOPs) of a step; the backward pass has twice the FLOPs of the forward pass."""
    length = run.config.data.sequence_length
    tokens = run.config.train.batch_size * length
    return tokens, 3 * tokens * run.training.model.config.flops_per_token(length)


class Evaluation:
    """Evaluates on steps that are due, and writes and prints the results."""

    def __init__(self, run, writer, progress):
        self._run = run
        self._writer = writer
        self._progress = progress

    def is_due(self, step):
        return step == self._run.config.train.steps or step % self._run.config.eval.every == 0

    def make_up_for(self, step, state):
        """Evaluate a checkpoint whose run was killed between saving and evaluating it."""
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
    """Evaluate the last state, write report.json and print its tables."""
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
        # The tables are printed also if the disk is full.
        print_found(written["measures"])


if __name__ == "__main__":
    # This may start the program anew, so it comes first.
    huge_pages.enable()
    command_line.run(main, default_config="configs/erc.py:tiny")
