"""Every figure that the data of one run allows, or of several side by side, each with what there is to see in it."""

import numpy as np

from moe_erc.analysis.coupling import ALPHAS
from moe_erc.analysis.expert_use import coactivation, domain_divergence, expert_shares, token_specialization
from moe_erc.analysis.figures import coactivation_maps, coupling_maps, curves, erc_by_alpha, gate_points, load_maps

BAND = " A line is the mean over layers, its band reaches from the lowest layer to the highest."

# figure -> ({label: metric}, caption)
OVER_TRAINING = {
    "loss over training": (
        {"training loss (nats per token)": "loss/lm", "validation loss (nats per token)": "validation/mean"},
        "Cross-entropy on training batches and, as a mean of domains, on validation text: lower is better.",
    ),
    "coupling over training": (
        {
            "ERC loss at alpha 1 (norm units)": "coupling/erc",
            "epsilon (relative noise bound)": "coupling/noise_bound",
            "rows led by the diagonal (share)": "coupling/diagonal_rows",
            "alignment (share of sigma_max)": "coupling/alignment",
        },
        "A router couples to its experts as its ERC loss falls to 0, its diagonal leads in every row and its rows turn"
        " to the strongest direction of their gates; a falling epsilon says that router rows move together." + BAND,
    ),
    "load over training": (
        {
            "highest load (times the mean)": "router/max_load",
            "load entropy (share of log E)": "router/load_entropy",
            "experts per token": "router/experts_per_token",
        },
        "Experts are evenly loaded where the highest load is near 1 and the entropy near 1." + BAND,
    ),
}

# figure -> ({label: (part of the report, measure)}, caption)
BY_LAYER = {
    "coupling by layer": (
        {
            "vanishing alpha": ("coupling", "vanishing_alpha_L"),
            "epsilon (relative noise bound)": ("coupling", "noise_bound_L"),
            "rows led by the diagonal (share)": ("coupling", "diagonal_rows_L"),
            "columns led by the diagonal (share)": ("coupling", "diagonal_columns_L"),
            "alignment (share of sigma_max)": ("coupling", "alignment_L"),
            "cosine of router rows": ("coupling", "row_cosine_L"),
        },
        "A layer is coupled at alpha 1 where its vanishing alpha is at most 1; its diagonal then leads everywhere.",
    ),
    "norms by layer": (
        {
            "norm of a router row (mean)": ("coupling", "router_norm_L"),
            "norm of a gate (mean)": ("coupling", "gate_norm_L"),
        },
        "A loss that couples by shrinking weights, and not by turning them, shows here as smaller norms.",
    ),
    "answers by layer": (
        {"cosine of expert outputs": ("specialization", "output_cosine_L")},
        "Mean cosine of what two experts answer to the same token: the lower, the more specialised.",
    ),
}


def run_figures(runs):
    """{figure name: (Figure, caption)}, in the order of a report; runs without the data of a figure are left out of it.

    runs: {run name: a dict with any of
      "metrics"   what `read_metrics` found
      "report"    report.json or eval.json
      "alpha"     that of its ERC loss
      "coupling"  {"layers": their numbers, "matrix_LEE": coupling matrices of the clean router}
      "gates"     {"layer": its number, "points_N2", "owner_N": what `gate_map` found}
      "use"       a dict with any of "domains" (names) with "load_GLE", "counts_LVE" with "occurrences_V", "pairs_LEE":
                  what the functions of `expert_use.py` take}
    """
    shared = _over_training(runs) | _by_layer(runs) | _by_alpha(runs) | _use_of_experts(runs)
    return shared | {f"{name} of {run}": made for run in runs for name, made in _of_one(runs[run]).items()}


def _over_training(runs):
    made = {}
    for name, (metrics, caption) in OVER_TRAINING.items():
        panels = {label: _found(runs, "metrics", metric) for label, metric in metrics.items()}
        made |= _curves(name, panels, "step", runs, caption)
    return made


