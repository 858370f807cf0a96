"""Where a run lives: its folder, checkpoints, rows, progress, processes and signals. Knows no model."""
