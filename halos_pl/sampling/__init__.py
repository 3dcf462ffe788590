"""Sampling into files, by a model in this process or at a server, and conversations in the terminal."""
