# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def block_forward(x: Tensor, attention: nn.Module, feed_forward: nn.Module) -> Tensor:
    return x + feed_forward(attention(x))


# %% 2
def gradient_at_input(slopes: Tensor, residual: bool) -> Tensor:
    return 1 + slopes.prod() if residual else slopes.prod()


# %% 3
def shares(written: list[Tensor]) -> Tensor:
    parts = torch.stack(written)
    return parts.flatten(1).norm(dim=1) / parts.sum(dim=0).norm()


# %% 4
class Gated(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.gate = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.part(x)
