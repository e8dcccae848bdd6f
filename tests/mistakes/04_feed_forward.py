# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def silence(hidden: Tensor) -> tuple[float, float]:
    is_zero = hidden == 0
    return is_zero.float().mean().item(), is_zero.any(dim=0).float().mean().item()


# %% 2
def by_convolution(x: Tensor, feed_forward: FeedForward) -> Tensor:
    widen, narrow = feed_forward.widen, feed_forward.narrow
    B, T, C = x.shape
    x = F.relu(F.conv1d(x.view(B, C, T), widen.weight[:, :, None], widen.bias))
    return F.conv1d(x, narrow.weight[:, :, None], narrow.bias).view(B, T, C)


# %% 3
def collapse(widen: nn.Linear, narrow: nn.Linear) -> tuple[Tensor, Tensor]:
    return narrow.weight @ widen.weight, widen.bias[: len(narrow.bias)] + narrow.bias


# %% 4
def gelu(x: Tensor) -> Tensor:
    inner = 2 / torch.pi * (x + 0.044715 * x**3)
    return x / 2 * (1 + torch.tanh(inner))


# %% 5
class SwiGLU(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = 4 * config.n_embd
        self.gate = nn.Linear(config.n_embd, width, bias=False)
        self.up = nn.Linear(config.n_embd, width, bias=False)
        self.down = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
