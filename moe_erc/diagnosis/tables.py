"""The measures of a run as tables, by domain and by layer, and as a verdict in words."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_erc.diagnosis.html import Table
from moe_erc.diagnosis.layers import Layers
from moe_erc.measures import coupling, erc, validation
from moe_erc.measures.registry import GROUPS, MEASURES, of_group
from moe_erc.tables import print_table

BY_DOMAIN = (
    validation.LOSS,
    validation.BITS,
    validation.UNIGRAM,
    validation.BIGRAM,
    validation.TOKENS,
)

NOT_QUALITY = (
    "These figures describe coupling, not quality: in three released MoEs, no statistic of routing "
    "predicted which experts matter (arXiv 2606.10703)."
)


def by_layer(
    found: Mapping[str, Any], numbers: Sequence[int] | None = None, addition: str = ""
) -> list[Table]:
    """A table for every group of measures: a row for every layer, a column for every measure.

    numbers: of the layers in the model, if they are not 0, 1, 2, …
    addition: what follows each title
    """
    made = []
    for name, group in GROUPS.items():
        columns = _columns(name, found)
        if columns:
            count = len(next(iter(columns.values())))
            layers = range(count) if numbers is None else numbers
            rows = list(zip(layers, *columns.values(), strict=True))
            made.append(Table(("layer", *columns), rows, group.title + addition))
    return made


def _columns(group, found):
    """{label: cells} of the measures of a group that have one number for every layer."""
    columns = {}
    for measure in of_group(group, found):
        value_L = found[measure.key]
        if measure.per_layer and np.ndim(value_L) == 1:
            columns[measure.label] = [measure.show(value) for value in value_L]
    return columns


def by_domain(found: Mapping[str, Any]) -> Table:
    """Validation: a row for every domain, and last their mean."""
    measures = list(BY_DOMAIN)
    mean = validation.FLOOR_DISTANCE.of(validation.MEAN)
    if mean.key in found:
        measures.insert(1, validation.FLOOR_DISTANCE)
    rows = []
    for domain in (*validation.domains(found), validation.MEAN):
        row = [domain]
        for measure in measures:
            value = found.get(measure.of(domain).key)
            row.append("" if value is None else measure.show(value))
        rows.append(tuple(row))
    title = f"Validation, {validation.LOSS.unit}"
    return Table(("domain", *(measure.label for measure in measures)), rows, title)


def print_found(found: Mapping[str, Any]) -> None:
    """Print the measures of a report. A layer is a row, so that any number of layers fits."""
    domains = by_domain(found)
    print_table(domains.caption, domains.columns, domains.rows[:-1], domains.rows[-1:])
    print_tables(by_layer(found))
    if coupling.ALIGNMENT.key in found:
        print(textwrap.fill(NOT_QUALITY, 80))


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables on the screen."""
    for table in tables:
        print_table(table.caption, table.columns, [tuple(map(str, row)) for row in table.rows])


def of_layers(layers: Layers) -> list[Table]:
    """The tables of a diagnosis.

    The measures of the coupling matrix are shown with its scales and without (paper, Table 2).
    """
    with_scales = by_layer(layers.measures, layers.numbers)
    addition = ", without the norms of rows and gates"
    without_scales = by_layer(layers.normalized, layers.numbers, addition)
    return with_scales + without_scales


def verdict(found: Mapping[str, np.ndarray]) -> str:
    """Whether router and experts are coupled, in a paragraph, from the measures of a diagnosis."""
    erc_L = found[erc.ERC.key]
    vanishes = np.max(found[erc.VANISHING_ALPHA.key])
    rows = np.mean(found[coupling.DIAGONAL_ROWS.key])
    displaced = np.mean(found[coupling.DISPLACED.key])
    held = np.mean(found[coupling.ALIGNMENT.key])
    return (
        f"{np.sum(erc_L == 0)} of {len(erc_L)} layers are coupled: their {erc.ERC.label} is 0. "
        f"Its mean over layers is {np.mean(erc_L):.3g}; "
        f"it vanishes in all of them at alpha {vanishes:.3g}. "
        f"{rows:.0%} of the router rows excite their own expert most; "
        f"the best one-to-one matching would give {displaced:.0%} of them another one. "
        f"A row excites its gate with {held:.0%} of what the gate's strongest direction would. "
        f"{NOT_QUALITY}"
    )


def markdown(table: Table) -> str:
    """A `Table` in Markdown."""
    rule = ["---"] * len(table.columns)
    lines = []
    for row in (table.columns, rule, *table.rows):
        cells = " | ".join(map(str, row))
        lines.append(f"| {cells} |")
    return f"**{table.caption}**\n\n" + "\n".join(lines)


def catalogue() -> str:
    """Every measure in Markdown, by key: what `docs/measures.md` shows."""
    rows = []
    for measure in MEASURES.values():
        key = measure.key if measure.name else f"{measure.key}/NAME"
        by = "layer" if measure.per_layer else ""
        rows.append((f"`{key}`", measure.label, measure.unit, by, measure.better or ""))
    columns = ("key", "label", "unit", "by", "better")
    return markdown(Table(columns, rows, "Measures by key"))
