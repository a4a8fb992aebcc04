"""Raw bytes to a batch on the device to a trained encoder; README.md beside this file draws the flow."""
