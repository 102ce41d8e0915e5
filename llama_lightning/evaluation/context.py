"""Whether a judge's server had room for all of a prompt: what it says, and what its count tells.

It knows no API. Some servers refuse a prompt that is too long, others cut it in silence.
"""

import re

_TOO_LONG = re.compile(r"context[ _](?:length|size|window)|maximum context|too long", re.IGNORECASE)


def says_too_long(message: str) -> bool:
    """Find the words of a refusal for want of context: vLLM's, llama.cpp's, OpenAI's, Ollama's."""
    return _TOO_LONG.search(message) is not None


def looks_cut(read: int | None, words: int, context: int | None = None, written: int = 0) -> bool:
    """Find signs that not all was read: fewer tokens than words, or a context that is full.

    No token spans two words. Some engines take only half of the context for the prompt.

    Args:
        read: tokens of the prompt, as the server counts; None if it does not.
        words: of the prompt.
        context: tokens that the model was given room for, if that is known.
        written: tokens of the reply.
    """
    if read is None:
        return False
    if read < words or context is None:
        return read < words
    half = context // 2
    return read + written >= context - 1 or half <= read <= half + 2
