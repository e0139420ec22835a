"""Images as functions: SIREN, Functa and Spatial Functa."""
