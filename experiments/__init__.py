"""One short absl main per experiment, and the configs they take."""

import os
import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
  # `python -m experiments.NAME` begins: until its command line listens, Ctrl-C ends it without a traceback.
  signal.signal(signal.SIGINT, signal.SIG_DFL)

import sleep_jax

sleep_jax.require("train", "ml_collections")

# XLA logs its banners about slow compilation as errors, so a program shows fatal ones only; what stops it is
# raised as well. The variable is read when jaxlib is imported; a value that is there already counts.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
