import os
import shutil
from pathlib import Path

import numpy as np
import pooch
import pytest
import scipy.sparse as sp

from discover_sc.data import kang

FILE = "example_sce.rda"
SHA256 = "f66811fa513a01a91dae01bad308e96ed5238277246b911d8e1cd5f4425c3ed9"


@pytest.fixture(scope="module")
def published_folder():
    folder = os.environ.get("DISCOVER_SC_DATA")
    if folder is None or not (Path(folder) / FILE).exists():
        pytest.skip(f"DISCOVER_SC_DATA does not name a folder with {FILE}")
    return Path(folder)


@pytest.fixture(scope="module")
def converted(published_folder, tmp_path_factory):
    """The data as first converted, and the cache folder they were converted into."""
    cache = tmp_path_factory.mktemp("kang")
    return kang(cache), cache


def refuse_network(*_, **__):
    raise OSError("no route to host")


def test_kang_has_the_published_shape_and_annotation(converted):
    adata, _ = converted
    assert adata.shape == (1556, 1267)
    assert adata.obs.nunique().to_dict() == {
        "condition": 2,
        "cell_type": 5,
        "donor": 2,
        "sample": 4,
    }
    assert list(adata.obs["condition"].cat.categories) == ["ctrl", "stim"]
    together = adata.obs["condition"].astype(str) + adata.obs["donor"].astype(str)
    assert (adata.obs["sample"].astype(str) == together).all()


def test_kang_holds_raw_counts_with_gene_names(converted):
    adata, _ = converted
    assert sp.isspmatrix_csr(adata.X)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X.data, np.round(adata.X.data))
    assert adata.X.data.min() >= 1
    assert {"ISG15", "CD74"} <= set(adata.var_names)
    assert (adata.X.getnnz(axis=0) >= 50).all()  # every gene is seen in at least 50 cells


def test_interferon_raises_isg15_in_every_cell_type(converted):
    adata, _ = converted
    fraction = adata[:, "ISG15"].X.toarray().ravel() / np.asarray(adata.X.sum(axis=1)).ravel()
    obs = adata.obs.assign(fraction=fraction)
    means = obs.groupby(["cell_type", "condition"], observed=True)["fraction"].mean().unstack()
    assert len(means) == 5
    assert (means["stim"] > 4 * means["ctrl"]).all()


def test_second_read_comes_from_the_cache_and_is_identical(converted, monkeypatch):
    adata, cache = converted
    monkeypatch.delenv("DISCOVER_SC_DATA")
    monkeypatch.setattr(pooch, "retrieve", refuse_network)
    again = kang(cache)
    assert (again.X != adata.X).nnz == 0
    assert sp.isspmatrix_csr(again.X)
    assert again.X.dtype == adata.X.dtype
    assert again.obs.equals(adata.obs)
    assert again.var_names.equals(adata.var_names)
    assert [path.suffix for path in cache.iterdir()] == [".h5ad"]  # no partial file is left


def test_download_is_checked_and_gives_the_same_cells(
    converted, published_folder, tmp_path, monkeypatch
):
    asked = {}

    def retrieve(url, known_hash, fname, path):
        asked.update(url=url, known_hash=known_hash)
        path.mkdir(parents=True, exist_ok=True)
        return shutil.copy(published_folder / FILE, path / fname)

    monkeypatch.delenv("DISCOVER_SC_DATA")
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    adata = kang(tmp_path / "new")
    assert asked["known_hash"] == f"sha256:{SHA256}"
    assert asked["url"].endswith(f"/data/{FILE}")
    assert (adata.X != converted[0].X).nnz == 0


def test_a_file_with_another_checksum_is_refused(tmp_path, monkeypatch):
    (tmp_path / FILE).write_bytes(b"not the published file")
    monkeypatch.setenv("DISCOVER_SC_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="is not the published file.*Replace it, or unset"):
        kang(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("folder_is_named", [False, True], ids=["no folder", "folder without file"])
def test_without_file_and_network_the_message_says_what_to_do(
    folder_is_named, tmp_path, monkeypatch
):
    monkeypatch.delenv("DISCOVER_SC_DATA", raising=False)
    if folder_is_named:
        monkeypatch.setenv("DISCOVER_SC_DATA", str(tmp_path))
    monkeypatch.setattr(pooch, "retrieve", refuse_network)
    with pytest.raises(
        ConnectionError,
        match="no route to host.*Connect to the network, or put the file.*DISCOVER_SC_DATA",
    ):
        kang(tmp_path / "cache")


def test_the_default_cache_is_that_of_the_system(tmp_path, monkeypatch):
    asked = []
    monkeypatch.delenv("DISCOVER_SC_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda name: asked.append(name) or tmp_path / name)
    monkeypatch.setattr(pooch, "retrieve", refuse_network)
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        kang()
    assert asked == ["discover-sc"]
