"""The notebooks run, as they stand, and show no errors."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


@pytest.mark.tutorial
@pytest.mark.skipif(
    "DISCOVER_SC_DATA" not in os.environ,
    reason="DISCOVER_SC_DATA does not name a folder with example_sce.rda",
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DISCOVER_SC_DATA", os.path.abspath(os.environ["DISCOVER_SC_DATA"]))
    notebook = nbformat.read(path, as_version=4)
    kernel = {"path": str(tmp_path)}
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": kernel}
    ).execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
