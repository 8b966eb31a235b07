"""axolotl: a plugin for its DPO.

    plugins:
      - fastdpo.integrations.axolotl.FastDPOPlugin

axolotl imports this module when its configuration names it; elsewhere the plugin has no base.
"""

from __future__ import annotations

from typing import Any

from ..core import checks

try:
    from axolotl.integrations.base import BasePlugin
except ImportError:
    BasePlugin = object

__all__ = ["FastDPOPlugin"]


class FastDPOPlugin(BasePlugin):
    """DPO and IPO (`rl: dpo`, `rl: ipo`) with fastdpo's loss.

    With the TRL that axolotl 0.18 pins (1.8.0) by `fastdpo.integrations.trl_liger.
    use_fastdpo_loss`, for which the configuration has `dpo_use_liger_kernel: true`; with TRL 1.16
    and later by `fastdpo.integrations.trl.use_fastdpo`.
    """

    def pre_model_load(self, cfg: Any) -> None:
        """Refuses a configuration in time, before a model is loaded.

        Raises:
            ValueError: rl is neither dpo nor ipo, or dpo_use_liger_kernel is missing.
        """
        rl = getattr(cfg.rl, "value", cfg.rl)
        if rl not in ("dpo", "ipo"):
            checks.fail("rl", "dpo or ipo with FastDPOPlugin", repr(rl))
        if not _fuses_the_head() and not cfg.dpo_use_liger_kernel:
            should = "true with FastDPOPlugin: this TRL computes logits otherwise"
            checks.fail("dpo_use_liger_kernel", should, repr(cfg.dpo_use_liger_kernel))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """
        Raises:
            ValueError: the trainer is one that fastdpo does not support; see the two functions.
        """
        if _fuses_the_head():
            from .trl import use_fastdpo

            use_fastdpo(trainer)
        else:
            from .trl_liger import use_fastdpo_loss

            use_fastdpo_loss(trainer)


def _fuses_the_head() -> bool:
    import trl.trainer.utils

    return hasattr(trl.trainer.utils, "add_fused_lm_head")
