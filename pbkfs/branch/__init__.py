"""Trunks and branches: what exists, on which port, until when, and how it comes and goes."""
