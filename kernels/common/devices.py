"""What to say where JAX finds no device to compute on."""

import os
import traceback


class NoDeviceError(RuntimeError):
  """JAX cannot use the platform that was asked for.

  Attributes:
    mistake: whether this installation of JAX lacks it, rather than the machine a device that works.
  """

  def __init__(self, message: str, mistake: bool):
    super().__init__(message)
    self.mistake = mistake


def lacking(error: BaseException) -> NoDeviceError | None:
  """The same as one line, if JAX raised `error` as it looked for devices; None if it is of another kind.

  JAX has no class for it: where a platform is not installed even an AssertionError comes.
  """
  frames = traceback.extract_tb(error.__traceback__)
  if not isinstance(error, RuntimeError | AssertionError) or not frames:
    return None
  if os.path.basename(frames[-1].filename) != "xla_bridge.py":
    return None
  said = " ".join(str(error).split("(set JAX_PLATFORMS")[0].split())
  if not said or "known backends" in said:
    lacks = f"JAX_PLATFORMS: this installation of jax has no platform {os.environ.get('JAX_PLATFORMS', '')!r}"
    return NoDeviceError(f"{lacks}; install it (README, Start) or leave the variable unset", mistake=True)
  return NoDeviceError(f"no device to compute on: {said}", mistake=False)
