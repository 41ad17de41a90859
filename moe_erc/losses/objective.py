"""Names -> terms -> weighted sum: the only place where a loss meets its weight.

A term reads one micro-batch (the model's output on it), or what one layer makes of it (reduced before layers are
stacked), or the parameters alone; the latter are computed once per optimizer step. A loss of weight 0 is not computed.
Adding a loss is one file beside this one, one line below and its weight in a config.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_erc.checks import BadInput
from moe_erc.losses.competition import competition, over_competing_layers
from moe_erc.losses.erc import check_options, erc_loss
from moe_erc.losses.expert_orthogonality import output_overlap, routing_variance
from moe_erc.losses.language_model import language_model, token_losses
from moe_erc.losses.load_balance import load, load_balance
from moe_erc.losses.precision import PRECISIONS, resolve
from moe_erc.losses.router_orthogonality import router_orthogonality
from moe_erc.losses.router_z import router_z
from moe_erc.losses.sharded_erc import sharded_erc_loss
from moe_erc.losses.simbal import simbal
from moe_erc.losses.synergistic import chosen_probability, path_coupling, specialization
from moe_erc.losses.top_p import routing_entropy
from moe_erc.random_keys import named


def _lm(output, batch, earlier_LE, *, chunk):
    losses_BT = token_losses(output.x_BTD, output.head_VD, batch["targets_BT"], chunk)
    return language_model(losses_BT, batch["mask_BT"])


def _load_balance(output, batch, earlier_LE, *, scope):
    assignments_LE = output.routing.assignments_E
    if scope == "step" and earlier_LE is not None:
        assignments_LE += earlier_LE
    return load_balance(load(assignments_LE), output.routing.probability_E)


def _check_scope(*, scope):
    if scope not in ("micro_batch", "step"):
        raise BadInput(f"scope is {scope!r}; use one of micro_batch, step")


def _check_erc(*, precision="auto", **options):
    check_options(**options)
    if precision not in ("auto", *PRECISIONS):
        raise BadInput(f"precision is {precision!r}; use one of auto, {', '.join(PRECISIONS)}")


def _erc(params, rng, model, **options):
    moe = params["layers"]["moe"] | {"router": model.router_rows(params)}
    return erc_loss(moe, rng, **options) if model.mesh is None else sharded_erc_loss(moe, rng, model.mesh, **options)


def _competition(layer):
    active, competitors_BTE = layer.auxiliary
    chosen = layer.scores.probabilities_BTE, competitors_BTE, layer.routing.experts_BTK, layer.mask_BT
    return jnp.stack([jnp.where(active, competition(*chosen), 0), active])


def _routing_variance(layer):
    return routing_variance(layer.score_alone().probabilities_BTE, layer.routing.experts_BTK, layer.mask_BT)


class LayerTerm(NamedTuple):
    """A term of what one layer observes; `keep` names what of the experts is to be kept for it."""

    observe: Callable
    keep: tuple[str, ...] = ()
    reduce: Callable = lambda terms_L, mask_BT: jnp.mean(terms_L)


BATCH_TERMS = {
    "lm": _lm,
    "load_balance": _load_balance,
    "router_z": lambda output, batch, _: router_z(output.routing.logsumexp2),
}
LAYER_TERMS = {
    "competition": LayerTerm(_competition, reduce=lambda terms_L2, mask_BT: over_competing_layers(terms_L2)),
    "output_overlap": LayerTerm(lambda layer: output_overlap(layer.kept["output"], layer.chosen_BTK), ("output",)),
    "path_coupling": LayerTerm(
        lambda layer: chosen_probability(layer.scores.probabilities_BTE, layer.routing.experts_BTK),
        reduce=path_coupling,
    ),
    "routing_entropy": LayerTerm(lambda layer: routing_entropy(layer.scores.probabilities_BTE, layer.mask_BT)),
    "routing_variance": LayerTerm(_routing_variance),
    "specialization": LayerTerm(lambda layer: specialization(layer.kept["hidden"], layer.chosen_BTK), ("hidden",)),
}
PARAMETER_TERMS = {
    "erc": _erc,
    "router_orthogonality": lambda params, *_, decoupled: router_orthogonality(params["layers"]["moe"]["router"]),
    "simbal": lambda params, *_: simbal(params["layers"]["moe"]["router"]),
}
CHECKS = {"load_balance": _check_scope, "erc": _check_erc}  # of a term's options, before anything is compiled
NEEDS = {  # term -> (what the router has to say of itself, what it is for)
    "erc": ("has_rows", "couples router rows with experts"),
    "router_orthogonality": ("is_linear", "reads one router row of the model's width for every expert"),
    "simbal": ("is_linear", "reads one router row of the model's width for every expert"),
    "routing_variance": ("has_probabilities", "reads probabilities"),
    "routing_entropy": ("has_probabilities", "reads probabilities"),
    "path_coupling": ("has_probabilities", "reads probabilities"),
    "router_z": ("has_probabilities", "reads the logits of probabilities"),
    "competition": ("competes", "learns from experts that compete"),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """`losses` maps a term's name to {"weight": number, **options of the term}; see `configs/base.py`.

    model: the Transformer; of it `config`, `mesh`, where the parameters lie, and `router_rows(params)` are read.
    """

    losses: Mapping
    model: Any

    def __post_init__(self):
        known = [*BATCH_TERMS, *LAYER_TERMS, *PARAMETER_TERMS]
        for name, options in self.losses.items():
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise BadInput(f"losses.{name}: no such loss; the nearest is {nearest!r} of {', '.join(known)}")
            if not 0 <= options["weight"] < float("inf"):
                raise BadInput(f"losses.{name}.weight: {options['weight']} is not a finite number >= 0")
            if name in CHECKS:
                try:
                    CHECKS[name](**_without_weight(options))
                except BadInput as error:
                    raise BadInput(f"losses.{name}: {error}") from None
            if name in NEEDS and options["weight"] > 0 and not getattr(self.model.config.router, NEEDS[name][0]):
                raise BadInput(
                    f"losses.{name}.weight: {options['weight']}, but the loss {NEEDS[name][1]}, and router "
                    f"{self.model.config.router.name!r} has none; set it to 0 or use another model.router"
                )

    @property
    def observers(self):
        """(name, function of a layer, what it keeps) for the terms of single layers."""
        return tuple((name, *LAYER_TERMS[name][:2]) for name, _ in self._active(LAYER_TERMS))

    def of_batch(self, output, batch, earlier_LE):
        """Terms of one micro-batch; `earlier_LE` counts the assignments of the step's earlier ones, None: it is alone.

        They are means over its unmasked tokens, and it is by these that those of several micro-batches are weighed.
        """
        return {
            name: BATCH_TERMS[name](output, batch, earlier_LE, **options) for name, options in self._active(BATCH_TERMS)
        } | {
            name: LAYER_TERMS[name].reduce(output.observed[name], batch["mask_BT"])
            for name, _ in self._active(LAYER_TERMS)
        }

    def of_parameters(self, params, rng, shape_BT=None):
        """Terms that depend on the parameters alone, each with a key of its own, named as the loss is.

        shape_BT: of the whole step's batch, if there is one: what precision of ERC is worth its cost depends on it.
        """
        terms = {}
        for name, options in self._active(PARAMETER_TERMS):
            key = None if rng is None else named(rng, f"losses.{name}")
            if "precision" in options:
                config = self.model.config
                options["precision"] = resolve(options["precision"], config, options["activation"], shape_BT)
            terms[name] = PARAMETER_TERMS[name](params, key, self.model, **options)
        return terms

    def total(self, terms, scales):
        """Their weighted sum; `scales` multiplies the weights that a controller moves."""
        weights = {name: self.losses[name]["weight"] for name in terms if name not in self._decoupled}
        return sum((weight * scales.get(name, 1) * terms[name] for name, weight in weights.items()), start=0.0)

    def decouple(self, params):
        """Parameters less weight times gradient of the losses that the optimizer is to know nothing of."""
        for name in self._decoupled:
            options = _without_weight(self.losses[name])
            gradients = jax.grad(lambda p: PARAMETER_TERMS[name](p, None, self.model, **options))(params)  # noqa: B023
            params = jax.tree.map(lambda p, g: p - self.losses[name]["weight"] * g, params, gradients)  # noqa: B023
        return params

    @property
    def _decoupled(self):
        return [name for name, options in self._active(PARAMETER_TERMS) if ("decoupled", True) in options.items()]

    def _active(self, terms):
        for name, options in self.losses.items():
            if name in terms and options["weight"] > 0:
                yield name, _without_weight(options)


def _without_weight(options):
    return {key: value for key, value in options.items() if key != "weight"}
