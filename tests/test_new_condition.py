"""A new condition learned from a few cells; all else keeps every bit."""

import numpy as np
import pytest
import torch
from fitting import QUIET, train_small

from discover_sc import DISCoVeR
from discover_sc._conditions import Conditions, ConditionVectors
from discover_sc.data import simulate
from discover_sc.evaluation import log_mean_profile

# targets that no group was seen under
pytestmark = pytest.mark.filterwarnings("ignore:The median support")


@pytest.fixture(scope="module")
def cells():
    """All cells, with a third treatment that no model was trained on."""
    adata = simulate(600, 60, n_types=3, n_conditions=4, effect_scale=1.5, seed=0)
    adata.obs["condition"] = adata.obs["condition"].astype(str)
    return adata


def of(adata, condition, n_cells=None):
    return adata[(adata.obs["condition"] == condition).to_numpy()][:n_cells].copy()


@pytest.fixture(params=["labels", "clusters"])
def model(cells, request):
    known = cells[(cells.obs["condition"] != "treat_3").to_numpy()].copy()
    setup = {"labels_key": "cell_type"} if request.param == "labels" else {}
    return train_small(known, setup, train={"max_epochs": 5})


def test_other_levels_and_latents_keep_every_bit(model, cells):
    source = of(cells, "ctrl")

    def answers():
        yield model.get_latent_representation(latent="z")
        yield model.get_latent_representation(latent="w")
        for method in ("auto", "shift", "neighbors", "groups", "linear", "abduction", "prior"):
            predicted = model.predict_counterfactual(
                source, to="treat_1", method=method, n_samples=2
            )
            yield from (predicted.X, predicted.obsm["X_discover_w"])

    before = list(answers())
    parameters = {name: p.clone() for name, p in model.module.named_parameters()}
    state = torch.get_rng_state()
    model.add_condition(of(cells, "treat_3", 20))
    assert torch.equal(state, torch.get_rng_state())
    for old, new in zip(before, answers(), strict=True):
        assert np.array_equal(old, new)
    assert all(torch.equal(p, parameters[name]) for name, p in model.module.named_parameters())
    assert not model.module.training


def test_the_new_condition_is_listed_predicted_for_every_type_and_saved(model, cells, tmp_path):
    few, source = of(cells, "treat_3", 20), of(cells, "ctrl")
    n_reference = len(model.reference_["z"])
    model.add_condition(few)
    assert model.conditions["condition"] == ["ctrl", "treat_1", "treat_2", "treat_3"]
    assert len(model.reference_["z"]) == n_reference + 20
    predicted = model.predict_counterfactual(source, to="treat_3", n_samples=2)
    assert (predicted.obs["condition"] == "treat_3").all()
    known = model.predict_counterfactual(source, to="treat_1", n_samples=2)
    assert not np.allclose(predicted.X, known.X)

    model.save(tmp_path / "model")
    loaded = DISCoVeR.load(tmp_path / "model", model.adata.copy(), accelerator="cpu")
    assert loaded.conditions == model.conditions
    again = loaded.predict_counterfactual(source, to="treat_3", n_samples=2)
    assert np.array_equal(predicted.X, again.X)
    latents = [m.get_latent_representation(few, latent="w") for m in (model, loaded)]
    assert np.array_equal(*latents)


def test_what_is_learned_lowers_the_loss_of_the_new_cells(model, cells):
    few = of(cells, "treat_3", 40)

    def loss(condition):
        named = few.copy()
        named.obs["condition"] = condition
        named = model._validate_anndata(named)
        [tensors] = model._make_data_loader(named, batch_size=40)
        torch.manual_seed(0)
        with torch.no_grad():
            return float(model.module(tensors)[2].loss)

    known = min(loss(level) for level in model.conditions["condition"])
    model.add_condition(few)
    assert loss("treat_3") < known


def test_what_the_decoder_misses_is_what_stands_out_of_the_noise(model, cells):
    few = of(cells, "treat_3", 40)
    model.add_condition(few)
    missed = model.missed_changes_["treat_3"]
    source = of(cells, "ctrl")
    model.missed_changes_["treat_3"] = np.zeros_like(missed)
    without = model.predict_counterfactual(source, to="treat_3", n_samples=2).X
    model.missed_changes_["treat_3"] = missed
    predicted = model.predict_counterfactual(source, to="treat_3", n_samples=2).X
    moved = log_mean_profile(predicted) - log_mean_profile(without)
    assert np.corrcoef(moved, missed)[0, 1] > 0.6  # beside known treatments, gene by gene
    truth = log_mean_profile(of(cells, "treat_3").X)
    errors = [np.abs(log_mean_profile(x) - truth).mean() for x in (predicted, without)]
    assert errors[0] < errors[1]


def test_known_treatments_tell_the_error_of_a_new_one(model, cells):
    model.add_condition(of(cells, "treat_3", 100))
    predicted = model.predict_counterfactual(of(cells, "ctrl"), to="treat_3", n_samples=2)
    assert predicted.varm["discover_mean_lower"].notna().all(axis=None)
    choice = model.counterfactual_choice_["ctrl"]
    assert choice["n_left_out"] > 0
    assert 0 < choice["mean_weight_of_observed_changes"] < 1


def test_cells_of_no_known_group_warn(cells):
    known = cells[(cells.obs["condition"] != "treat_3").to_numpy()].copy()
    model = train_small(known, {"labels_key": "cell_type"})
    few = of(cells, "treat_3", 20)
    few.obs["cell_type"] = "unheard of"
    with pytest.warns(UserWarning, match=r"None of the cells of 'treat_3' belongs to a group"):
        model.add_condition(few)
    assert (model.missed_changes_["treat_3"] == 0).all()


