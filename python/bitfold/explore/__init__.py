"""The page on which one sees what a format does to numbers (`bitfold explore`)."""
