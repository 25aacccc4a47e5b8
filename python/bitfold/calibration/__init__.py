"""What quantizing with calibration data needs to know of models and files."""
