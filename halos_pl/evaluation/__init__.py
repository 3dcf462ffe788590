"""Evaluation: held-out rows, sampled answers, rules and judges, for any model."""
