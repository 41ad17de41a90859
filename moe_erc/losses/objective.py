"""From the losses' names to their terms to the weighted sum: the only place that knows weights.

The losses are the records of `losses/__init__.py`; what a loss reads is in `losses/base.py`. A loss
of weight 0 is not computed.

A loss of parameters may have `weight_at_init` above 0. Its weight is then multiplied by

    weight_at_init / (its value at step 0)

so that the weighted term begins at weight * weight_at_init, whatever the size of the loss. The
factor is kept in the state of the run.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from moe_erc.checks import BadInput, Range, in_range, nearest
from moe_erc.losses import LOSSES
from moe_erc.losses.base import Loss
from moe_erc.numerics import divide
from moe_erc.random_keys import named

AT_INIT = "weight_at_init"
WEIGHTS = ("weight", AT_INIT)  # of a block, beside the options of the loss


@dataclasses.dataclass(frozen=True)
class Objective:
    """`losses` maps a loss's name to {"weight": number, **its options}; see `configs/base.py`.

    model: the Transformer; of it `config`, `mesh`, where the parameters lie, and
        `router_rows(params)` are read.

    Raises:
      BadInput: for a loss or an option that does not exist or is out of range, and for a loss whose
        weight is above 0 beside a router that lacks what the loss reads.
    """

    losses: Mapping[str, Mapping[str, Any]]
    model: Any

    def __post_init__(self):
        for name, block in self.losses.items():
            _check_name(name)
            _check_weights(name, block)
            _options(name, block)
            _check_router(name, block["weight"], self.model.config.router)

    @property
    def observers(self) -> tuple:
        """(name, function of a layer, what it needs kept) for the losses of single layers."""
        observers = []
        for name, loss, options in self._active("layer"):
            observers.append((name, functools.partial(loss.compute, options), loss.keep))
        return tuple(observers)

    def of_batch(self, output: Any, batch: Mapping, earlier_LE: jax.Array | None) -> dict:
        """Terms of one micro-batch, {name: scalar}, not weighted: means over its unmasked tokens.

        earlier_LE: assignments of the step's earlier micro-batches; None where it is alone. The
        terms of several micro-batches are to be weighed by their unmasked tokens.
        """
        terms = {}
        for name, loss, options in self._active("batch"):
            terms[name] = loss.compute(options, output, batch, earlier_LE)
        for name, loss, _ in self._active("layer"):
            terms[name] = loss.over_layers(output.observed[name], batch["mask_BT"])
        return terms

    def of_parameters(
        self, params: Any, rng: jax.Array | None, shape_BT: tuple[int, int] | None = None
    ) -> dict:
        """Terms of the parameters alone, {name: scalar}, not weighted.

        Each loss has a key of its own, named as the loss is.

        shape_BT: that of the whole step's batch, if there is one. The precision of ERC depends on
            it where a config says "auto".
        """
        terms = {}
        for name, loss, options in self._active("parameters"):
            key = None if rng is None else named(rng, f"losses.{name}")
            terms[name] = loss.compute(options, params, key, self.model, shape_BT)
        return terms

    def scales_at_init(self, params: Any, rng: jax.Array) -> dict[str, jax.Array]:
        """{name: weight_at_init over the value at step 0} of the losses that have it, scalars.

        The factor is 0 for a loss that is 0 at step 0: `check_scales` refuses it.

        params: those of step 0.
        rng: the key of step 0.
        """
        names = self._weighed_at_init()
        terms = self.of_parameters(params, rng) if names else {}
        return {name: divide(self.losses[name][AT_INIT], terms[name]) for name in names}

    def check_scales(self, scales: Mapping[str, jax.Array]) -> None:
        """BadInput for a loss that was 0 at step 0, or not finite, and is to be weighed by that."""
        for name in self._weighed_at_init():
            scale = float(scales[name])
            if not 0 < scale < float("inf"):
                raise BadInput(
                    f"losses.{name}.{AT_INIT}: {self.losses[name][AT_INIT]}, but the loss of "
                    f"step 0 gives the factor {scale}; set it to 0 and give a losses.{name}.weight"
                )

    def _weighed_at_init(self):
        return [name for name, _, _ in self._active("parameters") if self.losses[name].get(AT_INIT)]

    def total(self, terms: Mapping, scales: Mapping) -> jax.Array:
        """The weighted sum; `scales` multiplies the weights that a controller moves."""
        decoupled = [name for name, _, _ in self._decoupled()]
        total = 0.0
        for name, term in terms.items():
            if name not in decoupled:
                total += self.losses[name]["weight"] * scales.get(name, 1) * term
        return total

    def decouple(self, params: Any) -> Any:
        """Parameters minus weight times gradient of the losses that bypass the optimizer."""
        for name, loss, options in self._decoupled():
            value = functools.partial(_of_params, loss, options, self.model)
            descend = functools.partial(_descend, self.losses[name]["weight"])
            params = jax.tree.map(descend, params, jax.grad(value)(params))
        return params

    def _decoupled(self):
        for name, loss, options in self._active("parameters"):
            if getattr(options, "decoupled", False):
                yield name, loss, options

    def _active(self, kind) -> Iterator[tuple[str, Loss, Any]]:
        """(name, record, options) of the losses of that kind whose weight is above 0."""
        for name, block in self.losses.items():
            if LOSSES[name].kind == kind and block["weight"] > 0:
                yield name, LOSSES[name], _options(name, block)


def _of_params(loss, options, model, params):
    """The loss as a function of its last argument; it draws nothing and knows no step."""
    return loss.compute(options, params, None, model, None)


def _descend(weight, parameter, gradient):
    return parameter - weight * gradient


def _check_name(name):
    if name not in LOSSES:
        raise BadInput(
            f"losses.{name}: no such loss; "
            f"the nearest is {nearest(name, LOSSES)!r} of {', '.join(LOSSES)}"
        )


def _check_weights(name, block):
    for key in WEIGHTS:
        in_range(f"losses.{name}.{key}", block.get(key, 0), Range(least=0))
    if block.get(AT_INIT) and LOSSES[name].kind != "parameters":
        raise BadInput(
            f"losses.{name}.{AT_INIT}: {block[AT_INIT]}, but the loss reads a batch; set 0"
        )


def _options(name, block):
    """The options of a block as the loss's own record, which checks them."""
    kind = LOSSES[name].options
    known = [field.name for field in dataclasses.fields(kind)]
    given = {key: value for key, value in block.items() if key not in WEIGHTS}
    for key in given:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise BadInput(f"losses.{name}.{key}: no such option of this loss; {has}")
    for key in known:
        if key not in given:
            raise BadInput(f"losses.{name}.{key}: the option is missing; give it a value")
    try:
        return kind(**given)
    except BadInput as error:
        raise BadInput(f"losses.{name}.{error}") from None


def _check_router(name, weight, router):
    """Refuses a loss beside a router that lacks what the loss reads."""
    needs = LOSSES[name].needs
    if needs is None or weight == 0 or getattr(router, needs.capability):
        return
    raise BadInput(
        f"losses.{name}.weight: {weight}, but the loss {needs.purpose}, and router "
        f"{router.name!r} has none; set it to 0 or use another model.router"
    )
