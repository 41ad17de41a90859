"""A report as one HTML file: its figures inside, no script, nothing fetched. It prints, and follows a dark desktop."""

import base64
from html import escape
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; font-size: 0.875rem; opacity: 0.8; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #8884; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; break-inside: avoid; }
img { max-width: 100%; background: white; }
"""


class Table(NamedTuple):
    """Cells are text, or become it by `str`."""

    columns: tuple
    rows: list
    caption: str = ""


class Picture(NamedTuple):
    """`alt` is what is read to someone who does not see it."""

    png: bytes
    alt: str
    caption: str = ""


class Section(NamedTuple):
    """A heading, and under it in this order what there is."""

    heading: str
    prose: str = ""  # paragraphs, between blank lines
    tables: tuple = ()
    pictures: tuple = ()


def page(title, sections):
    """The whole document; every text is shown as written, markup and all."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "".join(map(_section, sections))
        + "</body>\n</html>\n"
    )


def _section(section):
    paragraphs = "".join(f"<p>{escape(text)}</p>\n" for text in section.prose.split("\n\n") if text)
    tables, pictures = "".join(map(_table, section.tables)), "".join(map(_picture, section.pictures))
    return f"<section>\n<h2>{escape(section.heading)}</h2>\n{paragraphs}{tables}{pictures}</section>\n"


def _table(table):
    head, rows = _row("th", table.columns), "".join(_row("td", row) for row in table.rows)
    return f"<table>\n<caption>{escape(table.caption)}</caption>\n{head}{rows}</table>\n"


def _row(tag, cells):
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>\n"


def _picture(picture):
    source = "data:image/png;base64," + base64.b64encode(picture.png).decode()
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f'<figure><img src="{source}" alt="{escape(picture.alt)}">{caption}</figure>\n'
