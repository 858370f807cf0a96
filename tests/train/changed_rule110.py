"""The experiment with something changed in it, for the tests of training.

`--changed="poison STEP"`: steps from that one on give NaN. `--changed="stop_in_evaluation NUMBER"`: SIGTERM
comes in the middle of that evaluation. Nothing: the experiment as it is.
"""

import os
import signal

import jax
import jax.numpy as jnp
from absl import flags

from sleep_jax.experiments import rule110
from sleep_jax.scoring import by_position
from sleep_jax.train import device_steps

CHANGED = flags.DEFINE_string("changed", "", "what, and when")


def main() -> int:
  if CHANGED.value:
    what, when = CHANGED.value.split()
    {"poison": poison, "stop_in_evaluation": stop_in_evaluation}[what](int(when))
  return rule110.main()


def poison(step: int) -> None:
  """The program is that of a run that is not poisoned."""
  call = device_steps.DeviceSteps.__call__

  def poisoned(self, state):
    state, measured, loads = call(self, state)
    bad = jnp.arange(int(state.step) - len(loads), int(state.step)) >= step
    if bad.any():
      measured = {name: jnp.where(bad, jnp.nan, x) for name, x in measured.items()}
      state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
    return state, measured, loads

  device_steps.DeviceSteps.__call__ = poisoned


def stop_in_evaluation(number: int) -> None:
  make, seen = by_position.make_evaluate, []

  def make_evaluate(*args):
    test = make(*args)

    def stopped(weights):
      seen.append(1)
      if len(seen) == number:
        os.kill(os.getpid(), signal.SIGTERM)
      return test(weights)

    return stopped

  by_position.make_evaluate = make_evaluate
