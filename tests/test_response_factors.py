import numpy as np
import pandas as pd
import pytest
from fitting import train_small
from sklearn.metrics import r2_score

from discover_sc._group_effects import GroupEffects
from discover_sc._response_factors import FactorEffects, complete
from discover_sc.data import simulate

N_TREATMENTS, N_GROUPS, N_GENES = 8, 6, 60


def planted(noise=0.05, seed=0):
    """Three pathways, receptors of each group, and a fifth of the table hidden."""
    rng = np.random.default_rng(seed)
    strengths = rng.uniform(0.0, 1.5, (N_TREATMENTS, 3))
    receptors = rng.uniform(0.2, 1.8, (N_GROUPS, 3))
    truth = np.einsum("lr,kr,rg->lkg", strengths, receptors, rng.normal(size=(3, N_GENES)))
    table = truth + noise * rng.normal(size=truth.shape)
    hidden = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 0), (7, 1), (0, 3)]
    table[tuple(zip(*hidden, strict=True))] = np.nan
    return table, truth, hidden


def test_gaps_of_a_table_of_few_factors_are_filled_with_the_truth():
    table, truth, hidden = planted()
    completed = complete(table, 4)
    assert completed.shape == table.shape
    for pair in hidden:
        assert r2_score(truth[pair], completed[pair]) > 0.95
    np.testing.assert_array_equal(completed, complete(table, 4))


def test_a_group_without_treatment_answers_like_a_typical_one():
    table, truth, _ = planted()
    table[:, 2] = np.nan
    typical = np.delete(truth, 2, axis=1).mean(axis=1)
    completed = complete(table, 4)[:, 2]
    assert r2_score(typical.ravel(), completed.ravel()) > 0.8


def test_errors_are_those_of_groups_left_out_of_the_treatment():
    table, *_ = planted()
    effects = FactorEffects(table, 0, np.zeros((N_GROUPS, N_GENES)), second_variance=0.1)
    seen = [1, 2, 4, 5]  # groups 0 and 3 are hidden under treatment 0
    assert effects.errors.shape == (4, N_GENES)
    without = table.copy()
    without[0, 2] = np.nan
    expected = table[0, 2] - complete(without, effects.n_factors)[0, 2]
    np.testing.assert_allclose(effects.errors[seen.index(2)], expected)
    assert effects.scores[effects.n_factors] == max(effects.scores.values())
    assert effects.summary()["n_factors"] == effects.n_factors


def test_factors_predict_what_the_distance_between_controls_cannot():
    table, truth, _ = planted()
    control = np.random.default_rng(1).normal(size=(N_GROUPS, N_GENES))
    seen = [1, 2, 4, 5]
    by_distance = GroupEffects(control[seen], control[seen] + table[0, seen])
    effects = FactorEffects(table, 0, control, by_distance.variance_beside())
    assert max(effects.scores.values()) > max(by_distance.scores.values()) + 0.1
    for group in (0, 3):
        fit, fit_by_distance = (
            r2_score(truth[0, group], e.change(control[group]))
            for e in (effects.of(group), by_distance)
        )
        assert fit > max(0.95, fit_by_distance)
    weight = effects.weight_beside(np.zeros(N_GENES))
    assert weight.shape == (N_GENES,)
    assert ((weight > 0.5) & (weight < 1)).all()  # better than the second estimate


def receptor_cells(n_treatments, n_types=4, seed=0):
    """Each type holds another amount of each of two receptors; one pair is left out."""
    rng = np.random.default_rng(seed)
    levels = ["ctrl", *(f"drug_{k}" for k in range(n_treatments))]
    pathways = rng.normal(0, 1.0, (2, 30))
    strengths = np.concatenate([np.zeros((1, 2)), rng.uniform(0, 1, (n_treatments, 2))])
    receptors = np.array([[0.2, 1.6], [1.6, 0.2], [1.0, 1.0], [0.2, 0.2], [1.6, 1.6]])
    pairs = [(c, t) for c in range(len(levels)) for t in range(n_types) if (c, t) != (1, 0)]
    adata = simulate(len(pairs) * 60, 30, seed=0)
    effects = [np.exp(2 + (strengths[c] * receptors[t]) @ pathways) for c, t in pairs]
    adata.X = rng.poisson(np.repeat(effects, 60, axis=0)).astype("float32")
    adata.obs["condition"] = pd.Categorical(np.repeat([levels[c] for c, _ in pairs], 60))
    adata.obs["cell_type"] = pd.Categorical(np.repeat([f"type_{t}" for _, t in pairs], 60))
    return adata


@pytest.mark.parametrize(("n_treatments", "chosen"), [(6, "n_factors"), (1, "power")])
def test_several_treatments_are_used_together_and_one_alone_is_not(n_treatments, chosen):
    adata = receptor_cells(n_treatments)
    model = train_small(adata, {"labels_key": "cell_type"}, train={"max_epochs": 2})
    controls = (adata.obs[["condition", "cell_type"]] == ["ctrl", "type_0"]).all(axis=1).to_numpy()
    model.predict_counterfactual(model.adata[controls].copy(), to="drug_0", n_samples=2)
    assert chosen in model.counterfactual_choice_["ctrl"]


def test_both_choices_are_told_where_a_group_was_never_treated():
    adata = receptor_cells(6, n_types=5)
    controls = (adata.obs["condition"] == "ctrl").to_numpy()
    known = controls | (adata.obs["cell_type"] != "type_4").to_numpy()
    model = train_small(adata[known].copy(), {"labels_key": "cell_type"}, train={"max_epochs": 2})
    model.predict_counterfactual(adata[controls].copy(), to="drug_0", n_samples=2)
    assert {"n_factors", "power"} <= set(model.counterfactual_choice_["ctrl"])
