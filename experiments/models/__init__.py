"""The networks that the studies train, beyond those of the libraries."""
