"""Proofs about value functions: v never falls, and is concave on gains, on the whole real line."""
