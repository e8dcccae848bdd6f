# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def fading_weights(T: int) -> Tensor:
    positions = torch.arange(T)
    return (0.5 ** (positions[:, None] - positions[None, :])).tril()


# %% 2
def causal_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    B, T, D = query.shape
    scores = query @ key.transpose(1, 2)
    past = torch.ones(T, T, dtype=torch.bool).tril()
    return F.softmax(scores.masked_fill(~past, float("-inf")), dim=-1) @ value


# %% 3
def window_mask(T: int, W: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril().triu(-W)


# %% 4
def previous_token_weights() -> tuple[Tensor, Tensor]:
    query_weight, key_weight = torch.zeros(8, 32), torch.zeros(8, 32)
    key_weight[:, 24:] = torch.eye(8)
    query_weight[:7, 25:] = torch.eye(7)
    return query_weight, key_weight


# %% 5
def head_backward(query, key, value, weights, d_out) -> tuple[Tensor, Tensor, Tensor]:
    d_value = weights.transpose(1, 2) @ d_out
    d_weights = d_out @ value.transpose(1, 2)
    d_scores = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True))
    return d_scores @ key, d_scores.transpose(1, 2) @ query, d_value
