# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def with_head(model: Model, found: Recording, i: int, h: int, z: Tensor) -> Tensor:
    name, projection = f"blocks.{i}.attention", model.blocks[i].attention.out_proj
    own = slice(h * z.shape[-1], (h + 1) * z.shape[-1])
    # the old output of the head is still in it
    return found[f"{name}.out_proj"] + z @ projection.weight[:, own].T


# %% 1
def with_head(model: Model, found: Recording, i: int, h: int, z: Tensor) -> Tensor:
    name, projection = f"blocks.{i}.attention", model.blocks[i].attention.out_proj
    own = slice(h * z.shape[-1], (h + 1) * z.shape[-1])
    change = z - found[f"{name}.heads"][..., own]
    return found[f"{name}.out_proj"] + change @ projection.weight[own]  # rows, not columns


# %% 1
def with_head(model: Model, found: Recording, i: int, h: int, z: Tensor) -> Tensor:
    name, projection = f"blocks.{i}.attention", model.blocks[i].attention.out_proj
    heads = found[f"{name}.heads"].clone()
    heads[..., h * z.shape[-1] : (h + 1) * z.shape[-1]] = z
    return heads @ projection.weight.T  # without the bias


# %% 1 right
def with_head(model: Model, found: Recording, i: int, h: int, z: Tensor) -> Tensor:
    name, projection = f"blocks.{i}.attention", model.blocks[i].attention.out_proj
    heads = found[f"{name}.heads"].clone()
    heads[..., h * z.shape[-1] : (h + 1) * z.shape[-1]] = z
    return projection(heads)


# %% 2
def effect(model: Model, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return model.final_norm(u) @ w  # divided by the standard deviation of u


# %% 2
def effect(model: Model, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
    norm = model.final_norm
    deviation = (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return (norm.weight * u / deviation) @ w  # without the mean of u


# %% 2
def effect(model: Model, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
    norm = model.final_norm
    deviation = (x.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()
    u = norm.weight * (u - u.mean(dim=-1, keepdim=True)) / deviation
    return (u + norm.bias) @ w  # the bias in every effect


# %% 2 right
def effect(model: Model, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
    norm = model.final_norm
    scale = norm.weight * w
    return (u @ scale - u.mean(-1) * scale.sum()) * (x.var(-1, correction=0) + norm.eps).rsqrt()


# %% 3
def lens(model: Model, x: Tensor) -> Tensor:
    return F.softmax(model.lm_head(x), dim=-1)  # without the norm


# %% 3
def lens(model: Model, x: Tensor) -> Tensor:
    return model.lm_head(model.final_norm(x))  # logits


# %% 4
def patch(model: Model, name: str, where: slice) -> Tensor:
    output = clean_run[name].clone()  # the other way round
    output[:, where] = corrupted_run[name][:, where]
    with replace(model, {name: output}):
        return model(clean)[0]


# %% 4
def patch(model: Model, name: str, where: slice) -> Tensor:
    corrupted_run[name][:, where] = clean_run[name][:, where]  # changes the recording
    with replace(model, {name: corrupted_run[name]}):
        return model(corrupted)[0]


# %% 4
def patch(model: Model, name: str, where: slice) -> Tensor:
    output = corrupted_run[name].clone()
    output[where] = clean_run[name][where]  # texts, not positions
    with replace(model, {name: output}):
        return model(corrupted)[0]


# %% 4 right
def patch(model: Model, name: str, where: slice) -> Tensor:
    mask = torch.zeros(corrupted.shape[1], 1, dtype=torch.bool)
    mask[where] = True
    with replace(model, {name: torch.where(mask, clean_run[name], corrupted_run[name])}):
        return model(corrupted)[0]


# %% 5
def induction_score(weights: Tensor, period: int) -> Tensor:
    return weights.diagonal(-period, -2, -1).mean(dim=(0, 2))  # the same letter


# %% 5
def induction_score(weights: Tensor, period: int) -> Tensor:
    return weights.diagonal(1 - period, -2, -1).mean(dim=(0, 2))  # one position too many


# %% 5
def induction_score(weights: Tensor, period: int) -> Tensor:
    return weights.diagonal(period - 1, -2, -1)[..., 1:].mean(dim=(0, 2))  # the future


# %% 6
def swapped(run: Recording, other: Recording, i: int, h: int) -> Tensor:
    return other[f"blocks.{i}.attention.heads"][..., h * 24 : (h + 1) * 24]  # at all positions


# %% 6
def swapped(run: Recording, other: Recording, i: int, h: int) -> Tensor:
    own, name = slice(h * 24, (h + 1) * 24), f"blocks.{i}.attention.heads"
    run[name][:, -1, own] = other[name][:, -1, own]  # changes the recording
    return run[name][..., own]


# %% 6
def swapped(run: Recording, other: Recording, i: int, h: int) -> Tensor:
    name = f"blocks.{i}.attention.heads"
    z = run[name].clone()
    z[:, -1] = other[name][:, -1]
    return z  # of all heads


# %% 6 right
def swapped(run: Recording, other: Recording, i: int, h: int) -> Tensor:
    before, after = (
        each[f"blocks.{i}.attention.heads"].unflatten(-1, (-1, 24))[..., h, :]
        for each in (run, other)
    )
    return torch.cat((before[:, :-1], after[:, -1:]), dim=1)
