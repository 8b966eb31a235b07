"""A process that fails: it says why, the others end within the group's timeout, and nothing of the
model is left replaced.
"""

from __future__ import annotations

import datetime
import time

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch.nn.parallel import DistributedDataParallel
from training import batch, our_loss, pair, tiny

from fastdpo.integrations import hf

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on CPUs")


def failing():
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    model, ref = pair()
    net = DistributedDataParallel(model, process_group=group)
    our_loss(net, batch(0), ref).backward()
    given, start = batch(1), time.monotonic()
    if dist.get_rank() == 1:
        given["labels"] = torch.where(given["labels"] > 0, 10_000, -100)
    try:
        our_loss(net, given, ref).backward()
    except (ValueError, RuntimeError) as error:
        message = str(error)
    else:
        message = ""
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    return message, time.monotonic() - start


def test_a_process_with_bad_labels(tmp_path):
    pool = Processes(2, str(tmp_path / "store"))
    try:
        (waited, seconds), (refused, _) = pool.run(failing)
        assert "labels should be in [0, 56)" in refused
        assert "timeout" in waited.lower() or "timed out" in waited.lower()
        assert seconds < 30
    finally:
        pool.close()


def test_labels_are_refused_before_the_model_runs():
    model, ref = pair()
    given = batch(0)
    our_loss(model, given, ref)
    given["labels"] = torch.where(given["labels"] > 0, 10_000, -100)
    for lm in (model, ref):
        lm.model.register_forward_pre_hook(lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=r"labels should be in \[0, 56\)"):
        our_loss(model, given, ref)


def test_a_failing_head_leaves_the_model_as_it_was():
    model = tiny(0)
    given = batch(0)
    arguments = given["input_ids"], given["labels"], given["attention_mask"]
    expected = hf.sequence_logps(model, *arguments)
    seen = []
    handles = [
        model.lm_head.register_forward_hook(lambda *_: seen.append("kept")),
        model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0),
    ]
    before = list(model.lm_head._forward_hooks)
    with pytest.raises(ZeroDivisionError):
        hf.sequence_logps(model, *arguments)
    assert list(model.lm_head._forward_hooks) == before
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    for handle in handles:
        handle.remove()
    assert hf.sequence_logps(model, *arguments).equal(expected)
