"""A mkdocs hook: the site has the repository's own paths, and a page of API reference for each package of sssd_zoo.

With the same paths, one relative link works on GitHub and in the site. README.md is the home page. Cards, reports and
recipes are pages too, though they lie outside of docs/, where the commands and the wheel need them.
"""

import ast
import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PLACES = ("*", "docs/**/*", "hub_cards/**/*", "train/recipes/**/*", "sssd_zoo/data/sample/*", "sssd_zoo/*/*.py")
SUFFIXES = {".css", ".csv", ".ipynb", ".json", ".jsonl", ".md", ".png", ".py", ".svg", ".yaml"}
NAMES = {"LICENSE", "CITATION.cff"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, those of the repository that a page shows or links to, and the API reference."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted({path for place in PLACES for path in ROOT.glob(place) if path.is_file()})
    names = [path.relative_to(ROOT).as_posix() for path in paths if path.suffix in SUFFIXES or path.name in NAMES]
    kept = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names]
    reference = [
        File.generated(config, f"docs/api/{package.parent.name}.md", content=api_page(package.parent))
        for package in sorted(ROOT.glob("sssd_zoo/*/__init__.py"))
    ]
    notebook = File.generated(config, "docs/notebook.md", content=notebook_page(ROOT / "docs" / "notebook.ipynb"))
    return Files([*theme, *kept, *reference, notebook])


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and below each cell what it printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
            parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join([*parts, f"[This page as a notebook]({path.name})", ""])


def api_page(package: Path) -> str:
    """The reference of a package: what its `__init__` defines, not what it re-exports, and then its modules."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    defined = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    public = [name for name in defined if not name.startswith("_")]
    modules = [path.relative_to(ROOT).with_suffix("") for path in sorted(package.rglob("*.py"))]
    names = [".".join(module.parts) for module in modules if not module.name.startswith("__")]
    lines = [f"# {package.name}", f"::: sssd_zoo.{package.name}", f"    options: {{members: {public or False}}}"]
    return "\n".join([*lines, *(f"\n::: {name}" for name in names)])
