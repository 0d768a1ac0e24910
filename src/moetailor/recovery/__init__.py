"""Training a compressed checkpoint for a short while, so that it gets back what compression took."""
