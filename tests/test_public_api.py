import ast
import tomllib
from pathlib import Path

import pytest

import discover_sc

ROOT = Path(__file__).parents[1]


def test_names_of_the_package():
    names = ["DISCoVeR", "InvarianceStopping", "data", "evaluation", "plotting"]
    assert discover_sc.__all__ == names


def test_names_of_data():
    names = ["check_counts", "check_finite", "kang", "simulate"]
    assert discover_sc.data.__all__ == names


def test_names_of_evaluation():
    assert discover_sc.evaluation.__all__ == [
        "additive_shift",
        "chance_accuracy",
        "change_pearson",
        "condition_probes",
        "counterfactual_scores",
        "counterfactual_table",
        "direction_match",
        "embedding_ablation",
        "kmeans_ari",
        "kmeans_nmi",
        "log_mean_profile",
        "mean_shift",
        "nearest_shift",
        "probe_accuracy",
        "report",
        "split_half_ceiling",
        "top_genes",
    ]


def test_names_of_plotting():
    names = ["counterfactual_scatter", "latent_scatter", "training_curves"]
    assert discover_sc.plotting.__all__ == names


def test_methods_of_the_model():
    classes = [c for c in discover_sc.DISCoVeR.__mro__ if c.__module__.startswith("discover_sc")]
    own = {name for c in classes for name in vars(c) if not name.startswith("_")}
    assert sorted(own) == [
        "add_condition",
        "condition_keys",
        "conditions",
        "dose_key",
        "get_latent_representation",
        "get_loadings",
        "get_normalized_expression",
        "get_shared_expression",
        "labels_key",
        "load",
        "predict_counterfactual",
        "predict_dose_response",
        "setup_anndata",
        "train",
        "write_latents",
    ]


@pytest.mark.parametrize("name", ["data", "evaluation", "plotting"])
def test_every_public_name_exists(name):
    namespace = getattr(discover_sc, name)
    assert all(callable(getattr(namespace, item)) for item in namespace.__all__)


def test_version_is_that_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert discover_sc.__version__ == project["version"]


@pytest.mark.parametrize("package", ["data", "evaluation", "plotting"])
def test_packages_that_serve_other_models_too_import_nothing_of_the_model(package):
    for path in Path(discover_sc.__file__).parent.joinpath(package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} imports from outside of {package}"
