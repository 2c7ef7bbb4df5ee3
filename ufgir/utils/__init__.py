"""Utilities: command-line arguments, text, atomic file writing, locks, running statistics, plot styles, and provenance of results.
Imports no other part of `ufgir`."""
