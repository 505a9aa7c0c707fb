"""What the encoder has learned: features, and classifiers on them."""
