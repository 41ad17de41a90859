"""What a configuration says of training, built and checked by one function.

    training = build(config)
    state = training.create_state()
    state, metrics = training.step(state, sharding.put_batch(training.mesh, batch))

`train.py`, the benchmarks, the tests and the notebooks call it, so that all of them train what the
configuration means. Nothing is compiled before the first step, and what cannot be built is refused
before.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from moe_erc import sharding
from moe_erc.losses.objective import Objective
from moe_erc.model.config import ModelConfig
from moe_erc.model.transformer import Transformer
from moe_erc.training import state as states
from moe_erc.training.guard import GuardConfig
from moe_erc.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from moe_erc.training.step import make_train_step, step_gradients


@dataclasses.dataclass(frozen=True)
class Training:
    """The parts of a run. Equal configurations on equal meshes give equal parts."""

    mesh: Mesh
    model: Transformer
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # of the learning rate, by the number of updates
    guard: GuardConfig
    micro_batches: int
    seed: int

    @functools.cached_property
    def initialize(self) -> Callable[..., states.TrainState]:
        """(params=None) -> the state of step 0; parameters that are not given are drawn."""
        return states.initializer(self.model, self.optimizer, self.seed, self.objective)

    @functools.cached_property
    def abstract_state(self) -> states.TrainState:
        """Shapes, types and shardings of the state, without a state."""
        return states.abstract_state(self.initialize, self.model)

    def create_state(self, params: Any = None) -> states.TrainState:
        """The state of step 0 on its devices, with `params` in place of the drawn ones.

        A tree of some parameters leaves the others drawn.
        """
        return states.create_state(self.initialize, self.abstract_state, params)

    @functools.cached_property
    def step(self) -> Callable:
        """(state, batch) -> (state, metrics), jitted.

        It takes the memory of the state it is given.
        """
        return make_train_step(
            self.model,
            self.objective,
            self.optimizer,
            self.micro_batches,
            states.shardings(self.abstract_state),
            self.guard,
            self.schedule,
        )

    @functools.cached_property
    def gradients(self) -> Callable:
        """(state, batch) -> (gradients, terms, counts) of a step, before anything is changed."""
        return step_gradients(self.model, self.objective, self.micro_batches)


def build(config: Any, devices: Sequence[jax.Device] | None = None) -> Training:
    """What `config`, of the form of `configs/base.py`, says of training.

    devices: to lay the mesh over; all there are, if not given. They need not be attached.

    Raises:
      BadInput: for a value out of its range, parts that do not fit together, and sizes that the
        mesh cannot split.
    """
    batch_size = config.train.batch_size
    micro_batches = config.train.micro_batches
    model_config = ModelConfig.of(config)
    optimizer_config = OptimizerConfig(**config.optimizer)
    guard = GuardConfig(**config.guard)
    schedule = learning_rate_schedule(optimizer_config, config.train.steps)
    optimizer = make_optimizer(optimizer_config, config.train.steps, model_config)

    mesh = sharding.make_mesh(config.mesh.data, config.mesh.expert, devices)
    model = Transformer(model_config, mesh)
    objective = Objective(config.losses.to_dict(), model)
    sharding.check(mesh, model_config, batch_size, micro_batches, config.eval.batch_size)
    model_config.check_assignments(batch_size, config.data.sequence_length)
    return Training(mesh, model, objective, optimizer, schedule, guard, micro_batches, config.seed)
