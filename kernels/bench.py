"""Times the implementations of the update rules and their peers: `sleep_jax.kernels.measure.bench`."""

from sleep_jax.kernels.measure.bench import main

if __name__ == "__main__":
  main()
