"""One short absl main per experiment, and the configs they take."""
