"""What a run will take: parameters, memory by part, tokens and FLOP per step. No weights are read."""
