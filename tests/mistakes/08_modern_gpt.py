# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def bounded_scores(query: Tensor, key: Tensor) -> Tensor:
    norm = RMSNorm()
    return norm(query) @ norm(key).transpose(-2, -1)


# %% 2
def rotate(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)  # (T, D/2) each
    cos, sin = angles.cos(), angles.sin()  # (T, D/2) each
    return torch.cat((a * cos - b * sin, b * cos - a * sin), dim=-1)


# %% 3
def orthogonalize(G: Tensor) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
    return G / sigma.max()


# %% 4
class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        C = config.n_embd
        hidden = 4 * C
        self.gate_proj = nn.Linear(C, hidden, bias=False)
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
