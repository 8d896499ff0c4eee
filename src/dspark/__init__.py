"""dspark: train, calibrate, plan and serve DSpark speculative decoding, losslessly."""
