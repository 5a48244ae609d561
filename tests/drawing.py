"""Small random tensors, the same at every call."""

import torch

N_CELLS = 16
NO_CATEGORIES = torch.zeros(N_CELLS, 0, dtype=torch.long)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def draw_codes(*n_levels):
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randint(n, (N_CELLS,), generator=generator) for n in n_levels]
    return torch.stack(columns, dim=1)
