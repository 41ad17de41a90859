"""The documents with figures: report.html of one run or of several, diagnosis.md of a model.

They need the extra `plot`; every figure is a file of its own as well.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_erc.diagnosis.figures import png
from moe_erc.diagnosis.html import Picture, Section, Table, page
from moe_erc.diagnosis.layers import Layers, diagnose
from moe_erc.diagnosis.report import write_bytes, write_report, write_text
from moe_erc.diagnosis.run_figures import run_figures
from moe_erc.diagnosis.tables import markdown, of_layers, print_tables, verdict
from moe_erc.measures.coupling import MATRIX
from moe_erc.measures.registry import GROUPS, of_group


def write_figures(directory, runs: Mapping[str, Mapping]) -> dict[str, tuple[bytes, str]]:
    """figures/*.png of `run_figures`; {path below the directory: (PNG, caption)}."""
    written = {}
    for name, (figure, caption) in run_figures(runs).items():
        path = f"figures/{re.sub('[^a-z0-9]+', '-', name.lower())}.png"
        written[path] = png(figure), f"{name[0].upper()}{name[1:]}. {caption}"
        write_bytes(directory / path, written[path][0])
    return written


def write_run_report(directory, runs: Mapping[str, Mapping]) -> None:
    """report.html, which needs nothing beside it, and its figures.

    `runs` are those of `run_figures`, each with its "measures".
    """
    pictures = []
    for image, text in write_figures(directory, runs).values():
        pictures.append(Picture(image, text.split(".")[0], text))
    measured = {name: run["measures"] for name, run in runs.items()}
    sections = [
        Section("What was reached", tables=tuple(compare(measured))),
        Section("Figures", pictures=tuple(pictures)),
    ]
    write_bytes(directory / "report.html", page(", ".join(runs), sections).encode())


def compare(measured: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Runs side by side: a table for every group, a row for every measure, means over layers."""
    keys = list(dict.fromkeys(key for found in measured.values() for key in found))
    made = []
    for name, group in GROUPS.items():
        rows = []
        for measure in of_group(name, keys):
            cells = [_mean(measure, found) for found in measured.values()]
            if any(cells):
                rows.append((measure.axis, *cells))
        if rows:
            caption = f"{group.title}; of measures by layer, the mean"
            made.append(Table(("", *measured), rows, caption))
    return made


def _mean(measure, found):
    """The cell of a run, empty where it has no such number."""
    value = found.get(measure.key)
    if value is None or isinstance(value, str) or np.ndim(value) > 1:
        return ""
    return measure.show(np.mean(value))


def report_diagnosis(directory, name: str, layers: Iterable, numbers: Sequence[int]) -> None:
    """Diagnoses layers (router_ED, w_gate_EDF), numbered so; prints and writes what is found."""
    found = diagnose(layers, numbers)
    print_tables(of_layers(found))
    print(f"{name}: {verdict(found.measures)}")
    drawn = {"measures": found.measures | {MATRIX.key: found.matrices["raw"]}, "layers": numbers}
    pictures = write_figures(directory, {name: drawn})
    captions = {path: caption for path, (_, caption) in pictures.items()}
    write_diagnosis(directory, name, found, captions)


def write_diagnosis(directory, name: str, found: Layers, pictures: Mapping[str, str]) -> None:
    """diagnosis.json and diagnosis.md, with pictures: {path below the directory: caption}."""
    measured = {
        "layers": list(found.numbers),
        "measures": found.measures,
        "normalized": found.normalized,
    }
    write_report(directory / "diagnosis.json", measured)
    parts = [f"# Diagnosis of {name}", verdict(found.measures), *map(markdown, of_layers(found))]
    parts += [f"![{caption}]({path})\n\n{caption}" for path, caption in pictures.items()]
    write_text(directory / "diagnosis.md", "\n\n".join(parts) + "\n")
