"""The site: builds without a warning, and every link, anchor and picture in it is there."""
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("mkdocs_jupyter")


class Links(HTMLParser):
    "What a page points to, and what in it can be pointed at."
    def __init__(self, text):
        super().__init__()
        self.to, self.ids = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[k] for k in ("id", "name") if found.get(k)}
        self.to |= {found[k] for k in ("href", "src") if found.get(k)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site without code cells and pictures of notebooks: all their text, headings and links, in a fraction of the time."
    home = tmp_path_factory.mktemp("site")
    for name in ("nbs", "avnb", "figures"): (home / name).symlink_to(ROOT / name)
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff"): shutil.copy(ROOT / name, home)
    (home / "_docs").mkdir()
    text = (ROOT / "mkdocs.yml").read_text().replace("  - search\n", "").replace("execute: false,", "execute: false, cache: false,")
    (home / "mkdocs.yml").write_text(text + "extra: {bare: true}\n")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=home, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return home / "_site"


@pytest.mark.quick
def test_links_of_notebooks_lead_somewhere():
    "Files and notebooks alone; the built pages and their anchors are looked at by `make soak`, since a site takes most of a minute."
    gone = []
    for notebook in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(notebook.read_text())["cells"]:
            text = re.sub(r"```.*?```|`[^`]*`", "", "".join(cell["source"]), flags=re.S) if cell["cell_type"] == "markdown" else ""
            for link in re.findall(r"\]\(([^)\s]+)\)", text):
                if re.match(r"[a-zA-Z][\w+.-]*:|#", link): continue
                if not (notebook.parent / unquote(link.partition("#")[0])).exists(): gone.append(f"{notebook.name}: {link}")
    assert not gone, "\n".join(gone)


@pytest.mark.soak
def test_every_link_and_anchor_resolves(site):
    pages = {p: Links(p.read_text()) for p in site.rglob("*.html")}
    assert len(pages) > 150
    gone = []
    for page, found in pages.items():
        if page.name == "404.html": continue  # its links are absolute: where a server's root is, nobody knows
        for link in found.to:
            if re.match(r"[a-zA-Z][\w+.-]*:|//", link): continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path.partition("?")[0])).resolve() if path else page
            if not target.exists(): gone.append(f"{page.relative_to(site)}: {link}")
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids: gone.append(f"{page.relative_to(site)}: no {link}")
    assert not gone, f"{len(gone)} links lead nowhere:\n" + "\n".join(sorted(gone)[:40])


@pytest.mark.soak
def test_all_notebooks_modules_and_results_have_a_page(site):
    for notebook in (ROOT / "nbs").glob("[!._]*.ipynb"):
        assert notebook.stem == "index" or (site / "nbs" / f"{notebook.stem}.html").is_file(), notebook.name
    modules = [p.stem for p in (ROOT / "avnb").glob("[!_]*.py")]
    assert all((site / "api" / f"{m}.html").is_file() for m in modules)
    results = (site / "results.html").read_text()
    assert all(f'id="{p.stem.lower()}"' in results for p in (ROOT / "figures").glob("*.json"))
    from avnb.core import __all__ as names
    assert all(f">{n}" in (site / "api" / "core.html").read_text() for n in names)


@pytest.mark.soak
def test_no_page_needs_another_machine_to_be_read(site):
    "Scripts, styles and fonts lie in the site; mathematics alone is set by MathJax from its own server, and diagrams, of which there are none, would be by Mermaid."
    for page in site.rglob("*.html"):
        text = page.read_text()
        for link in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="((?:https?:)?//[^"]+)"', text):
            assert re.search(r"mathjax", link, re.I) or 'rel="canonical"' in text, f"{page.relative_to(site)}: {link}"
