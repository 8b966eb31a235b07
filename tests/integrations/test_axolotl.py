"""axolotl's plugin: its two calls, on a stand-in of BasePlugin (axolotl 0.18)."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

trl = pytest.importorskip("trl", reason="needs trl")


class BasePlugin:
    def __init__(self): ...

    def register(self, cfg): ...

    def pre_model_load(self, cfg): ...

    def post_trainer_create(self, cfg, trainer): ...


@pytest.fixture
def plugin(monkeypatch):
    """Loaded by its name, as axolotl loads it."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    module, _, cls = "fastdpo.integrations.axolotl.FastDPOPlugin".rpartition(".")
    monkeypatch.delitem(sys.modules, module, raising=False)
    yield getattr(importlib.import_module(module), cls)()
    sys.modules.pop(module, None)


class Rl:
    """As axolotl's enum."""

    def __init__(self, value):
        self.value = value


def cfg(rl="dpo", liger=None):
    return types.SimpleNamespace(rl=rl, dpo_use_liger_kernel=liger)


@pytest.fixture(params=["a TRL that fuses the head", "a TRL with Liger's seam"])
def calls(request, monkeypatch):
    """(which function the plugin is to call, the calls of both)"""
    fused = request.param == "a TRL that fuses the head"
    utils = importlib.import_module("trl.trainer.utils")
    if fused:
        monkeypatch.setattr(utils, "add_fused_lm_head", lambda model: None, raising=False)
    else:
        monkeypatch.delattr(utils, "add_fused_lm_head", raising=False)
    seen = []
    for module, name in (("trl", "use_fastdpo"), ("trl_liger", "use_fastdpo_loss")):
        loaded = importlib.import_module(f"fastdpo.integrations.{module}")
        monkeypatch.setattr(loaded, name, lambda trainer, name=name: seen.append((name, trainer)))
    return "use_fastdpo" if fused else "use_fastdpo_loss", seen


@pytest.mark.parametrize("rl", ["dpo", "ipo", Rl("dpo")], ids=lambda rl: type(rl).__name__)
def test_it_puts_fastdpo_into_the_trainer(plugin, calls, rl):
    expected, seen = calls
    assert isinstance(plugin, BasePlugin)
    plugin.pre_model_load(cfg(rl, liger=True))
    trainer = object()
    plugin.post_trainer_create(cfg(rl, liger=True), trainer)
    assert seen == [(expected, trainer)]


def test_the_seam_is_asked_for_in_time(plugin, calls):
    if calls[0] == "use_fastdpo":
        plugin.pre_model_load(cfg())
        return
    with pytest.raises(ValueError, match="dpo_use_liger_kernel should be true"):
        plugin.pre_model_load(cfg())


def test_other_training_is_refused(plugin):
    with pytest.raises(ValueError, match="rl should be dpo or ipo"):
        plugin.pre_model_load(cfg("kto", liger=True))
