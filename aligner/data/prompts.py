"""Prompts and their order, under the names that programs import."""

from functools import partial

from aligner.data.examples import Prompt
from aligner.data.order import Order

PromptOrder = partial(Order, noun="prompts")

__all__ = ["Prompt", "PromptOrder"]
