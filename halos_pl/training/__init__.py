"""Training: the step engine, the LightningModule, checkpoints, callbacks and what they leave in a run's folder."""
