"""One file a study: its presets, its straight-line run, its figures and table."""
