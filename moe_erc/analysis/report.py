"""The tables at the end of a run: what it reached by domain, how coupled each layer is, how its experts are loaded."""

import json
import math

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from moe_erc.analysis.coupling import ALPHAS
from moe_erc.losses.load_balance import load_measures

# row of the layers table -> measure by layer
ROWS = {
    "noise bound": "noise_bound_L",
    "diagonal rows": "diagonal_rows_L",
    "diagonal columns": "diagonal_columns_L",
    "alignment": "alignment_L",
    "row cosine": "row_cosine_L",
    "router norm": "router_norm_L",
    "router spread": "router_spread_L",
    "gate norm": "gate_norm_L",
    "gate spread": "gate_spread_L",
    "output cosine": "output_cosine_L",
}


def write_report(path, report):
    """`report` as JSON, null for None and numbers that are not finite."""
    write_text(path, json.dumps(_plain(report), indent=1))


def read_report(path, step: int) -> dict | None:
    """The report at `path` if it is of that step, with NaN where a number was not finite; None without one."""
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
    except ValueError:
        return None
    return _with_nan(report) if isinstance(report, dict) and report.get("step") == step else None


def _with_nan(value):
    """Lists of numbers as `_plain` found them; a part that is None stays so."""
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [math.nan if item is None else _with_nan(item) for item in value]
    return value


def write_text(path, text):
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path, content):
    """A reader sees the old file or the new one, never a part; its directory is made.

    On a pod process 0 writes; `path` is an `etils.epath.Path`, local or in a bucket.
    """
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(content)
        temporary.replace(path)


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    value = np.asarray(value).tolist()
    if value is None:
        return None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str) or math.isfinite(value) else None


def print_report(report):
    """Validation, coupling and load, as far as the report has them.

    report["coupling"] is None for a model without router rows; report["specialization"] may be absent.
    """
    console, coupling = Console(), report["coupling"]
    console.print(_validation(report["validation"], report["baselines"]))
    if coupling is not None:
        console.print(_erc_by_alpha(coupling))
    measures = (coupling or {}) | (report.get("specialization") or {})
    console.print(_layers(measures, np.asarray(report["validation"]["load_LE"])))


def _validation(validation, baselines):
    table = Table("domain", "loss", "bits/byte", "unigram", "bigram", "tokens", title="Validation, nats per token")
    for domain, values in validation["domains"].items():
        counted = [f"{baselines[order][domain]:.3f}" for order in ("unigram", "bigram")]
        table.add_row(
            domain, f"{values['loss']:.3f}", f"{values['bits_per_byte']:.3f}", *counted, f"{values['tokens']:,}"
        )
    table.add_section()
    means = [f"{np.mean(list(baselines[order].values())):.3f}" for order in ("unigram", "bigram")]
    table.add_row("mean", f"{validation['loss']:.3f}", "", *means, "")
    return table


def _erc_by_alpha(coupling):
    layers = len(coupling["erc_LA"])
    table = Table("alpha", *(f"layer {layer}" for layer in range(layers)), title="ERC of the clean router")
    for column, alpha in enumerate(ALPHAS):
        table.add_row(f"{alpha:g}", *(f"{row[column]:.4f}" for row in np.asarray(coupling["erc_LA"])))
    table.add_section()
    table.add_row("vanishes at", *(f"{alpha:.2f}" for alpha in coupling["vanishing_alpha_L"]))
    return table


def _layers(measures, load_LE):
    layers, experts = load_LE.shape
    table = Table("", *(f"layer {layer}" for layer in range(layers)), title="Layers")
    for name, key in ROWS.items():
        if key in measures:
            table.add_row(name, *(f"{value:.3f}" for value in measures[key]))
    load = load_measures(load_LE)
    table.add_row("highest load", *(f"{value:.2f}x" for value in load["router/max_load"]))
    table.add_row("lowest load", *(f"{value:.2f}x" for value in load_LE.min(axis=1) * experts))
    table.add_row("load entropy", *(f"{value:.3f}" for value in load["router/load_entropy"]))
    table.add_row("MaxVio", *(f"{value:.2f}" for value in load["router/max_violation"]))
    return table
