"""Starts experiments in several processes, on this machine or on others."""
