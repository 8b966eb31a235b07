"""Brings into the site what lies outside docs/: a few pages of the repository, and the plots.

Sources link to what they mean where they lie, so that a checkout can be read without the site;
here the links are turned to where the copies are.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Page of the site -> file of the repository.
PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "csrc.md": "csrc/README.md",
}
# Folder of the site -> folder of the repository.
PLOTS = {"plots": "benchmarks/results", "frontier-plots": "examples/frontier/figures"}
_LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for folder, source in PLOTS.items():
        for plot in sorted((ROOT / source).glob("*.png")):
            files.append(File.generated(config, f"{folder}/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    source = PAGES.get(uri, f"docs/{uri}")

    def turned(link):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        target = _in_site(path)
        if target is None:
            return link[0]
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(uri) or '.')}{link[3]}"

    return _LINK.sub(turned, markdown)


def _in_site(path: str) -> str | None:
    """Where the file of the repository is in the site; None where it is not."""
    for page, source in PAGES.items():
        if path == source:
            return page
    for folder, source in PLOTS.items():
        if path.startswith(f"{source}/"):
            return f"{folder}/{path.removeprefix(f'{source}/')}"
    return path.removeprefix("docs/") if path.startswith("docs/") else None
