"""How many bytes of text each token stands for.

A loss per token depends on the tokenizer, a loss per byte of UTF-8 text does not.
"""

from collections.abc import Container, Sequence

import numpy as np


def token_bytes(
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    special: Container[int],
) -> np.ndarray:
    """The bytes of UTF-8 text of each token, int32 [n].

    A character counts at the first token that holds some of it, and what a tokenizer
    leaves out between two tokens at the second, so that the sum is that of the text.

    Args:
      text: what was encoded.
      ids: its tokens.
      offsets: the characters of each token, [start, end).
      special: ids that stand for no text, and so for 0 bytes.
    """
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.array([end for _, end in offsets], np.int64)
    reached = before[np.maximum.accumulate(ends)]
    found = np.diff(reached, prepend=0).astype(np.int32)
    found[[i for i, token in enumerate(ids) if token in special]] = 0
    return found
