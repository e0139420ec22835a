"""The studies that prove the libraries: command line, data, training, results."""
