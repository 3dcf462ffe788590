"""The objective: rewards, reference points, value functions and feedback combined into a loss; no models."""
