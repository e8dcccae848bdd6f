# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def silence(hidden: Tensor) -> tuple[float, float]:
    is_zero = hidden == 0
    return is_zero.float().mean().item(), is_zero.any(dim=0).float().mean().item()


# %% 2
def by_convolution(x: Tensor, feed_forward: FeedForward) -> Tensor:
    up_proj, down_proj = feed_forward.up_proj, feed_forward.down_proj
    B, T, C = x.shape
    x = F.relu(F.conv1d(x.view(B, C, T), up_proj.weight[:, :, None], up_proj.bias))
    return F.conv1d(x, down_proj.weight[:, :, None], down_proj.bias).view(B, T, C)


# %% 3
def collapse(up_proj: nn.Linear, down_proj: nn.Linear) -> tuple[Tensor, Tensor]:
    return down_proj.weight @ up_proj.weight, up_proj.bias[: len(down_proj.bias)] + down_proj.bias


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
