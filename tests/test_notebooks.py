"""The notebooks run from the first cell to the last, through a kernel."""

import importlib.util
import os
from pathlib import Path

import pytest

from document_blocks import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.py"))


def test_notebooks_hold_no_outputs_and_are_named_in_the_tutorial() -> None:
    assert len(NOTEBOOKS) >= 3
    assert not list((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
    tutorial = (REPOSITORY / "docs" / "tutorials" / "notebooks.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"../notebooks/{path.name}" in tutorial
        compile(path.read_text(encoding="utf-8"), path.name, "exec")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("jupytext", "nbclient", "ipykernel"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'genomamba[notebooks]'")
    import jupytext  # noqa: PLC0415 - an extra
    import nbclient  # noqa: PLC0415

    monkeypatch.setenv("GENOMAMBA_DEMO", str(REPOSITORY / "demo"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    folders = [str(REPOSITORY / name) for name in ("", "kernels", "pipelines")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(path)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert any(output.output_type == "display_data" for cell in cells for output in cell.outputs)
