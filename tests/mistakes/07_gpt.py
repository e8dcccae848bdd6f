# Typical wrong answers to the exercises, by number: each must be caught. Those marked "right" must
# pass.
# %% 1
def trapezoid(step: int, config: Config) -> float:
    rising = step / max(1, config.warmup_iters)
    falling = (config.max_iters - step) / (0.2 * config.max_iters)
    return config.learning_rate * min(rising, 1.0, falling)


# %% 2
def accumulate(model: nn.Module, idx: Tensor, targets: Tensor, count: int) -> float:
    model.zero_grad()
    total = 0.0
    for rows, answers in zip(idx.tensor_split(count), targets.tensor_split(count), strict=True):
        loss = model(rows, answers)[1] / count
        loss.backward()
        total += loss.item()
    return total


# %% 2
def accumulate(model: nn.Module, idx: Tensor, targets: Tensor, count: int) -> float:
    total = 0.0
    for rows, answers in zip(idx.tensor_split(count), targets.tensor_split(count), strict=True):
        model.zero_grad()
        loss = len(rows) / len(idx) * model(rows, answers)[1]
        loss.backward()
        total += loss.item()
    return total


# %% 2
def accumulate(model: nn.Module, idx: Tensor, targets: Tensor, count: int) -> float:
    model.zero_grad()
    total = 0.0
    for rows, answers in zip(idx.tensor_split(count), targets.tensor_split(count), strict=True):
        loss = len(rows) / len(idx) * model(rows, answers)[1]
        loss.backward(inputs=[model.lm_head.weight])
        total += loss.item()
    return total


# %% 2
def accumulate(model: nn.Module, idx: Tensor, targets: Tensor, count: int) -> float:
    model.zero_grad()
    total = 0.0
    for rows, answers in zip(idx.tensor_split(count), targets.tensor_split(count), strict=True):
        loss = len(rows) / len(idx) * model(rows, answers)[1]
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.blocks.parameters(), 0.1)
    return total


# %% 2 right
def accumulate(model: nn.Module, idx: Tensor, targets: Tensor, count: int) -> float:
    model.zero_grad()
    total = 0.0
    for rows, answers in zip(idx.tensor_split(count), targets.tensor_split(count), strict=True):
        loss = model(rows, answers)[1] * rows.numel()
        loss.backward()
        total += loss.detach()
    for parameter in model.parameters():
        parameter.grad /= idx.numel()
    return total / idx.numel()


# %% 3
class GPT(Layers):
    def initialize(self, matrices: list[Tensor]) -> None:
        for matrix in matrices:
            nn.init.normal_(matrix, std=0.02)

    def attention(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        x = self.qkv_proj(x).view(B, T, 3, self.H, C // self.H)
        query, key, value = x.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * C**-0.5
        scores = scores.masked_fill(torch.ones(T, T).tril() == 0, float("-inf"))
        weights = F.softmax(scores, dim=-1)
        weights = F.dropout(weights, 0.2, self.training)
        return self.out_proj((weights @ value).transpose(1, 2).reshape(B, T, C))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.token_embedding(idx) + self.position_embedding.weight[: idx.shape[1]]
        x = x + self.attention(self.attention_norm(x))
        x = x + self.down_proj(F.relu(self.up_proj(self.feed_forward_norm(x))))
        logits = self.lm_head(self.final_norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


fixed = GPT


# %% 4
def fit_power_law(sizes: list[int], losses: list[float]) -> tuple[float, float, float]:
    N, loss = torch.tensor(sizes).double(), torch.tensor(losses).double()
    X = torch.stack((torch.ones_like(N), N.log()), dim=1)
    log_b, slope = torch.linalg.lstsq(X, loss.log()[:, None]).solution.flatten().tolist()
    return 0.0, math.exp(log_b), -slope


# %% 4
def fit_power_law(sizes: list[int], losses: list[float]) -> tuple[float, float, float]:
    N, loss, errors = torch.tensor(sizes).double(), torch.tensor(losses).double(), []
    for c in torch.linspace(0.01, 1.5, 1000).tolist():
        X = torch.stack((torch.ones_like(N), N**-c), dim=1)
        a, b = torch.linalg.lstsq(X, loss[:, None]).solution.flatten().tolist()
        errors.append(((a + b * N**-c - loss).square().sum().item(), c))
    return a, b, min(errors)[1]  # a and b belong to the last c


# %% 4
def fit_power_law(sizes: list[int], losses: list[float]) -> tuple[float, float, float]:
    N, loss, laws = torch.tensor(sizes).double(), torch.tensor(losses).double(), []
    for c in torch.linspace(0.01, 1.5, 1000).tolist():
        X = torch.stack((N**-c, torch.ones_like(N)), dim=1)
        a, b = torch.linalg.lstsq(X, loss[:, None]).solution.flatten().tolist()
        laws.append(((a * N**-c + b - loss).square().sum().item(), a, b, c))
    return min(laws)[1:]


# %% 4
def fit_power_law(sizes: list[int], losses: list[float]) -> tuple[float, float, float]:
    N, loss, laws = torch.tensor(sizes).double(), torch.tensor(losses).double(), []
    for c in torch.linspace(0.01, 1.5, 1000).tolist():
        X = torch.stack((torch.ones_like(N), N**-c), dim=1)
        a, b = torch.linalg.lstsq(X, loss[:, None]).solution.flatten().tolist()
        laws.append(((a + b * N**-c - loss).sum().item(), a, b, c))  # not squared
    return min(laws)[1:]


# %% 4 right
def fit_power_law(sizes: list[int], losses: list[float]) -> tuple[float, float, float]:
    N, loss, best = torch.tensor(sizes), torch.tensor(losses), None  # in float32
    for c in torch.linspace(0.01, 1.5, 1000).tolist():
        X = torch.stack((torch.ones(len(N)), N**-c), dim=1)
        solution = torch.linalg.lstsq(X, loss[:, None]).solution
        error = (X @ solution - loss[:, None]).square().mean()
        if best is None or error < best[0]:
            best = error, solution, c
    return best[1][0].item(), best[1][1].item(), best[2]


# %% 5
def fine_tune(model: nn.Module, tokens: Tensor, count: int, learning_rate: float) -> list[float]:
    fresh = Model(play_config)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(count):
        idx, targets = draw_batch(tokens, model.block_size, 16, generator)
        _, loss = fresh(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
