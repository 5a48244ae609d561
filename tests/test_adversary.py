import pytest
import torch
import torch.nn.functional as F
from drawing import N_CELLS, NO_CATEGORIES, draw, draw_codes

from discover_sc._adversary import Adversary
from discover_sc._losses import adversarial_loss

TARGETS = [torch.full((1, 2), 0.5), torch.full((1, 3), 1 / 3)]


def plain_logits(adversary, x, labels):
    hidden = adversary.first(x)
    if adversary.told_labels:
        hidden = hidden + adversary.labels.embeddings[0].weight[labels[:, 0]]
    return adversary.heads(F.leaky_relu(hidden, 0.2)).split(adversary.n_levels, dim=1)


def test_adversary_has_one_head_per_condition_key():
    adversary = Adversary(4, [2, 3], n_labels=0)
    truth = draw_codes(2, 3)
    _, _, predictions = adversary.play(draw(N_CELLS, 4), NO_CATEGORIES, truth, TARGETS)
    assert [tuple(log.shape) for log in predictions] == [(N_CELLS, 2), (N_CELLS, 3)]


@pytest.mark.parametrize("told", [False, True], ids=["told nothing", "told the label"])
def test_labels_change_the_predictions_only_of_an_adversary_that_is_told_them(told):
    adversary = Adversary(4, [2], n_labels=3 if told else 0)
    z, labels, truth = draw(N_CELLS, 4), draw_codes(3), draw_codes(2)
    [prediction], [relabelled] = (
        adversary.play(z, codes, truth, TARGETS[:1])[2] for codes in (labels, (labels + 1) % 3)
    )
    changed = (prediction != relabelled).any(dim=1)
    assert changed.tolist() == [told] * N_CELLS


@pytest.mark.parametrize("n_labels", [0, 3], ids=["told nothing", "told the label"])
def test_the_losses_and_gradients_of_the_game_are_those_of_two_players_in_turn(n_labels):
    """One pass over the sum of both losses: neither player's gradient reaches the other."""
    adversary = Adversary(7, [2, 3], n_labels)
    x, labels, truth = draw(N_CELLS, 7).requires_grad_(), draw_codes(3), draw_codes(2, 3)
    targets = [torch.full((1, 2), 0.5), torch.softmax(draw(N_CELLS, 3), -1)]
    model_loss, cross_entropy, predictions = adversary.play(x, labels, truth, targets)
    (3 * model_loss + 2 * cross_entropy).backward()
    found = [x.grad.clone(), *(p.grad.clone() for p in adversary.parameters())]

    per_key = [logits.log_softmax(-1) for logits in plain_logits(adversary, x, labels)]
    pairs = list(enumerate(zip(per_key, targets, strict=True)))
    against = sum(adversarial_loss(log, t, truth[:, k]).mean() for k, (log, t) in pairs)
    plain = sum(F.nll_loss(log, truth[:, k]) for k, log in enumerate(per_key))
    (for_x,) = torch.autograd.grad(3 * against, x, retain_graph=True)
    expected = [for_x, *torch.autograd.grad(2 * plain, list(adversary.parameters()))]
    torch.testing.assert_close((model_loss, cross_entropy), (against, plain))
    torch.testing.assert_close(predictions, per_key)
    torch.testing.assert_close(found, expected)
