"""The tables at the end of a run: what it reached by domain, how coupled each layer is, how its experts are loaded."""

import json
import math

import jax
import numpy as np

from moe_erc.analysis.coupling import ALPHAS
from moe_erc.losses.load_balance import load_measures
from moe_erc.tables import print_table

# column of the tables by layer -> measure by layer
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
# The tables by layer: 80 columns hold each with its headings on one line.
COUPLING = ("noise bound", "diagonal rows", "diagonal columns", "alignment")
WEIGHTS = ("row cosine", "router norm", "router spread", "gate norm", "gate spread")
EXPERTS = ("output cosine",)


def write_report(path, report):
    """`report` as JSON, null for None and numbers that are not finite."""
    write_text(path, json.dumps(_plain(report), indent=1))


def read_report(path, step: int) -> dict | None:
    """The report at `path` if it is of that step, with NaN where a number was not finite; None without one."""
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is written anew
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


def print_report(report: dict) -> None:
    """Validation, coupling and load, as far as the report has them. A layer is a row, so that any number of them fits.

    report["coupling"] is None for a model without router rows; report["specialization"] may be absent.
    """
    coupling = report["coupling"]
    _print_validation(report["validation"], report["baselines"])
    if coupling is not None:
        _print_erc_by_alpha(coupling)
    measures = (coupling or {}) | (report.get("specialization") or {})
    load_LE = np.asarray(report["validation"]["load_LE"])
    _print_layers("Layers: coupling", _measured(COUPLING, measures))
    _print_layers("Router rows and gates", _measured(WEIGHTS, measures))
    _print_layers("Experts and their load", _measured(EXPERTS, measures) | _load(load_LE))


def _print_validation(validation, baselines):
    columns = ("domain", "loss", "bits/byte", "unigram", "bigram", "tokens")
    rows = []
    for domain, values in validation["domains"].items():
        reached = [f"{values['loss']:.3f}", f"{values['bits_per_byte']:.3f}"]
        counted = [f"{baselines[order][domain]:.3f}" for order in ("unigram", "bigram")]
        rows.append([domain, *reached, *counted, f"{values['tokens']:,}"])
    means = [f"{np.mean(list(baselines[order].values())):.3f}" for order in ("unigram", "bigram")]
    mean = ["mean", f"{validation['loss']:.3f}", "", *means, ""]
    print_table("Validation, nats per token", columns, rows, [mean])


def _print_erc_by_alpha(coupling):
    erc_AL = np.asarray(coupling["erc_LA"]).T
    by_alpha = {f"{alpha:g}": [f"{value:.4f}" for value in erc_L] for alpha, erc_L in zip(ALPHAS, erc_AL, strict=True)}
    vanishes = {"vanishes at": [f"{alpha:.2f}" for alpha in coupling["vanishing_alpha_L"]]}
    _print_layers("ERC of the clean router by alpha", by_alpha | vanishes)


def _measured(names, measures):
    present = {name: measures[ROWS[name]] for name in names if ROWS[name] in measures}
    return {name: [f"{value:.3f}" for value in value_L] for name, value_L in present.items()}


def _load(load_LE):
    load = load_measures(load_LE)
    lowest_L = load_LE.min(axis=1) * load_LE.shape[1]
    return {
        "highest load": [f"{value:.2f}x" for value in load["router/max_load"]],
        "lowest load": [f"{value:.2f}x" for value in lowest_L],
        "load entropy": [f"{value:.3f}" for value in load["router/load_entropy"]],
        "MaxVio": [f"{value:.2f}" for value in load["router/max_violation"]],
    }


def _print_layers(title, columns):
    """{heading: cells by layer} as a table of a row per layer; nothing where nothing was measured."""
    if columns:
        cells_LC = zip(*columns.values(), strict=True)
        print_table(title, ("layer", *columns), [(str(layer), *cells) for layer, cells in enumerate(cells_LC)])
