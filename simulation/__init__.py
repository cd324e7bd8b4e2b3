"""Attackers, data partitions and local runs of a whole federation."""
