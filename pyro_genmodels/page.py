"""One self-contained HTML page: text, tables, code and pictures in one file that asks nothing of any server.

Pictures are PNGs inside the page, and the page's own policy forbids a browser to load anything from elsewhere. All text is
escaped: what a data set calls its columns cannot become markup.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page", "write_whole"]

_DOTS = 150  # an inch
_PNG = b"\x89PNG\r\n\x1a\n"
_NUMBER = re.compile(r"[-+−]?(\d[\d,]*\.?\d*|\.\d+)([eE][-+]?\d+)?( ?(±.*|%|s|x|×))?|nan|-|")

_STYLE = """
:root { --ink: #22262c; --soft: #5d6672; --line: #dfe3e8; --wash: #f6f7f9; --accent: #3b6fb6;
  --good: #2c7a57; --bad: #b3432b }
* { box-sizing: border-box }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100% }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
header, main, footer { max-width: 60rem; margin: 0 auto; padding: 0 1.25rem }
header { padding-top: 2.5rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .7rem; padding-top: .7rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .5rem; overflow-wrap: anywhere }
p { margin: .5rem 0; max-width: 46rem } .soft, figcaption, footer { color: var(--soft) }
a { color: var(--accent); text-decoration: none } a:hover { text-decoration: underline }
nav { margin: 1.4rem 0 0; padding: .8rem 1rem; background: var(--wash); border-radius: 8px; font-size: .93rem }
nav ul { list-style: none; margin: 0; padding: 0; columns: 13rem auto; column-gap: 1.5rem }
nav li { padding: .16rem 0; break-inside: avoid }
ul.findings { padding: 0; list-style: none; max-width: 50rem }
ul.findings li { margin: .45rem 0; padding: .5rem .8rem; background: var(--wash); border-left: 3px solid var(--bad);
  border-radius: 0 6px 6px 0; overflow-wrap: anywhere }
