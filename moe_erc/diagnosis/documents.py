"""The document with figures: report.html of one run or of several.

It needs the extra `plot`. Every figure is also written to a file of its own.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from moe_erc.diagnosis.figures import png
from moe_erc.diagnosis.html import Picture, Section, Table, page
from moe_erc.diagnosis.report import write_bytes
from moe_erc.diagnosis.run_figures import run_figures
from moe_erc.measures.registry import GROUPS, of_group


def write_figures(
    directory: epath.Path, runs: Mapping[str, Mapping]
) -> dict[str, tuple[bytes, str]]:
    """Write the figures of `run_figures` to figures/*.png.

    Returns {path below the directory: (PNG, caption)}.
    """
    written = {}
    for name, (figure, caption) in run_figures(runs).items():
        path = f"figures/{re.sub('[^a-z0-9]+', '-', name.lower())}.png"
        image = png(figure)
        title = f"{name[0].upper()}{name[1:]}"
        written[path] = (image, f"{title}. {caption}")
        write_bytes(directory / path, image)
    return written


def write_run_report(directory: epath.Path, runs: Mapping[str, Mapping]) -> None:
    """Write report.html, which contains its figures, and the figures as files.

    `runs` are as for `run_figures`; each must have its "measures".
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
    """Runs side by side: a table for every group and in it a row for every measure.

    The cell of a measure by layer is the mean over layers.
    """
    keys = {}  # a dict keeps the order in which the measures are met
    for found in measured.values():
        keys |= dict.fromkeys(found)
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
