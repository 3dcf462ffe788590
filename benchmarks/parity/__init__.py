"""Other libraries' losses beside ours: the same batch, each library's code or formula, loss and gradient compared.

    make parity

``table.yaml`` names the losses, ``libraries/`` has a file for each library, ``numbers.json`` keeps what was computed
and ``docs/reference/parity.md`` is the page made of them.
"""
