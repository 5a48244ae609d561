"""Time an epoch of DISCoVeR beside one of scvi-tools' SCVI, alternating in one process.

    python tests/benchmarks/throughput.py [--likelihood zinb] [--batch-size 1024] [--epochs 2]
    python tests/benchmarks/throughput.py --profile      where the time of a step goes
    python tests/benchmarks/throughput.py --memory       peak memory and seconds for --n-cells cells
    python tests/benchmarks/throughput.py --inference    latents and expression of --n-cells cells

Both models: same likelihood, genes, layers, minibatches, threads; the default training
of each. Epochs are those of whole calls of --epochs of them, so that what a call does once is
shared between them. Ratios are taken pairwise, so that what else runs on the machine hits both.
Seconds are wall time; "CPU" is the process's time on all threads, which other processes disturb
less.
"""

import argparse
import logging
import tempfile
import time

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from measuring import EpochTimes, in_own_process, peak_megabytes
from scvi import REGISTRY_KEYS

from discover_sc import DISCoVeR
from discover_sc._keys import INFLATION_KEY, LIBRARY_KEY, OUTPUTS_KEY, THETA_KEY
from discover_sc._likelihoods import reconstruction_losses

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def counts(n_cells, n_genes, density=0.08, n_conditions=2, seed=0):
    """Overdispersed counts with a share of non-zero entries, in blocks of cells."""
    rng = np.random.default_rng(seed)
    frequency = rng.gamma(0.06, 1.0, n_genes) + 1e-4
    depth = _depth(frequency, density, n_genes)
    blocks = []
    for start in range(0, n_cells, 1000):
        n = min(1000, n_cells - start)
        mean = depth * rng.lognormal(0.0, 0.4, (n, 1)) * rng.gamma(2.0, 0.5, (n, n_genes))
        blocks.append(sp.csr_matrix(rng.poisson(mean * frequency).astype(np.float32)))
    adata = ad.AnnData(sp.vstack(blocks).tocsr())
    levels = np.array([f"c{k}" for k in range(n_conditions)])
    adata.obs["condition"] = pd.Categorical(levels[np.arange(n_cells) % n_conditions])
    return adata


def _depth(frequency, density, n_genes):
    """Return the factor at which that share of genes is expected to be seen in a cell."""
    low, high = 1e-3, 1e6
    for _ in range(60):
        depth = np.sqrt(low * high)
        # a gamma of shape 2 and mean 1 mixed over the Poisson zero
        seen = 1 - np.mean((1 + 0.5 * depth * frequency) ** -2.0)
        low, high = (depth, high) if seen < density else (low, depth)
    return depth


def build_scvi(adata, likelihood):
    adata = adata.copy()
    scvi.model.SCVI.setup_anndata(adata, batch_key="condition")
    return scvi.model.SCVI(adata, gene_likelihood=likelihood, n_hidden=128, n_layers=1)


def build_own(adata, likelihood):
    adata = adata.copy()
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    return DISCoVeR(adata, gene_likelihood=likelihood)


def train(model, options, **arguments):
    """Train on all cells."""
    workers = {"datasplitter_kwargs": {"num_workers": options.workers}} if options.workers else {}
    model.train(train_size=1.0, batch_size=options.batch_size, **arguments, **workers, **QUIET)


def epoch(model, options):
    """Return wall and CPU seconds of an epoch, in a call of several."""
    wall, cpu = time.perf_counter(), time.process_time()
    train(model, options, max_epochs=options.epochs)
    seconds = (time.perf_counter() - wall, time.process_time() - cpu)
    return tuple(s / options.epochs for s in seconds)


def compare(first, second, repetitions):
    """Call both in turn; return a table of wall and CPU seconds and of their ratios."""
    rows = []
    first(), second()  # warm up
    for _ in range(repetitions):
        (wall, cpu), (own_wall, own_cpu) = first(), second()
        rows.append(
            {
                "SCVI, s": wall,
                "DISCoVeR, s": own_wall,
                "ratio": own_wall / wall,
                "CPU ratio": own_cpu / cpu,
            }
        )
    return pd.DataFrame(rows).describe().loc[["50%", "min", "max"]].rename({"50%": "median"})


def throughput(options):
    adata = counts(options.n_cells, options.n_genes)
    theirs, own = build_scvi(adata, options.likelihood), build_own(adata, options.likelihood)
    return compare(
        lambda: epoch(theirs, options),
        lambda: epoch(own, options),
        options.repetitions,
    )


