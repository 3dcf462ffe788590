"""Labels for sampled completions: rules, reward models and judges, in the formats of ``halos fit``."""
