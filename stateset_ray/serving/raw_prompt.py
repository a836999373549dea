"""Prompts that are no conversation: text or token ids that a reply goes on with."""

from __future__ import annotations

from typing import Any

from stateset_ray.policies.renderer import Renderer

__all__ = ["raw_prompt"]


def raw_prompt(
    renderer: Renderer, tokenizer: Any, prompt: str | tuple[int, ...], vocabulary: int
) -> tuple[int, ...]:
    """The ids of a prompt; () if it holds none, or one that the model does not have.

    In text, control tokens stay words, as in what users say. Who sends ids says exactly what it means: they
    are taken as they are.
    """
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(renderer.plain(prompt)))
    return prompt if all(0 <= token < vocabulary for token in prompt) else ()
