"""Online training: rounds of sampling, labelling and fitting, with a report over rounds."""
