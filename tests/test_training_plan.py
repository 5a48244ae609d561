import numpy as np
import pytest
import scvi
import torch
from fitting import QUIET, train_small

from discover_sc import DISCoVeR, InvarianceStopping
from discover_sc._training_plan import DiscoverTrainingPlan

TERMS = (
    "reconstruction_loss",
    "shared_reconstruction_loss",
    "kl_z",
    "kl_w",
    "kl_local",
    "elbo",
    "adversary_cross_entropy",
    "adversary_accuracy",
    "adversary_entropy",
)


def test_history_holds_every_documented_term_on_both_splits_and_the_chance_level(adata):
    history = train_small(adata).history
    for key in [f"{t}_{split}" for t in TERMS for split in ("train", "validation")]:
        values = history[key][key].astype(float)
        assert len(values) == 2
        assert np.isfinite(values).all()
    accuracy = history["adversary_chance_accuracy"].iloc[0, 0]
    frequencies = adata.obs["condition"].value_counts(normalize=True)
    assert accuracy == pytest.approx(frequencies.max(), abs=1e-6)
    assert {"train_loss", "validation_loss"} <= set(history)


def test_history_is_the_mean_over_cells_not_over_minibatches(adata):
    """The last minibatch is smaller; weighing it like the others would bias the epoch."""
    model = train_small(adata, train={"max_epochs": 1, "plan_kwargs": {"lr": 0.0}})
    # nothing was learned, and evaluation mode gives the mean over all validation cells
    cells = model.validation_indices
    loader = model._make_data_loader(model.adata, indices=cells, batch_size=7)
    total = 0.0
    scvi.settings.seed = 0
    for tensors in loader:
        total += float(model.module(tensors)[2].kl_local["kl_z"].detach().sum())
    logged = model.history["kl_z_validation"].iloc[0, 0]
    assert logged == pytest.approx(total / len(cells), rel=1e-4)


def test_the_adversary_steps_change_only_the_adversary(adata):
    model = train_small(adata, train={"plan_kwargs": {"lr": 0.0, "weight_decay": 0.0}})
    fresh = DISCoVeR(model.adata)
    fresh.module.load_state_dict(model.module.state_dict())
    before = {n: p.clone() for n, p in fresh.module.named_parameters()}
    fresh.train(max_epochs=1, plan_kwargs={"lr": 0.0, "weight_decay": 0.0}, **QUIET)
    moved = {n for n, p in fresh.module.named_parameters() if not torch.equal(p, before[n])}
    moved -= {"log_theta"}  # fitted when training has ended
    assert moved
    assert all(n.startswith("adversary") for n in moved)


def test_the_model_step_leaves_the_adversary_alone(adata):
    model = train_small(adata)
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    frozen = {"adversary_lr": 0.0, "weight_decay": 0.0}
    model.train(max_epochs=1, plan_kwargs=frozen, **QUIET)
    moved = {n for n, p in model.module.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert not any(n.startswith("adversary") for n in moved)


def test_global_step_counts_steps_of_the_model_only(adata):
    model = train_small(adata, train={"max_epochs": 3, "batch_size": 90})
    assert model.trainer.global_step == 3 * 3  # 270 training cells in minibatches of 90


def test_max_steps_means_steps_of_the_model(adata):
    model = train_small(adata, train={"max_epochs": 50, "max_steps": 5, "batch_size": 90})
    assert model.trainer.global_step == 5


def test_kl_warm_up_grows_over_steps_and_over_epochs(adata):
    model = train_small(adata)
    by_step = DiscoverTrainingPlan(model.module, n_steps_kl_warmup=10)
    assert float(by_step.kl_weight) == 0.0
    by_epoch = DiscoverTrainingPlan(model.module, n_epochs_kl_warmup=4, min_kl_weight=0.5)
    assert float(by_epoch.kl_weight) == 0.5
    warmed = train_small(
        adata, train={"max_epochs": 6, "plan_kwargs": {"n_epochs_kl_warmup": 1000}}
    )
    plain = train_small(adata, train={"max_epochs": 6})
    # an untouched KL term is larger than one that was held down from the start
    kl = [m.history["kl_z_train"].iloc[-1, 0] for m in (warmed, plain)]
    assert kl[0] != kl[1]


def test_gradient_clipping_bounds_the_norm(adata, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        result = clip(parameters, max_norm)
        norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))
        return result

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    train_small(adata, train={"max_epochs": 1, "gradient_clip_val": 0.5})
    assert norms
    assert max(norms) <= 0.5 + 1e-4


def test_the_learning_rate_falls_on_a_plateau(adata):
    plan = {"reduce_lr_on_plateau": True, "lr_patience": 0, "lr_threshold": 1e9, "lr_factor": 0.1}
    model = train_small(adata, train={"max_epochs": 3, "plan_kwargs": plan})
    rate = model.trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(1e-3 * 0.1**2)
    assert model.trainer.optimizers[1].param_groups[0]["lr"] == 1e-3  # the adversary keeps its own


def test_early_stopping_on_a_named_metric_is_scvi_tools_own(adata):
    stop = {
        "early_stopping": True,
        "early_stopping_monitor": "reconstruction_loss_validation",
        "early_stopping_patience": 1,
        "early_stopping_min_delta": 1e9,
    }
    model = train_small(adata, train={"max_epochs": 20} | stop)
    assert len(model.history["train_loss"]) == 2


