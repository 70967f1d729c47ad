"""How the commands explain themselves."""
