# Typical wrong answers to the exercises, by number: each must be caught. Those marked "right" must
# pass.
# %% 1
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    output = attention.heads[h](x)
    D = output.shape[-1]
    return output @ attention.out_proj.weight[h * D : (h + 1) * D]


# %% 1
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    return (attention(x) - attention.out_proj.bias) / H  # adds up, but no head contributes this


# %% 1
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    k = H - 1 - h  # of another head
    return attention.heads[k](x) @ attention.out_proj.weight[:, k * D : (k + 1) * D].T


# %% 1
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    weight = attention.out_proj.weight[:, h * D : (h + 1) * D]
    return F.linear(attention.heads[h](x), weight, attention.out_proj.bias)


# %% 1
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    return attention.heads[h](x) @ attention.out_proj.weight[:, h::H].T


# %% 1
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    return attention.heads[h](x)


# %% 1 right
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    alone = torch.zeros_like(x)  # all heads concatenated, the others as zeros
    alone[..., h * D : (h + 1) * D] = attention.heads[h](x)
    return attention.out_proj(alone) - attention.out_proj.bias


# %% 1 right
@torch.no_grad()
def take_head(attention: HeadList, x: Tensor, h: int) -> Tensor:
    without = deepcopy(attention)
    without.out_proj.weight[:, h * D : (h + 1) * D] = 0
    return attention(x) - without(x)


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
