import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from discover_sc import DISCoVeR
from discover_sc.data import check_counts, check_finite
from discover_sc.data._checks import match_genes, total_count

N_CELLS, N_GENES = 12, 5


@pytest.fixture
def cells():
    """Twelve cells of two conditions, every cell and gene with counts."""
    counts = np.random.default_rng(0).poisson(2.0, (N_CELLS, N_GENES)) + 1.0
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical(["ctrl", "stim"] * (N_CELLS // 2)),
            "batch": ["a", "b", "c"] * (N_CELLS // 3),
            "age": np.arange(N_CELLS) + 20.0,
        },
        index=[f"cell_{i}" for i in range(N_CELLS)],
    )
    genes = pd.DataFrame(index=[f"gene_{g}" for g in range(N_GENES)])
    return ad.AnnData(counts.astype(np.float32), obs, genes)


STORAGE = {
    "dense": np.asarray,
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr array": sp.csr_array,
    "integers": lambda x: x.astype(np.int32),
}


def store(cells, storage, backed, folder):
    """The same cells in another storage, in memory or on disk."""
    stored = ad.AnnData(STORAGE[storage](cells.X), cells.obs.copy(), cells.var.copy())
    if not backed:
        return stored
    stored.write_h5ad(folder / "cells.h5ad")
    return ad.read_h5ad(folder / "cells.h5ad", backed="r")


every_storage = pytest.mark.parametrize(
    ("storage", "backed"),
    [(name, False) for name in STORAGE] + [("dense", True), ("csr", True), ("csc", True)],
    ids=[*STORAGE, "backed dense", "backed csr", "backed csc"],
)


# ----------------------------------------------------------------------------- storage


@pytest.mark.filterwarnings("ignore:Training will be faster when sparse matrix is formatted as CSR")
@every_storage
def test_counts_are_accepted_however_they_are_stored(cells, storage, backed, tmp_path):
    stored = store(cells, storage, backed, tmp_path)
    check_counts(stored)
    DISCoVeR.setup_anndata(stored, condition_key="condition", batch_key="batch")
    assert DISCoVeR(stored).conditions == {"condition": ["ctrl", "stim"]}


@every_storage
@pytest.mark.parametrize(("value", "message"), [(-1, "negative"), (0, "1 cells.*are empty")])
def test_bad_counts_are_refused_however_they_are_stored(
    cells, storage, backed, value, message, tmp_path
):
    cells.X[3] = value
    with pytest.raises(ValueError, match=message):
        check_counts(store(cells, storage, backed, tmp_path))


@every_storage
def test_total_count_is_the_plain_sum_however_it_is_stored(cells, storage, backed, tmp_path):
    stored = store(cells, storage, backed, tmp_path)
    assert total_count(stored, None) == sum(float(value) for value in cells.X.ravel())


def test_a_bad_value_far_down_is_found():
    """Rows are read in blocks; the last one is looked at as well."""
    counts = np.ones((10_000, 2), dtype=np.float32)
    counts[-1, 0] = 0.5
    with pytest.raises(ValueError, match="not integers"):
        check_counts(ad.AnnData(sp.csr_matrix(counts)))
    with pytest.warns(UserWarning, match="1 genes"):
        check_counts(ad.AnnData(np.pad(np.ones((10_000, 1), dtype=np.float32), ((0, 0), (0, 1)))))


def test_explicitly_stored_zeros_are_counts(cells):
    matrix = sp.csr_matrix(cells.X)
    matrix.data[0] = 0
    check_counts(ad.AnnData(matrix))


def test_checking_changes_nothing(cells):
    before = cells.copy()
    check_counts(cells)
    check_finite(cells)
    np.testing.assert_array_equal(cells.X, before.X)
    assert cells.obs.equals(before.obs)


# ------------------------------------------------------------------------------ values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layer", [None, "raw"])
def test_values_that_are_not_finite_are_refused(cells, value, layer):
    cells.layers["raw"] = cells.X.copy()
    matrix = cells.X if layer is None else cells.layers[layer]
    matrix[2, 1] = value
    source = "adata.X" if layer is None else r"adata.layers\['raw'\]"
    with pytest.raises(ValueError, match=f"{source} holds NaN or infinite values .1 among"):
        check_finite(cells, layer)
    with pytest.raises(ValueError, match="every value must be finite. Remove those cells or genes"):
        DISCoVeR.setup_anndata(cells, condition_key="condition", layer=layer)


@pytest.mark.parametrize("storage", ["dense", "csr"])
def test_log_data_are_refused_by_the_name_of_their_layer_and_normal_is_offered(cells, storage):
    cells.layers["log"] = STORAGE[storage](np.log1p(cells.X))
    DISCoVeR.setup_anndata(cells, condition_key="condition", layer="log")
    with pytest.raises(
        ValueError,
        match=r"adata.layers\['log'\] holds values that are not integers.*gene_likelihood='normal'",
    ):
        DISCoVeR(cells)
    assert DISCoVeR(cells, gene_likelihood="normal").module.gene_likelihood == "normal"


def test_the_message_on_fractions_shows_one(cells):
    cells.X[0, 0] = 0.25
    with pytest.raises(ValueError, match="for example 0.25"):
        check_counts(cells)


def test_negative_values_are_refused_with_the_smallest(cells):
    cells.X[0, :2] = -1.5, -3.0
    with pytest.raises(ValueError, match=r"negative values \(smallest -3\).*integers from 0"):
        check_counts(cells)


def test_empty_cells_are_refused(cells):
    cells.X[[1, 4]] = 0
    with pytest.raises(ValueError, match=r"2 cells of adata.X are empty.*filter_cells"):
        check_counts(cells)


def test_empty_genes_are_kept_with_a_warning(cells):
    cells.X[:, 2] = 0
    with pytest.warns(UserWarning, match=r"1 genes of adata.X have zero counts.*filter_genes"):
        check_counts(cells)
    DISCoVeR.setup_anndata(cells, condition_key="condition")
    with pytest.warns(UserWarning, match="zero counts in all cells"):
        model = DISCoVeR(cells)
    assert model.module.n_input == N_GENES


def test_a_missing_layer_is_refused_and_the_layers_are_listed(cells):
    cells.layers["counts"] = cells.X.copy()
    for check in (check_counts, check_finite):
        with pytest.raises(KeyError, match=r"Layer 'raw'.*layers are \['counts'\]. Choose"):
            check(cells, "raw")
    with pytest.raises(KeyError, match="Layer 'raw' is not in adata.layers"):
        DISCoVeR.setup_anndata(cells, condition_key="condition", layer="raw")


def test_missing_expression_is_refused(cells):
    empty = ad.AnnData(obs=cells.obs, var=cells.var)
    with pytest.raises(ValueError, match=r"adata.X is empty \(None\).*name a layer"):
        DISCoVeR.setup_anndata(empty, condition_key="condition")


# ----------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("condition_key", "treatment"),
        ("condition_key", ["condition", "treatment"]),
        ("batch_key", "treatment"),
        ("labels_key", "treatment"),
        ("size_factor_key", "treatment"),
        ("categorical_covariate_keys", ["batch", "treatment"]),
        ("continuous_covariate_keys", ["treatment"]),
    ],
)
def test_a_missing_column_is_refused_by_its_argument_and_columns_are_listed(cells, argument, given):
    with pytest.raises(
        KeyError,
        match=rf"{argument}: 'treatment' is not a column.*\['condition', 'batch', 'age'\]",
    ):
        DISCoVeR.setup_anndata(cells, **({"condition_key": "condition"} | {argument: given}))


