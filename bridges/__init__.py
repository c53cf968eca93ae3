"""Set up below as the package grows."""
