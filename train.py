"""Trains a Mixture-of-Experts language model.

    python train.py                                             configs/erc.py:tiny into runs/erc-tiny, minutes on a CPU
    python train.py --config=configs/vanilla.py:small --config.optimizer.learning_rate=3e-4 --workdir=DIR

Started again on the same workdir, a directory or gs://bucket/path, it goes on where it stopped, bit for bit, on any
number of processes (docs/launch.md); exit codes: docs/reliability.md. On a CPU it asks for huge pages, which
GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns off.
"""

import functools
import sys

from absl import flags

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
from moe_erc.losses.objective import Objective
from moe_erc.measures import validation
from moe_erc.measures.registry import curves
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.checkpoint import Checkpoints, holds_steps, prepare_directory
from moe_erc.training.environment import environment
from moe_erc.training.failure import EXPECTED, LastWords
from moe_erc.training.guard import GuardConfig
from moe_erc.training.interrupt import StopRequest
from moe_erc.training.metrics import MetricWriter, check_package
from moe_erc.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer, updates_done
from moe_erc.training.progress import Progress
from moe_erc.training.state import abstract_state, create_state, initializer, shardings
from moe_erc.training.step import make_train_step, step_gradients
from moe_erc.training.trace import Trace

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Everything of the run goes here, as --workdir=runs/mine; runs/CONFIG-SIZE if not given"
)


