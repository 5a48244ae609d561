import numpy as np
import torch
from fitting import train_small

from discover_sc import _prediction


def anchored_profile(model, source, n_cells):
    """Anchor of a decoder that gives every gene the same expression."""
    with torch.no_grad():
        for p in model.module.decoder.parameters():
            p.zero_()
    cells = np.arange(n_cells)
    registered = model._validate_anndata(source)
    with torch.inference_mode():
        groups = _prediction._Groups(model, registered).of_source
        anchor = _prediction._Anchor(model, registered, cells, groups, None)
        flat = torch.full((n_cells, source.n_vars), 1e4 / source.n_vars)
        return anchor.apply(flat, cells, 1e4).numpy()


def test_the_anchor_adds_what_the_decoder_misses_shrunk_by_the_number_of_cells(adata):
    adata.obs["cell_type"] = "one"
    model = train_small(adata, {"labels_key": "cell_type"})
    source = adata[adata.obs["condition"] == "ctrl"][:100].copy()
    x = source.X.toarray()
    observed = np.log1p((x / x.sum(1, keepdims=True)).mean(0) * 1e4)
    decoded = np.log1p(1e4 / source.n_vars)
    expected = np.expm1(decoded + 100 / 150 * (observed - decoded)).clip(min=0)
    profile = anchored_profile(model, source, 100)
    np.testing.assert_allclose(profile[0], expected * 1e4 / expected.sum(), rtol=2e-3)
    np.testing.assert_allclose(profile.sum(1), 1e4, rtol=1e-4)


def test_the_anchor_reads_each_group_by_itself(adata):
    model = train_small(adata, {"labels_key": "cell_type"})
    source = adata[adata.obs["condition"] == "ctrl"].copy()
    profile = anchored_profile(model, source, source.n_obs)
    types = source.obs["cell_type"].to_numpy()
    same = types == types[0]
    np.testing.assert_allclose(profile[same], np.tile(profile[0], (same.sum(), 1)), rtol=1e-5)
    assert not np.allclose(profile[~same][0], profile[0], rtol=0.05)