def _by_layer(runs):
    made = {}
    for name, (measures, caption) in BY_LAYER.items():
        panels = {label: _layers(_found(runs, "report", *measure)) for label, measure in measures.items()}
        made |= _curves(name, panels, "layer", runs, caption)
    return made


def _by_alpha(runs):
    made, erc = {}, _found(runs, "report", "coupling", "erc_LA")
    if erc:
        figure = erc_by_alpha(erc, ALPHAS, range(max(map(len, erc.values()))))
        made["ERC by alpha"] = figure, "ERC of the clean router: a coupled layer is at 0 from alpha 1 on, others later."
    bounds, alphas = _found(runs, "report", "coupling", "noise_bound_L"), _found(runs, "alpha")
    points = sorted((alphas[run], np.mean(bounds[run])) for run in alphas.keys() & bounds.keys())
    if len(points) > 1:
        panels = {"epsilon (relative noise bound)": {"mean over layers": tuple(zip(*points, strict=True))}}
        caption = (
            "The noise bound of trained routers, mean over layers; in the paper it falls as alpha rises (Figure 5a)."
        )
        made["epsilon by alpha"] = curves(panels, "alpha"), caption
    return made


def _use_of_experts(runs):
    loads, seen = _found(runs, "use", "load_GLE"), _found(runs, "use", "occurrences_V")
    panels = {
        "divergence of domains (bits)": {run: domain_divergence(load_GLE) for run, load_GLE in loads.items()},
        "token specialisation (share of occurrences)": {
            run: token_specialization(runs[run]["use"]["counts_LVE"], seen_V) for run, seen_V in seen.items()
        },
    }
    caption = (
        "How much the domains differ in the experts they use, 0 if in nothing; and the share of a token's occurrences"
        " that its most used expert sees, K / E if use is even."
    )
    panels = {label: _layers(series) for label, series in panels.items()}
    made = _curves("specialisation by layer", panels, "layer", runs, caption)
    if shares := {run: expert_shares(load) for run, load in _found(runs, "report", "validation", "load_LE").items()}:
        caption = "Where validation tokens go; even use is one shade, a dark cell an idle expert."
        made["load by layer"] = load_maps(shares, "layer"), caption
    return made


def _of_one(run):
    """Figures that hold the matrices of one run alone."""
    made, use = {}, run.get("use", {})
    if coupling := run.get("coupling"):
        caption = "How strongly router row i excites expert j: a coupled layer is brightest on its diagonal."
        made["coupling matrices"] = coupling_maps(coupling["matrix_LEE"], coupling["layers"]), caption
    if gates := run.get("gates"):
        caption = f"Hidden units of the gates of layer {gates['layer']}: those of specialised experts lie together."
        made["gate map"] = gate_points(gates["points_N2"], gates["owner_N"]), caption
    if "load_GLE" in use:
        caption = "An expert of one domain is bright in one row; where rows are alike, the domains share all experts."
        loads = enumerate(np.swapaxes(expert_shares(use["load_GLE"]), 0, 1))
        panels = {f"layer {layer}": load_GE for layer, load_GE in loads}
        made["load by domain"] = load_maps(panels, "domain", use["domains"]), caption
    if "pairs_LEE" in use:
        caption = "Experts that are chosen together are bright; chosen independently, all were near (K-1) / (E-1)."
        share_LEE = coactivation(use["pairs_LEE"])
        made["co-activation"] = coactivation_maps(share_LEE, range(len(share_LEE))), caption
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


def _layers(series):
    return {run: (range(len(value_L)), value_L) for run, value_L in series.items()}


def _curves(name, panels, xlabel, runs, caption):
    """The figure of those panels that have a curve, or none."""
    panels = {label: series for label, series in panels.items() if series}
    return {name: (curves(panels, xlabel, runs), caption)} if panels else {}
