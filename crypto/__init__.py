"""Sealing, measuring, combining and opening updates: numbers and bytes in, numbers and bytes out."""
