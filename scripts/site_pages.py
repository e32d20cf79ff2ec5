"""A hook of mkdocs: the pages and pictures of the site that lie outside docs/, and links that fit both places.

In the repository a page links to files by their place. On the site README.md is index.md, and all pages are in one
folder; links are rewritten for that.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {  # place in the repository -> name on the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "samplers/README.md": "samplers.md",
    "assets/tiny-sdxl/README.md": "tiny-sdxl.md",
    "assets/tiny-dit/README.md": "tiny-dit.md",
    "assets/shapes-preferences/README.md": "shapes-preferences.md",
}
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")  # targets without a scheme


def on_files(files: Any, config: Any) -> Any:
    for place, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / place)))
    for picture in sorted((ROOT / "assets").rglob("*.png")):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    name = page.file.src_uri
    place = next((place for place, page in PAGES.items() if page == name), f"docs/{name}")
    return LINK.sub(lambda link: rewritten(link, posixpath.dirname(place)), markdown)


def rewritten(link: re.Match[str], folder: str) -> str:
    """A link of a page in ``folder`` of the repository as a link between pages of the site."""
    target = posixpath.normpath(posixpath.join(folder, link[2]))
    target = PAGES.get(target, target.removeprefix("docs/"))
    return f"{link[1]}{target}{link[3] or ''}{link[4]}"
