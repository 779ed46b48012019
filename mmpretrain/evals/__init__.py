"""What a trained model is measured by."""
