"""Models in torch: calibration data, decoder blocks, and what each layer sees of them."""
