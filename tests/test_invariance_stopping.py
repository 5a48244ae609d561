import numpy as np
import pytest
from fitting import train_small

from discover_sc import InvarianceStopping


def test_training_stops_when_fresh_probes_find_nothing(adata):
    shuffled = adata.copy()
    shuffled.obs["condition"] = shuffled.obs["condition"].sample(frac=1, random_state=0).to_numpy()
    stop = InvarianceStopping(every_n_epochs=1, patience=1, min_steps=2)
    model = train_small(shuffled, train={"max_epochs": 40, "callbacks": [stop], "train_size": 0.5})
    excess = model.history["condition_excess_validation"].iloc[:, 0].astype(float)
    assert len(model.history["train_loss"]) < 40
    assert excess.iloc[-1] < 0.35  # two standard errors of chance with 150 test cells
    assert np.isfinite(excess).all()


def test_training_goes_on_while_probes_find_the_condition(simulated):
    stop = InvarianceStopping(every_n_epochs=1, patience=1, min_steps=1)
    model = train_small(
        simulated[1],
        model={"adversarial_weight": 0.0},
        train={"max_epochs": 6, "callbacks": [stop]},
    )
    assert len(model.history["train_loss"]) == 6
    assert model.history["condition_excess_validation"].iloc[-1, 0] > 0.5


def test_early_stopping_alone_means_stopping_on_invariance(adata):
    model = train_small(adata, train={"early_stopping": True})
    callbacks = [type(c) for c in model.trainer.callbacks]
    assert InvarianceStopping in callbacks


def test_stopping_on_invariance_without_held_out_cells_is_refused(adata):
    with pytest.raises(ValueError, match="needs validation cells and there are none"):
        train_small(adata, train={"early_stopping": True, "train_size": 1.0})


def test_stopping_on_invariance_needs_two_conditions_among_the_held_out_cells(adata):
    treated = (adata.obs["condition"] != adata.obs["condition"].iloc[0]).to_numpy()
    split = [np.r_[np.flatnonzero(~treated)[:5], np.flatnonzero(treated)]]
    split.append(np.flatnonzero(~treated)[5:])
    options = {"early_stopping": True, "datasplitter_kwargs": {"external_indexing": split}}
    with pytest.raises(ValueError, match="validation cells hold one level of key 0"):
        train_small(adata, train=options)
