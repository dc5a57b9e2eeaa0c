"""Solving problems with a model: grades, rewards, metrics with confidence intervals."""
