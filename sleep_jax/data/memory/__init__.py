"""Tests of memory that people know, made anew: each sequence a pure function of (seed, index).

Needles in a haystack, associative recall (MQAR), overwriting, variable tracking, common and frequent words,
and bAbI's questions 1 to 5 among filler (BABILong's form). `sequences` makes token sequences for small
models, `prompts` the same tests as text for any tokenizer.
"""

from sleep_jax.data.memory.config import TESTS, MemoryConfig
from sleep_jax.data.memory.sequences import answer_of, batch, check_window, layout, set_names, story

__all__ = ["TESTS", "MemoryConfig", "answer_of", "batch", "check_window", "layout", "set_names", "story"]
