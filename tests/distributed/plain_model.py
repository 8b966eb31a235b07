"""A small model without transformers, as torchtitan's: it can leave its lm_head out, or compute a
loss inside its forward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, LENGTH, PAIRS, STEPS = 53, 16, 7, 4, 3
BETA = 0.5


class Model(nn.Module):
    def __init__(self, seed: int = 0, bias: bool = False):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=bias)
        with torch.no_grad():
            self.lm_head.weight.mul_(4.0)
        self._skip_lm_head = False

    def forward(self, ids: Tensor, loss=None):  # [S, T]
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x.cumsum(1)))  # each position sees those before it
        x = self.norm(x)
        if loss is not None:
            return loss(self.lm_head, x)
        return x if self._skip_lm_head else self.lm_head(x)


def batch(step: int, pairs: int = PAIRS) -> dict[str, Tensor]:
    """ids and shifted labels [2B, T], reference log-probabilities [2B]: chosen, then rejected."""
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(VOCAB, (2 * pairs, LENGTH), generator=g)
    start = torch.randint(1, LENGTH - 1, (2 * pairs, 1), generator=g)
    labels = torch.where(torch.arange(LENGTH) >= start, ids, -100)
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    return {"ids": ids, "labels": labels, "ref": torch.randn(2 * pairs, generator=g) - 20.0}


def pairs_of(whole: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    half = len(whole["ids"]) // 2
    mine = torch.arange(first, last)
    rows = torch.cat([mine, mine + half])
    return {name: value[rows] for name, value in whole.items()}


def eager_logps(logits: Tensor, labels: Tensor) -> Tensor:  # [S, T, V], [S, T] -> [S, T]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(labels == -100, 0.0, logps)


def eager_loss(logits: Tensor, given: dict[str, Tensor]) -> Tensor:
    logps = eager_logps(logits, given["labels"]).sum(-1)
    chosen, rejected = (logps - given["ref"]).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole, and by the names that they have without wrappers."""
    found = {}
    for name, value in model.named_parameters():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        for prefix in ("_orig_mod.", "_fsdp_wrapped_module."):
            name = name.replace(prefix, "")
        found[name.removeprefix("module.")] = value.detach().clone()
    return found


def expected(make=Model, loss_of=None) -> tuple[list[float], dict[str, Tensor]]:
    """By one process, with logits."""
    model = make()
    optimizer, losses = sgd(model), []
    for step in range(STEPS):
        given = batch(step)
        loss = (loss_of or eager_loss)(model(given["ids"]), given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert max(losses) - min(losses) > 1e-3  # something was learned
    return losses, weights(model)


def mean(losses: list[Tensor]) -> list[float]:
    """Over the processes."""
    total = torch.stack([loss.detach() for loss in losses])
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


Result = tuple[list[float], dict[str, Tensor]]


def assert_right(results: list[Result], expected: Result) -> None:
    """Every loss and every weight within 2e-5, on every process."""
    losses, values = expected
    for got_losses, got in results:
        torch.testing.assert_close(got_losses, losses, atol=2e-5, rtol=0)
        assert got.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(got[name], value, atol=2e-5, rtol=0, msg=name)
