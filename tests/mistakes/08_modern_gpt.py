# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def bounded_scores(query: Tensor, key: Tensor) -> Tensor:
    norm = RMSNorm()
    return norm(query) @ norm(key).transpose(-2, -1)


# %% 2
def turn(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos + b * sin, b * cos + a * sin), dim=-1)


# %% 3
def key_for(query: Tensor, distance: int) -> Tensor:
    return Rotary(len(query))(query[None], -distance)[0]


# %% 4
def orthogonalised(G: Tensor) -> Tensor:
    return G / torch.linalg.svdvals(G)[0]


# %% 5
def saved(config: Config) -> int:
    T, C, L = config.block_size, config.n_embd, config.n_layer
    return T * C + L * (C + 4 * C + C) + (2 * L + 1) * 2 * C
