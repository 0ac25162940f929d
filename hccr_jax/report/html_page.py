"""The parts of pages that need nothing but a browser."""

import base64
import html
from collections.abc import Mapping, Sequence

STYLE = """
:root { color-scheme: light; --ink: #22262b; --quiet: #5d656e; --rule: #e3e6ea; --blue: #2f6db5 }
* { box-sizing: border-box }
body { margin: 0; background: #f5f6f8; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1rem 3rem }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 0 0 .75rem; font-size: 1.1rem }
.quiet { margin: .25rem 0 1.25rem; color: var(--quiet) }
section { background: #fff; border: 1px solid var(--rule); border-radius: .6rem;
  padding: 1.1rem 1.25rem; margin-top: 1rem }
.figures { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)) }
.figures div { background: #fff; border: 1px solid var(--rule); border-radius: .6rem;
  padding: .7rem .9rem }
.figures dt { color: var(--quiet); font-size: .85rem }
.figures dd { margin: 0; font-size: 1.4rem; font-weight: 650; line-height: 1.3;
  overflow-wrap: anywhere }
.figures div.main dd { color: var(--blue) }
dl { margin: 0 }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem }
img { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto }
.scroll img { min-width: 42rem }
table { border-collapse: collapse; width: 100%; max-width: 34rem;
  font-variant-numeric: tabular-nums }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--rule); text-align: left }
th { font-weight: 400; color: var(--quiet) }
td, thead th + th { text-align: right }
tr:last-child > * { border-bottom: 0 }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 700 }
pre { margin: .75rem 0 0; overflow-x: auto; font-size: .85rem; line-height: 1.45 }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """Returns a whole HTML file of the parts that are not empty."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def image(png: bytes, what: str) -> str:
    """Returns a picture, held by the page itself; `what` says what it shows."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(what)}">'


def table(heading: str, rows: Mapping[str, str]) -> str:
    """Returns a section of names and values; nothing where there are none."""
    if not rows:
        return ""
    lines = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f'<section><h2>{heading}</h2><div class="scroll"><table>{lines}</table></div></section>'


def grid(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Returns a table with a head; each row begins with its name."""
    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    lines = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows.items()
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"
