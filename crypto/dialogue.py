"""Driving a dialogue to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quorsum.crypto.suite import Ask, Blocks, Dialogue, Site, T

__all__ = ["run_dialogue"]


def run_dialogue(dialogue: Dialogue[T], exchange: Callable[[Ask], Mapping[Site, Blocks]]) -> T:
    """Run ``dialogue``, letting ``exchange`` carry each question out and the answers back.

    Args:
        dialogue: what ``measure`` or ``combine`` of a coordinator returned; it is used up.
        exchange: sends an :class:`Ask` and returns what came back; sites that stay silent are left out.

    Returns:
        what the dialogue returns.

    Raises:
        RoundFailed: too few consistent answers came back.
        Exception: whatever ``exchange`` raises; the dialogue is closed first.
    """
    try:
        ask = next(dialogue)
        while True:
            ask = dialogue.send(exchange(ask))
    except StopIteration as finished:
        result: T = finished.value
        return result
    finally:
        dialogue.close()
