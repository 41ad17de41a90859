"""Trains a Mixture-of-Experts language model.

    python train.py                                             configs/erc.py:tiny into runs/erc-tiny, minutes on a CPU
    python train.py --config=configs/vanilla.py:small --config.optimizer.learning_rate=3e-4 --workdir=DIR

Started again on the same workdir, a directory or gs://bucket/path, it goes on where it stopped, bit for bit, on any
number of processes (docs/launch.md); exit codes: docs/reliability.md.
"""

import functools
import sys

from absl import flags

from moe_erc import command_line, compilation_cache, paths, processes, sharding
from moe_erc.analysis.diagnosis import Diagnosis, headline, summarize
from moe_erc.analysis.report import print_report, write_report
from moe_erc.data import text
from moe_erc.evaluation.generate import Generator, Sampling
from moe_erc.evaluation.ngram import ngram_losses
from moe_erc.evaluation.perplexity import Perplexity, validation_metrics
from moe_erc.evaluation.tasks import TaskScores, load_tasks, task_metrics
from moe_erc.hf import olmoe, tokenizer_files
from moe_erc.losses.language_model import token_losses
from moe_erc.losses.objective import Objective
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training.checkpoint import Checkpoints, holds_steps, prepare_directory
from moe_erc.training.failure import EXPECTED, LastWords
from moe_erc.training.guard import GuardConfig
from moe_erc.training.identity import check_same_run
from moe_erc.training.interrupt import StopRequest
from moe_erc.training.metrics import MetricWriter, check_package
from moe_erc.training.optimizer import OptimizerConfig, make_optimizer
from moe_erc.training.progress import Progress
from moe_erc.training.state import abstract_state, create_state, initializer, shardings
from moe_erc.training.step import make_train_step, step_gradients
from moe_erc.training.trace import Trace

WORKDIR = flags.DEFINE_string("workdir", None, "everything of the run goes here; runs/CONFIG-SIZE if not given")


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
        model_config, data_config = ModelConfig(**config.model), text.DataConfig(**config.data)
        optimizer = make_optimizer(OptimizerConfig(**config.optimizer), steps)
        guard, micro_batches = GuardConfig(**config.guard), config.train.micro_batches
        sharding.use_cpu_cores(batch_size // max(micro_batches, 1), config.eval.batch_size, model_config.experts)
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.expert)
        model = Transformer(model_config, mesh)
        objective = Objective(config.losses.to_dict(), model)
        sharding.check(mesh, model_config, batch_size, micro_batches, config.eval.batch_size)
        processes.mute_all_but_first()
        print(f"{workdir}: {model_config.parameters():,} parameters, {model_config.active_parameters():,} active")

        # ---------------------------------------------------------------- data
        with processes.first():  # it fills the cache
            corpus = text.prepare(data_config)
        model_config.check_vocabulary(corpus.tokenizer.vocab_size)

        # ---------------------------------------------------------------- evaluators
        put, put_whole = (functools.partial(put, mesh) for put in (sharding.put_batch, sharding.put_whole_batch))
        losses, rows = functools.partial(token_losses, chunk=config.losses.lm.chunk), (config.eval.batch_size, length)
        perplexity = Perplexity(model, corpus, losses, put_whole, rows)
        diagnosis = Diagnosis(model, perplexity.probe(mesh.size))
        generator = Generator(model, corpus.tokenizer)
        sampling = Sampling(config.eval.sample_tokens, config.eval.temperature)
        tasks = load_tasks(config.eval.tasks, config.eval.task_dir)
        task_scores = TaskScores(tasks, config.eval.task_limit, model, corpus.tokenizer, rows)

        # ---------------------------------------------------------------- what the run is, and where it stopped
        data = {"tokenizer": corpus.tokenizer.identity, "corpus": corpus.identity}
        identity = {"model": model_config.identity(), "data": data, "optimizer": {"name": config.optimizer.name}}
        identity |= {"seed": config.seed, "init_from": config.init_from}
        init = initializer(model, optimizer, config.seed)
        shapes = abstract_state(init, mesh)
        source = None if holds_steps(workdir / "checkpoints") else config.init_from
        given = source and olmoe.open_olmoe(source, model_config, shapes.params)
        with processes.first():  # it clears up what a killed run left, and keeps other runs out while this one lasts
            _lock = prepare_directory(workdir / "checkpoints")
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        start = checkpoints.newest_intact()
        meta = identity | {"config": config.to_dict()}
        processes.agree(meta | {"checkpoint": start})
        check_same_run(checkpoints.read_meta() if start else identity, identity)
        sharding.print_plan(shapes)

    # -------------------------------------------------------------------- state and step
    state = checkpoints.restore(shapes)[0] if start else create_state(init, shapes, given.read() if given else None)
    train_step = make_train_step(model, objective, optimizer, micro_batches, shardings(shapes), guard)

    def evaluate(step, weights):
        with progress.paused():
            found, measured = perplexity.run(weights, config.eval.windows), diagnosis.run(weights)
            reached = task_scores.run(weights)
            writer.write(step, validation_metrics(found) | summarize(measured) | task_metrics(reached))
            writer.flush()
            writer.check()
            print(f"step {step}: validation {found['loss']:.3f}, {headline(measured)}")
            if prompt := config.eval.prompt:
                print(repr(prompt + generator.run(weights, [prompt], sampling)[0]))

    def evaluated(step):
        return step == steps or step % config.eval.every == 0

    # -------------------------------------------------------------------- loop
    step_size = (batch_size * length, 3 * model_config.flops_per_token(length) * batch_size * length)
    batches_from = functools.partial(text.train_batches, corpus, length, batch_size, config.seed)
    batches = batches_from(start, sharding.local_rows(mesh, batch_size))
    trace = Trace(workdir / "profile", config.train.profile_step, (start, steps))
    last_words = LastWords(workdir, step_gradients(model, objective, micro_batches), batches_from)
    try:
        writer = MetricWriter(workdir, config.log.tensorboard, config.log.wandb_project, meta["config"], start + 1)
        progress = Progress(writer, config.log.every, (start, steps), step_size, guard)
        with checkpoints, writer, progress, StopRequest() as stop:
            if start and evaluated(start) and not writer.holds(start, "validation/mean"):
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
                    checkpoints.save(step, state, meta)
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
    validation = perplexity.run(state.weights, config.eval.report_windows)
    report = {"validation": validation, "baselines": ngram_losses(corpus)} | diagnosis.run(state.weights)
    try:
        write_report(workdir / "report.json", report)
    except OSError as error:
        sys.exit(last_words.say(error, state, checkpoints.newest))
    finally:  # a full disk leaves the tables
        print_report(report)


if __name__ == "__main__":
    command_line.run(main, default_config="configs/erc.py:tiny")
