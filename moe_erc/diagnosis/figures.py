"""Figures of coupling, expert use and training: arrays in, a `matplotlib.figure.Figure` out.

One look for all. A line has an Okabe-Ito colour, a dash and a marker of its own, so that it can be told from the others
in grey and by colour-blind eyes; the lightness of a map follows its value. No pyplot: no window, no global figures.
"""

import io

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
def png(figure):
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


@matplotlib.rc_context(LOOK)
def curves(panels, xlabel, runs=()):
    """A panel a measure, {its label (its unit): {run: (x_N, y_N)}}; a run has one look, by its place in `runs`.

    Of values by layer, y_NL, the line is the mean and the band reaches from the lowest layer to the highest.
    """
    runs = list(dict.fromkeys([*runs, *(run for series in panels.values() for run in series)]))
    figure, axes = _panels(len(panels), 2, 0.65, sharex=True)
    lines = {}
    for ax, (ylabel, series) in zip(axes, panels.items(), strict=True):
        for run, (x_N, y) in series.items():
            y_NL, style = np.reshape(np.asarray(y, float), (len(x_N), -1)), _style(runs.index(run))
            (lines[run],) = ax.plot(x_N, y_NL.mean(axis=1), markevery=-(-len(x_N) // 12), label=run, **style)
            if y_NL.shape[1] > 1:
                ax.fill_between(x_N, y_NL.min(axis=1), y_NL.max(axis=1), color=style["color"], alpha=0.25 / len(runs))
            ax.xaxis.get_major_locator().set_params(integer=np.asarray(x_N).dtype.kind == "i")
        ax.set(xlabel=xlabel, ylabel=ylabel.replace(" (", "\n("))
        ax.tick_params(labelbottom=True)
        ax.grid(axis="y")
    if len(lines) > 1:
        figure.legend(handles=list(lines.values()), loc="outside upper left", ncols=2 * min(len(panels), 2))
    return figure


@matplotlib.rc_context(LOOK)
def erc_by_alpha(erc, alphas, layers):
    """A panel a run, {run: erc_LA}: a line a layer, the lighter the deeper."""
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


def coupling_maps(M_LEE, layers):
    """A panel a layer: the diagonal stands out where router and experts are coupled."""
    labels = "expert", "router row (proxy)", MATRIX.axis
    return _square_maps(M_LEE, layers, labels)


def coactivation_maps(share_LEE, layers):
    """A panel a layer, without the diagonal, which is 1."""
    labels = "expert chosen as well", "chosen expert", COACTIVATION.unit
    return _square_maps(np.where(np.eye(share_LEE.shape[-1], dtype=bool), np.nan, share_LEE), layers, labels)


@matplotlib.rc_context(LOOK)
def load_maps(panels, ylabel, rows=None):
    """A panel a title, {title: shares of every expert}, with the names of its rows or their numbers."""
    figure, axes = _panels(len(panels), 2, 0.5)
    image = _draw(axes, panels, ("expert", ylabel), "auto")
    for ax in axes if rows else ():
        ax.set_yticks(**_ticks(rows))
    _colorbar(figure, axes, image, LOAD.unit)
    return figure


@matplotlib.rc_context(LOOK)
def gate_points(points_N2, owner_N):
    """The map of `diagnosis/gate_map.py`: a colour and a marker an expert."""
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
    panels = {f"layer {layer}": matrix_EE for layer, matrix_EE in zip(layers, matrix_LEE, strict=True)}
    _colorbar(figure, axes, _draw(axes, panels, labels[:2], "equal"), labels[2])
    return figure


def _draw(axes, panels, labels, aspect):
    """Every matrix in its axes, on one scale from 0; the last image stands for the scale."""
    highest = max(np.nanmax(matrix) for matrix in panels.values())
    for ax, (title, matrix) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(matrix, vmin=0, vmax=highest, aspect=aspect)
        ax.set(title=title, xlabel=labels[0], ylabel=labels[1])
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True, nbins=5)
    return image


def _colorbar(figure, axes, mappable, label):
    return figure.colorbar(mappable, ax=axes, label=label, aspect=20 * axes[0].get_gridspec().nrows)


def _ticks(names):
    """At most twelve."""
    every = -(-len(names) // 12)
    return {"ticks": range(0, len(names), every), "labels": names[::every]}


def _panels(count, columns, aspect, **share):
    """A figure, and its axes row by row: as wide as the page, or half as wide for one."""
    rows, columns = -(-count // columns), min(count, columns)
    width = WIDTH / max(columns, 2)
    figure = Figure(figsize=(width * columns, width * aspect * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **share).flat)
    for surplus in axes[count:]:
        surplus.remove()
    return figure, axes[:count]


def _style(number):
    cycles = {"color": COLORS, "linestyle": DASHES, "marker": MARKERS}
    return {name: cycle[number % len(cycle)] for name, cycle in cycles.items()}
