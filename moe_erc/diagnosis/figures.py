"""Figures of coupling, expert use and training: arrays in, a `matplotlib.figure.Figure` out.

One look for all. A line has an Okabe-Ito colour, a dash and a marker of its own, so that it can be
told from the others in grey and by colour-blind eyes; the lightness of a map follows its value. No
pyplot: no window, no global figures.
"""

import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from moe_erc.checks import BadInput
from moe_erc.measures.coupling import MATRIX
from moe_erc.measures.erc import ERC
from moe_erc.measures.expert_use import COACTIVATION
from moe_erc.measures.load import LOAD

try:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
except ImportError:
    raise BadInput('figures need matplotlib, which is missing: pip install -e ".[plot]"') from None

LOOK = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "image.cmap": "cividis",
    "text.parse_math": False,  # a run may have a $ in its name
    "savefig.dpi": 200,
}
WIDTH = 7.0  # inches, the two columns of a paper
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")  # the three lengths share no factor: 140 lines differ


@matplotlib.rc_context(LOOK)
def png(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@matplotlib.rc_context(LOOK)
def curves(
    panels: Mapping[str, Mapping[str, tuple]], xlabel: str, runs: Iterable[str] = ()
) -> Figure:
    """A panel for every measure: {label (unit): {run: (x_N, y_N)}}.

    The place of a run in `runs` decides its colour, dash and marker, which are the same in all
    panels. For values by layer, y_NL, the line is the mean over layers, and the band reaches from
    the lowest layer to the highest.
    """
    runs = dict.fromkeys(runs)  # a dict keeps the order
    for series in panels.values():
        runs |= dict.fromkeys(series)
    runs = list(runs)
    figure, axes = _panels(len(panels), 2, 0.65, sharex=True)
    lines = {}
    for ax, (ylabel, series) in zip(axes, panels.items(), strict=True):
        for run, (x_N, y) in series.items():
            y_NL = np.reshape(np.asarray(y, float), (len(x_N), -1))
            style = _style(runs.index(run))
            every = -(-len(x_N) // 12)  # at most twelve markers on a line
            (lines[run],) = ax.plot(x_N, y_NL.mean(axis=1), markevery=every, label=run, **style)
            if y_NL.shape[1] > 1:
                ax.fill_between(
                    x_N,
                    y_NL.min(axis=1),
                    y_NL.max(axis=1),
                    color=style["color"],
                    alpha=0.25 / len(runs),
                )
            ax.xaxis.get_major_locator().set_params(integer=np.asarray(x_N).dtype.kind == "i")
        ax.set(xlabel=xlabel, ylabel=ylabel.replace(" (", "\n("))
        ax.tick_params(labelbottom=True)
        ax.grid(axis="y")
    if len(lines) > 1:
        figure.legend(
            handles=list(lines.values()), loc="outside upper left", ncols=2 * min(len(panels), 2)
        )
    return figure


@matplotlib.rc_context(LOOK)
def erc_by_alpha(
    erc: Mapping[str, np.ndarray], alphas: Sequence[float], layers: Sequence[int]
) -> Figure:
    """A panel for every run, {run: erc_LA}: a line is a layer, and deeper layers are lighter."""
    figure, axes = _panels(len(erc), 3, 0.8, sharey=True)
    shades = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers))))
    for ax, (run, erc_LA) in zip(axes, erc.items(), strict=True):
        for number, erc_A in enumerate(erc_LA):
            ax.plot(alphas, erc_A, **_style(number) | {"color": shades(number)})
        ax.set(title=run, xlabel="alpha", ylabel=f"ERC ({ERC.unit})", xticks=alphas)
        ax.tick_params(labelleft=True)
        ax.grid(axis="y")
    steps = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = _colorbar(figure, axes, ScalarMappable(steps, shades), "layer")
    bar.set_ticks(**_ticks(layers))
    bar.minorticks_off()
    return figure


def coupling_maps(M_LEE: np.ndarray, layers: Sequence[int]) -> Figure:
    """A panel for every layer: the diagonal is bright where router and experts are coupled."""
    labels = ("expert", "router row (proxy)", MATRIX.axis)
    return _square_maps(M_LEE, layers, labels)


def coactivation_maps(share_LEE: np.ndarray, layers: Sequence[int]) -> Figure:
    """A panel for every layer, without the diagonal, which is 1."""
    labels = ("expert chosen as well", "chosen expert", COACTIVATION.unit)
    is_diagonal_EE = np.eye(share_LEE.shape[-1], dtype=bool)
    return _square_maps(np.where(is_diagonal_EE, np.nan, share_LEE), layers, labels)


@matplotlib.rc_context(LOOK)
def load_maps(
    panels: Mapping[str, np.ndarray], ylabel: str, rows: Sequence[str] | None = None
) -> Figure:
    """A panel for every title: {title: shares (rows, E)}.

    `rows` are the names of the rows; without them the rows are numbered.
    """
    figure, axes = _panels(len(panels), 2, 0.5)
    image = _draw(axes, panels, ("expert", ylabel), "auto")
    if rows:
        for ax in axes:
            ax.set_yticks(**_ticks(rows))
    _colorbar(figure, axes, image, LOAD.unit)
    return figure


@matplotlib.rc_context(LOOK)
def gate_points(points_N2: np.ndarray, owner_N: np.ndarray) -> Figure:
    """The map of `diagnosis/gate_map.py`; every expert has its own colour and marker."""
    figure, (ax,) = _panels(1, 2, 1.1)
    for number, expert in enumerate(np.unique(owner_N)):
        style = _style(number) | {"linestyle": "none", "markersize": 2, "markeredgewidth": 0}
        ax.plot(*points_N2[owner_N == expert].T, label=f"expert {expert}", **style)
    ax.set(xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
    figure.legend(loc="outside upper left", ncols=3, markerscale=2)
    return figure


@matplotlib.rc_context(LOOK)
def _square_maps(matrix_LEE, layers, labels):
    figure, axes = _panels(len(layers), 4, 1)
    panels = {}
    for layer, matrix_EE in zip(layers, matrix_LEE, strict=True):
        panels[f"layer {layer}"] = matrix_EE
    image = _draw(axes, panels, labels[:2], "equal")
    _colorbar(figure, axes, image, labels[2])
    return figure


def _draw(axes, panels, labels, aspect):
    """Draw every matrix in its axes, on one scale from 0; returns the last image."""
    highest = max(np.nanmax(matrix) for matrix in panels.values())
    for ax, (title, matrix) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(matrix, vmin=0, vmax=highest, aspect=aspect)
        ax.set(title=title, xlabel=labels[0], ylabel=labels[1])
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True, nbins=5)
    return image


def _colorbar(figure, axes, mappable, label):
    rows = axes[0].get_gridspec().nrows
    return figure.colorbar(mappable, ax=axes, label=label, aspect=20 * rows)


def _ticks(names):
    """At most twelve ticks with their names."""
    every = -(-len(names) // 12)
    return {"ticks": range(0, len(names), every), "labels": names[::every]}


def _panels(count, columns, aspect, **share):
    """A figure and its axes, row by row: as wide as the page, or half as wide for one panel."""
    rows = -(-count // columns)
    columns = min(count, columns)
    width = WIDTH / max(columns, 2)
    figure = Figure(figsize=(width * columns, width * aspect * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **share).flat)
    for surplus in axes[count:]:
        surplus.remove()
    return figure, axes[:count]


def _style(number):
    cycles = {"color": COLORS, "linestyle": DASHES, "marker": MARKERS}
    return {name: cycle[number % len(cycle)] for name, cycle in cycles.items()}
