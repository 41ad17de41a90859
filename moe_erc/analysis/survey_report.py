"""What a survey of a model's coupling found: a verdict, tables on screen and in Markdown, numbers as JSON, figures."""

import numpy as np

from moe_erc.analysis.coupling import ALPHAS
from moe_erc.analysis.html import Table
from moe_erc.analysis.report import ROWS, write_report, write_text
from moe_erc.analysis.survey import survey
from moe_erc.tables import print_table

HEADINGS = ROWS | {"displaced": "displaced_L", "matching gain": "matching_gain_L"}  # heading -> measure by layer
OWN_EXPERTS = ("diagonal rows", "diagonal columns", "displaced", "matching gain")
WEIGHTS = ("noise bound", "alignment", "row cosine", "router norm", "router spread", "gate norm", "gate spread")


def report_survey(directory, name, layers, numbers):
    """Surveys (router_ED, w_gate_EDF) by layer, numbered so; prints what is found and writes it into the directory."""
    from moe_erc.analysis.run_report import write_figures  # needs the extra `plot`

    measures, matrices = survey(layers)
    print_survey(name, measures, numbers)
    drawn = {"report": {"coupling": measures}, "coupling": {"layers": numbers, "matrix_LEE": matrices["raw"]}}
    pictures = write_figures(directory, {name: drawn})
    write_survey(directory, name, measures, numbers, {path: caption for path, (_, caption) in pictures.items()})


def verdict(measures):
    """Whether router and experts are coupled, in a paragraph."""
    erc_L, vanishes = measures["erc_LA"][:, 0], np.max(measures["vanishing_alpha_L"])
    rows, displaced, held = (np.mean(measures[f"{name}_L"]) for name in ("diagonal_rows", "displaced", "alignment"))
    return (
        f"{np.sum(erc_L == 0)} of {len(erc_L)} layers are coupled: their ERC at alpha 1 is 0. Its mean over layers is "
        f"{np.mean(erc_L):.3g}; it vanishes in all of them at alpha {vanishes:.3g}. {rows:.0%} of the router rows "
        f"excite their own expert most; the best one-to-one matching would give {displaced:.0%} of them another one. "
        f"A row excites its gate with {held:.0%} of what the gate's strongest direction would."
    )


def tables(measures, layers):
    """The matrices with and without their scales (paper, Table 2), and the weights (Table 3): a row a layer."""
    made = []
    for form, found in (("", measures), (", without the norms of rows and gates", measures["normalized"])):
        by_alpha = {f"{alpha:g}": erc_L for alpha, erc_L in zip(ALPHAS, found["erc_LA"].T, strict=True)}
        noisy = {"1, noisy": found["noisy_erc_LA"][:, 0], "vanishes at": found["vanishing_alpha_L"]}
        made.append(_table(f"ERC by alpha{form}", layers, by_alpha | noisy))
        made.append(_table(f"Own experts{form}", layers, _select(found, OWN_EXPERTS)))
    return [*made, _table("Router rows and gates", layers, _select(measures, WEIGHTS))]


def _select(measures, headings):
    return {heading: measures[HEADINGS[heading]] for heading in headings}


def _table(caption, layers, columns):
    cells = ([f"{value:.3f}" for value in value_L] for value_L in columns.values())
    return Table(("layer", *columns), list(zip(layers, *cells, strict=True)), caption)


def print_survey(name, measures, layers):
    """On screen."""
    for made in tables(measures, layers):
        print_table(made.caption, made.columns, [tuple(map(str, row)) for row in made.rows])
    print(f"{name}: {verdict(measures)}")


def write_survey(directory, name, measures, layers, pictures):
    """coupling.json and coupling.md, which shows the `pictures`, {path below the directory: caption}."""
    write_report(directory / "coupling.json", {"layers": layers, "alphas": ALPHAS} | measures)
    parts = [f"# Coupling of {name}", verdict(measures), *map(markdown, tables(measures, layers))]
    parts += [f"![{caption}]({path})\n\n{caption}" for path, caption in pictures.items()]
    write_text(directory / "coupling.md", "\n\n".join(parts) + "\n")


def markdown(table):
    """A `Table` in Markdown."""
    rule = ["---"] * len(table.columns)
    rows = ("| " + " | ".join(map(str, row)) + " |" for row in (table.columns, rule, *table.rows))
    return f"**{table.caption}**\n\n" + "\n".join(rows)
