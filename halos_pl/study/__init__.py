"""Ablation studies: a plan of runs, held-out metrics by example, statistics, and a report."""
