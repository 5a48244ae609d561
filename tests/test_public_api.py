import ast
import tomllib
from pathlib import Path

import pytest

import discover_sc

ROOT = Path(__file__).parents[1]


def test_names_of_the_package():
    names = ["DISCoVeR", "InvarianceStopping", "TreatmentEffect", "data", "evaluation", "plotting"]
    assert discover_sc.__all__ == names


def test_names_of_data():
    names = ["check_counts", "check_finite", "kang", "simulate"]
    assert discover_sc.data.__all__ == names


def test_names_of_evaluation():
    assert discover_sc.evaluation.__all__ == [
        "additive_shift",
        "benchmark_counterfactual",
        "chance_accuracy",
        "composition_accuracy",
        "change_pearson",
        "condition_probes",
        "counterfactual_methods",
        "counterfactual_scores",
        "counterfactual_table",
        "direction_match",
        "embedding_ablation",
        "energy_distance",
        "gap_closed",
        "gene_variances",
        "interval_coverage",
        "kmeans_ari",
        "kmeans_nmi",
        "log_mean_profile",
        "mean_shift",
        "nearest_shift",
        "probe_accuracy",
        "probe_accuracy_within",
        "report",
        "split_half_ceiling",
        "squared_mmd",
        "top_genes",
        "top_overlap",
    ]


def test_names_of_plotting():
    assert discover_sc.plotting.__all__ == [
        "counterfactual_scatter",
        "latent_scatter",
        "plot_counterfactual_benchmark",
        "plot_treatment_effect",
        "training_curves",
    ]


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
        "invariance",
        "labels_key",
        "load",
        "predict_counterfactual",
        "predict_dose_response",
        "setup_anndata",
        "train",
        "treatment_effect",
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
    """Only the benchmark, which trains the model among others, does so inside of one function."""
    importing = []
    for path in Path(discover_sc.__file__).parent.joinpath(package).glob("*.py"):
        tree = ast.parse(path.read_text())
        for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
            if any(imports_model(node) for node in function.body):
                importing.append((path.name, function.name))
                function.body = [n for n in function.body if not imports_model(n)]
        assert not any(imports_model(node) for node in ast.walk(tree)), path.name
    assert importing == ([("_rivals.py", "_discover")] if package == "evaluation" else [])


def imports_model(node):
    if isinstance(node, ast.Import):
        return any(name.name.startswith("discover_sc") for name in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.level > 1 or (node.level == 0 and node.module.startswith("discover_sc"))
    return False