def main(_):
    config = flags.FLAGS.config
    with command_line.refusing_bad_input(), processes.ending_together():
        workdir = paths.absolute(WORKDIR.value or f"runs/{command_line.config_name()}")
        # ---------------------------------------------------------------- configuration and devices
        processes.initialize()
        compilation_cache.enable()
        command_line.check_numbers(config)
        check_package(config.log.wandb_project)
        steps, length, batch_size = config.train.steps, config.data.sequence_length, config.train.batch_size
        config.init_from = config.init_from and str(paths.local(config.init_from))
        config.data.tokenizer = tokenizer_files.tokenizer_of(config.init_from, config.data.tokenizer)
        if config.data.tokenizer != tokenizer_files.BYTES:  # a run is evaluated in any directory
            config.data.tokenizer = str(paths.local(config.data.tokenizer))
        model_config, data_config = ModelConfig.of(config), text.DataConfig(**config.data)
        optimizer = make_optimizer(OptimizerConfig(**config.optimizer), steps, model_config)
        guard, micro_batches = GuardConfig(**config.guard), config.train.micro_batches
        sharding.use_cpu_cores(batch_size // max(micro_batches, 1), config.eval.batch_size, model_config.experts)
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.expert)
        model = Transformer(model_config, mesh)
        objective = Objective(config.losses.to_dict(), model)
        sharding.check(mesh, model_config, batch_size, micro_batches, config.eval.batch_size)
        model_config.check_assignments(batch_size, length)
        processes.mute_all_but_first()
        print(f"{workdir}: {model_config.parameters():,} parameters, {model_config.active_parameters():,} active")

        # ---------------------------------------------------------------- where it stopped
        # The checkpoint comes before the text: a run that goes on reads the text that it was begun with.
        resuming, settings = holds_steps(workdir / "checkpoints"), config.to_dict()
        processes.agree({"checkpoint": resuming})
        checkpoints, start, earlier = None, 0, resume.Earlier()
        if resuming:
            _lock, checkpoints = open_checkpoints(workdir, config.checkpoint.keep)
            start = checkpoints.newest_intact()
        if start:
            earlier = resume.read(checkpoints.read_meta(start), start, base.get_config().to_dict())
        earlier = resume.compare(earlier, settings)
        if start > steps:
            print(f"train.steps: {steps} are fewer than the {start} that are done: nothing is trained")

        # ---------------------------------------------------------------- data
        finished = read_report(workdir / "report.json", start) if start >= steps else None
        with processes.first():  # it fills the cache
            try:
                corpus, other_text = resume.open_text(earlier, data_config, config.resume.allow)
            except resume.TextGone as gone:
                if not finished:
                    raise
                print(f"{gone}; the report of step {start} is the one in report.json")
                corpus = None
        if corpus is None:
            print_found(finished["measures"])
            return
        model_config.check_vocabulary(corpus.tokenizer.vocab_size)
        print("\n".join(text.describe(corpus, length, steps * batch_size)))
        if not data_config.attend_across_documents:
            print(f"attention within documents: {text.documents_per_window(corpus, length):.1f} in a window on average")

        # ---------------------------------------------------------------- evaluators
        put, put_whole = (functools.partial(put, mesh) for put in (sharding.put_batch, sharding.put_whole_batch))
        losses, rows = functools.partial(token_losses, chunk=config.losses.lm.chunk), (config.eval.batch_size, length)
        perplexity = Perplexity(model, corpus, losses, put_whole, rows, config.eval.windows)
        diagnosis = Diagnosis(model, perplexity.probe(mesh.size))
        sampling = Sampling(config.eval.sample_tokens, config.eval.temperature)
        sample = Sample(Generator(model, corpus.tokenizer), config.eval.prompt, sampling)
        tasks = load_tasks(config.eval.tasks, config.eval.task_dir)
        task_scores = TaskScores(tasks, config.eval.task_limit, model, corpus.tokenizer, rows)
        while_training = [perplexity, diagnosis, task_scores, sample]
        at_the_end = [perplexity.on(config.eval.report_windows), diagnosis]

        # ---------------------------------------------------------------- what the run is
        init = initializer(model, optimizer, config.seed, objective)
        shapes = abstract_state(init, model)
        resume.check_state(earlier, model, shapes)
        source = None if start else config.init_from
        given = source and olmoe.open_olmoe(source, model_config, shapes.params)
        if not resuming:  # what is refused leaves no directory
            _lock, checkpoints = open_checkpoints(workdir, config.checkpoint.keep)
        changes = [*earlier.changes, *other_text]
        resume.print_changes(earlier, changes)
        meta = {"config": settings, "data": corpus.record, "history": earlier.history_with(changes)}
        processes.agree({"config": settings, "data": corpus.identity, "checkpoint": [start, earlier.rows]})
        sharding.print_plan(shapes)

    # -------------------------------------------------------------------- state and step
    state = checkpoints.restore(shapes)[0] if start else create_state(init, shapes, given.read() if given else None)
    with command_line.refusing_bad_input():
        objective.check_scales(state.loss_scales)
    schedule = learning_rate_schedule(OptimizerConfig(**config.optimizer), steps)
    train_step = make_train_step(model, objective, optimizer, micro_batches, shardings(shapes), guard, schedule)
    resume.print_schedule(earlier, settings, int(updates_done(state.opt_state)))

    def evaluate(step, weights):
        with progress.paused():
            found = evaluators.evaluate(while_training, weights)
            writer.write(step, curves(found))
            writer.flush()
            writer.check()
            print(f"step {step}: {headline(found)}")
            if config.eval.prompt:
                print(repr(found[validation.SAMPLE.of(config.eval.prompt).key]))

    def evaluated(step):
        return step == steps or step % config.eval.every == 0

    # -------------------------------------------------------------------- loop
    validation_loss = validation.LOSS.of(validation.MEAN).key
    step_size = (batch_size * length, 3 * model_config.flops_per_token(length) * batch_size * length)

    def batches_from(step, rows=None):
        start_row = earlier.row_at(step, batch_size)
        return text.train_batches(corpus, length, batch_size, config.seed, start_row=start_row, rows=rows)

    batches = batches_from(start, sharding.local_rows(mesh, batch_size))
    trace = Trace(workdir / "profile", config.train.profile_step, (start, steps))
    last_words = LastWords(workdir, step_gradients(model, objective, micro_batches), batches_from)
    try:
        writer = MetricWriter(workdir, config.log.tensorboard, config.log.wandb_project, settings, start + 1)
        progress = Progress(writer, config.log.every, (start, steps), step_size, guard)
        with checkpoints, writer, progress, StopRequest() as stop:
            if start and evaluated(start) and not writer.holds(start, validation_loss):
                evaluate(start, state.weights)  # the run was killed between this checkpoint and its evaluation
            for step in range(start + 1, steps + 1):
                trace.before(step)
                state, metrics = train_step(state, put(next(batches)))
                progress.add(step, metrics)
                leaving = step == steps or stop.reached(step)
                saving = leaving or step % config.checkpoint.every == 0
                if saving or step % config.log.every == 0:
                    progress.flush()
                trace.after(step)
                if saving:  # before anything that may fail: evaluators, and what writers of logs have met with
                    writer.flush()
                    checkpoints.save(step, state, meta | {"rows": earlier.row_at(step, batch_size)})
                writer.check()
                if evaluated(step) and (step == steps or not leaving):  # who leaves early is evaluated when it returns
                    evaluate(step, state.weights)
                if leaving:
                    break
    except EXPECTED as error:
        sys.exit(last_words.say(error, state, checkpoints.newest))
    if stop and step < steps:
        sys.exit(128 + stop.signal)

    # -------------------------------------------------------------------- report
    found = ngram_losses(corpus) | evaluators.evaluate(at_the_end, state.weights)
    report = make_report(max(start, steps), resume.history_lines(meta["history"]), found)
    report |= {"environment": environment(mesh), "corpus": corpus.identity}
    try:
        write_report(workdir / "report.json", report)
    except OSError as error:
        sys.exit(last_words.say(error, state, checkpoints.newest))
    finally:  # a full disk leaves the tables
        print_found(report["measures"])


def open_checkpoints(workdir, keep):
    """(lock, checkpoints) of a writer: it clears up what a killed run left, and keeps other runs out while it lasts."""
    with processes.first():
        lock = prepare_directory(workdir / "checkpoints")
    return lock, Checkpoints(workdir / "checkpoints", keep)


if __name__ == "__main__":
    huge_pages.enable()  # may start the program anew
    command_line.run(main, default_config="configs/erc.py:tiny")
