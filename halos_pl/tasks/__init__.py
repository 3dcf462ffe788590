"""Benchmarks through EleutherAI's lm-evaluation-harness, on local data or the hub's, with paired statistics."""