@pytest.mark.parametrize(
    ("argument", "column"),
    [
        ("condition_key", "condition"),
        ("batch_key", "batch"),
        ("labels_key", "batch"),
        ("size_factor_key", "age"),
        ("categorical_covariate_keys", "batch"),
        ("continuous_covariate_keys", "age"),
    ],
)
def test_missing_values_of_a_column_are_refused(cells, argument, column):
    cells.obs.loc[["cell_0", "cell_5"], column] = np.nan
    given = [column] if argument.endswith("keys") else column
    with pytest.raises(
        ValueError, match=rf"{argument}: adata.obs\['{column}'\] is missing \(NaN\) for 2 cells"
    ):
        DISCoVeR.setup_anndata(cells, **({"condition_key": "condition"} | {argument: given}))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_covariate_is_refused(cells, value):
    cells.obs.loc["cell_0", "age"] = value
    with pytest.raises(ValueError, match="age"):
        DISCoVeR.setup_anndata(cells, "condition", continuous_covariate_keys=["age"])


@pytest.mark.parametrize("kind", [str, "category"], ids=["strings", "categories"])
def test_a_single_condition_is_refused(cells, kind):
    cells.obs["only"] = pd.Series("stim", index=cells.obs_names).astype(kind)
    with pytest.raises(
        ValueError, match=r"\['only'\] has only one condition, 'stim'; at least two"
    ):
        DISCoVeR.setup_anndata(cells, condition_key="only")


