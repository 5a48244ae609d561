import pytest
import torch
import torch.nn.functional as F
from drawing import N_CELLS, NO_CATEGORIES, draw, draw_codes

from discover_sc._adversary import Adversary


def test_adversary_has_one_head_per_condition_key():
    adversary = Adversary(4, [2, 3], n_labels=0)
    shapes = [tuple(logits.shape) for logits in adversary(draw(N_CELLS, 4), NO_CATEGORIES)]
    assert shapes == [(N_CELLS, 2), (N_CELLS, 3)]


@pytest.mark.parametrize("told", [False, True], ids=["told nothing", "told the label"])
def test_labels_change_the_logits_only_of_an_adversary_that_is_told_them(told):
    adversary = Adversary(4, [2], n_labels=3 if told else 0)
    z, labels = draw(N_CELLS, 4), draw_codes(3)
    [logits], [relabelled] = adversary(z, labels), adversary(z, (labels + 1) % 3)
    changed = (logits != relabelled).any(dim=1)
    assert changed.tolist() == [told] * N_CELLS


@pytest.mark.parametrize("n_labels", [0, 3], ids=["told nothing", "told the label"])
def test_the_fused_loss_and_its_gradients_are_those_of_the_cross_entropy(n_labels):
    adversary = Adversary(7, [2, 3], n_labels)
    x, labels, truth = draw(N_CELLS, 7), draw_codes(3), draw_codes(2, 3)
    fused = adversary.loss(x, labels, truth)
    (2 * fused).backward()
    gradients = [p.grad.clone() for p in adversary.parameters()]
    adversary.zero_grad()
    per_key = adversary(x, labels)
    plain = sum(F.cross_entropy(g, truth[:, k]).mean() for k, g in enumerate(per_key))
    (2 * plain).backward()
    torch.testing.assert_close(fused, plain)
    for gradient, parameter in zip(gradients, adversary.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