def inference(options):
    adata = counts(options.n_cells, options.n_genes)
    theirs, own = build_scvi(adata, options.likelihood), build_own(adata, options.likelihood)
    for model in (theirs, own):
        model.train(max_epochs=1, train_size=min(1.0, 2_000 / options.n_cells), **QUIET)

    def seconds(model, method, **arguments):
        wall, cpu = time.perf_counter(), time.process_time()
        getattr(model, method)(**arguments)
        return time.perf_counter() - wall, time.process_time() - cpu

    def beside(method, **arguments):
        return compare(
            lambda: seconds(theirs, method, **arguments),
            lambda: seconds(own, method, **arguments),
            options.repetitions,
        )

    tables = {
        "latents": beside("get_latent_representation"),
        "expression": beside("get_normalized_expression", return_numpy=True),
    }
    return pd.concat(tables)


# ------------------------------------------------------------------------------- profile


def milliseconds(function, repetitions=30):
    """Return the median wall and CPU milliseconds of a call."""
    function()
    times = []
    for _ in range(repetitions):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return 1e3 * np.median(times, axis=0)


def profile(options):
    """Time each stage of a step alone, forward and backward, on one minibatch.

    Two tables: of stages, and of ratios.
    """
    adata = counts(min(options.n_cells, 20_000), options.n_genes)
    model = build_own(adata, options.likelihood)
    train(model, options, max_epochs=1)  # warm up
    steps, wholes, products = _steps_and_products(model, options)
    plan, module = model._training_plan_cls(model.module), model.module.train()
    loader = model._make_data_loader(
        model.adata, batch_size=options.batch_size, shuffle=True, load_sparse_tensor=True
    )
    batch = next(iter(loader))
    (optimizer, adversary_optimizer), _ = plan.configure_optimizers()
    inference_outputs, outputs, losses = module(batch)
    read = module.representation(batch, inference_outputs, outputs).detach().requires_grad_()
    parts = {
        "encoders": lambda: _encoders(module, batch),
        "decoders": _decoders(module, batch, inference_outputs),
        "likelihood": _likelihood(module, batch, inference_outputs, outputs),
        "adversary": lambda: _adversary(module, adversary_optimizer, read, batch),
        "optimiser": lambda: optimizer.step(),
    }
    _sum_backward(losses.loss)  # gradients for the optimiser
    table = {name: milliseconds(part) for name, part in parts.items()}
    whole, step = np.median(wholes, axis=0), np.median(steps, axis=0)
    table["divergences, averaging, records, cold caches"] = step - np.sum([*table.values()], axis=0)
    table["step"] = step
    table |= {"data": _loading(loader)}
    table |= {"trainer": whole - step - table["data"], "step, data and trainer": whole}
    table["matrix products of the step"] = np.median(products, axis=0)
    table = pd.DataFrame(table, index=["wall, ms", "CPU, ms"]).T
    table["of all"] = table["CPU, ms"] / whole[1]
    ratios = {"step": _ratio(steps, products), "step, data and trainer": _ratio(wholes, products)}
    return table, pd.DataFrame(ratios, index=["median", "least", "most"]).T.add_suffix(
        " / products"
    )


def _ratio(times, products):
    """Return median, least and most of the ratios of wall times."""
    ratios = np.array(times)[:, 0] / np.array(products)[:, 0]
    return np.median(ratios), ratios.min(), ratios.max()


