"""The site holds what its pages point to outside docs/: READMEs of recipes and benchmarks as pages, logs and figures as files.

GitHub shows a link such as `../recipes/demo/README.md` as it is; mkdocs knows docs/ alone. So each target is added to the site
below `repository/`, where its own links work too, and the links to it are rewritten. A link whose target does not exist is left
as it is, and `mkdocs build --strict` refuses it.

The pages of the API are made here, too: one for each module of `API`, from its docstrings. So is the page of all options as
the command line has them, from the dataclass of the plugin.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from pathlib import Path
from typing import Callable, Iterator, List, Pattern, Set

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
BELOW = "repository"
# What a folder that has no README shows: as a list, the reports with a link.
SHOWN = (".md", ".txt", ".png", ".json", ".csv")
PACKAGE = "fairseq_codistill"
API = ("core", "exchange")  # the folders for other trainers
OPTIONS = "all_options.md"


def modules(folder: str) -> List[str]:
    return sorted(path.stem for path in (ROOT / PACKAGE / folder).glob("*.py") if path.stem != "__init__")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation's `API: …` gets the pages that `on_files` makes; a page that it does not name yet comes under More."""
    section = next(item for item in config.nav if "API" in item)
    section["API"] = [{folder: [{name: f"api/{folder}/{name}.md"} for name in modules(folder)]} for folder in API]
    named = str(config.nav)
    rest = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if f"'{path.name}'" not in named]
    config.nav += [{"More": rest}] if rest else []
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the API's pages; and all that pages point to, and what those pages point to in turn."""
    for folder in API:
        for name in modules(folder):
            text = f"# {folder}.{name}\n\n::: {PACKAGE}.{folder}.{name}\n    options:\n      show_root_heading: false\n"
            files.append(File.generated(config, f"api/{folder}/{name}.md", content=text))
    files.append(File.generated(config, OPTIONS, content=options()))
    seen: Set[str] = set()
    waiting: List[str] = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        uri = site_uri(name)
        if files.get_file_from_path(uri) is None:
            path = ROOT / name
            if path.is_dir():
                files.append(File.generated(config, uri, content=listing(name)))
            else:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
        waiting += targets(name)
    return files


def options() -> str:
    """Every option of the criterion, with its default and help, as `--criterion codistill_ce --help` has them."""
    from fairseq_codistill.config import CodistillConfig

    more = "With more on each, and where defaults depend on other options: [options](options.md)."
    lines = ["# All options, as --help has them", "", more, "", "| option | default | help |", "|---|---|---|"]
    for field in dataclasses.fields(CodistillConfig):
        if field.name.startswith("codistill_"):
            text = " ".join(field.metadata["help"].split()).replace("|", "\\|")
            lines.append(f"| `--{field.name.replace('_', '-')}` | {default_of(field)} | {text} |")
    return "\n".join(lines) + "\n"


def default_of(field: dataclasses.Field) -> str:
    if field.default is None:
        return "–"
    return "off" if field.default is False else f"`{getattr(field.default, 'value', field.default)}`"


def targets(name: str) -> Iterator[str]:
    """The files and folders of the repository that a page, or a folder's list, points to."""
    path = ROOT / name
    if path.is_dir():
        text = listing(name)
    elif path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
    else:
        return
    for link in LINK.finditer(without_code(text)):
        target = resolved(link[1], name)
        if (ROOT / target).exists():
            yield target


def resolved(link: str, name: str) -> str:
    """A link in the file or folder `name`, as a path in the repository; a folder's README stands for the folder."""
    here = name if (ROOT / name).is_dir() else posixpath.dirname(name)
    target = posixpath.normpath(posixpath.join(here, link))
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target


def site_uri(name: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if name.startswith("docs/"):
        return name[len("docs/") :]
    if (ROOT / name).is_dir():
        return f"{BELOW}/{name}/index.md"
    return "index.md" if name == "README.md" else f"{BELOW}/{name}"


def repository_name(file: File) -> str:
    """The inverse of `site_uri`."""
    uri = file.src_uri
    if uri == "index.md":
        return "README.md"
    name = uri[len(BELOW) + 1 :] if uri.startswith(f"{BELOW}/") else f"docs/{uri}"
    return posixpath.dirname(name) if not (ROOT / name).exists() and name.endswith("/index.md") else name


def listing(folder: str) -> str:
    """A page that lists a folder of results."""
    lines = [f"# {folder}", ""]
    for path in sorted((ROOT / folder).iterdir()):
        if not path.name.startswith((".", "__")):
            name = path.name + ("/" if path.is_dir() else "")
            lines.append(f"* [{name}]({path.name})" if path.suffix in SHOWN else f"* `{name}`")
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between files of the site."""
    name = repository_name(page.file)
    if not (ROOT / name).exists():
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(link: re.Match) -> str:
        target = resolved(link[1], name)
        if not (ROOT / target).exists():
            return link[0]
        return os.path.relpath(site_uri(target), here or ".").replace(os.sep, "/") + (link[2] or "")

    return outside_code(spaced(markdown), lambda text: LINK.sub(rewritten, text))


def spaced(markdown: str) -> str:
    """What GitHub takes and Python-Markdown does not: lists right after paragraphs and blocks, indented by three."""

    def change(text: str) -> str:
        text = re.sub(r"(?m)^   (?=[^ \n])", "    ", text)
        text = re.sub(r"(?m)^( +.+)\n(?=\d\. )", r"\1\n\n", text)
        return re.sub(r"(?m)^(?![*+\- \t|#>\d]|$)(.+)\n(?=(?:[*-]|1\.) )", r"\1\n\n", text)

    return outside_code(markdown, change, TOP_FENCE)


FENCE = re.compile(r"(?ms)^ *```.*?^ *```[^\n]*$")
TOP_FENCE = re.compile(r"(?ms)^```.*?^```[^\n]*$")


def outside_code(text: str, change: Callable[[str], str], fence: Pattern = FENCE) -> str:
    """`text` with `change` made to what is not in a fenced block of code."""
    parts: List[str] = []
    end = 0
    for block in fence.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def without_code(text: str) -> str:
    return FENCE.sub("", text)
