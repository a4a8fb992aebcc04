"""Methods, encoders and the parts they share."""
