"""The objective: rewards, reference points, value functions and feedback, put together as a loss. No model in it."""
