"""The error of a plan that cannot be made."""


class PlanError(ValueError):
    """A run cannot be planned: the model, the card or the layout is unknown or impossible."""
