"""Run the notebooks in this folder and save their outputs, without progress bars and alternative formats: `make notebooks`."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient


NOTEBOOKS = sorted((Path(__file__).parent / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path, timeout: float = 300.0) -> nbformat.NotebookNode:
    """Run all cells of a notebook.

    Args:
        path: the file; it is not changed.
        folder: where the cells run.
        timeout: seconds that one cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # Pillow gives it beside the PNG
    return notebook


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(execute(path, path.parent), path)
