"""The model side: loading, reference models, log-probs. It never imports a loss."""
