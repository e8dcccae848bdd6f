# Typical wrong answers to the exercises, by number: each must be caught.
# %% 1
def trapezoid(step: int, config: Config) -> float:
    up = step / config.warmup_iters
    down = (config.max_iters - step) / (0.2 * config.max_iters)
    return config.learning_rate * min(up, 1.0, down)


# %% 2
def keep_top_k(logits: Tensor, k: int) -> Tensor:
    smallest_kept = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, 0.0)


# %% 3
def cache_numbers(config: Config, B: int, S: int) -> int:
    return 2 * B * S * config.n_embd


# %% 4
def fine_tune(model: nn.Module, tokens: Tensor, steps: int, learning_rate: float) -> list[float]:
    fresh = Model(play_config)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        idx, targets = draw_batch(tokens, model.block_size, 16, generator)
        _, loss = fresh(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
