"""Preference data: from rows of text or messages to token ids.

prepare   a data set in any of TRL's preference formats to prompt_ids, chosen_ids, rejected_ids
"""

from .prepare import prepare

__all__ = ["prepare"]
