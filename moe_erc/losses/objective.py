"""Names -> terms -> weighted sum: the only place where a loss meets its weight.

A term reads either one micro-batch (the model's output on it) or the parameters alone; the latter are computed once per
optimizer step. A loss of weight 0 is not computed. Adding a loss is one file beside this one and one line below.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from moe_erc.losses.erc import check_options, erc_loss
from moe_erc.losses.language_model import language_model, token_losses
from moe_erc.losses.load_balance import load_balance
from moe_erc.losses.router_z import router_z
from moe_erc.losses.sharded_erc import sharded_erc_loss


def _lm(output, batch, earlier_load_LE, *, chunk):
    losses_BT = token_losses(output.x_BTD, output.head_VD, batch["targets_BT"], chunk)
    return language_model(losses_BT, batch["mask_BT"])


def _load_balance(output, batch, earlier_load_LE, *, scope):
    load_LE = output.routing.load_E
    if scope == "step":
        load_LE += earlier_load_LE
        load_LE /= load_LE.sum(axis=-1, keepdims=True)
    return load_balance(load_LE, output.routing.probability_E)


def _router_z(output, batch, earlier_load_LE):
    return router_z(output.routing.logsumexp2)


def _check_scope(*, scope):
    if scope not in ("micro_batch", "step"):
        raise ValueError(f"scope is {scope!r}; use one of micro_batch, step")


def _erc(params, rng, mesh, **options):
    moe = params["layers"]["moe"]
    return erc_loss(moe, rng, **options) if mesh is None else sharded_erc_loss(moe, rng, mesh, **options)


BATCH_TERMS = {"lm": _lm, "load_balance": _load_balance, "router_z": _router_z}
PARAMETER_TERMS = {"erc": _erc}
CHECKS = {"load_balance": _check_scope, "erc": check_options}  # of a term's options, before anything is compiled


@dataclasses.dataclass(frozen=True)
class Objective:
    """`losses` maps a term's name to {"weight": number, **options of the term}; see `configs/base.py`.

    `mesh` is where the parameters lie; None means one device.
    """

    losses: Mapping
    mesh: Any = None

    def __post_init__(self):
        known = [*BATCH_TERMS, *PARAMETER_TERMS]
        for name, options in self.losses.items():
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise ValueError(f"losses.{name}: no such loss; the nearest is {nearest!r} of {', '.join(known)}")
            if not 0 <= options["weight"] < float("inf"):
                raise ValueError(f"losses.{name}.weight: {options['weight']} is not a finite number >= 0")
            if name in CHECKS:
                try:
                    CHECKS[name](**_without_weight(options))
                except ValueError as error:
                    raise ValueError(f"losses.{name}: {error}") from None

    def of_batch(self, output, batch, earlier_load_LE):
        """Terms of one micro-batch; `earlier_load_LE` sums the loads of the step's earlier micro-batches."""
        return {
            name: BATCH_TERMS[name](output, batch, earlier_load_LE, **options)
            for name, options in self._active(BATCH_TERMS)
        }

    def of_parameters(self, params, rng):
        """Terms that depend on the parameters alone."""
        return {
            name: PARAMETER_TERMS[name](params, rng, self.mesh, **options)
            for name, options in self._active(PARAMETER_TERMS)
        }

    def total(self, terms):
        """Their weighted sum."""
        return sum((self.losses[name]["weight"] * value for name, value in terms.items()), start=0.0)

    def _active(self, terms):
        for name, options in self.losses.items():
            if name in terms and options["weight"] > 0:
                yield name, _without_weight(options)


def _without_weight(options):
    return {key: value for key, value in options.items() if key != "weight"}
