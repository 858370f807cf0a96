"""Configs: each opens with its command, its cost and the number to expect."""
