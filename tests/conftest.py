import os

import matplotlib
import pytest
import scvi
import torch
from fitting import train_small

from discover_sc.data import kang, simulate

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _seeded():
    scvi.settings.seed = 0
    torch.manual_seed(0)


@pytest.fixture
def adata():
    """300 small cells: 3 types, 2 conditions, 2 batches, known truth."""
    return simulate(300, 60, n_types=3, n_batches=2, seed=0)


@pytest.fixture(scope="session")
def simulated():
    """Simulated cells with a strong effect, and one type's treated cells held out of training."""
    full = simulate(1200, 200, n_types=4, effect_scale=1.5, affected_fraction=0.15, seed=1)
    hidden = (full.obs["cell_type"] == "type_0") & (full.obs["condition"] == "treat_1")
    return full, full[~hidden.to_numpy()].copy(), full[hidden.to_numpy()].copy()


@pytest.fixture(scope="session")
def trained(simulated):
    """A model trained with the default length on the simulation, labels registered."""
    scvi.settings.seed = 0
    return train_small(simulated[1], {"labels_key": "cell_type"}, train={"max_epochs": None})


@pytest.fixture(scope="session")
def kang_data(tmp_path_factory):
    if "DISCOVER_SC_DATA" not in os.environ:
        pytest.skip("DISCOVER_SC_DATA does not name a folder with example_sce.rda")
    return kang(tmp_path_factory.mktemp("kang"))
