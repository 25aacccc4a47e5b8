"""Outlier features: what they are in a model, what 8 bits lose to them, and recipes that keep layers for them."""
