"""Five optimizer steps on the same global batches: by one process with eager logits, which is what
is right, and by several, however their model is wrapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from fastdpo.integrations import hf

VOCAB, STEPS, PAIRS, LENGTH = 56, 5, 4, 9
BETA, RATE = 0.5, 0.1
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}


def tiny(seed: int = 0, family: str = "Llama", **options: Any) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**CONFIG, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


def pair() -> tuple[Any, Any]:
    """A policy and its reference."""
    return tiny(0), tiny(1).eval()


def batch(step: int, pairs: int = PAIRS) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(3, VOCAB, (2 * pairs, LENGTH), generator=g)
    lengths = torch.randint(5, LENGTH + 1, (2 * pairs, 1), generator=g)
    mask = (torch.arange(LENGTH) < lengths).long()
    labels = torch.where((mask == 1) & (torch.arange(LENGTH) >= 3), ids, -100)
    return {"input_ids": ids * mask, "labels": labels, "attention_mask": mask}


def share(whole: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """Its pairs of the batch."""
    half = len(whole["input_ids"]) // 2
    mine = torch.arange(half)[rank * half // world : (rank + 1) * half // world]
    rows = torch.cat([mine, mine + half])
    return {name: value[rows] for name, value in whole.items()}


def eager_logps(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    labels = given["labels"][:, 1:]
    logps = logits[:, :-1].float().log_softmax(-1)
    picked = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (picked * (labels != -100)).sum(-1)


def eager_loss(model: nn.Module, given: dict[str, Tensor], ref: Any) -> Tensor:
    with torch.no_grad():
        reference = eager_logps(ref, given)
    chosen, rejected = (eager_logps(model, given) - reference).chunk(2)
    return -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def our_loss(model: nn.Module, given: dict[str, Tensor], ref: Any) -> Tensor:
    return hf.dpo_loss(model, given, ref, beta=BETA).loss


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    # Adam would turn the roundings of vanishing gradients into whole steps.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)


Loss = Callable[[Any, dict[str, Tensor], Any], Tensor]


def train(model: Any, ref: Any, loss_of: Loss = our_loss, *, shared: bool = True) -> list[float]:
    """The mean loss over the processes of every step, each with its pairs."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    optimizer, losses = sgd(model), []
    for step in range(STEPS):
        loss = loss_of(model, share(batch(step), rank, world), ref)
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return mean(losses) if shared else [float(loss) for loss in losses]


def mean(losses: list[Tensor]) -> list[float]:
    total = torch.stack([loss.detach() for loss in losses])
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole, and by the names that they have without wrappers."""
    found = {}
    for name, value in model.named_parameters():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        for prefix in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
            name = name.replace(prefix, "")
        found[name.removeprefix("module.")] = value.detach().clone()
    return found


Result = tuple[list[float], dict[str, Tensor]]


def one_process(
    make: Callable[[], tuple[Any, Any]] = pair,
    loss_of: Loss = eager_loss,
    prepare: Callable[[Any], Any] | None = None,
) -> Result:
    model, ref = make()
    if prepare is not None:
        prepare(model)
    return train(model, ref, loss_of, shared=False), weights(model)


def assert_right(results: list[Result], expected: Result) -> None:
    """Every loss and every weight within 2e-5, on every process."""
    losses, values = expected
    assert max(losses) - min(losses) > 1e-3  # something was learned
    for got_losses, got in results:
        for step, (a, b) in enumerate(zip(got_losses, losses, strict=True)):
            assert abs(a - b) <= 2e-5, f"loss of step {step}: {a} and not {b}"
        assert got.keys() == values.keys()
        for name, value in values.items():
            worst = float((got[name] - value).abs().max())
            assert worst <= 2e-5, f"{name} is off by {worst:.2g}"


@contextlib.contextmanager
def nothing():
    yield
