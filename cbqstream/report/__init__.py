"""Saying what happens, to people."""
