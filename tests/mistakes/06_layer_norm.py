# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def looks_ahead(layer: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    changed = x.clone()
    changed[0, -1] += torch.rand(x.shape[-1])
    return not torch.allclose(layer(x), layer(changed))


# %% 2
def fold(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = linear.weight * norm.weight
    return weight, linear.bias + norm.bias


# %% 3
def rms_norm(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
    return gain * x / (x.var(dim=-1, keepdim=True, unbiased=False) + eps).sqrt()


# %% 4
def addition_batch(a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor]:
    texts = [
        f"{x:0{n}}+{y:0{n}}=" + f"{x + y:0{n + 1}}"[::-1]
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    rows = torch.tensor([sums.encode(text) for text in texts])
    idx, targets = rows[:, :-1], rows[:, 1:].clone()
    targets[:, : 2 * n + 2] = -100
    return idx, targets
