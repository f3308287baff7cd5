"""More prompts from the calibration set."""
