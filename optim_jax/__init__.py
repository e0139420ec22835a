"""Optimisation that finds structure while it trains."""
