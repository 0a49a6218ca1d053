"""An example plugin for an imaginary device."""
