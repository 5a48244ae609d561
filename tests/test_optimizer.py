import pytest
import torch

from discover_sc._optimizer import AdamW


def train(optimizer_class, fused, reload=False):
    """Step a small network on fixed data; return its parameters."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    network[0].weight = torch.nn.Parameter(network[0].weight.detach().t().contiguous().t())
    groups = [{"params": network[0].parameters()}, {"params": network[2].parameters(), "lr": 0.1}]
    options = {"lr": 0.01, "weight_decay": 0.1, "fused": fused}
    optimizer = optimizer_class(groups, **options)
    x = torch.randn(20, 5)
    for k in range(10):
        if reload and k == 5:
            state = optimizer.state_dict()
            optimizer = optimizer_class(groups, **options)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        (network(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    return list(network.parameters())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_updates_are_those_of_torch_to_the_bit(fused):
    own, reference = train(AdamW, fused), train(torch.optim.AdamW, fused)
    assert all(torch.equal(a, b) for a, b in zip(own, reference, strict=True))


def test_the_state_survives_saving_and_loading():
    saved, reference = train(AdamW, True, reload=True), train(torch.optim.AdamW, True)
    assert all(torch.equal(a, b) for a, b in zip(saved, reference, strict=True))


def test_a_closure_gives_gradients_and_its_loss_is_returned():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = AdamW([parameter], lr=0.1, weight_decay=0.0, fused=True)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.9]))  # the first step is lr


def test_gradients_are_forgotten_or_set_to_zero():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], fused=True)
    parameter.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(parameter.grad, torch.zeros(3))
    optimizer.zero_grad()
    assert parameter.grad is None