ul.findings li.good { border-left-color: var(--good) }
.scroll { overflow-x: auto; margin: .7rem 0 }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
thead th { border-bottom: 2px solid var(--line); white-space: nowrap; font-weight: 600 }
tbody th { font-weight: 500 } td.number, th.number { text-align: right; white-space: nowrap }
td.good { color: var(--good); font-weight: 600 } td.bad { color: var(--bad); font-weight: 600 }
pre { background: var(--wash); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; margin: .7rem 0;
  font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
details { margin: .7rem 0 } summary { cursor: pointer; color: var(--accent) }
figure { margin: 1rem 0 } figure img { display: block; max-width: 100%; height: auto } figcaption { font-size: .88rem;
  margin-top: .35rem; max-width: 46rem }
footer { padding: 2rem 1.25rem 3rem; font-size: .85rem }
@media (max-width: 40rem) { body { font-size: 15px } header { padding-top: 1.4rem } h1 { font-size: 1.5rem } }
@media print { nav { display: none } figure, tr { break-inside: avoid } }
"""


class Page:
    """A page that is written from top to bottom.

    Args:
        title: What it is about.
        subtitle: One line below; "" for none.

    Example:
        >>> page = Page("Old Faithful")
        >>> page.section("Estimates")
        >>> page.table(["site", "mean"], [["weight", "0.64"]])
        >>> "<td class=\\"number\\">0.64</td>" in page.html()
        True
    """

    MARK: ClassVar[str] = "Written by pyro-genmodels"

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._contents: list[tuple[str, str]] = []
        self._ids: set[str] = {"top"}

    def section(self, title: str) -> None:
        """Begins a section, which the table of contents lists."""
        name = self._id(title)
        self._contents.append((name, title))
        self._parts.append(f'<h2 id="{name}">{html.escape(title)}</h2>')

    def heading(self, title: str) -> None:
        """Begins a part of a section."""
        self._parts.append(f'<h3 id="{self._id(title)}">{html.escape(title)}</h3>')

    def text(self, text: str, soft: bool = False) -> None:
        """A paragraph; ``soft`` for what is said in passing."""
        self._parts.append(f"<p{' class=soft' * soft}>{html.escape(text)}</p>")

    def findings(self, lines: Iterable[str], none: str = "Nothing found.") -> None:
        """What is to be looked at, a box a sentence; where there is nothing, ``none`` in a quiet one."""
        items = [f"<li>{html.escape(line)}</li>" for line in lines] or [f'<li class="good">{html.escape(none)}</li>']
        self._parts.append(f'<ul class="findings">{"".join(items)}</ul>')

    def code(self, text: str, title: str = "") -> None:
        """Text as it stands: a program, what a command printed. With a title it is folded away below that."""
        block = f"<pre>{html.escape(text.rstrip())}</pre>"
        fold = f"<details><summary>{html.escape(title)}</summary>{block}</details>"
        self._parts.append(fold if title else block)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], marks: dict[str, str] | None = None) -> None:
        """A table; columns of numbers are set flush right.

        Args:
            header: Names of the columns, (columns,); an empty one leaves the heads out.
            rows: Cells, each of the header's length.
            marks: Cell to "good" or "bad", which colours it.
        """
        count = len(rows[0]) if rows else len(header)
        numeric = [
            i > 0 and any(row[i] for row in rows) and all(_NUMBER.fullmatch(row[i]) for row in rows) for i in range(count)
        ]
        classes = [["number"] * numeric[i] for i in range(count)]
        heads = "".join(_cell("th", name, classes[i]) for i, name in enumerate(header))
        body = []
        for row in rows:
            cells = [
                _cell("td" if i else "th", cell, [*classes[i], *([(marks or {})[cell]] if cell in (marks or {}) else [])])
                for i, cell in enumerate(row)
            ]
            body.append(f"<tr>{''.join(cells)}</tr>")
        head = f"<thead><tr>{heads}</tr></thead>" if header else ""
        self._parts.append(f'<div class="scroll"><table>{head}<tbody>{"".join(body)}</tbody></table></div>')

    def picture(self, figure: Figure | bytes, description: str, caption: str = "") -> None:
        """A picture, inside the page.

        Args:
            figure: A matplotlib figure, or the bytes of a PNG file.
            description: What it shows, for who cannot see it.
            caption: What to see in it.

        Raises:
            ValueError: If the bytes are no PNG.
        """
        data = figure if isinstance(figure, bytes) else _png(figure)
        if not data.startswith(_PNG):
            raise ValueError(f"The picture '{description}' is no PNG: it begins with {data[:8]!r}.")
        width = int.from_bytes(data[16:20], "big")
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        shown = f'<img src="{source}" alt="{html.escape(description)}" width="{round(width * 96 / _density(data))}">'
        self._parts.append(f"<figure>{shown}{below}</figure>")

    def html(self) -> str:
        """The page."""
        from pyro_genmodels import __version__

        title, sub = html.escape(self.title), html.escape(self.subtitle)
        links = "".join(f'<li><a href="#{name}">{html.escape(text)}</a></li>' for name, text in self._contents)
        contents = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if links else ""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">"
            f'<title>{title}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n'
            f'<body><header id="top"><h1>{title}</h1>{f"<p class=soft>{sub}</p>" if sub else ""}{contents}</header>\n'
            f"<main>\n{chr(10).join(self._parts)}\n</main>\n"
            f'<footer>{self.MARK} {__version__}. <a href="#top">Back to the top</a></footer></body></html>\n'
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the page, whole or not at all: what was there stays if it fails.

        Raises:
            OSError: If it cannot be written.
        """
        write_whole(path, lambda fresh: fresh.write_text(self.html(), encoding="utf-8"))

    def _id(self, title: str) -> str:
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"
        name, count = stem, 2
        while name in self._ids:
            name, count = f"{stem}-{count}", count + 1
        self._ids.add(name)
        return name


def write_whole(path: str | os.PathLike[str], write: Any) -> None:
    """Writes a file under another name first: what was there stays if it fails.

    Args:
        path: The file; folders are made.
        write: Takes the place to write to, a ``Path`` of the same ending.

    Raises:
        OSError: If it cannot be written; the message names the file.
    """
    target = Path(path)
    fresh = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(fresh)
        fresh.replace(target)
    except OSError as error:
        raise OSError(f"Cannot write '{path}': {error.strerror or error}.") from error
    finally:
        fresh.unlink(missing_ok=True) if target.parent.is_dir() else None


def _cell(tag: str, text: str, classes: Sequence[str]) -> str:
    named = f' class="{" ".join(classes)}"' if classes else ""
    return f"<{tag}{named}>{html.escape(text)}</{tag}>"


def _density(data: bytes) -> float:
    """Dots an inch of a PNG, as its chunk pHYs says, in dots a metre."""
    place = data.find(b"pHYs", 0, 10_000)
    dots = int.from_bytes(data[place + 4 : place + 8], "big") * 0.0254
    return dots if place > 0 and dots >= 1.0 else _DOTS


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DOTS)
    return stream.getvalue()
