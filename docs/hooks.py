"""What MkDocs does beside its plugins: the site names no file outside of it and no other host."""

import re
from pathlib import Path

SOURCE_LINK = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
POLYFILLS = "https://unpkg.com/"  # Material fetches Mermaid from there, and what browsers before 2020 lack


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links into the source, which a reader of the repository follows, are plain text on the site."""
    return SOURCE_LINK.sub(r"\1", markdown)


def on_post_build(config) -> None:
    for path in Path(config.site_dir).rglob("*.min.js"):
        path.write_text(path.read_text().replace(POLYFILLS, ""))
