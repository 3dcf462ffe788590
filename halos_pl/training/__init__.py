"""Training: the step engine, the LightningModule, checkpoints, callbacks and the files of a run."""
