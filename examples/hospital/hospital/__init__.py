"""A Flower app for a federation that runs; its data stand in for those of a hospital."""
