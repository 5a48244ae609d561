"""discover-sc demo | fit | predict | evaluate."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator  # noqa: TC003  (typer reads annotations at run time)
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="What a cell is whatever was done to it, and what the treatment did to it.",
)
console = Console()
errors = Console(stderr=True)

Data = Annotated[Path, typer.Argument(help="Cells x genes as .h5ad, raw counts.")]
ModelFolder = Annotated[Path, typer.Argument(help="Folder written by 'discover-sc fit'.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Seed = Annotated[int, typer.Option(help="Seed of training.")]

_USER_ERRORS = (
    ValueError,
    KeyError,
    FloatingPointError,
    OSError,  # among them: not found, exists, no connection
)


def main() -> None:
    """Run the command line; a user's mistake ends with a message and exit code 1."""
    try:
        app()
    except _USER_ERRORS as error:
        message = error.args[0] if error.args and isinstance(error.args[0], str) else error
        errors.print(f"[red]Error:[/red] {type(error).__name__}: ", end="")
        errors.print(str(message), markup=False, highlight=False)
        sys.exit(1)


@app.command()
def demo(
    output: Output = Path("discover-sc-demo"),
    held_out: Annotated[
        str | None,
        typer.Option(help="Cell type whose treated cells are held out; default: the first."),
    ] = None,
    max_epochs: Annotated[
        int | None, typer.Option(help="Passes over the data; default: enough.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Train on the Kang 2018 interferon data, one cell type's treated cells held out."""
    from ._demo import run_demo

    with _whole_folder(output, force, owned_file="report.csv") as folder:
        tables = run_demo(folder, held_out, max_epochs, seed, console)
    for title, table in tables.items():
        console.print(_rich_table(title, table))
    console.print(f"Written to {output}: latents, UMAPs, training curves, counterfactual scatter.")


@app.command()
def fit(
    data: Data,
    condition_key: Annotated[
        list[str], typer.Option(help="Column of .obs with the condition; repeat for several.")
    ],
    output: Output,
    batch_key: Annotated[str | None, typer.Option(help="Column with the batch.")] = None,
    labels_key: Annotated[str | None, typer.Option(help="Column with the cell type.")] = None,
    layer: Annotated[str | None, typer.Option(help="Layer with the counts; default: .X.")] = None,
    gene_likelihood: Annotated[str, typer.Option(help="nb, zinb, poisson or normal.")] = "nb",
    max_epochs: Annotated[
        int | None, typer.Option(help="Passes over the data; default: enough.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Train a model; write it, its latents and its history into a folder."""
    import anndata as ad
    import scvi

    from ._model import DISCoVeR

    with _whole_folder(output, force, owned_file="model.pt") as folder:
        adata = _read(data)
        scvi.settings.seed = seed
        DISCoVeR.setup_anndata(
            adata, list(condition_key), batch_key=batch_key, labels_key=labels_key, layer=layer
        )
        model = DISCoVeR(adata, gene_likelihood=gene_likelihood)
        model.train(max_epochs=max_epochs)
        model.save(str(folder), overwrite=True)
        model.write_latents()
        own = [name for name in adata.obs if not name.startswith("_scvi")]
        latents = ad.AnnData(obs=adata.obs[own])
        for key in ("X_discover_z", "X_discover_w"):
            latents.obsm[key] = adata.obsm[key]
        latents.write_h5ad(folder / "latents.h5ad")
        _history_table(model.history).to_csv(folder / "history.csv")
    console.print(f"{model}\nWritten to {output}: model.pt, latents.h5ad, history.csv.")


@app.command()
def predict(
    model_folder: ModelFolder,
    data: Data,
    to: Annotated[
        list[str], typer.Option(help="Target level, or key=level; repeat for several keys.")
    ],
    output: Output,
    from_obs: Annotated[
        list[str] | None, typer.Option(help="Source cells: column=value; repeat to narrow.")
    ] = None,
    method: Annotated[str, typer.Option(help="How w is replaced.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    force: Force = False,
) -> None:
    """Predict cells under another condition."""
    from ._model import DISCoVeR

    with _whole_file(output, force) as partial:
        source = _select(_read(data), from_obs or [])
        model = DISCoVeR.load(str(_existing(model_folder)), source)
        prediction = model.predict_counterfactual(
            model.adata, _target(to, model.condition_keys), method=method, seed=seed
        )
        prediction.write_h5ad(partial)
    console.print(f"{prediction.n_obs} cells predicted under {to}, written to {output}.")


@app.command()
def evaluate(
    model_folder: ModelFolder,
    data: Data,
    labels_key: Annotated[str | None, typer.Option(help="Column with the cell type.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the table as .csv.")
    ] = None,
    force: Force = False,
) -> None:
    """Report what z and w carry: fresh cross-validated probes, beside chance."""
    from ._model import DISCoVeR
    from .evaluation import report

    adata = _read(data)
    model = DISCoVeR.load(str(_existing(model_folder)), adata)
    table = report(model, model.adata, labels_key=labels_key)
    console.print(_rich_table("What the latents carry", table))
    if output is not None:
        with _whole_file(output, force) as partial:
            table.to_csv(partial, index=False)


# ------------------------------------------------------------------------- in and out


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give the path of an existing one.")
    return path


def _read(path: Path):
    import anndata as ad

    try:
        return ad.read_h5ad(_existing(path))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path} cannot be read as .h5ad ({error}). Give an AnnData file."
        ) from error


def _select(adata, conditions: list[str]):
    """Keep the cells for which each column=value holds."""
    for condition in conditions:
        column, separator, value = condition.partition("=")
        if not separator or column not in adata.obs:
            raise ValueError(
                f"--from-obs {condition!r} is not column=value with a column of .obs; columns are "
                f"{list(adata.obs.columns)}."
            )
        mask = (adata.obs[column].astype(str) == value).to_numpy()
        if not mask.any():
            raise ValueError(
                f"--from-obs {condition!r} selects no cell; values of {column!r} are "
                f"{sorted(adata.obs[column].astype(str).unique())}. Choose one of them."
            )
        adata = adata[mask].copy()
    return adata


def _target(to: list[str], condition_keys: list[str]) -> str | dict[str, str]:
    """Read levels or key=level; a level may itself hold an equals sign."""
    pairs = [level.partition("=") for level in to]
    if all(separator and key in condition_keys for key, separator, _ in pairs):
        return {key: level for key, _, level in pairs}
    if len(to) > 1:
        raise ValueError(
            f"--to is {to}; several targets are written key=level with keys {condition_keys}."
        )
    return to[0]


@contextmanager
def _whole_file(path: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary path beside the output that becomes it when all went well."""
    if path.exists() and (not force or path.is_dir()):
        raise FileExistsError(f"{path} exists. Choose another output or pass --force.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _whole_folder(path: Path, force: bool, owned_file: str) -> Iterator[Path]:
    """Yield a temporary folder beside the output that becomes it when all went well.

    With force only a folder that holds ``owned_file``, written by this command, is replaced.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists. Choose another output or pass --force.")
    if path.exists() and not (path / owned_file).exists():
        raise FileExistsError(
            f"{path} exists and was not written by this command (it holds no {owned_file}). "
            "It is not replaced; choose another output."
        )
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.replace(old)
            partial.replace(path)
            shutil.rmtree(old)
        else:
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _history_table(history: dict):
    import pandas as pd

    return pd.DataFrame({key: frame.iloc[:, 0] for key, frame in history.items()})


def _rich_table(title: str, frame) -> Table:
    table = Table(title=title)
    for column in frame.columns:
        numeric = frame[column].dtype.kind == "f"
        table.add_column(str(column), justify="right" if numeric else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
    return table
