"""The figures of one run, or of several side by side, each with what there is to see in it."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from moe_erc.diagnosis.figures import (
    coactivation_maps,
    coupling_maps,
    curves,
    erc_by_alpha,
    gate_points,
    load_maps,
)
from moe_erc.measures import coupling, erc, expert_use, load, validation
from moe_erc.measures.registry import GROUPS, of_group

BAND = " A line is the mean over layers, its band reaches from the lowest layer to the highest."


def run_figures(runs: Mapping[str, Mapping]) -> dict[str, tuple[Figure, str]]:
    """{figure name: (Figure, caption)}, in the order of a report.

    A run is left out of the figures for which it has no data.

    runs: {run name: a dict with any of
      "metrics"   what `read_metrics` found
      "measures"  {key: value} of report.json or eval.json, `ExpertUse`, and coupling matrices
      "layers"    the numbers of its layers, if they are not 0, 1, 2, …
      "alpha"     that of its ERC loss
      "gates"     {"layer": its number, "points_N2", "owner_N": what `gate_map` found}
    """
    shared = _over_training(runs) | _by_layer(runs) | _by_alpha(runs) | _load_by_layer(runs)
    return shared | {
        f"{name} of {run}": made for run in runs for name, made in _of_one(runs[run]).items()
    }


def _over_training(runs):
    """A figure for every group, a panel for every metric of it that any of the runs has."""
    keys = list(dict.fromkeys(key for run in runs.values() for key in run.get("metrics", {})))
    made = {}
    for name, group in GROUPS.items():
        shown = of_group(name, keys)
        if shown:
            panels = {measure.axis: _found(runs, "metrics", measure.key) for measure in shown}
            figure = curves(panels, "step", runs)
            band = BAND if any(measure.per_layer for measure in shown) else ""
            made[f"{group.title} over training"] = figure, group.caption + band
    return made


def _by_layer(runs):
    """A figure for every group, a panel for every measure by layer that any of the runs has."""
    keys = list(dict.fromkeys(key for run in runs.values() for key in run.get("measures", {})))
    made = {}
    for name, group in GROUPS.items():
        panels = {}
        for measure in of_group(name, keys):
            series = _vectors(runs, measure)
            if series:
                panels[measure.axis] = series
        if panels:
            made[f"{group.title} by layer"] = curves(panels, "layer", runs), group.caption
    return made


def _vectors(runs, measure):
    """{run: (numbers of its layers, values)} of the runs that have one value for every layer."""
    series = {}
    for run, value_L in _found(runs, "measures", measure.key).items():
        if measure.per_layer and np.ndim(value_L) == 1:
            series[run] = runs[run].get("layers", range(len(value_L))), value_L
    return series


def _by_alpha(runs):
    made = {}
    penalties = {}
    for run in _found(runs, "measures", erc.ERC.key):
        by_alpha = [runs[run]["measures"][measure.key] for measure in erc.AT_ALPHAS]
        penalties[run] = np.stack(by_alpha, axis=1)
    if penalties:
        figure = erc_by_alpha(penalties, erc.ALPHAS, range(max(map(len, penalties.values()))))
        caption = "ERC of the clean router: a coupled layer is at 0 from alpha 1 on, others later."
        made["ERC by alpha"] = figure, caption
    bounds = _found(runs, "measures", coupling.NOISE_BOUND.key)
    alphas = _found(runs, "alpha")
    points = sorted((alphas[run], np.mean(bounds[run])) for run in alphas.keys() & bounds.keys())
    if len(points) > 1:
        panels = {coupling.NOISE_BOUND.axis: {"mean over layers": tuple(zip(*points, strict=True))}}
        caption = "The mean over layers; in the paper it falls as alpha rises (Figure 5a)."
        made[f"{coupling.NOISE_BOUND.label} by alpha"] = curves(panels, "alpha"), caption
    return made


def _load_by_layer(runs):
    shares = {}
    for run, load_LE in _found(runs, "measures", load.LOAD.key).items():
        shares[run] = expert_use.expert_shares(load_LE)
    if not shares:
        return {}
    caption = "Where validation tokens go; even use is one shade, a dark cell an idle expert."
    return {f"{load.LOAD.label} by layer": (load_maps(shares, "layer"), caption)}


def _of_one(run):
    """Figures that hold the matrices of one run alone."""
    made = {}
    found = run.get("measures", {})
    if coupling.MATRIX.key in found:
        matrix_LEE = found[coupling.MATRIX.key]
        layers = run.get("layers", range(len(matrix_LEE)))
        caption = (
            "How strongly row i excites expert j: a coupled layer is brightest on its diagonal."
        )
        made["coupling matrices"] = coupling_maps(matrix_LEE, layers), caption
    if gates := run.get("gates"):
        of_layer = f"Hidden units of the gates of layer {gates['layer']}"
        caption = f"{of_layer}: those of specialised experts lie together."
        made["gate map"] = gate_points(gates["points_N2"], gates["owner_N"]), caption
    if expert_use.LOAD.key in found:
        caption = (
            "An expert of one domain is bright in one row. "
            "Where rows are alike, the domains share all experts."
        )
        share_LGE = np.swapaxes(expert_use.expert_shares(found[expert_use.LOAD.key]), 0, 1)
        panels = {f"layer {layer}": share_GE for layer, share_GE in enumerate(share_LGE)}
        figure = load_maps(panels, "domain", validation.domains(found))
        made[expert_use.LOAD.label] = figure, caption
    if expert_use.COACTIVATION.key in found:
        caption = (
            "Experts that are chosen together are bright. "
            "If they were chosen independently, all would be near (K-1) / (E-1)."
        )
        share_LEE = found[expert_use.COACTIVATION.key]
        figure = coactivation_maps(share_LEE, range(len(share_LEE)))
        made[expert_use.COACTIVATION.label] = figure, caption
    return made


def _found(runs, *keys):
    """{run: what lies under the keys}, of the runs that have it."""
    found = {}
    for name, value in runs.items():
        for key in keys:
            value = None if value is None else value.get(key)
        if value is not None:
            found[name] = value
    return found
