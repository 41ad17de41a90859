"""What a loss is: a record. Each loss is one file that ends with its record, `LOSS`.

A loss is unweighted; `objective.py` multiplies it by its weight. `Loss.kind` says what the loss
reads, and with it how `compute` is called and how often:

    "batch"       compute(options, output, batch, earlier_LE) -> scalar, for every micro-batch
    "layer"       compute(options, layer) -> array, in every layer, for every micro-batch
    "parameters"  compute(options, params, rng, model, shape_BT) -> scalar, once a step

    options       the loss's own, an instance of `Loss.options`
    output        what the model returns for the micro-batch: `model/transformer.py`, `Output`
    batch         the micro-batch: targets_BT, and mask_BT, which is True for tokens that count
    earlier_LE    assignments of the step's earlier micro-batches; None where there is one alone
    layer         what one layer has computed: `moe/layer.py`, `Observation`
    params, model the parameters and the module; rng is a key of this loss's own, or None
    shape_BT      of the whole step's batch; None where no step is known

Terms of a micro-batch are means over its unmasked tokens. Micro-batches are weighed by these.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("batch", "layer", "parameters")


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a loss that has none."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a loss needs of the router. Without it the loss is refused.

    capability: what the router has to say of itself, an attribute of its record that is true.
    purpose: what the loss does with it, as the predicate of a sentence about the loss.
    """

    capability: str
    purpose: str


def mean_over_layers(terms_L: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The mean of one number per layer."""
    return jnp.mean(terms_L)


@dataclasses.dataclass(frozen=True)
class Loss:
    """One loss.

    options: a frozen dataclass with the keys of the config block `losses.NAME` except `weight`. It
        checks itself: its BadInput begins with the name of the option, and `objective.py` puts
        `losses.NAME.` in front. Options with `decoupled=True` of a loss on parameters take the
        gradient from the parameters after the optimizer's update, and not through it.
    needs: None if every router will do.
    keep: for a "layer" loss, which values of the chosen experts it reads from `layer.kept`.
    over_layers: for a "layer" loss, the scalar of all layers: (terms, stacked over layers, and
        mask_BT) -> scalar.
    """

    kind: str
    compute: Callable[..., jax.Array]
    options: type[Any] = NoOptions
    needs: Needs | None = None
    keep: tuple[str, ...] = ()
    over_layers: Callable[[jax.Array, jax.Array], jax.Array] = mean_over_layers

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"the kind of a loss is {self.kind!r}; use one of {', '.join(KINDS)}")
