"""Levels, their parts and their rows; combinations that were never registered."""

import numpy as np
import pytest
from fitting import train_small

from discover_sc import DISCoVeR
from discover_sc._counterfactual import Parts, Reference, Shift, summed
from discover_sc._levels import Levels
from discover_sc._target import _measured_overlap
from discover_sc.data import simulate

# targets that no group was seen under
pytestmark = pytest.mark.filterwarnings("ignore:The median support")


def combined(keep=("ctrl", "A", "B", "A+B")):
    """Small cells under two treatments and both together."""
    adata = simulate(400, 40, n_types=2, n_conditions=4, seed=0)
    names = {"treat_1": "A", "treat_2": "B", "treat_3": "A+B"}
    adata.obs["condition"] = adata.obs["condition"].astype(str).replace(names)
    return adata[adata.obs["condition"].isin(keep).to_numpy()].copy()


@pytest.fixture(scope="module")
def parts_only():
    """A model that saw A and B, never both."""
    return train_small(combined(("ctrl", "A", "B")), {"labels_key": "cell_type"})


def controls(model):
    return model.adata[(model.adata.obs["condition"] == "ctrl").to_numpy()].copy()


def test_plain_levels_have_unit_vectors_in_the_order_of_their_codes():
    levels = Levels("condition", ["ctrl", "B", "A"], "+")
    assert np.array_equal(levels.design, np.eye(3))
    assert not levels.combines


def test_a_combination_has_a_one_for_each_part_whatever_their_order():
    levels = Levels("condition", ["ctrl", "A", "B", "B+A", "A + C"], "+")
    assert levels.columns == ["ctrl", "A", "B", "C"]
    assert levels.design[3:].tolist() == [[0, 1, 1, 0], [0, 1, 0, 1]]
    assert levels.code("A+B") == levels.code("B+A") == 3
    assert levels.row("B+C+A").tolist() == [0, 1, 1, 1]  # more than ever seen


@pytest.mark.parametrize(
    ("names", "separator"),
    [(["CD4+", "CD8+"], "+"), (["A+B", "B+A", "A+A"], None), (["A+B", "A"], "&")],
    ids=["empty part", "switched off", "another separator"],
)
def test_what_is_no_combination_shares_nothing(names, separator):
    levels = Levels("condition", names, separator)
    assert np.array_equal(levels.design, np.eye(len(names)))


def test_parts_add_the_changes_of_the_parts():
    rng = np.random.default_rng(0)
    under = np.repeat(["ctrl", "A", "B"], 50)
    change = {"ctrl": [0, 0], "A": [1, 0], "B": [0.5, 2]}
    w = np.array([change[level] for level in under]) + 0.01 * rng.normal(size=(150, 2))
    groups = np.full(150, "only")
    reference = Reference(w, w, under == "ctrl", np.zeros(150, dtype=bool), groups)
    way = Parts([Shift(), Shift()], [under == "A", under == "B"]).fit(reference)
    np.testing.assert_allclose(way(w[:5], np.zeros((5, 2))), [[1.5, 2.0]] * 5, atol=0.02)


def test_overlapping_changes_count_once_at_overlap_one_and_add_up_at_zero():
    a, b, c = np.array([1.0, 0.0]), np.array([0.0, 2.0]), np.array([1.0, 1.0])

    def total(*changes, overlap):
        return summed(np.stack(changes)[:, None, :], overlap)[0]

    np.testing.assert_allclose(total(a, c, overlap=0.0), a + c, rtol=1e-3)
    np.testing.assert_allclose(total(a, a, overlap=1.0), a, rtol=1e-3)
    np.testing.assert_allclose(total(a, a, overlap=0.5), a * 4 / 3, rtol=1e-3)
    np.testing.assert_allclose(total(a, b, overlap=1.0), a + b, rtol=1e-3)
    np.testing.assert_allclose(total(a, -a, overlap=1.0), 0 * a, atol=1e-3)  # opposite: no overlap
    both = total(a, c, overlap=1.0)
    assert both @ a == pytest.approx(a @ a, rel=1e-2)  # each part as far as it goes alone
    assert both @ c == pytest.approx(c @ c, rel=1e-2)


@pytest.mark.parametrize(("both", "expected"), [([2.0, 1.0], 0.0), ([1.0, 1.0], 1.0)])
def test_registered_combinations_tell_the_overlap(both, expected):
    levels = Levels("condition", ["ctrl", "A", "B", "A+B"], "+")
    codes = np.repeat(np.arange(4), 10)
    w = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], both])[codes]
    reference = Reference(w, w, codes == 0, codes == 9, np.full(40, "only"))
    assert _measured_overlap(levels, codes, reference) == expected


