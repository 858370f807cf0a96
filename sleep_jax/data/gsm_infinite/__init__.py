"""GSM-Infinite: word problems among noise, with an exact number of operations. See README.md."""

from sleep_jax.data.gsm_infinite.config import GsmInfiniteConfig
from sleep_jax.data.gsm_infinite.problems import Problem, problem
from sleep_jax.data.gsm_infinite.solver import count_operations, solve

__all__ = ["GsmInfiniteConfig", "Problem", "count_operations", "problem", "solve"]
