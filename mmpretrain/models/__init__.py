"""Image encoders, text encoders, and the model that combines them."""