def test_training_on_all_cells_needs_no_validation(adata):
    model = train_small(adata, train={"train_size": 1.0})
    assert len(model.train_indices) == adata.n_obs
    assert "reconstruction_loss_validation" not in model.history


def test_external_indexing_decides_the_split(adata):
    cells = np.arange(adata.n_obs)
    split = {"external_indexing": [cells[:200], cells[200:]]}
    model = train_small(adata, train={"datasplitter_kwargs": split})
    assert set(model.validation_indices) == set(cells[200:])
    assert "reconstruction_loss_validation" in model.history


def test_sparse_minibatches_train_the_same_model(adata):
    latents = []
    for sparse in (False, True):
        scvi.settings.seed = 0
        model = train_small(adata, train={"load_sparse_tensor": sparse})
        latents.append(model.get_latent_representation())
    np.testing.assert_allclose(latents[0], latents[1], rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_training_at_the_last_finite_state(adata, monkeypatch):
    model = train_small(adata)
    finite = {k: v.clone() for k, v in model.module.state_dict().items()}
    kl = model.module.loss.__globals__["kl_to_unit_normal"]
    monkeypatch.setitem(
        model.module.loss.__globals__, "kl_to_unit_normal", lambda q, m: kl(q, m) * float("nan")
    )
    with pytest.raises(FloatingPointError, match=r"kl_w is not finite in epoch 0.*learning rate"):
        model.train(max_epochs=5, **QUIET)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, finite[name]), name
    assert np.isfinite(model.get_latent_representation()).all()


@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson", "normal"])
@pytest.mark.parametrize("end", ["of the epoch", "max_steps"])
def test_a_loss_that_breaks_between_two_looks_is_found_before_anything_judges_it(
    adata, monkeypatch, gene_likelihood, end
):
    model = train_small(adata, model={"gene_likelihood": gene_likelihood})
    finite = {k: v.clone() for k, v in model.module.state_dict().items()}
    namespace, n_calls = model.module.loss.__globals__, []
    kl = namespace["kl_to_unit_normal"]

    def break_later(q, mean):
        n_calls.append(1)
        return kl(q, mean) * (float("nan") if len(n_calls) > 1 else 1.0)

    monkeypatch.setitem(namespace, "kl_to_unit_normal", break_later)
    judged = []
    monkeypatch.setattr(DiscoverTrainingPlan, "validation_step", lambda *a: judged.append(a))
    stop = InvarianceStopping(every_n_epochs=1, min_steps=1)
    options = {"max_steps": 3} if end == "max_steps" else {}
    with pytest.raises(FloatingPointError, match="kl_w is not finite in epoch 0"):
        model.train(max_epochs=5, batch_size=50, callbacks=[stop], **options, **QUIET)
    assert not judged
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, finite[name]), name


def test_parameters_that_are_not_finite_are_found_too(adata):
    with pytest.raises(FloatingPointError, match="is not finite in epoch 0"):
        train_small(adata, train={"max_epochs": 1, "plan_kwargs": {"lr": 1e30}})


def test_an_unknown_plan_argument_is_refused_before_training(adata):
    with pytest.raises(TypeError, match="warmup"):
        train_small(adata, train={"plan_kwargs": {"warmup": 3}})


def test_without_weight_the_adversary_is_neither_trained_nor_heard(adata):
    model = train_small(adata, model={"adversarial_weight": 0.0})
    expected = (
        0.8 * model.history["reconstruction_loss_train"].iloc[-1, 0]
        + 0.2 * model.history["shared_reconstruction_loss_train"].iloc[-1, 0]
        + 0.01 * model.history["kl_z_train"].iloc[-1, 0]
        + 3.0 * model.history["kl_w_train"].iloc[-1, 0]
    )
    assert model.history["train_loss"].iloc[-1, 0] == pytest.approx(expected, rel=1e-4)


def test_checkpoints_are_written_under_the_two_optimisers(adata, tmp_path):
    scvi.settings.logging_dir = str(tmp_path)
    model = train_small(adata, train={"enable_checkpointing": True})
    assert list(tmp_path.rglob("model.pt"))
    assert model.is_trained


@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson"])
def test_training_in_bfloat16_is_training_up_to_rounding(adata, gene_likelihood):
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        scvi.settings.seed = 0
        model = train_small(
            adata,
            model={"gene_likelihood": gene_likelihood},
            train={"max_epochs": 3, "precision": precision},
        )
        losses.append(model.history["reconstruction_loss_train"].iloc[-1, 0])
        assert np.isfinite(model.get_latent_representation()).all()
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_training_ends_with_the_average_which_validation_judged(adata):
    """With decay 0 the average is the last state; otherwise it lags behind."""
    models = []
    for decay in (0.0, 0.99):
        scvi.settings.seed = 0
        arguments = {"max_epochs": 4, "plan_kwargs": {"averaging_decay": decay}}
        models.append(train_small(adata, train=arguments))
    last, averaged = models
    distance = sum(
        float((a - b).detach().square().sum())
        for a, b in zip(last.module.parameters(), averaged.module.parameters(), strict=True)
    )
    assert distance > 1e-3
    key = "reconstruction_loss"  # the steps are the same, what is judged is not
    assert last.history[f"{key}_train"].equals(averaged.history[f"{key}_train"])
    assert not last.history[f"{key}_validation"].equals(averaged.history[f"{key}_validation"])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(adata, decay):
    with pytest.raises(ValueError, match=r"averaging_decay is .*at least 0 and below 1"):
        train_small(adata, train={"plan_kwargs": {"averaging_decay": decay}})
