import pytest
import torch

from discover_sc._epoch_terms import EpochTerms


def term(value):
    return torch.tensor(value)


def test_means_count_cells_and_begin_anew_when_they_were_taken():
    epoch = EpochTerms()
    epoch.add({"a": term(1.0), "b": term(-2.0)}, n_cells=3)
    epoch.add({"a": term(5.0), "b": term(0.0)}, n_cells=1)
    assert epoch.n_cells == 4
    assert epoch.pop_means() == pytest.approx({"a": 2.0, "b": -1.5})
    epoch.add({"a": term(7.0), "b": term(7.0)}, n_cells=2)
    assert epoch.pop_means() == pytest.approx({"a": 7.0, "b": 7.0})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_term_that_broke_first_is_named_though_all_break_later(value):
    epoch = EpochTerms()
    assert epoch.find_broken() == []
    epoch.add({"a": term(1.0), "b": term(1.0)}, n_cells=1)
    assert epoch.find_broken() == []
    epoch.add({"a": term(1.0), "b": term(value)}, n_cells=1)
    epoch.add({"a": term(value), "b": term(value)}, n_cells=1)
    assert epoch.find_broken() == ["b"]


def test_minibatches_that_are_summed_up_together_count_as_one_by_one():
    epoch, values = EpochTerms(), torch.linspace(0.0, 1.0, 120)
    for value in values:
        epoch.add({"a": value}, n_cells=2)
    assert epoch.find_broken() == []
    assert epoch.pop_means() == pytest.approx({"a": 0.5})
    for k in range(120):  # breaks among those that are summed up second, after looks in between
        broken = float("nan") if k == 70 else 1.0
        epoch.add({"a": term(float("nan") if k > 70 else 1.0), "b": term(broken)}, n_cells=1)
        if k in (10, 69):
            assert epoch.find_broken() == []
    assert epoch.find_broken() == ["b"]
