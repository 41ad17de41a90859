"""The diagnosis of a model from router rows and gates: tables, diagnosis.json, diagnosis.md."""

from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from moe_erc.checks import BadInput
from moe_erc.diagnosis.layers import Layers, diagnose
from moe_erc.diagnosis.report import write_report, write_text
from moe_erc.diagnosis.tables import markdown, of_layers, print_tables, verdict
from moe_erc.measures.coupling import MATRIX


def report_diagnosis(
    directory: epath.Path, name: str, layers: Iterable, numbers: Sequence[int]
) -> None:
    """Diagnose layers (router_ED, w_gate_EDF) with these numbers; print and write what is found."""
    found = diagnose(layers, numbers)
    print_tables(of_layers(found))
    print(f"{name}: {verdict(found.measures)}")
    write_diagnosis(directory, name, found, draw(directory, name, found))


def draw(directory: epath.Path, name: str, found: Layers) -> dict[str, str]:
    """Write the figures, and return {path below the directory: caption}.

    Without the extra `plot` there are none, and a line says so: the tables are the diagnosis.
    """
    try:
        from moe_erc.diagnosis.documents import write_figures
    except BadInput as missing:
        print(f"no figures are drawn: {missing}")
        return {}
    measures = found.measures | {MATRIX.key: found.matrices["raw"]}
    pictures = write_figures(directory, {name: {"measures": measures, "layers": found.numbers}})
    return {path: caption for path, (_, caption) in pictures.items()}


def write_diagnosis(
    directory: epath.Path, name: str, found: Layers, pictures: Mapping[str, str]
) -> None:
    """Write diagnosis.json and diagnosis.md.

    `pictures` are {path below the directory: caption}.
    """
    measured = {
        "layers": list(found.numbers),
        "measures": found.measures,
        "normalized": found.normalized,
    }
    write_report(directory / "diagnosis.json", measured)
    parts = [f"# Diagnosis of {name}", verdict(found.measures), *map(markdown, of_layers(found))]
    parts += [f"![{caption}]({path})\n\n{caption}" for path, caption in pictures.items()]
    write_text(directory / "diagnosis.md", "\n\n".join(parts) + "\n")
