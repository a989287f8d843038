"""Pages of the site that are made when it is built, so that they cannot go stale.

- the reference of the commands, from what `--help` prints from;
- the reference of the Python packages, from their docstrings (through mkdocstrings);
- documents and source files outside `docs/` that a page links to, so that no link leaves the site.
"""

import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from command_pages import command_pages

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = {"genomamba": ".", "audiomamba": ".", "mambacore": "kernels"}
# A link of Markdown: its text is kept, its target without the anchor and the anchor.
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
# Code is not searched for links.
CODE = re.compile(r"^```.*?^```$|^(?: {4}[^\n]*\n)+|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LISTING_LANGUAGES = {".py": "python", ".cpp": "cpp", ".h": "cpp", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml"}


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation."""
    generated = {
        "commands": [{title: path} for path, title, _ in command_pages()],
        "python": [{title: path} for path, title, _ in python_pages()],
    }
    config.nav = _fill(config.nav, generated)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and all that the pages link to outside `docs/`."""
    pages = {path: text for path, _, text in [*command_pages(), *python_pages()]}
    waiting = [*_entries(config.nav)]
    waiting += [file.src_uri for file in files.documentation_pages()]
    seen: set[str] = set()
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        source = _source(page)
        if page in pages or not source.is_file():
            continue
        if page.startswith("repository/"):
            pages[page] = _text(source)
        if source.suffix == ".md":
            waiting += [site for _, site in _outside_links(source) if site]
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for path in _pictures(pages):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files of the repository into links to their pages."""
    source = _source(page.file.src_uri)
    if source.suffix != ".md" or not source.is_file():
        return markdown
    here = posixpath.dirname(page.file.src_uri)
    pages = dict(_outside_links(source))

    def rewritten(match: re.Match[str]) -> str:
        site = pages.get(match[1])
        return match[0] if site is None else posixpath.relpath(site, here or ".") + (match[2] or "")

    return _outside_code(markdown, lambda text: LINK.sub(rewritten, text))


def python_pages() -> list[tuple[str, str, str]]:
    """A page per package folder: its path, its title, and a directive for each of its modules."""
    pages = []
    for package, root in PACKAGES.items():
        for initial in sorted((REPOSITORY / root / package).rglob("__init__.py")):
            name = ".".join(initial.parent.relative_to(REPOSITORY / root).parts)
            modules = [f"{name}.{path.stem}" for path in sorted(initial.parent.glob("*.py")) if path.stem[0] != "_"]
            directives = "\n\n".join(f"::: {module}" for module in modules)
            overview = f"::: {name}\n    options: {{members: false, show_root_heading: false}}\n"
            pages.append((f"reference/python/{name}.md", name, f"# {name}\n\n{overview}\n{directives}\n"))
    return pages


def _fill(nav: Any, generated: dict[str, list[Any]]) -> Any:
    """`nav` with every `generated NAME` replaced."""
    if isinstance(nav, list):
        return [_fill(entry, generated) for entry in nav]
    if isinstance(nav, dict):
        return {title: _fill(value, generated) for title, value in nav.items()}
    return generated[nav.split()[1]] if nav.startswith("generated ") else nav


def _entries(nav: Any) -> Iterator[str]:
    """The pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _entries(entry)


def _source(page: str) -> Path:
    """The file of the repository that a page of the site is made from."""
    if not page.startswith("repository/"):
        return REPOSITORY / "docs" / page
    path = REPOSITORY / page.removeprefix("repository/")
    return path if path.is_file() else path.with_suffix("")


def _text(source: Path) -> str:
    """A page with the content of a file outside `docs/`."""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return text
    name = source.relative_to(REPOSITORY)
    return f"# {name}\n\n~~~~{LISTING_LANGUAGES.get(source.suffix, 'text')}\n{text}~~~~\n"


def _outside_links(source: Path) -> Iterator[tuple[str, str | None]]:
    """Links of a document that its page cannot keep: the target as written, and the page it leads to."""
    inside = REPOSITORY / "docs"
    for target, _ in LINK.findall(CODE.sub("", source.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        path = Path(os.path.normpath(source.parent / target))
        if inside in path.parents and inside in source.parents:
            continue
        if inside in path.parents:
            yield target, path.relative_to(inside).as_posix()
        elif path.is_dir():
            yield target, _page_of(path / "README.md") if (path / "README.md").is_file() else None
        elif path.is_file():
            yield target, _page_of(path)


def _page_of(path: Path) -> str:
    """The page of a file of the repository."""
    name = path.relative_to(REPOSITORY).as_posix()
    return f"repository/{name}" if path.suffix in {".md", ".png", ".svg"} else f"repository/{name}.md"


def _pictures(pages: dict[str, str]) -> set[str]:
    """Pictures outside `docs/` that pages show."""
    return {
        path.relative_to(REPOSITORY).as_posix()
        for page in pages
        if page.startswith("repository/") and (source := _source(page)).suffix == ".md"
        for target, _ in LINK.findall(CODE.sub("", source.read_text(encoding="utf-8")))
        if (path := Path(os.path.normpath(source.parent / target))).suffix in {".png", ".svg"} and path.is_file()
        if REPOSITORY / "docs" not in path.parents
    }


def _outside_code(markdown: str, change: Any) -> str:
    """`markdown` with what is not code changed."""
    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])
