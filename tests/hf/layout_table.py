"""The table of families in docs/huggingface.md: a row for each set of names and layouts.

python -m tests.hf.layout_table
"""

import json
import pathlib

from moe_erc.hf import layouts
from moe_erc.hf.families import FAMILIES

PATH = pathlib.Path(__file__).with_name("layouts.json")
WORDS = {
    layout: name.lower()
    for name, layout in vars(layouts).items()
    if isinstance(layout, layouts.Layout)
}


def load():
    """What `make_layouts.py` wrote: {"transformers": version, "models": {model type: record}}."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def markdown():
    """The table."""
    recorded = load()
    tested = {record["family"] for record in recorded["models"].values()}
    rows = {}
    for name, family in FAMILIES.items():
        version = f"transformers {recorded['transformers']}" if name in tested else "no model of it"
        rows.setdefault((family, version), []).append(f"`{name}`")
    lines = ["| families | router | gates | tested with |", "| --- | --- | --- | --- |"]
    for (family, version), names in rows.items():
        columns = (", ".join(names), cell(family.routers), cell(family.gates), version)
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def cell(matrices):
    """The names of a matrix after the number of the layer, and the layouts that each may have."""
    found = {}
    for name, layout in matrices:
        found.setdefault(name or layout.parts[0].suffix, []).append(WORDS[layout])
    lines = [f"`{name}` {' or '.join(words)}" for name, words in found.items()]
    return "<br>".join(line.removesuffix(" router") for line in lines)


if __name__ == "__main__":
    print(markdown())