@pytest.mark.parametrize("method", ["auto", "abduction", "prior", "shift", "groups", "linear"])
def test_an_unseen_combination_is_predicted_in_any_order(parts_only, method):
    options = {"method": method, "n_samples": 2}
    first, second = (
        parts_only.predict_counterfactual(controls(parts_only), to=to, **options)
        for to in ("A+B", "B+A")
    )
    np.testing.assert_allclose(first.X, second.X, rtol=1e-4)
    assert first.obs["condition"].unique().tolist() == ["A+B"]
    alone = parts_only.predict_counterfactual(controls(parts_only), to="A", **options)
    assert not np.allclose(first.obsm["X_discover_w"], alone.obsm["X_discover_w"], atol=1e-3)


def test_the_shift_of_an_unseen_combination_is_made_of_its_parts_shifts(parts_only):
    source = controls(parts_only)
    own = parts_only.get_latent_representation(source, latent="w")
    a, b, both = (
        parts_only.predict_counterfactual(source, to=to, method="shift", n_samples=2).obsm[
            "X_discover_w"
        ]
        - own
        for to in ("A", "B", "A+B")
    )
    np.testing.assert_allclose(both, summed(np.stack([a, b]), 0.5), atol=1e-4)


def test_a_registered_combination_is_the_same_in_another_order():
    model = train_small(combined())
    first, second = (
        model.predict_counterfactual(controls(model), to=to, n_samples=2) for to in ("A+B", "B+A")
    )
    assert np.array_equal(first.X, second.X)
    assert second.obs["condition"].unique().tolist() == ["A+B"]


def test_a_part_without_cells_of_its_own_leaves_auto_the_prior():
    model = train_small(combined(("ctrl", "A", "A+B")))
    predicted = model.predict_counterfactual(controls(model), to="B", n_samples=2)
    assert predicted.uns["discover_counterfactual"]["ways"] == ["abduction"]
    with pytest.raises(ValueError, match=r"no cell under \['B'\], which method='shift'"):
        model.predict_counterfactual(controls(model), to="B", method="shift")


def test_combinations_survive_saving(parts_only, tmp_path):
    parts_only.save(tmp_path / "model")
    source = controls(parts_only)
    loaded = DISCoVeR.load(tmp_path / "model", parts_only.adata.copy(), accelerator="cpu")
    first, second = (
        m.predict_counterfactual(source.copy(), to="A+B", n_samples=2).X
        for m in (parts_only, loaded)
    )
    assert np.array_equal(first, second)


def test_parts_that_are_not_known_or_repeated_are_refused(parts_only):
    source = controls(parts_only)
    for to, message in {
        "A+C": r"Condition 'A\+C' \(its part 'C'\) of 'condition' is not known; known are \['A'",
        "A+A": r"Level 'A\+A' of 'condition' repeats a part; .* Write it once",
    }.items():
        with pytest.raises(ValueError, match=message):
            parts_only.predict_counterfactual(source, to=to)


def test_a_source_that_is_a_part_of_the_target_is_refused_without_combinations(parts_only):
    treated = parts_only.adata[(parts_only.adata.obs["condition"] == "A").to_numpy()].copy()
    with pytest.raises(ValueError, match=r"under 'A', which is a part of 'A\+B'.*the control"):
        parts_only.predict_counterfactual(treated, to="A+B")


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        ({"A": "B+A"}, r"Levels '.\+.' and '.\+.' of 'condition' are the same combination in two"),
        ({"A": "A+A"}, r"Level 'A\+A' of 'condition' repeats a part; a combination names each"),
    ],
    ids=["both orders", "repeated part"],
)
def test_combinations_that_cannot_be_read_are_refused_at_set_up(renamed, message):
    adata = combined()
    adata.obs["condition"] = adata.obs["condition"].replace(renamed)
    with pytest.raises(ValueError, match=message):
        DISCoVeR.setup_anndata(adata, condition_key="condition")
    DISCoVeR.setup_anndata(adata, condition_key="condition", combination_separator=None)


def test_class_means_cannot_take_combinations_apart():
    adata = combined()
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    with pytest.raises(ValueError, match=r"combinations, which prior='class_mean' cannot take"):
        DISCoVeR(adata, prior="class_mean")
