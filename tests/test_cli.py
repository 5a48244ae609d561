import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from discover_sc import _cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; return exit code, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["discover-sc", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:  # typer exits in any case
            _cli.main()
        code = stop.value.code or 0
        return code, *(" ".join(text.split()) for text in capsys.readouterr())

    return call


@pytest.fixture
def cells(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def fitted(run, cells, tmp_path):
    code, output, errors = run(
        "fit", cells, "--condition-key", "condition", "--labels-key", "cell_type",
        "--max-epochs", 2, "-o", tmp_path / "model",
    )  # fmt: skip
    assert code == 0, errors
    return tmp_path / "model"


def test_fit_writes_the_model_its_latents_and_its_history(fitted, adata):
    latents = ad.read_h5ad(fitted / "latents.h5ad")
    assert list(latents.obs_names) == list(adata.obs_names)
    assert latents.obsm["X_discover_z"].shape == (300, 10)
    history = pd.read_csv(fitted / "history.csv")
    assert {"kl_w_train", "adversary_accuracy_validation"} <= set(history.columns)
    assert (fitted / "model.pt").exists()


def test_predict_moves_the_selected_cells(run, fitted, cells, adata, tmp_path):
    code, _, errors = run(
        "predict", fitted, cells, "--to", "treat_1", "--from-obs", "condition=ctrl",
        "--from-obs", "cell_type=type_0", "-o", tmp_path / "predicted.h5ad",
    )  # fmt: skip
    assert code == 0, errors
    predicted = ad.read_h5ad(tmp_path / "predicted.h5ad")
    obs = adata.obs
    selected = (obs["condition"] == "ctrl") & (obs["cell_type"] == "type_0")
    assert list(predicted.obs_names) == list(adata.obs_names[selected])
    assert set(predicted.obs["condition"]) == {"treat_1"}


def test_a_target_may_be_named_with_its_key():
    assert _cli._target(["condition=a=b"], ["condition"]) == {"condition": "a=b"}
    assert _cli._target(["a=b"], ["condition"]) == "a=b"
    assert _cli._target(["x=a", "y=b"], ["x", "y"]) == {"x": "a", "y": "b"}
    with pytest.raises(ValueError, match="several targets are written key=level"):
        _cli._target(["a", "b"], ["condition"])


def test_evaluate_prints_the_report_and_writes_it(run, fitted, cells, tmp_path):
    code, output, errors = run("evaluate", fitted, cells, "-o", tmp_path / "report.csv")
    assert code == 0, errors
    assert "What the latents carry" in output
    table = pd.read_csv(tmp_path / "report.csv")
    assert set(table["question"]) == {
        "condition left in z",
        "condition found in w",
        "cell_type kept in z",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nowhere.h5ad", "--condition-key", "c"], "nowhere.h5ad does not exist"),
        (["fit", "{cells}", "--condition-key", "drug"], "'drug' is not a column of adata.obs"),
        (["fit", "{text}", "--condition-key", "c"], "cannot be read as .h5ad"),
        (["predict", "nowhere", "{cells}", "--to", "x"], "nowhere does not exist"),
    ],
)
def test_a_mistake_gets_a_message_an_exit_code_and_no_traceback(
    run, cells, tmp_path, arguments, message
):
    text = tmp_path / "text.h5ad"
    text.write_text("not HDF5")
    filled = [a.format(cells=cells, text=text) for a in arguments]
    code, output, errors = run(*filled, "-o", tmp_path / "out")
    assert code == 1
    assert message in errors
    assert "Traceback" not in output + errors
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("condition=no", "selects no cell; values of 'condition' are ['ctrl', 'treat_1']"),
        ("drug=x", "is not column=value with a column of .obs"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(run, fitted, cells, tmp_path, selection, message):
    code, _, errors = run(
        "predict", fitted, cells, "--to", "treat_1", "--from-obs", selection,
        "-o", tmp_path / "p.h5ad",
    )  # fmt: skip
    assert code == 1
    assert message in errors


def test_an_existing_output_is_kept_without_force(run, fitted, cells, tmp_path):
    before = (fitted / "model.pt").read_bytes()
    arguments = ["fit", cells, "--condition-key", "condition", "--max-epochs", 1, "-o", fitted]
    code, _, errors = run(*arguments)
    assert code == 1
    assert "exists. Choose another output or pass --force" in errors
    assert (fitted / "model.pt").read_bytes() == before
    assert run(*arguments, "--force")[0] == 0
    assert (fitted / "model.pt").read_bytes() != before


def test_force_replaces_only_folders_of_its_own(run, cells, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    code, _, errors = run(
        "fit", cells, "--condition-key", "condition", "-o", precious, "--force"
    )  # fmt: skip
    assert code == 1
    assert "was not written by this command" in errors
    assert (precious / "thesis.txt").read_text() == "years"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def interrupted():
        with _cli._whole_file(tmp_path / "out.csv", force=False) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_commands():
    result = subprocess.run(
        [sys.executable, "-m", "discover_sc", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "fit", "predict", "evaluate"):
        assert command in result.stdout


def test_demo_without_the_data_says_that_it_simulates(run, tmp_path, monkeypatch):
    def offline():
        raise ConnectionError("no network")

    monkeypatch.setattr("discover_sc._demo.kang", offline)
    monkeypatch.setattr(
        "discover_sc._demo.simulate", lambda *a, **k: _small_simulation(), raising=True
    )
    out = tmp_path / "demo"
    code, output, errors = run("demo", "-o", out, "--max-epochs", 2)
    assert code == 0, errors
    assert "Simulated data, not real cells: no network" in output
    assert {p.name for p in out.iterdir()} == {
        "report.csv", "counterfactual.csv", "umap_z.png", "umap_w.png", "training.png",
        "counterfactual.png", "latents.h5ad", "predicted.h5ad",
    }  # fmt: skip
    rows = pd.read_csv(out / "counterfactual.csv")["method"]
    assert list(rows) == [
        "prediction", "no change", "mean shift", "nearest type's shift", "split-half ceiling",
    ]  # fmt: skip
    trained_on = ad.read_h5ad(out / "latents.h5ad").obs
    held_out = (trained_on["cell_type"] == "type_0") & (trained_on["condition"] == "treat_1")
    assert not held_out.any()
    assert np.isfinite(ad.read_h5ad(out / "predicted.h5ad").X).all()


def _small_simulation():
    from discover_sc.data import simulate

    return simulate(300, 60, n_types=3)
