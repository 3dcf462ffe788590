"""Models: loading, reference models, log-probs and sampling. Never imports a loss."""