def test_several_conditions_can_be_added_and_combined(model, cells):
    first, second = of(cells, "treat_3", 40), of(cells, "treat_3")[40:80].copy()
    second.obs["condition"] = "treat_4"
    model.add_condition(first)
    one = model.predict_counterfactual(of(cells, "ctrl"), to="treat_3", n_samples=2)
    model.add_condition(second)
    assert model.added_levels_ == {"condition": ["treat_3", "treat_4"]}
    again = model.predict_counterfactual(of(cells, "ctrl"), to="treat_3", n_samples=2)
    assert np.array_equal(one.X, again.X)
    codes = model.reference_["condition_codes"][-40:]
    assert (codes == 4).all()
    both = model.predict_counterfactual(of(cells, "ctrl"), to="treat_4+treat_1", n_samples=2)
    assert (both.obs["condition"] == "treat_4+treat_1").all()


def test_the_same_seed_learns_the_same_whatever_the_global_state(cells, tmp_path):
    known = cells[(cells.obs["condition"] != "treat_3").to_numpy()].copy()
    train_small(known).save(tmp_path / "model")
    learned = []
    for state in (0, 1):
        model = DISCoVeR.load(tmp_path / "model", known.copy(), accelerator="cpu")
        torch.manual_seed(state)
        model.add_condition(of(cells, "treat_3", 20), seed=3)
        learned.append(model.module.prior.conditions.added)
    assert torch.equal(*learned)
    assert learned[0].abs().sum() > 0


def test_added_columns_stand_last_and_are_zero_for_other_levels():
    conditions = Conditions([torch.eye(2), torch.eye(2)], torch.tensor([1.0]))
    codes, dose = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1.0], [3.0]])
    before = conditions(codes, dose)
    conditions.tell_added([1, 0])
    assert torch.equal(conditions(codes, dose), torch.cat([before, torch.zeros(2, 1)], dim=1))
    new = conditions(torch.tensor([[2, 1]]), torch.tensor([[3.0]]))
    torch.testing.assert_close(new, torch.tensor([[0, 0, 0, 1, 0.75]]))


def test_vectors_of_added_levels_add_to_the_known_ones():
    vectors = ConditionVectors([2], 4)
    vectors.added = torch.ones(1, 4)
    features = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    expected = torch.stack([vectors.embeddings[0].weight[0], vectors.embeddings[0].weight[1] + 2])
    torch.testing.assert_close(vectors(features), expected)


def test_training_goes_not_on_with_added_conditions(model, cells):
    model.add_condition(of(cells, "treat_3", 20))
    with pytest.raises(RuntimeError, match=r"were added after training .*Train a new model on all"):
        model.train(max_epochs=1, **QUIET)


def test_cells_that_teach_no_new_condition_are_refused_and_leave_the_model_alone(model, cells):
    few = of(cells, "treat_3", 20)
    mixed = cells[:50].copy()
    combined = few.copy()
    combined.obs["condition"] = "treat_1+treat_9"
    fewer_genes = few[:, :10].copy()
    for wrong, message in (
        (mixed, r"holds the levels \[.*\]; one new level is learned at a time"),
        (of(cells, "treat_1", 20), r"Level 'treat_1' of 'condition' is known to the model"),
        (combined, r"Level 'treat_1\+treat_9' of 'condition' is a combination"),
        (fewer_genes, "50 genes of the model are missing"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_condition(wrong)
    with pytest.raises(ValueError, match="condition_key is 'dose'; condition keys are"):
        model.add_condition(few, condition_key="dose")
    assert model.conditions["condition"] == ["ctrl", "treat_1", "treat_2"]
    assert len(model.module.prior.conditions.added) == 0


def test_class_means_learn_no_new_condition(cells):
    model = train_small(cells, model={"prior": "class_mean"})
    new = of(cells, "treat_3", 20)
    new.obs["condition"] = "new"
    with pytest.raises(ValueError, match="prior is 'class_mean', whose means need the cells"):
        model.add_condition(new)


def test_one_of_several_keys_must_be_named(cells):
    known = cells[(cells.obs["condition"] != "treat_3").to_numpy()].copy()
    known.obs["donor"] = np.where(np.arange(known.n_obs) % 2, "a", "b")
    model = train_small(known, {"condition_key": ["condition", "donor"]})
    few = of(cells, "treat_3", 20)
    few.obs["donor"] = "a"
    with pytest.raises(ValueError, match=r"several condition keys, \['condition', 'donor'\]. Say"):
        model.add_condition(few)
    model.add_condition(few, condition_key="condition")
    source = of(known, "ctrl")
    predicted = model.predict_counterfactual(source, to={"condition": "treat_3"}, n_samples=2)
    assert (predicted.obs["condition"] == "treat_3").all()


def test_a_new_condition_with_doses(cells):
    rng = np.random.default_rng(7)
    dosed = cells.copy()
    dosed.obs["dose"] = np.where(
        dosed.obs["condition"] == "ctrl", 0.0, rng.choice([1.0, 10.0], dosed.n_obs)
    )
    known = dosed[(dosed.obs["condition"] != "treat_3").to_numpy()].copy()
    model = train_small(known, {"dose_key": "dose"})
    source = of(dosed, "ctrl")
    options = {"dose": 2.0, "n_samples": 2}
    before = model.predict_counterfactual(source, to="treat_1", **options)
    model.add_condition(of(dosed, "treat_3", 30))
    after = model.predict_counterfactual(source, to="treat_1", **options)
    assert np.array_equal(before.X, after.X)
    assert model.doses_["treat_3"] == [1.0, 10.0]
    low, high = (
        model.predict_counterfactual(source, to="treat_3", dose=d, n_samples=2) for d in (1.0, 9.0)
    )
    assert not np.allclose(low.X, high.X)
