"""Image and text encoders, and the model that joins them."""
