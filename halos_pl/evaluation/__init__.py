"""Evaluation of any model: held-out rows, sampled answers, rules and judges."""
