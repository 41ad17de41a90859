"""The figures of one run or of several, each a file of its own, and a report.html that holds them all."""

import re

import numpy as np

from moe_erc.analysis.figures import png
from moe_erc.analysis.html import Picture, Section, Table, page
from moe_erc.analysis.report import ROWS, write_bytes
from moe_erc.analysis.run_figures import run_figures
from moe_erc.losses.load_balance import load_measures

MEASURES = ("diagonal rows", "alignment", "row cosine", "router norm", "gate norm", "output cosine")  # of `ROWS`


def write_figures(directory, runs):
    """figures/*.png of what `run_figures` makes of the runs; {path below the directory: (PNG, caption)}."""
    written = {}
    for name, (figure, caption) in run_figures(runs).items():
        path = f"figures/{re.sub('[^a-z0-9]+', '-', name.lower())}.png"
        written[path] = png(figure), f"{name[0].upper()}{name[1:]}. {caption}"
        write_bytes(directory / path, written[path][0])
    return written


def write_run_report(directory, runs):
    """report.html, which needs nothing beside it, and its figures; every run has its "report"."""
    pictures = tuple(
        Picture(image, text.split(".")[0], text) for image, text in write_figures(directory, runs).values()
    )
    rows = [(name, *_row(run["report"])) for name, run in runs.items()]
    columns = ("run", "step", "validation loss", "ERC at alpha 1", *MEASURES, "MaxVio")
    table = Table(columns, rows, "Loss in nats a token, mean of the domains; all else is a mean over layers.")
    sections = [Section("What was reached", tables=(table,)), Section("Figures", pictures=pictures)]
    write_bytes(directory / "report.html", page(", ".join(runs), sections).encode())


def _row(report):
    coupling, load = report["coupling"] or {}, load_measures(np.asarray(report["validation"]["load_LE"]))
    erc = [f"{np.mean(coupling['erc_LA'], axis=0)[0]:.3f}"] if coupling else ["-"]
    measures = coupling | report["specialization"]
    means = [f"{np.mean(measures[key]):.3f}" if key in measures else "-" for key in map(ROWS.get, MEASURES)]
    validation = f"{report['validation']['loss']:.3f}"
    return report["step"], validation, *erc, *means, f"{np.mean(load['router/max_violation']):.3f}"
