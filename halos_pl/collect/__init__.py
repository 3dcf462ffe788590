"""``halos collect``: a web page on which people chat with a model and judge its answers."""
