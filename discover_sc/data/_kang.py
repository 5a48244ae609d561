"""The Kang 2018 interferon data, as muscat ships them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pooch
import rdata
import scipy.sparse as sp

_FILE = "example_sce.rda"
_SHA256 = "f66811fa513a01a91dae01bad308e96ed5238277246b911d8e1cd5f4425c3ed9"
_COMMIT = "017b290b414212c357e184d17edcca27f4302ace"
_URL = f"https://raw.githubusercontent.com/HelenaLC/muscat/{_COMMIT}/data/{_FILE}"
_CACHED = "kang_muscat_v1.h5ad"


def kang(cache_dir: str | os.PathLike | None = None) -> ad.AnnData:
    """Blood cells of two donors, untreated or after 6 h of interferon beta.

    The subset of Kang et al. :cite:p:`Kang2018` (GEO GSE96583) that the R package muscat
    :cite:p:`Crowell2020` ships as ``example_sce``: genes with more than one count in more than 50
    cells. The file is looked for in the folder that the environment variable ``DISCOVER_SC_DATA``
    names, then in the cache, and downloaded otherwise; its checksum is verified in each case.

    Parameters
    ----------
    cache_dir
        Folder for the download and the converted file; None: the cache folder of the system.

    Returns
    -------
    1,556 cells x 1,267 genes; ``.X`` raw counts (csr, float32); ``.obs``: ``condition`` (``ctrl``,
    ``stim``), ``cell_type`` (5), ``donor`` (2), ``sample`` (4).

    Raises
    ------
    ConnectionError
        If the file is in neither folder and cannot be downloaded.
    ValueError
        If a file is there but is not the published one.
    """
    cache = Path(cache_dir) if cache_dir is not None else Path(pooch.os_cache("discover-sc"))
    converted = cache / _CACHED
    if converted.exists():
        return ad.read_h5ad(converted)
    adata = _read_sce(_locate(cache))
    cache.mkdir(parents=True, exist_ok=True)
    partial = converted.with_suffix(f".{os.getpid()}.partial")
    adata.write_h5ad(partial, compression="gzip")
    partial.replace(converted)
    return adata


def _locate(cache: Path) -> Path:
    """Return the verified R data file: from the named folder, the cache or the network."""
    folder = os.environ.get("DISCOVER_SC_DATA")
    if folder and (Path(folder) / _FILE).exists():
        path = Path(folder) / _FILE
        if pooch.file_hash(path) != _SHA256:
            raise ValueError(
                f"{path} is not the published file (its sha256 is not {_SHA256}). Replace it, or "
                "unset DISCOVER_SC_DATA to download it."
            )
        return path
    try:
        return Path(pooch.retrieve(_URL, known_hash=f"sha256:{_SHA256}", fname=_FILE, path=cache))
    except OSError as error:  # requests' errors are OSErrors
        raise ConnectionError(
            f"{_FILE} could not be downloaded from the muscat repository ({error}). Connect to the "
            "network, or put the file into a folder and name it in DISCOVER_SC_DATA."
        ) from error


def _read_sce(path: Path) -> ad.AnnData:
    """Convert the SingleCellExperiment: counts, gene names and the annotation of the cells."""
    with warnings.catch_warnings():
        # Bioconductor's classes are read as plain containers, which is all that is needed here
        warnings.filterwarnings("ignore", message="Missing constructor for R class")
        sce = rdata.conversion.convert(rdata.parser.parse_file(path))["example_sce"]
    counts = sce.assays.data.listData["counts"]
    genes, cells = ([str(name) for name in names] for names in counts.Dimnames)
    matrix = sp.csc_matrix((counts.x, counts.i, counts.p), shape=tuple(counts.Dim))
    columns = sce.colData.listData
    sample = pd.Categorical(np.asarray(columns["sample_id"], dtype=str))
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical(np.asarray(columns["group_id"], dtype=str)),
            "cell_type": pd.Categorical(np.asarray(columns["cluster_id"], dtype=str)),
            "donor": pd.Categorical([name[-3:] for name in sample]),  # ctrl101 -> 101
            "sample": sample,
        },
        index=cells,
    )
    return ad.AnnData(matrix.T.tocsr().astype(np.float32), obs, pd.DataFrame(index=genes))
