"""Fast recommenders."""
