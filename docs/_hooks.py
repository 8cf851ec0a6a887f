"""What mkdocs asks while it builds the site (mkdocs.yml): pages link to source files, which are no pages.

A link out of docs/ gets a page of its own with the file in it, or with what a folder holds, so that the site is whole
without a network; one that leads nowhere stays, and fails the build.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".md": "markdown", ".toml": "toml", ".sh": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for everything in the project that a page links to."""
    root = Path(config.docs_dir).parent
    pages = [file for file in files if file.is_documentation_page()]
    for name in sorted({match[1].rstrip("/") for page in pages for match in OUTSIDE.finditer(page.content_string)}):
        if (root / name).exists():
            file = File.generated(
                config, _page(name), content=_content(root / name, name), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Links out of docs/ lead to those pages."""
    if page.file.generated_by:
        return markdown

    def link(match: re.Match[str]) -> str:
        page = _page(match[1].rstrip("/"))
        return f"]({page})" if files.get_file_from_path(page) else match[0]

    return OUTSIDE.sub(link, markdown)


def _page(name: str) -> str:
    return f"source/{name.lstrip('.')}.md"  # a name with a dot before it is left out of sites


def _content(path: Path, name: str) -> str:
    head = f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n"
    if path.is_dir():
        return head + "\n".join(f"- `{entry.name}`" for entry in sorted(path.iterdir()) if entry.name[0] not in "._")
    return head + f"``````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n``````\n"
