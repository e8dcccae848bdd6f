# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    mean, deviation = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
    return weight * (x - mean) / (deviation + eps) + bias


# %% 2
def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    sigma = (x.var(dim=-1, keepdim=True, unbiased=False) + eps).sqrt()
    x_hat = (x - x.mean(dim=-1, keepdim=True)) / sigma
    g = grad_y * weight
    grad_x = (g - g.mean(dim=-1, keepdim=True)) / sigma
    return grad_x, (grad_y * x_hat).sum(dim=(0, 1)), grad_y.sum(dim=(0, 1))


# %% 3
def fold(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = linear.weight * norm.weight
    return weight, linear.bias + norm.bias


# %% 4
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return weight * x / (x.var(dim=-1, keepdim=True, unbiased=False) + eps).sqrt()


# %% 5
def held_out(a: Tensor, b: Tensor) -> Tensor:
    return chance[a, b] < 0.1


# %% 6
def addition_batch(a: Tensor, b: Tensor, reverse: bool = True) -> tuple[Tensor, Tensor]:
    rows = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        result = f"{x + y:03}"
        text = f"{x:02}+{y:02}=" + (result[::-1] if reverse else result)
        rows.append(digits.encode(text))
    tokens = torch.tensor(rows)
    idx, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[:, :6] = -100
    return idx, targets