def _steps_and_products(model, options):
    """Return wall and CPU milliseconds of a step, alone and with data and trainer, per epoch.

    And of its matrix products, in turn, so that what else runs on the machine hits all.
    """
    products, steps, wholes, run = [], [], [], _matrix_products(model.module, options)
    n_steps = -(-model.adata.n_obs // options.batch_size)
    for _ in range(options.repetitions):
        times = EpochTimes()
        train(model, options, max_epochs=1, callbacks=[times])
        steps.append(1e3 * times.step_seconds[0] / n_steps)
        wholes.append(1e3 * times.seconds[0] / n_steps)
        products.append(milliseconds(run, repetitions=100))
    return steps, wholes, products


def _sum_backward(*tensors):
    sum(tensor.sum() for tensor in tensors).backward()


def _encoders(module, batch):
    outputs = module.inference(**module._get_inference_input(batch))
    _sum_backward(outputs["z"], outputs["w"])


def _loading(loader):
    wall, cpu = time.perf_counter(), time.process_time()
    n_minibatches = sum(1 for _ in loader)
    seconds = (time.perf_counter() - wall, time.process_time() - cpu)
    return 1e3 * np.array(seconds) / n_minibatches


def _decoders(module, batch, inference_outputs):
    inputs = module._get_generative_input(batch, inference_outputs)
    inputs = {k: v.detach().requires_grad_() if k in ("z", "w") else v for k, v in inputs.items()}

    def run():
        generative = module.generative(**inputs, likelihoods=False)
        outputs = _decoded(generative)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    return run


def _likelihood(module, batch, inference_outputs, outputs):
    x, library = batch[REGISTRY_KEYS.X_KEY], inference_outputs[LIBRARY_KEY]
    theta, *decoded = (
        tensor.detach().requires_grad_() for tensor in (outputs[THETA_KEY], *_decoded(outputs))
    )
    arguments = (x, module.gene_likelihood, decoded[:2], library, theta, *decoded[2:])
    return lambda: _sum_backward(reconstruction_losses(*arguments))


def _decoded(outputs):
    """Return both decoders' outputs, and the logits of zero inflation if there are any."""
    inflation = outputs[INFLATION_KEY]
    return [*outputs[OUTPUTS_KEY], *([] if inflation is None else [inflation])]


def _adversary(module, optimizer, read, batch):
    adversarial_loss, cross_entropy, _ = module.game(read, batch)
    _sum_backward(adversarial_loss, cross_entropy)
    optimizer.step()


def _matrix_products(module, options):
    """Return a function with the products of all linear layers of a step, both ways, dense.

    Forward, backward to the weights, and backward to the inputs but for layers that read the
    cells; the adversary's backward to the inputs is of the other player's loss.
    """
    shapes = [
        (torch.rand(options.batch_size, m.in_features), torch.rand(m.weight.shape))
        for m in module.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    shapes = [(x, weight, torch.rand(len(x), len(weight))) for x, weight in shapes]

    def run():
        for x, weight, grad in shapes:
            _ = x @ weight.T
            _ = grad.T @ x
            if x.shape[1] < options.n_genes:
                _ = grad @ weight

    return run


# -------------------------------------------------------------------------------- memory


def memory(options):
    """Return peak memory beyond the data, and beyond the output of a counterfactual, and times."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/counts.h5ad"
        in_own_process(_write_counts, path, options)
        found = {
            f.__name__.lstrip("_"): in_own_process(f, path, options) for f in (_train, _predict)
        }
        return pd.DataFrame(found, index=["peak, MB", "seconds"])


def _write_counts(path, options):
    counts(options.n_cells, options.n_genes).write_h5ad(path)


def _read_and_build(path, options):
    torch.set_num_threads(options.threads)
    adata = ad.read_h5ad(path)
    DISCoVeR.setup_anndata(adata, condition_key="condition")
    return adata, DISCoVeR(adata, gene_likelihood=options.likelihood)


def _train(path, options):
    _, model = _read_and_build(path, options)
    peak, start = [], time.perf_counter()
    with peak_megabytes(peak):
        train(model, options, max_epochs=1)
    return peak[0], time.perf_counter() - start


def _predict(path, options):
    """Every cell under the other condition, those that are under it already among them."""
    adata, model = _read_and_build(path, options)
    model.train(max_epochs=1, train_size=min(1.0, 5_000 / adata.n_obs), **QUIET)
    peak, start = [], time.perf_counter()
    with peak_megabytes(peak):
        predicted = model.predict_counterfactual(adata, to="c1", n_samples=options.n_samples)
    seconds, dense = time.perf_counter() - start, [predicted.X, *predicted.layers.values()]
    return peak[0] - sum(_megabytes(array) for array in dense), seconds


def _megabytes(array):
    parts = (array.data, array.indices, array.indptr) if sp.issparse(array) else (array,)
    return sum(part.nbytes for part in parts) / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in ("profile", "inference", "memory"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--likelihood", choices=["nb", "zinb", "poisson"], default="nb")
    parser.add_argument("--n-cells", type=int, default=20_000)
    parser.add_argument("--n-genes", type=int, default=2_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a call")
    parser.add_argument("--workers", type=int, default=0, help="processes that read minibatches")
    parser.add_argument("--n-samples", type=int, default=25, help="draws per cell, --memory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in ("lightning", "lightning.pytorch", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    chosen = [f for f in (profile, inference, memory) if getattr(arguments, f.__name__)]
    for function in chosen or [throughput]:
        found = function(arguments)
        for table in found if isinstance(found, tuple) else [found]:
            print(table.round(3).to_string(), flush=True)
