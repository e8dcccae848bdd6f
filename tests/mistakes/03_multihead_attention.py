# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    output = attention.heads[h](x)
    D = output.shape[-1]
    return output @ attention.out_proj.weight[h * D : (h + 1) * D]


# %% 2
def split_heads(x: Tensor, H: int) -> Tensor:
    B, T, C = x.shape
    return x.view(B, H, T, C // H)


def merge_heads(x: Tensor) -> Tensor:
    B, H, T, D = x.shape
    return x.reshape(B, T, H * D)


# %% 3
def ov_circuit(model: Model, h: int, x: Tensor) -> Tensor:
    _, _, value, output = matrices(model, h)
    return model.lm_head(x @ value.T @ output.T + model.attention.out_proj.bias)


# %% 4
def qk_circuit(model: Model, h: int, t: int, s: int) -> Tensor:
    query, key, _, _ = matrices(model, h)
    token, position = model.token_embedding.weight, model.position_embedding.weight
    return (token + position[t]) @ query.T @ key @ (token + position[s]).T


# %% 5
def without_head(model: Model, h: int) -> Model:
    ablated = deepcopy(model)
    with torch.no_grad():
        ablated.attention.out_proj.weight[h * D : (h + 1) * D] = 0
    return ablated
