"""Observers for those who count, measure and log elsewhere: each module needs an extra of its own, or none."""
