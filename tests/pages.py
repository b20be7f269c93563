"""What every page that the package writes must hold: one file, whole, that asks nothing of anybody."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "br", "hr", "input"}
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


class Parsed(HTMLParser):
    """The elements of a page, in order; text by the tag that holds it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text.strip() for name, text in self.texts if name == tag and text.strip()]


def check(path: Path) -> Parsed:
    """Parses a page and holds it to its promises."""
    text = path.read_text(encoding="utf-8")
    page = Parsed(text)
    assert text.startswith("<!DOCTYPE html>") and page.all("html")[0]["lang"] == "en"
    for image in page.all("img"):
        assert image["src"].startswith("data:image/png;base64,") and image["alt"]
        assert base64.b64decode(image["src"].partition(",")[2], validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    names = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(names) == len(set(names))
    links = [attrs["href"] for attrs in page.all("a")]
    assert links and all(link.startswith("#") and link[1:] in names for link in links)
    assert len(page.all("nav")) == 1 and len(page.all("h1")) == 1
    assert any(attrs.get("name") == "viewport" for attrs in page.all("meta"))  # readable on a phone
    assert not {"script", "iframe", "object", "embed", "video", "audio", "form"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert not re.search(r"url\(|@import|https?://", "".join(text for tag, text in page.texts if tag == "style"))
    assert all(attrs["href"].startswith("data:") for attrs in page.all("link"))
    return page


def look(path: Path, folder: Path, width: int = 420) -> tuple[int, int, int, str]:
    """Opens a page in a real browser: pictures, broken ones among them, pixels that stick out, what the console says."""
    assert BROWSER is not None
    probe = folder / "probe.html"
    script = (
        "<script>addEventListener('load', () => { const all = [...document.images];"
        "const out = document.documentElement.scrollWidth - document.documentElement.clientWidth;"
        "document.title = `${all.length} ${all.filter(i => !i.complete || !i.naturalWidth).length} ${out}` })</script>"
    )
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8"))
    probe.write_text(text.replace("</body>", script + "</body>"), encoding="utf-8")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},900",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom",
    ]  # fmt: skip

    def run(page: Path) -> subprocess.CompletedProcess[str]:
        command = [BROWSER or "", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    console = "\n".join(line for line in run(path).stderr.splitlines() if "CONSOLE" in line)
    title = re.search(r"<title>(\d+) (\d+) (\d+)</title>", run(probe).stdout)
    assert title is not None
    count, broken, out = map(int, title.groups())
    return count, broken, out, console
