"""From a record to a call: evidence, its combination and calibration, out-of-distribution detection, and their fits."""
