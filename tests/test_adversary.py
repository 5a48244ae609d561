import pytest
import torch
from drawing import N_CELLS, NO_CATEGORIES, draw, draw_codes

from discover_sc._adversary import Adversary
from discover_sc._losses import adversary_cross_entropy


def test_adversary_has_one_head_per_condition_key_for_each_representation():
    adversary = Adversary({"z": 4, "reconstruction": 6}, [2, 3], n_labels=0)
    representations = {"z": draw(N_CELLS, 4), "reconstruction": draw(N_CELLS, 6)}
    logits = adversary(representations, NO_CATEGORIES)
    shapes = [[tuple(t.shape) for t in classifiers] for classifiers in logits]
    assert shapes == [[(N_CELLS, 2)] * 2, [(N_CELLS, 3)] * 2]


def test_each_classifier_of_the_adversary_reads_its_own_representation_only():
    adversary = Adversary({"z": 4, "reconstruction": 6}, [2], n_labels=0)
    z, reconstruction = draw(N_CELLS, 4), draw(N_CELLS, 6)
    [[from_z, from_reconstruction]] = adversary(
        {"z": z, "reconstruction": reconstruction}, NO_CATEGORIES
    )
    [[other_z, other_reconstruction]] = adversary(
        {"z": z + 1, "reconstruction": reconstruction}, NO_CATEGORIES
    )
    assert torch.equal(from_reconstruction, other_reconstruction)
    assert not torch.allclose(from_z, other_z)


@pytest.mark.parametrize("told", [False, True], ids=["told nothing", "told the label"])
def test_labels_change_the_logits_only_of_an_adversary_that_is_told_them(told):
    adversary = Adversary({"z": 4}, [2], n_labels=3 if told else 0)
    z, labels = draw(N_CELLS, 4), draw_codes(3)
    [[logits]] = adversary({"z": z}, labels)
    [[relabelled]] = adversary({"z": z}, (labels + 1) % 3)
    changed = (logits != relabelled).any(dim=1)
    assert changed.tolist() == [told] * N_CELLS


@pytest.mark.parametrize("n_labels", [0, 3], ids=["told nothing", "told the label"])
def test_the_fused_loss_and_its_gradients_are_those_of_the_cross_entropy(n_labels):
    adversary = Adversary({"z": 4, "reconstruction": 7}, [2, 3], n_labels)
    representations = {"z": draw(N_CELLS, 4), "reconstruction": draw(N_CELLS, 7)}
    labels, truth = draw_codes(3), draw_codes(2, 3)
    fused = adversary.loss(representations, labels, truth)
    (2 * fused).backward()
    gradients = [p.grad.clone() for p in adversary.parameters()]
    adversary.zero_grad()
    plain = 0.0
    for key, classifiers in enumerate(adversary(representations, labels)):
        for logits in classifiers:
            plain = plain + adversary_cross_entropy(logits, truth[:, key]).mean()
    (2 * plain).backward()
    torch.testing.assert_close(fused, plain)
    for gradient, parameter in zip(gradients, adversary.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
