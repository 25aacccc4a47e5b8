"""What a format does to a number, a rounding step by step, and what a format's name means: `bitfold explain`."""
