# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def bounded_scores(query: Tensor, key: Tensor) -> Tensor:
    norm = RMSNorm()
    return norm(query) @ norm(key).transpose(-2, -1)


# %% 2
def rotate(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*angles.shape, 2))
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(pairs).flatten(1)


# %% 3
def key_for(query: Tensor, distance: int) -> Tensor:
    return RoPE(len(query))(query[None], -distance)[0]


# %% 4
def orthogonalised(G: Tensor) -> Tensor:
    return G / torch.linalg.svdvals(G)[0]


# %% 5
def saved(config: Config) -> int:
    T, C, L = config.block_size, config.n_embd, config.n_layer
    return T * C + L * (C + 4 * C + C) + (2 * L + 1) * 2 * C
