import pytest
import torch

from discover_sc._running_average import RunningAverage


def test_the_average_is_exponential_over_four_steps_together_and_its_start_does_not_linger():
    module = torch.nn.Linear(1, 1, bias=False)
    average = RunningAverage(module, decay=0.4)
    expected = float(module.weight.detach())
    average.start()
    for step, value in enumerate([3.0, -1.0, 2.0, 7.0, -4.0, 5.0], start=1):
        module.weight.data.fill_(value)
        average.update()
        if step in (4, 6):  # four steps, and the two that are left when the average is asked for
            decay = min(0.4, step / (step + 10)) ** (4 if step == 4 else 2)
            expected = decay * expected + (1 - decay) * value
    average.swap()
    assert module.weight.item() == pytest.approx(expected)
    average.swap()
    assert module.weight.item() == 5.0
