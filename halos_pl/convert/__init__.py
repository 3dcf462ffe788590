"""Configs of other libraries as configs of ``halos fit``; each library is a file that is found by itself."""
