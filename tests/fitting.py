"""Small models for tests."""

from discover_sc import DISCoVeR

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def train_small(adata, setup=None, model=None, train=None):
    """Set up and train a model for a few epochs, on a copy."""
    adata = adata.copy()
    DISCoVeR.setup_anndata(adata, **({"condition_key": "condition"} | (setup or {})))
    fitted = DISCoVeR(adata, **(model or {}))
    fitted.train(**({"max_epochs": 2} | QUIET | (train or {})))
    return fitted
