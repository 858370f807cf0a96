"""The same training step lowers for a GPU and a TPU, although only a CPU is here."""

import functools

import jax
import pytest

from sleep_jax import train, windows
from sleep_jax.experiments import rule110
from sleep_jax.experiments.configs import rule110 as configs


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_training_step_lowers(platform):
  values = configs.get_config("fig2b")
  values.sleep.num_passes = 2
  values.model.dtype = "bfloat16"
  cfg, task = rule110.build(values.to_dict())
  _, tx, one_step = train.optimization(cfg)
  dispatch = train.make_dispatch(cfg, task, one_step, windows.plan(task.layout, cfg.model.window))
  state = jax.eval_shape(functools.partial(train.init_state, cfg, tx))
  lowered = dispatch.trace(state).lower(lowering_platforms=(platform,)).as_text()
  assert "stablehlo.while" in lowered  # windows, passes and steps are loops of the device
  assert "callback" not in lowered  # data, too, is made there: nothing goes back to the host