def test_a_single_numeric_condition_is_named_as_the_user_wrote_it(cells):
    cells.obs["dose"] = 10
    with pytest.raises(ValueError, match="has only one condition, '?10'?; at least two"):
        DISCoVeR.setup_anndata(cells, condition_key="dose")


def test_no_condition_at_all_is_refused(cells):
    with pytest.raises(ValueError, match="condition_key"):
        DISCoVeR.setup_anndata(cells, condition_key=[])


def test_a_rare_condition_is_refused(cells):
    cells.obs["drug"] = ["a"] * 5 + ["b"] * 5 + ["c"] * 2
    with pytest.raises(ValueError, match=r"\['drug'\] with fewer than 3 cells: \{'c': 2\}.*merge"):
        DISCoVeR.setup_anndata(cells, condition_key=["condition", "drug"])


def test_an_unused_category_is_refused(cells):
    cells.obs["condition"] = cells.obs["condition"].cat.add_categories("never")
    with pytest.raises(ValueError, match=r"fewer than 3 cells: \{'never': 0\}"):
        DISCoVeR.setup_anndata(cells, condition_key="condition")


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize("axis", ["obs_names", "var_names"])
def test_names_that_stand_twice_are_refused(cells, axis):
    names = list(getattr(cells, axis))
    names[1] = names[0]
    setattr(cells, axis, names)
    with pytest.raises(
        ValueError, match=rf"adata.{axis} are not unique \('{names[0]}'.*{axis}_make_unique"
    ):
        DISCoVeR.setup_anndata(cells, condition_key="condition")


@pytest.mark.parametrize(
    ("selection", "size"),
    [((slice(0, 0), slice(None)), "0 cells and 5"), ((slice(None), slice(0, 0)), "12 cells and 0")],
    ids=["no cells", "no genes"],
)
def test_an_empty_selection_is_refused(cells, selection, size):
    with pytest.raises(ValueError, match=f"adata has {size} genes: the selection is empty.*mask"):
        DISCoVeR.setup_anndata(cells[selection].copy(), condition_key="condition")


def test_genes_in_the_models_order_are_left_alone(cells):
    assert match_genes(cells, list(cells.var_names)) is cells


@pytest.mark.parametrize("backed", [False, True], ids=["in memory", "backed"])
def test_genes_are_put_into_the_models_order_in_a_copy(cells, backed, tmp_path):
    stored = store(cells, "csr", backed, tmp_path)
    wanted = ["gene_3", "gene_0", "gene_4"]
    matched = match_genes(stored, wanted)
    assert list(matched.var_names) == wanted
    np.testing.assert_array_equal(matched.X.toarray(), cells.X[:, [3, 0, 4]])
    assert not matched.is_view
    assert not matched.isbacked
    assert list(stored.var_names) == list(cells.var_names)


def test_missing_genes_are_refused_and_the_first_ten_named(cells):
    wanted = [*cells.var_names, *(f"other_{k}" for k in range(12))]
    with pytest.raises(
        ValueError, match=r"12 genes of the model are missing.*'other_9'\] \.\.\.\. All 17"
    ):
        match_genes(cells, wanted)


def test_genes_that_stand_twice_in_new_cells_are_refused_by_name(cells):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anndata notes the duplicate as well
        twice = ad.concat([cells, cells[:, :1]], axis=1, merge="same")
    with pytest.raises(ValueError, match="gene_0"):
        match_genes(twice, list(cells.var_names))
