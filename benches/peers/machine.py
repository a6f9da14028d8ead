"""What this machine can do at best, as PyTorch finds it."""

import time

import torch
import torch.nn.functional as F

from workload import layer_values, matrices

ROWS = 512


def best(run, repeat=5):
    """The seconds of the quickest of some runs, after one that does not count."""
    run()
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


@torch.inference_mode()
def matmul_flops(config, dtype, most_layers=8):
    """Operations a second in the products of 512 rows with the matrices of some layers."""
    layers = min(config["num_hidden_layers"], most_layers)
    weights = [torch.randn(shape).to(dtype) for _ in range(layers) for shape in matrices(config)]
    x = {inner: torch.randn(ROWS, inner).to(dtype) for inner in {w.shape[1] for w in weights}}
    seconds = best(lambda: [F.linear(x[w.shape[1]], w) for w in weights])
    return 2 * ROWS * layer_values(config) * layers / config["num_hidden_layers"] / seconds


@torch.inference_mode()
def bandwidth(size=3 << 29):
    """Bytes a second, reading 1.5 GB, which no cache holds."""
    x = torch.ones(size // 4).reshape(-1, 4096)
    v = torch.ones(4096)
    low, high = x.view(-1).chunk(2)
    return size / min(best(x.sum), best(lambda: x @ v), best(lambda: torch.dot(low, high)))
