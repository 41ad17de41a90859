"""What the benchmarks measure of this code base: the compiled train step of a config, as `train.py` makes it.

The config is that of size `tiny` with the benchmark's sizes in place of its own, so that what a config derives from
sizes (AoE's rank, the K of shared experts and of top-p) is derived from these.
"""

import dataclasses
import functools
import importlib
import time
from unittest import mock

import jax
import numpy as np

from benchmarks import timed
from benchmarks.compiled.costs import memory
from configs import sizes
from moe_erc import sharding
from moe_erc.training.build import build as build_training


def configure(method, model):
    """The config of `configs/METHOD.py` (a dot for a folder), of the sizes `model`."""
    with mock.patch.dict(sizes.MODELS, tiny=tuple(model[field] for field in sizes.MODEL_FIELDS)):
        return importlib.import_module(f"configs.{method}").get_config("tiny")


def build(method, model, batch_size, length, changes=(), warm_up=0):
    """(run, facts) for `benchmarks.Subject`; `changes` of the model block come last, `warm_up` steps are done first."""
    compiled, state, batch, facts = compile_step(method, model, batch_size, length, changes)
    active = []

    def step():
        nonlocal state
        state, metrics = compiled(state, batch())
        jax.block_until_ready((state, metrics))
        active.append(metrics["router/experts_per_token"])

    def run(steps):
        seconds = timed(step)(steps)
        of_steps = np.mean(active, axis=1)  # since the warm-up
        facts["router/experts_per_token"] = float(of_steps.mean())
        facts["experts_per_token_range"] = (float(of_steps.min()), float(of_steps.max()))
        return seconds

    if warm_up:
        run(warm_up)
        active.clear()
    return run, facts


def compile_step(method, model, batch_size, length, changes=(), **options):
    """(the compiled step, its first state, a function that makes batches, facts); `options` are the compiler's."""
    config = configure(method, model)
    config.update_from_flattened_dict(dict(changes))
    config.train.update(batch_size=batch_size, micro_batches=1)
    config.data.sequence_length = length
    config.eval.batch_size = batch_size
    sharding.use_cpu_cores(batch_size, config.model.experts)
    training = build_training(config)
    model_config = training.model.config
    state = training.create_state()
    shape_BT = (batch_size, length)
    batch = functools.partial(
        random_batch, training.mesh, np.random.default_rng(0), model_config.vocab_size, shape_BT
    )
    start = time.perf_counter()
    compiled = training.step.lower(state, batch()).compile(options or None)
    facts = {"compile_s": time.perf_counter() - start} | describe(model_config, length) | {
        "temp_bytes": memory(compiled).temporaries,  # of one device, as the next
        "allocated_bytes": memory(compiled).allocated,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }  # fmt: skip
    return compiled, state, batch, facts


def random_batch(mesh, generator, vocabulary, shape):
    """Random tokens on their devices, of (sequences, length); nothing is masked."""
    batch_size, length = shape
    tokens = generator.integers(vocabulary, size=(batch_size, length + 1), dtype=np.int32)
    mask_BT = np.ones(shape, bool)
    return sharding.put_batch(mesh, {"inputs_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "mask_BT": mask_BT})


def describe(model_config, length):
    """The sizes, and what follows from them; the FLOPs are of a token, forward and backward."""
    router = model_config.router
    sizes = dataclasses.asdict(model_config)
    sizes |= {"router": router.name, "gate_rank": router.gate_rank(model_config)}
    return {
        "model": sizes,
        "parameters": model_config.parameters(),
        "active_parameters": model_config.active_parameters(),
        "flops_per_token": 3 * model_config.flops_per_token(length),
    }
