"""Measurements on the user's own data and machine: what `recfast bench` runs."""
