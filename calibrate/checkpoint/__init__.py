"""What calibration reads and writes: samples, schemes, weights, the calibrated checkpoint. numpy only."""
