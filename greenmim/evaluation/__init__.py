"""What is measured of a model besides training: held-out loss, features, classifiers on them."""
