"""The generative model, its inference and its objective; the adversary lives here too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import nn

from ._adversary import Adversary
from ._conditions import Conditions
from ._counts import SparseCells
from ._decoded import likelihood_of
from ._keys import (
    CONDITION_FEATURES_KEY,
    CONDITION_KEY,
    DOSE_KEY,
    INFLATION_KEY,
    LIBRARY_KEY,
    OUTPUTS_KEY,
    PW_KEY,
    PX_KEY,
    PX_SHARED_KEY,
    QW_KEY,
    QZ_KEY,
    SHARED_HIDDEN_KEY,
    THETA_KEY,
    W_KEY,
    Z_KEY,
)
from ._likelihoods import reconstruction_losses
from ._losses import adversary_entropy, kl_to_standard_normal, kl_to_unit_normal
from ._networks import Decoder, Encoders, LinearDecoder
from ._priors import ClassMeanPrior, LearnedPrior

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_READ_BY_ADVERSARY = {
    "hidden": ("z", "hidden"),
    "both": ("z", "reconstruction"),
    "reconstruction": ("reconstruction",),
    "z": ("z",),
}


class DiscoverVAE(BaseModuleClass):
    """Variational auto-encoder with two latents, two reconstructions and an adversary.

    Parameters
    ----------
    n_input
        Number of genes.
    condition_targets
        One tensor per condition key, ``(n_labels or 1, n_levels)``, rows summing to 1: what is
        known of the condition without the latent, given the label or not.
    designs
        One tensor per condition key, ``(n_levels, n_columns)``: how each level is described to
        the networks (:class:`~discover_sc._conditions.Conditions`); None: levels share nothing.
    dose_scales
        Doses of half response, ``(n_responses,)``; None where no dose is registered.
    label_frequencies
        Share of the cells that each label holds, ``(n_labels,)``, where targets are given the
        label; None where they are not.
    n_batch
        Number of batches.
    n_cats_per_cov
        Number of categories of each categorical covariate.
    n_continuous_cov
        Number of continuous covariates.
    library_scale
        Total count that a size factor of 1 stands for; None where libraries are observed.
    n_latent, n_latent_specific
        Dimensions of z and of w.
    n_hidden, n_layers
        Width and number of the hidden layers of encoders and decoders.
    dropout_rate
        Dropout of the encoders, in [0, 1).
    gene_likelihood, dispersion, prior, adversary_input, invariance, decoder
        See :class:`~discover_sc.DISCoVeR`.
    reconstruction_weight, shared_reconstruction_weight, kl_z_weight, kl_w_weight
        Weights of the terms of the bound.
    adversarial_weight
        Weight of the adversarial term.
    """

    def __init__(
        self,
        n_input: int,
        condition_targets: Sequence[Tensor],
        designs: Sequence[Tensor] | None = None,
        dose_scales: Tensor | None = None,
        label_frequencies: Tensor | None = None,
        n_batch: int = 1,
        n_cats_per_cov: Sequence[int] = (),
        n_continuous_cov: int = 0,
        library_scale: float | None = None,
        n_latent: int = 10,
        n_latent_specific: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        gene_likelihood: Literal["nb", "zinb", "poisson", "normal"] = "nb",
        dispersion: Literal["gene", "gene-batch"] = "gene",
        prior: Literal["learned", "class_mean"] = "learned",
        adversary_input: Literal["hidden", "both", "reconstruction", "z"] = "hidden",
        invariance: Literal["marginal", "conditional"] = "marginal",
        decoder: Literal["nonlinear", "linear"] = "nonlinear",
        reconstruction_weight: float = 0.8,
        shared_reconstruction_weight: float = 0.2,
        kl_z_weight: float = 1e-2,
        kl_w_weight: float = 3.0,
        adversarial_weight: float = 100.0,
    ) -> None:
        super().__init__()
        self.n_input = n_input
        self.n_latent = n_latent
        self.n_latents = {"z": n_latent, "w": n_latent_specific}
        self.gene_likelihood = gene_likelihood
        self.dispersion = dispersion
        self.invariance = invariance
        self.reconstruction_weight = reconstruction_weight
        self.shared_reconstruction_weight = shared_reconstruction_weight
        self.kl_z_weight = kl_z_weight
        self.kl_w_weight = kl_w_weight
        self.adversarial_weight = adversarial_weight
        self.n_levels = [target.shape[1] for target in condition_targets]
        for key, target in enumerate(condition_targets):
            self.register_buffer(f"condition_target_{key}", target)
        if label_frequencies is None:
            label_frequencies = torch.ones(1)
        # of the data at hand, not of the saved model
        self.register_buffer("label_frequencies", label_frequencies, persistent=False)
        self.register_buffer("library_scale", torch.tensor(library_scale or 1.0))

        self.conditions = Conditions(designs or [torch.eye(n) for n in self.n_levels], dose_scales)
        n_features = self.conditions.n_features
        self.encoders = Encoders(
            n_input, (n_latent, n_latent_specific), n_hidden, n_layers, dropout_rate, n_features
        )
        self.prior = (
            LearnedPrior(n_latent, n_latent_specific, n_hidden, n_features)
            if prior == "learned"
            else ClassMeanPrior(n_latent, self.n_levels)
        )
        n_cats = [n for n in (n_batch, *n_cats_per_cov) if n > 1]
        self.uses_batch = n_batch > 1
        self._used_covariates = [k for k, n in enumerate(n_cats_per_cov) if n > 1]
        self.has_covariates = bool(n_cats) or n_continuous_cov > 0
        self._inflates = gene_likelihood == "zinb"
        covariates = (n_cats, n_continuous_cov)
        for name, n, inflates in (
            ("decoder", n_latent + n_latent_specific, False),
            ("shared_decoder", n_latent, self._inflates),
        ):
            network = (
                LinearDecoder(n, n_input, *covariates, inflates)
                if decoder == "linear"
                else Decoder(n, n_input, n_hidden, n_layers, *covariates, inflates)
            )
            self.add_module(name, network)
        n_dispersions = n_batch if dispersion == "gene-batch" else 1
        self.log_theta = nn.Parameter(1.0 + 0.1 * torch.randn(n_dispersions, n_input))

        if decoder == "linear" and adversary_input == "hidden":  # there is no hidden layer
            adversary_input = "both"
        self._read_by_adversary = _READ_BY_ADVERSARY[adversary_input]
        widths = {
            "z": n_latent,
            "hidden": self.shared_decoder.n_hidden,
            "reconstruction": n_input,
        }
        self.adversary = Adversary(
            sum(widths[name] for name in self._read_by_adversary),
            self.n_levels,
            len(condition_targets[0]) if invariance == "conditional" else 0,
        )

    # ------------------------------------------------------------------ inference

    def condition_features(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return what the networks are told of the conditions, ``(n_cells, n_features)``."""
        condition_index = tensors[CONDITION_KEY].long()  # arrives as float32
        return self.conditions(condition_index, tensors.get(DOSE_KEY))

    def _get_inference_input(
        self, tensors: dict[str, Tensor | SparseCells]
    ) -> dict[str, Tensor | SparseCells | None]:
        return {
            "x": tensors[REGISTRY_KEYS.X_KEY],
            "condition_features": self.condition_features(tensors),
            "size_factor": tensors.get(REGISTRY_KEYS.SIZE_FACTOR_KEY),
        }

    @auto_move_data
    def inference(
        self,
        x: Tensor | SparseCells,
        condition_features: Tensor,
        size_factor: Tensor | None = None,
    ) -> dict[str, Tensor | torch.distributions.Normal]:
        """Return the posteriors of z and w, a draw of each, the log library, the features.

        Parameters
        ----------
        x
            Expression of shape ``(n_cells, n_genes)``, or its non-zero entries.
        condition_features
            Shape ``(n_cells, n_features)``.
        size_factor
            Positive, of shape ``(n_cells, 1)``, or None: the total count of the cell.
        """
        x = x.to(self.log_theta.device)  # tensors have been moved, sparse cells have not
        qz, qw = self.encoders(self._transform(x), condition_features)
        total = _total(x) if size_factor is None else size_factor
        return {
            QZ_KEY: qz,
            QW_KEY: qw,
            Z_KEY: qz.rsample(),
            W_KEY: qw.rsample(),
            LIBRARY_KEY: torch.log(total * self.library_scale),
            CONDITION_FEATURES_KEY: condition_features,
        }

    def _transform(self, x: Tensor | SparseCells) -> Tensor | SparseCells:
        """Return the expression as the encoders read it, ``(n_cells, n_genes)``."""
        return x if self.gene_likelihood == "normal" else x.log1p()

    @auto_move_data
    def posteriors(self, tensors: dict[str, Tensor]) -> dict[str, torch.distributions.Normal]:
        """Return the posteriors of ``"z"`` and ``"w"`` of a minibatch, and draw nothing."""
        x = self._transform(tensors[REGISTRY_KEYS.X_KEY].to(self.log_theta.device))
        return dict(zip("zw", self.encoders(x, self.condition_features(tensors)), strict=True))

    # ----------------------------------------------------------------- generative

    def covariates(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the batch codes, all categorical codes that are decoded, and the continuous."""
        batch_index = tensors[REGISTRY_KEYS.BATCH_KEY].long()
        parts = [batch_index] if self.uses_batch else []
        if self._used_covariates:
            parts.append(tensors[REGISTRY_KEYS.CAT_COVS_KEY].long()[:, self._used_covariates])
        categories = torch.cat(parts, dim=1) if parts else batch_index[:, :0]
        return batch_index, categories, tensors.get(REGISTRY_KEYS.CONT_COVS_KEY)

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict
    ) -> dict[str, Tensor | None]:
        batch_index, categories, continuous = self.covariates(tensors)
        return {
            "z": inference_outputs[Z_KEY],
            "w": inference_outputs[W_KEY],
            "library": inference_outputs[LIBRARY_KEY],
            "condition_features": inference_outputs[CONDITION_FEATURES_KEY],
            "batch_index": batch_index,
            "categories": categories,
            "continuous": continuous,
        }

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        w: Tensor,
        library: Tensor,
        condition_features: Tensor,
        batch_index: Tensor,
        categories: Tensor,
        continuous: Tensor | None,
        likelihoods: bool = True,
    ) -> dict[str, Tensor | tuple[Tensor, Tensor] | torch.distributions.Distribution]:
        """Return what is decoded from z and w and from z alone, and the prior mean of w.

        Zero inflation is decoded from z alone, for both: it is taken to be of the assay, the same
        under every condition.

        ``likelihoods=False`` leaves out the distributions that the decoders' outputs stand for:
        the loss reads the outputs.
        """
        theta = self.theta(batch_index)
        covariates = (categories, continuous)
        output = self.decoder(torch.cat([z, w], dim=-1), *covariates)
        shared_hidden = self.shared_decoder.hidden(z, *covariates)
        shared_output = self.shared_decoder.read_out(shared_hidden, *covariates)
        outputs = {
            OUTPUTS_KEY: (output, shared_output),
            INFLATION_KEY: self._inflation(shared_hidden, *covariates),
            SHARED_HIDDEN_KEY: shared_hidden,
            PW_KEY: self.prior(z, condition_features),
            THETA_KEY: theta,
        }
        if likelihoods:
            told = (library, theta, outputs[INFLATION_KEY])
            outputs[PX_KEY] = self.likelihood(output, *told)
            outputs[PX_SHARED_KEY] = self.likelihood(shared_output, *told)
        return outputs

    def _inflation(self, shared_hidden: Tensor, *covariates: Tensor | None) -> Tensor | None:
        """Return the logits of zero inflation, ``(n_cells, n_genes)``; None where there is none."""
        return self.shared_decoder.inflation(shared_hidden, *covariates) if self._inflates else None

    @auto_move_data
    def decode(
        self, z: Tensor, w: Tensor | None, library: Tensor, tensors: dict[str, Tensor]
    ) -> torch.distributions.Distribution:
        """Return the likelihood of given latents under the covariates of a minibatch.

        Without w: that of the reconstruction from z alone.
        """
        batch_index, *covariates = self.covariates(tensors)
        latents = z if w is None else torch.cat([z, w], dim=-1)
        output = (self.shared_decoder if w is None else self.decoder)(latents, *covariates)
        zi_logits = None
        if self._inflates:
            zi_logits = self._inflation(self.shared_decoder.hidden(z, *covariates), *covariates)
        return self.likelihood(output, library, self.theta(batch_index), zi_logits)

    def theta(self, batch_index: Tensor) -> Tensor:
        """Return the inverse dispersion, positive, ``(1 or n_cells, n_genes)``."""
        theta = torch.exp(self.log_theta)
        return theta[batch_index.squeeze(-1)] if self.dispersion == "gene-batch" else theta

    def likelihood(
        self, output: Tensor, library: Tensor, theta: Tensor, zi_logits: Tensor | None = None
    ) -> torch.distributions.Distribution:
        """Return the likelihood of decoder output (:func:`~discover_sc._decoded.likelihood_of`)."""
        return likelihood_of(self.gene_likelihood, output, library, theta, zi_logits)

    # ------------------------------------------------------------------ objective

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict,
        generative_outputs: dict,
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Return the weighted negative bounds, without the adversarial term, and their parts."""
        x = tensors[REGISTRY_KEYS.X_KEY]
        reconstruction, shared = reconstruction_losses(
            x,
            self.gene_likelihood,
            generative_outputs[OUTPUTS_KEY],
            inference_outputs[LIBRARY_KEY],
            generative_outputs[THETA_KEY],
            generative_outputs[INFLATION_KEY],
        )
        kl_z = kl_to_standard_normal(inference_outputs[QZ_KEY])
        kl_w = kl_to_unit_normal(inference_outputs[QW_KEY], generative_outputs[PW_KEY])
        if self.training:
            self.prior.update(
                inference_outputs[QZ_KEY].loc.detach(), inference_outputs[CONDITION_FEATURES_KEY]
            )
        loss = (
            self.reconstruction_weight * reconstruction
            + self.shared_reconstruction_weight * shared
            + kl_weight * (self.kl_z_weight * kl_z + self.kl_w_weight * kl_w)
        )
        kl = {"kl_z": kl_z.detach(), "kl_w": kl_w.detach()}
        return LossOutput(
            loss=loss.mean(),
            reconstruction_loss=reconstruction.detach(),
            kl_local=kl,
            extra_metrics={
                "shared_reconstruction_loss": shared.detach().mean(),
                **{name: divergence.mean() for name, divergence in kl.items()},
            },
        )

    # ------------------------------------------------------------------- the game

    def representation(
        self, tensors: dict[str, Tensor], inference_outputs: dict, generative_outputs: dict
    ) -> Tensor:
        """Return what the adversary reads of each cell, ``(n_cells, n)``.

        One or several, side by side, of: the posterior mean of z, noise-free, because that is
        what users and probes read; the last hidden layer of the shared decoder, of which the
        expression decoded from z is a linear map and a softmax (zero inflation included), so that
        it knows no more of the condition; and the logarithm of that expression, in multiples of
        the mean gene so that neither depth nor the number of genes changes its scale.

        Covariates are permuted between cells before the last two: a batch that goes with a
        condition would tell it.
        """
        hidden, output = generative_outputs[SHARED_HIDDEN_KEY], generative_outputs[OUTPUTS_KEY][1]
        zi_logits = generative_outputs[INFLATION_KEY]
        reads_reconstruction = "reconstruction" in self._read_by_adversary
        if self.has_covariates and self._read_by_adversary != ("z",):
            covariates = self._permuted_covariates(tensors)
            hidden = self.shared_decoder.hidden(inference_outputs[Z_KEY], *covariates)
            if reads_reconstruction:
                output = self.shared_decoder.read_out(hidden, *covariates)
                zi_logits = self._inflation(hidden, *covariates)
        parts = {"z": inference_outputs[QZ_KEY].loc, "hidden": hidden}
        if reads_reconstruction:
            parts["reconstruction"] = self._as_read(output, zi_logits)
        return torch.cat([parts[name] for name in self._read_by_adversary], dim=1)

    def _permuted_covariates(self, tensors: dict[str, Tensor]) -> list[Tensor | None]:
        """Return the covariates, each cell's those of another cell."""
        batch_index, *covariates = self.covariates(tensors)
        order = torch.randperm(len(batch_index), device=batch_index.device)
        return [c if c is None else c[order] for c in covariates]

    def _as_read(self, output: Tensor, zi_logits: Tensor | None) -> Tensor:
        if self.gene_likelihood == "normal":
            return output
        scale = torch.softmax(output, dim=-1)
        if zi_logits is not None:  # the inflation must not be a way past the adversary
            scale = scale * torch.sigmoid(-zi_logits)
        return torch.log1p(self.n_input * scale)

    def _labels(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors[REGISTRY_KEYS.LABELS_KEY].long()

    def _targets(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """Return per condition key what is known without the latent, (1 or n_cells, n_levels)."""
        targets = [getattr(self, f"condition_target_{k}") for k in range(len(self.n_levels))]
        if self.invariance == "conditional":
            labels = self._labels(tensors).squeeze(-1)
            return [target[labels] for target in targets]
        return targets

    def game(
        self, representation: Tensor, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the losses of both players, and how well the adversary does.

        Returns
        -------
        The adversarial loss of the model, whose gradient leaves the adversary alone; the
        cross-entropy that the adversary minimises, whose gradient reaches nothing else: 0-d, in
        nats, summed over keys. And ``adversary_cross_entropy``, ``adversary_accuracy`` and
        ``adversary_entropy``, 0-d, averaged over the keys.
        """
        condition_index = tensors[CONDITION_KEY].long()
        adversarial_loss, cross_entropy, predictions = self.adversary.play(
            representation, self._labels(tensors), condition_index, self._targets(tensors)
        )
        accuracy, entropy = [], []
        for key, log_prediction in enumerate(predictions):
            right = log_prediction.argmax(-1) == condition_index[:, key]
            accuracy.append(right.float().mean())
            entropy.append(adversary_entropy(log_prediction).mean())
        metrics = {
            "adversary_cross_entropy": cross_entropy.detach() / len(predictions),
            "adversary_accuracy": _mean(accuracy),
            "adversary_entropy": _mean(entropy),
        }
        return adversarial_loss, cross_entropy, metrics

    def chance(self) -> dict[str, float]:
        """Return what the adversary reaches without reading anything, averaged over the keys.

        ``adversary_chance_accuracy`` always names the most frequent level;
        ``adversary_chance_cross_entropy`` is the entropy of the level frequencies, in nats. Under
        conditional invariance both are given the label, averaged over cells as the adversary's
        own accuracy is.
        """
        accuracy, entropy = [], []
        for key in range(len(self.n_levels)):
            target = getattr(self, f"condition_target_{key}")
            accuracy.append(self.label_frequencies @ target.amax(-1))
            entropy.append(self.label_frequencies @ torch.special.entr(target).sum(-1))
        return {
            "adversary_chance_accuracy": float(torch.stack(accuracy).mean()),
            "adversary_chance_cross_entropy": float(torch.stack(entropy).mean()),
        }


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def _total(x: Tensor | SparseCells) -> Tensor:
    """Return the total expression of each cell, ``(n_cells, 1)``."""
    if isinstance(x, SparseCells):
        return x.sum_per_cell(x.values).unsqueeze(1)
    return x.sum(-1, keepdim=True)
