"""Robust aggregation rules as pure functions of a Gram matrix."""
