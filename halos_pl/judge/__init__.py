"""Judges: models that compare or grade answers, their verdicts, and the statistics of these."""
