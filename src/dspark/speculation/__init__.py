"""Floor 4: the law. Verify, calibrate, price, plan; no device, no process, no engine."""
