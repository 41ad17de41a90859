"""What was measured as tables, of validation and by layer, and in a few words. On screen, and in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_erc.diagnosis.html import Table
from moe_erc.diagnosis.layers import Layers
from moe_erc.measures import coupling, erc, validation
from moe_erc.measures.registry import GROUPS, MEASURES
from moe_erc.tables import print_table

BY_DOMAIN = (validation.LOSS, validation.BITS, validation.UNIGRAM, validation.BIGRAM, validation.TOKENS)


def by_layer(found: Mapping[str, Any], numbers: Sequence[int] | None = None, addition: str = "") -> list[Table]:
    """A table for every group that has measures by layer: a row for every layer, a column for every measure.

    numbers: of the layers in the model, if they are not 0, 1, 2, …; `addition` goes behind each title.
    """
    made = []
    for name, group in GROUPS.items():
        shown = [measure for measure in MEASURES.values() if measure.group == name and _is_by_layer(measure, found)]
        if not shown:
            continue
        layers = range(len(found[shown[0].key])) if numbers is None else numbers
        columns_CL = [[measure.show(value) for value in found[measure.key]] for measure in shown]
        rows = list(zip(layers, *columns_CL, strict=True))
        made.append(Table(("layer", *(measure.label for measure in shown)), rows, group.title + addition))
    return made


def _is_by_layer(measure, found):
    return measure.per_layer and measure.key in found and np.ndim(found[measure.key]) == 1


def by_domain(found: Mapping[str, Any]) -> Table:
    """Validation: a row for every domain, and last their mean."""
    rows = []
    for domain in (*validation.domains(found), validation.MEAN):
        keys = [measure.of(domain).key for measure in BY_DOMAIN]
        cells = [measure.show(found[key]) if key in found else "" for measure, key in zip(BY_DOMAIN, keys, strict=True)]
        rows.append((domain, *cells))
    title = f"Validation, {validation.LOSS.unit}"
    return Table(("domain", *(measure.label for measure in BY_DOMAIN)), rows, title)


def print_found(found: Mapping[str, Any]) -> None:
    """The measures of a report, on screen. A layer is a row, so that any number of them fits."""
    domains = by_domain(found)
    print_table(domains.caption, domains.columns, domains.rows[:-1], domains.rows[-1:])
    print_tables(by_layer(found))


def print_tables(tables: Sequence[Table]) -> None:
    """On screen."""
    for table in tables:
        print_table(table.caption, table.columns, [tuple(map(str, row)) for row in table.rows])


def of_layers(layers: Layers) -> list[Table]:
    """The tables of a diagnosis: of the matrices with their scales and without (paper, Table 2), and of the weights."""
    without = ", without the norms of rows and gates"
    return by_layer(layers.measures, layers.numbers) + by_layer(layers.normalized, layers.numbers, without)


def verdict(found: Mapping[str, np.ndarray]) -> str:
    """Whether router and experts are coupled, in a paragraph, from the measures of a diagnosis."""
    erc_L = found[erc.ERC.key]
    vanishes = np.max(found[erc.VANISHING_ALPHA.key])
    rows = np.mean(found[coupling.DIAGONAL_ROWS.key])
    displaced = np.mean(found[coupling.DISPLACED.key])
    held = np.mean(found[coupling.ALIGNMENT.key])
    return (
        f"{np.sum(erc_L == 0)} of {len(erc_L)} layers are coupled: their {erc.ERC.label} is 0. Its mean over layers is "
        f"{np.mean(erc_L):.3g}; it vanishes in all of them at alpha {vanishes:.3g}. {rows:.0%} of the router rows "
        f"excite their own expert most; the best one-to-one matching would give {displaced:.0%} of them another one. "
        f"A row excites its gate with {held:.0%} of what the gate's strongest direction would."
    )


def markdown(table: Table) -> str:
    """A `Table` in Markdown."""
    rule = ["---"] * len(table.columns)
    rows = ["| " + " | ".join(map(str, row)) + " |" for row in (table.columns, rule, *table.rows)]
    return f"**{table.caption}**\n\n" + "\n".join(rows)
