"""The notebook of the docs runs from top to bottom, and holds what it printed."""

import json
import re

import pytest

from helpers.commands import ROOT, command

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CELLS for output in cell.get("outputs", [])]


def test_it_was_saved_after_a_run_without_errors():
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(CODE) + 1))
    assert not [output for output in OUTPUTS if output["output_type"] == "error"]
    assert "Verdict: weak" in json.dumps(OUTPUTS)
    assert not re.search(r"[\"' ]/(?:tmp|home|root|work)/", json.dumps(OUTPUTS))  # of one machine


def test_links_of_its_text_lead_to_pages():
    text = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert links
    assert all((NOTEBOOK.parent / link).is_file() for link in links)


@pytest.mark.slow
def test_its_cells_run(tmp_path):
    done = command(
        "-c",
        "\n".join([f"import os, sssd_zoo; os.chdir({str(tmp_path)!r})", *CODE]),
        environment={"HF_DATASETS_CACHE": str(tmp_path / "cache")},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "did you mean epochs?" in done.stdout
    assert (tmp_path / "notebook-run" / "fit" / "report.html").is_file()
