"""From a layout and a target to the steps between them. Pure."""
