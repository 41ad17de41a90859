"""Whether a step may change the state.

Its numbers must be finite and, where spikes are skipped, its loss must be no spike:

    z = (loss - mean) / deviation

Mean and deviation are exponentially weighted over about the last `window` accepted steps.

The step itself decides, from scalars that it computes anyway: nothing is fetched. A refused step
changes nothing but the step number, so the next step reads other data. After `limit` refused steps
in a row, no step is accepted any more. The state stays as it is until the host, which looks at
metrics when they are due, ends the run.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_erc.checks import among, check_fields, within
from moe_erc.measures.training import IN_A_ROW, PARAMETER_NORM, SKIPPED, TOTAL, ZSCORE


class Stopped(Exception):
    """The run must end: at `step` the refused ones reached the limit, or parameters were lost."""

    def __init__(self, step, reason):
        super().__init__(f"step {step}: {reason}")
        self.step = step


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """The `guard` block of a config; BadInput for a value beyond its limit."""

    nonfinite: str = among("stop", "skip", default="stop")
    spike: str = among("report", "skip", default="report")
    zscore: float = within(above=0, finite=False, note="inf finds no spike", default=6.0)
    window: int = within(least=2, note="steps", default=100)
    limit: int = within(least=1, note="steps", default=10)

    def __post_init__(self):
        check_fields(self, "guard")


def initial() -> dict[str, jax.Array]:
    """What the guard carries from step to step, in `TrainState`."""
    return {
        "mean": jnp.float32(0),
        "variance": jnp.float32(0),
        "counted": jnp.int32(0),
        "skipped": jnp.int32(0),
        "in_a_row": jnp.int32(0),
    }


def judge(config: GuardConfig, guard: Mapping, metrics: Mapping) -> tuple[jax.Array, dict, dict]:
    """(whether the step is accepted, the guard for the next step, metrics of the guard).

    guard: as `initial` gives it, or as the step before left it. metrics: of this step, by key.
    """
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in metrics.values()]))
    distance = metrics[TOTAL.key] - guard["mean"]
    # Even losses that do not vary differ by a rounding.
    deviation = jnp.sqrt(guard["variance"] + 1e-12)
    z = jnp.where(guard["counted"] >= config.window, distance / deviation, 0)
    refused = ~finite
    if config.spike == "skip":
        refused = refused | (z > config.zscore)
    stopped = guard["in_a_row"] >= config.limit
    accepted = ~(refused | stopped)

    # A running mean until the window is full, an exponentially weighted one from then on.
    share = 1 / (jnp.minimum(guard["counted"], config.window - 1) + 1)
    with_this = {
        "mean": guard["mean"] + share * distance,
        "variance": (1 - share) * (guard["variance"] + share * distance**2),
        "counted": guard["counted"] + 1,
    }
    after = {name: jnp.where(accepted, value, guard[name]) for name, value in with_this.items()}
    # Under "stop", a step that is not finite reaches the limit at once.
    weight = jnp.where(finite, 1, config.limit if config.nonfinite == "stop" else 1)
    after["in_a_row"] = jnp.where(accepted, 0, guard["in_a_row"] + weight)
    after["skipped"] = guard["skipped"] + ~accepted
    told = {ZSCORE.key: z, SKIPPED.key: after["skipped"], IN_A_ROW.key: after["in_a_row"]}
    return accepted, after, told


def read(config: GuardConfig, step: int, metrics: Mapping) -> str:
    """A line about a step, from its metrics on the host; "" for a step like any other.

    Raises Stopped where the guard accepts no step any more, and where an accepted step has left
    parameters that are not finite: no checkpoint of them is written.
    """
    bad = sorted(name for name, value in metrics.items() if not np.all(np.isfinite(value)))
    reason = ""
    if bad:
        reason = f"not finite: {', '.join(bad)}"
    elif metrics[ZSCORE.key] > config.zscore:
        total = metrics[TOTAL.key]
        z = metrics[ZSCORE.key]
        reason = f"the loss, {total:.4g}, is {z:.1f} standard deviations above its recent mean"
    if metrics[IN_A_ROW.key] >= config.limit:
        stops_at_once = bad and config.nonfinite == "stop"
        if not stops_at_once:
            reason = f"{reason}; guard.limit: {config.limit} steps skipped in a row"
        raise Stopped(step, reason)
    # A refused step keeps finite parameters, so this one was accepted.
    if PARAMETER_NORM.key in bad:
        raise Stopped(step, reason)
    if not reason:
        return ""
    skipped = ", the step was skipped" if metrics[IN_A_ROW.key] else ""
    return f"step {step}: {reason}{skipped}"
