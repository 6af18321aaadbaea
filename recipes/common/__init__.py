"""Helpers that every recipe shares; they know nothing of any task."""
