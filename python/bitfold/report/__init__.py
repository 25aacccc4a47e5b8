"""What quantizing did to a model: measured, drawn, and put on one page (`bitfold report`)."""
