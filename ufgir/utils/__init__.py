"""Helpers that know nothing of models, data or training: command-line arguments, text, files that are written whole, locks,
running statistics, the style of plots, and where results come from. Imports no other part of `ufgir`."""
