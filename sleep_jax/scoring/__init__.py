"""How good the answers are: exact match by position and by group; what sleep changed."""
