"""Whether a step may change the state: its numbers must be finite, and its loss no spike if spikes are skipped.

    z = (loss - mean) / deviation        over the last `window` steps that counted, both exponentially weighted

Decided in the step itself, from scalars that it computes anyway: nothing is fetched. A step that does not count changes
nothing but its number, so the next one reads other data. After `limit` of them in a row none counts any more: the state
stays as it was before the last refusal, until the host, which looks at metrics when they are due, ends the run.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_erc.checks import among, check_fields, within
from moe_erc.measures.training import IN_A_ROW, SKIPPED, TOTAL, ZSCORE


class Stopped(Exception):
    """The guard lets no step change the state any more; `step` is the one that was too much."""

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


def initial():
    """What the guard carries from step to step, in `TrainState`."""
    return {
        "mean": jnp.float32(0),
        "variance": jnp.float32(0),
        "counted": jnp.int32(0),
        "skipped": jnp.int32(0),
        "in_a_row": jnp.int32(0),
    }


def judge(config, guard, metrics):
    """(whether the step counts, the guard for the next step, what is told of it) from the step's metrics."""
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in metrics.values()]))
    distance = metrics[TOTAL.key] - guard["mean"]
    deviation = jnp.sqrt(guard["variance"] + 1e-12)  # losses that do not vary at all vary by a rounding
    z = jnp.where(guard["counted"] >= config.window, distance / deviation, 0)
    refused = ~finite | (z > config.zscore) if config.spike == "skip" else ~finite
    stopped = guard["in_a_row"] >= config.limit
    counts = ~(refused | stopped)

    share = 1 / (jnp.minimum(guard["counted"], config.window - 1) + 1)
    with_this = {
        "mean": guard["mean"] + share * distance,
        "variance": (1 - share) * (guard["variance"] + share * distance**2),
        "counted": guard["counted"] + 1,
    }
    after = {name: jnp.where(counts, value, guard[name]) for name, value in with_this.items()}
    weight = jnp.where(finite, 1, config.limit if config.nonfinite == "stop" else 1)
    after["in_a_row"] = jnp.where(counts, 0, guard["in_a_row"] + weight)
    after["skipped"] = guard["skipped"] + ~counts
    return counts, after, {ZSCORE.key: z, SKIPPED.key: after["skipped"], IN_A_ROW.key: after["in_a_row"]}


def read(config, step, metrics):
    """What there is to say of a step, from its metrics on the host; "" for almost all. Stopped, where they must end."""
    bad = sorted(name for name, value in metrics.items() if not np.all(np.isfinite(value)))
    reason = f"not finite: {', '.join(bad)}" if bad else ""
    if not bad and metrics[ZSCORE.key] > config.zscore:
        total = metrics[TOTAL.key]
        reason = f"the loss, {total:.4g}, is {metrics[ZSCORE.key]:.1f} standard deviations above its recent mean"
    if metrics[IN_A_ROW.key] >= config.limit:
        at_once = bad and config.nonfinite == "stop"
        raise Stopped(step, reason if at_once else f"{reason}; guard.limit: {config.limit} steps skipped in a row")
    skipped = ", the step was skipped" if metrics[IN_A_ROW.key] else ""
    return f"step {step}: {reason}{skipped}" if reason else ""
