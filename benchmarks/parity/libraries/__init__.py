"""One file for each library; its functions take the batch and constants, and return the loss.

A file defines ``LIBRARY`` and its functions; the table finds both by the file's name. A library that is installed is
called (``package`` and ``version`` say which one); of another one, the formula is written out from its code.
"""
